"""Attacks that differ in the gradient that they follow or the step that they take.

Every preset takes eps and alpha in units of [0, 1] images, and the keywords of `Options`.
"""

from __future__ import annotations

from typing import Unpack

from torch import nn

from alignfast.attacks.engine import Attack
from alignfast.attacks.estimators import VarianceTuning
from alignfast.attacks.presets.build import ALPHA, EPS, STEPS, Options, build
from alignfast.attacks.steps import SignStep

__all__ = [
    "BIM",
    "FGSM",
    "MIFGSM",
    "NIFGSM",
    "PGD",
    "VMIFGSM",
    "VNIFGSM",
]


def FGSM(source: nn.Module, eps: float = EPS, **options: Unpack[Options]) -> Attack:
    """One step of size eps (Goodfellow et al., ICLR 2015)."""
    return build(source, eps, eps, 1, **options)


def BIM(
    source: nn.Module, eps: float = EPS, alpha: float = ALPHA, steps: int = STEPS, **options: Unpack[Options]
) -> Attack:
    """FGSM iterated from the image itself (Kurakin et al., ICLR 2017 workshop)."""
    return build(source, eps, alpha, steps, **options)


def PGD(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    random_start: bool = True,
    **options: Unpack[Options],
) -> Attack:
    """BIM from a random point of the ball (Madry et al., ICLR 2018)."""
    return build(source, eps, alpha, steps, random_start=random_start, **options)


def MIFGSM(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    **options: Unpack[Options],
) -> Attack:
    """Momentum (Dong et al., CVPR 2018)."""
    return build(source, eps, alpha, steps, step=SignStep(decay), **options)


def NIFGSM(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    **options: Unpack[Options],
) -> Attack:
    """Nesterov momentum (Lin et al., ICLR 2020)."""
    return build(source, eps, alpha, steps, step=SignStep(decay, nesterov=True), **options)


def VMIFGSM(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    N: int = 5,
    beta: float = 1.5,
    **options: Unpack[Options],
) -> Attack:
    """Momentum with variance tuning over N neighbours (Wang and He, CVPR 2021)."""
    return build(source, eps, alpha, steps, estimator=VarianceTuning(N, beta), step=SignStep(decay), **options)


def VNIFGSM(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    N: int = 5,
    beta: float = 1.5,
    **options: Unpack[Options],
) -> Attack:
    """Nesterov momentum with variance tuning over N neighbours (Wang and He, CVPR 2021)."""
    step = SignStep(decay, nesterov=True)
    return build(source, eps, alpha, steps, estimator=VarianceTuning(N, beta), step=step, **options)
