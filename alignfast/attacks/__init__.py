"""One attack loop, components that combine freely, and the field's attacks as presets over them."""

from alignfast.attacks.engine import Attack
from alignfast.attacks.estimators import Estimator, Plain, VarianceTuning
from alignfast.attacks.objectives import CrossEntropy, Objective
from alignfast.attacks.presets import (
    BIM,
    DIFGSM,
    FGSM,
    MIFGSM,
    NIFGSM,
    PGD,
    PRESETS,
    SINIFGSM,
    TIFGSM,
    VMIFGSM,
    VNIFGSM,
    create,
)
from alignfast.attacks.shaping import Shaping, Smoothing
from alignfast.attacks.steps import L2Step, SignStep, StepRule
from alignfast.attacks.transforms import InputDiversity, Neighbors, Scales, Transform

__all__ = [
    "BIM",
    "DIFGSM",
    "FGSM",
    "MIFGSM",
    "NIFGSM",
    "PGD",
    "PRESETS",
    "SINIFGSM",
    "TIFGSM",
    "VMIFGSM",
    "VNIFGSM",
    "Attack",
    "CrossEntropy",
    "Estimator",
    "InputDiversity",
    "L2Step",
    "Neighbors",
    "Objective",
    "Plain",
    "Scales",
    "Shaping",
    "SignStep",
    "Smoothing",
    "StepRule",
    "Transform",
    "VarianceTuning",
    "create",
]
