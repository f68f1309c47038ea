"""Model alignment, transferable attacks and their evaluation on unseen image classifiers."""

from alignfast import attacks
from alignfast.alignment import AlignConfig, AlignResult, align
from alignfast.evaluation import TransferMatrix, transfer_matrix
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
    "load_checkpoint",
    "load_model",
    "prepare",
    "save_checkpoint",
    "transfer_matrix",
]
