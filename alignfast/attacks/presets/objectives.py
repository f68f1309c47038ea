"""Attacks that differ in the objective that they drive up.

Every preset takes eps and alpha in units of [0, 1] images, and the keywords of `Options`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, Unpack

from torch import nn

from alignfast.attacks.engine import Attack
from alignfast.attacks.estimators import Expectation, Plain
from alignfast.attacks.objectives import (
    CrossEntropy,
    Divergence,
    FeatureDistance,
    FeatureImportance,
    FeatureProjection,
    Jittered,
    Logit,
    LogitMargin,
    LogitRatio,
    Margin,
    NeuronAttribution,
    PoincareTriplet,
    RandomPatches,
)
from alignfast.attacks.objectives.features import middle_layer, stages
from alignfast.attacks.presets.build import ALPHA, EPS, STEPS, MakesObjective, Options, build
from alignfast.attacks.shaping import Smoothing
from alignfast.attacks.steps import NormalStart, SignStep, SummedStep
from alignfast.attacks.transforms import InputDiversity
from alignfast.checks import check_choice

__all__ = ["CWPGD", "FIA", "ILA", "LOGIT", "NAA", "POTRIP", "RPA", "TAP", "TPGD", "UPGD", "Jitter", "Logit_Margin"]

# Of UPGD; the first three are torchattacks'.
LOSSES: dict[str, MakesObjective] = {
    "ce": CrossEntropy,
    "margin": partial(Margin, kappa=0.0),
    "dlr": LogitRatio,
    "logit": Logit,
    "logit_margin": LogitMargin,
}


def CWPGD(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    kappa: float = 50.0,
    random_start: bool = True,
    **options: Unpack[Options],
) -> Attack:
    """PGD on the margin (Carlini and Wagner, S&P 2017), with the confidence that Madry et al. took (ICLR 2018)."""
    objective = partial(Margin, kappa=kappa)
    return build(source, eps, alpha, steps, objective=objective, random_start=random_start, **options)


def TPGD(
    source: nn.Module, eps: float = EPS, alpha: float = ALPHA, steps: int = STEPS, **options: Unpack[Options]
) -> Attack:
    """PGD away from the clean prediction, from normal noise (Zhang et al., ICML 2019). Labels have no part in it."""
    return build(source, eps, alpha, steps, objective=Divergence, step=NormalStart(), random_start=True, **options)


def UPGD(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    random_start: bool = False,
    loss: Literal["ce", "margin", "dlr", "logit", "logit_margin"] = "ce",
    decay: float = 1.0,
    eot_iter: int = 1,
    **options: Unpack[Options],
) -> Attack:
    """Momentum PGD by the name of its objective, with the mean of eot_iter draws (torchattacks; Kim, 2020)."""
    objective = LOSSES[check_choice("loss", loss, LOSSES)]
    parts: dict[str, Any] = {"estimator": Plain() if eot_iter == 1 else Expectation(eot_iter), "step": SignStep(decay)}
    return build(source, eps, alpha, steps, objective=objective, random_start=random_start, **parts, **options)


def Jitter(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    scale: float = 10.0,
    std: float = 0.1,
    random_start: bool = True,
    **options: Unpack[Options],
) -> Attack:
    """PGD that jitters the scaled prediction (Schwinn et al., 2021)."""
    objective = partial(Jittered, scale=scale, std=std)
    return build(source, eps, alpha, steps, objective=objective, random_start=random_start, **options)


def LOGIT(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = 300,
    decay: float = 1.0,
    resize_rate: float = 1.1,
    diversity_prob: float = 0.7,
    kernel_size: int = 5,
    **options: Unpack[Options],
) -> Attack:
    """TI-DI-MI on the target's logit, gradients not normalised in the momentum (Zhao et al., NeurIPS 2021)."""
    parts = _diverse(resize_rate, diversity_prob, kernel_size)
    return build(source, eps, alpha, steps, objective=Logit, step=SummedStep(decay), **parts, **options)


