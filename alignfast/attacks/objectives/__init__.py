"""Objectives: what an attack drives up, per image."""

from alignfast.attacks.objectives import base, features, logits
from alignfast.attacks.objectives.base import *
from alignfast.attacks.objectives.features import *
from alignfast.attacks.objectives.logits import *

__all__ = [*base.__all__, *features.__all__, *logits.__all__]
