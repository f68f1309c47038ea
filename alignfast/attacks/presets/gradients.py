"""Attacks that differ in the gradient that they follow or the step that they take.

Every preset takes eps and alpha in units of [0, 1] images, and the keywords of `Options`.
"""

from __future__ import annotations

from typing import Unpack

from torch import nn

from alignfast.attacks.engine import Attack
from alignfast.attacks.estimators import (
    EnhancedMomentum,
    Expectation,
    GradientRelevance,
    PenalizedNorm,
    Plain,
    VarianceTuning,
)
from alignfast.attacks.presets.build import ALPHA, EPS, STEPS, Options, build
from alignfast.attacks.steps import CornerStart, DecayingStep, L2Step, SignStep

__all__ = [
    "BIM",
    "EMIFGSM",
    "EOTPGD",
    "FFGSM",
    "FGSM",
    "GRA",
    "MIFGSM",
    "NIFGSM",
    "PGD",
    "PGDL2",
    "PGN",
    "RFGSM",
    "UPGD",
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


def PGN(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    num_neighbor: int = 20,
    beta: float = 3.0,
    gamma: float = 0.5,
    **options: Unpack[Options],
) -> Attack:
    """Momentum toward flat maxima, the gradient's norm penalised by gamma (Ge et al., NeurIPS 2023)."""
    estimator = PenalizedNorm(num_neighbor, beta, gamma)
    return build(source, eps, alpha, steps, estimator=estimator, step=SignStep(decay), **options)


def GRA(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    num_neighbor: int = 20,
    beta: float = 3.5,
    eta: float = 0.94,
    **options: Unpack[Options],
) -> Attack:
    """Neighbours' gradients weighted by relevance, steps that shrink where signs turn (Zhu et al., ICCV 2023)."""
    estimator, step = GradientRelevance(num_neighbor, beta), DecayingStep(decay, eta=eta)
    return build(source, eps, alpha, steps, estimator=estimator, step=step, **options)


def EMIFGSM(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    num_sample: int = 11,
    radius: float = 7.0,
    **options: Unpack[Options],
) -> Attack:
    """Momentum over samples along the last gradient (Wang et al., BMVC 2021)."""
    estimator = EnhancedMomentum(num_sample, radius)
    return build(source, eps, alpha, steps, estimator=estimator, step=SignStep(decay), **options)


def PGDL2(
    source: nn.Module,
    eps: float = 1.0,
    alpha: float = 0.2,
    steps: int = STEPS,
    random_start: bool = True,
    **options: Unpack[Options],
) -> Attack:
    """PGD in the L2 norm, eps and alpha being L2 distances (Madry et al., ICLR 2018)."""
    return build(source, eps, alpha, steps, step=L2Step(), random_start=random_start, **options)


def RFGSM(
    source: nn.Module, eps: float = EPS, alpha: float = ALPHA, steps: int = STEPS, **options: Unpack[Options]
) -> Attack:
    """BIM from alpha times random signs (Tramer et al., ICLR 2018)."""
    return build(source, eps, alpha, steps, step=CornerStart(radius=alpha), random_start=True, **options)


def FFGSM(source: nn.Module, eps: float = EPS, alpha: float = 10 / 255, **options: Unpack[Options]) -> Attack:
    """One step from a random point of the ball (Wong et al., ICLR 2020)."""
    return build(source, eps, alpha, 1, random_start=True, **options)


def EOTPGD(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    eot_iter: int = 2,
    random_start: bool = True,
    **options: Unpack[Options],
) -> Attack:
    """PGD on the mean gradient of eot_iter draws of a model or transform (Zimmermann, arXiv 2019)."""
    return build(source, eps, alpha, steps, estimator=Expectation(eot_iter), random_start=random_start, **options)


def UPGD(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    random_start: bool = False,
    decay: float = 1.0,
    eot_iter: int = 1,
    **options: Unpack[Options],
) -> Attack:
    """PGD with momentum and the mean of eot_iter draws, as torchattacks has it, on cross-entropy."""
    estimator = Expectation(eot_iter) if eot_iter != 1 else Plain()
    step = SignStep(decay)
    return build(source, eps, alpha, steps, estimator=estimator, step=step, random_start=random_start, **options)
