"""Attacks that differ in how they use several models; their source is an `Ensemble`.

Every preset takes eps and alpha in units of [0, 1] images, and the keywords of `Options`. An attack on the mean of
logits, probabilities or losses is any other preset on an `Ensemble`.
"""

from __future__ import annotations

from typing import Any, Unpack

from torch import nn

from alignfast.attacks.engine import Attack
from alignfast.attacks.estimators import AdaptiveEnsemble, CommonWeakness, ReducedVariance
from alignfast.attacks.objectives.base import refuse_targeted
from alignfast.attacks.presets.build import ALPHA, EPS, STEPS, Options, build
from alignfast.attacks.steps import NormalStart, SignStep

__all__ = ["CWA", "SVRE", "AdaEA"]


def SVRE(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    rounds: int = 4,
    beta: float = 1.0,
    **options: Unpack[Options],
) -> Attack:
    """Momentum with less variance between models, over inner loops of step beta alpha (Xiong et al., CVPR 2022)."""
    estimator = ReducedVariance(rounds, beta, decay)
    return build(source, eps, alpha, steps, estimator=estimator, step=SignStep(decay), **options)


def AdaEA(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    beta: float = 10.0,
    threshold: float = -0.3,
    random_start: bool = True,
    **options: Unpack[Options],
) -> Attack:
    """Momentum with models weighted by how their steps transfer; not targeted (Chen et al., ICCV 2023).

    The start is normal noise of deviation 0.001, as in the authors' code.
    """
    refuse_targeted("AdaEA", options.get("targeted", False))
    parts: dict[str, Any] = {"estimator": AdaptiveEnsemble(beta, threshold), "step": NormalStart(decay)}
    return build(source, eps, alpha, steps, random_start=random_start, **parts, **options)


def CWA(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    r_size: float = 16 / 255 / 15,
    inner_step_size: float = 250.0,
    **options: Unpack[Options],
) -> Attack:
    """Momentum towards weaknesses that the models have in common (Chen et al., ICLR 2024)."""
    estimator = CommonWeakness(r_size, inner_step_size, decay)
    return build(source, eps, alpha, steps, estimator=estimator, step=SignStep(decay), **options)
