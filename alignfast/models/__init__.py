"""Classifiers that map images in [0, 1] to logits: a user's module, timm, torchvision, checkpoints, ensembles."""

from alignfast.models.checkpoint import fingerprint, load_checkpoint, save_checkpoint
from alignfast.models.classifier import Classifier, as_classifier, evaluating, fit_size, in_range, keeping_modes
from alignfast.models.ensemble import Ensemble
from alignfast.models.folding import fold_batch_norm, folded
from alignfast.models.loading import load_model
from alignfast.models.preparation import prepare

__all__ = [
    "Classifier",
    "Ensemble",
    "as_classifier",
    "evaluating",
    "fingerprint",
    "fit_size",
    "fold_batch_norm",
    "folded",
    "in_range",
    "keeping_modes",
    "load_checkpoint",
    "load_model",
    "prepare",
    "save_checkpoint",
]
