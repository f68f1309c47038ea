"""Classifiers that map images in [0, 1] to logits: own modules, timm, torchvision, checkpoints, ensembles, defences."""

from alignfast.models.checkpoint import fingerprint, load_checkpoint, save_checkpoint
from alignfast.models.classifier import Classifier, as_classifier, evaluating, fit_size, in_range, keeping_modes
from alignfast.models.defences import (
    DEFENCES,
    BitDepth,
    Defence,
    Defended,
    Jpeg,
    MedianFilter,
    RandomizedSmoothing,
    RandomResizePad,
)
from alignfast.models.ensemble import Ensemble
from alignfast.models.folding import fold_batch_norm, folded
from alignfast.models.loading import load_model
from alignfast.models.preparation import prepare

__all__ = [
    "DEFENCES",
    "BitDepth",
    "Classifier",
    "Defence",
    "Defended",
    "Ensemble",
    "Jpeg",
    "MedianFilter",
    "RandomResizePad",
    "RandomizedSmoothing",
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