def Logit_Margin(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = 300,
    decay: float = 1.0,
    resize_rate: float = 1.1,
    diversity_prob: float = 0.7,
    kernel_size: int = 5,
    **options: Unpack[Options],
) -> Attack:
    """TI-DI-MI on logits calibrated by their margin (Weng et al., TIFS 2023)."""
    parts = _diverse(resize_rate, diversity_prob, kernel_size)
    return build(source, eps, alpha, steps, objective=LogitMargin, step=SignStep(decay), **parts, **options)


def POTRIP(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = 300,
    decay: float = 1.0,
    lamb: float = 0.01,
    gamma: float = 0.007,
    resize_rate: float = 1.1,
    diversity_prob: float = 0.7,
    kernel_size: int = 5,
    **options: Unpack[Options],
) -> Attack:
    """TI-DI-MI on the Poincare distance and a triplet, gradients not normalised in the momentum, as in the code of
    Zhao et al. (Li et al., CVPR 2020). Needs `targeted`."""
    parts = _diverse(resize_rate, diversity_prob, kernel_size)
    objective = partial(PoincareTriplet, lam=lamb, gamma=gamma)
    return build(source, eps, alpha, steps, objective=objective, step=SummedStep(decay), **parts, **options)


def ILA(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    layer: str | None = None,
    **options: Unpack[Options],
) -> Attack:
    """BIM along what a first attack, with momentum, did to the features of `layer` (Huang et al., ICCV 2019)."""
    objective = partial(FeatureProjection, layer or middle_layer(source), decay=decay)
    return build(source, eps, alpha, steps, objective=objective, **options)


def FIA(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    num_ens: int = 30,
    drop_rate: float = 0.3,
    layer: str | None = None,
    **options: Unpack[Options],
) -> Attack:
    """Momentum against the important features of `layer` (Wang et al., ICCV 2021)."""
    objective = partial(FeatureImportance, layer or middle_layer(source), copies=num_ens, drop=drop_rate)
    return build(source, eps, alpha, steps, objective=objective, step=SignStep(decay), **options)


def NAA(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    N: int = 30,
    layer: str | None = None,
    **options: Unpack[Options],
) -> Attack:
    """Momentum against what neurons of `layer` are attributed (Zhang et al., CVPR 2022)."""
    objective = partial(NeuronAttribution, layer or middle_layer(source), copies=N)
    return build(source, eps, alpha, steps, objective=objective, step=SignStep(decay), **options)


def RPA(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    num_ens: int = 30,
    patch_prob: float = 0.7,
    layer: str | None = None,
    **options: Unpack[Options],
) -> Attack:
    """FIA with random patches, each left out with a probability of 1 - patch_prob (Zhang et al., IJCAI 2022)."""
    objective = partial(RandomPatches, layer or middle_layer(source), copies=num_ens, drop=1 - patch_prob)
    return build(source, eps, alpha, steps, objective=objective, step=SignStep(decay), **options)


def TAP(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    lam: float = 0.005,
    alpha_tap: float = 0.5,
    yita: float = 0.01,
    s: int = 3,
    layers: Sequence[str] | None = None,
    **options: Unpack[Options],
) -> Attack:
    """BIM away from the clean features of `layers`, smoothly (Zhou et al., ECCV 2018)."""
    names = tuple(stages(source) if layers is None else layers)
    objective = partial(FeatureDistance, names, lam=lam, power=alpha_tap, eta=yita, size=s)
    return build(source, eps, alpha, steps, objective=objective, **options)


def _diverse(resize_rate: float, diversity_prob: float, kernel_size: int) -> dict[str, Any]:
    """The components of TI-DI."""
    return {
        "transforms": [InputDiversity(resize_rate, diversity_prob)],
        "shaping": [Smoothing("gaussian", kernel_size)],
    }
