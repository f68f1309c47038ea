"""Attacks that differ in the model that they take gradients of.

Every preset takes eps and alpha in units of [0, 1] images, and the keywords of `Options`.
"""

from __future__ import annotations

from typing import Unpack

from torch import nn

from alignfast.attacks.engine import Attack
from alignfast.attacks.presets.build import ALPHA, EPS, STEPS, Options, build
from alignfast.attacks.steps import SignStep
from alignfast.surrogates import SkipGradient, surrogate

__all__ = [
    "SGM",
]


def SGM(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    gamma: float = 0.5,
    **options: Unpack[Options],
) -> Attack:
    """Gradients through residual branches times gamma (Wu et al., ICLR 2020)."""
    return build(surrogate(source, SkipGradient(gamma)), eps, alpha, steps, step=SignStep(decay), **options)
