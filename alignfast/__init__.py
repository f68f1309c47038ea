"""Model alignment, transferable attacks and their evaluation on unseen image classifiers."""

from alignfast import attacks, geometry, surrogates
from alignfast.alignment import AlignConfig, AlignResult, align
from alignfast.evaluation import TransferMatrix, transfer_matrix
from alignfast.memory import keep_memory
from alignfast.models import Classifier, Ensemble, load_checkpoint, load_model, prepare, save_checkpoint
from alignfast.versions import package_versions

__version__ = package_versions()["alignfast"]

__all__ = [
    "AlignConfig",
    "AlignResult",
    "Classifier",
    "Ensemble",
    "TransferMatrix",
    "align",
    "attacks",
    "geometry",
    "keep_memory",
    "load_checkpoint",
    "load_model",
    "prepare",
    "save_checkpoint",
    "surrogates",
    "transfer_matrix",
]
