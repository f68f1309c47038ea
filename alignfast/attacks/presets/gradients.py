"""Attacks that differ in the gradient that they follow or the step that they take.

Every preset takes eps and alpha in units of [0, 1] images, and the keywords of `Options`.
"""

from __future__ import annotations

from typing import Unpack

from torch import nn

from alignfast.attacks.engine import Attack
from alignfast.attacks.estimators import (
    DirectionTuning,
    EnhancedMomentum,
    EulerMean,
    Expectation,
    GradientRelevance,
    IntegratedGradients,
    NormPenalty,
    PenalizedNorm,
    PredictionCorrection,
    QuantisedPaths,
    RandomWalk,
    VarianceTuning,
    WorstCase,
)
from alignfast.attacks.objectives import Logit, Probability
from alignfast.attacks.presets.build import ALPHA, EPS, STEPS, Options, build, even
from alignfast.attacks.shaping import FrequencyMask, Smoothing
from alignfast.attacks.steps import (
    AdaptiveTanhStep,
    CornerStart,
    DecayingStep,
    GlobalMomentum,
    L2Step,
    PatchwiseStep,
    RescaledStep,
    SignStep,
    StaircaseStep,
)

__all__ = [
    "AIFGTM",
    "BIM",
    "DTA",
    "EMIFGSM",
    "EOTPGD",
    "FFGSM",
    "FGSM",
    "GIFGSM",
    "GNP",
    "GRA",
    "IEFGSM",
    "IFGSSM",
    "LFIFGSM",
    "MIFGSM",
    "MIG",
    "MUMODIG",
    "NIFGSM",
    "PCIFGSM",
    "PGD",
    "PGDL2",
    "PGN",
    "PIFGSM",
    "PIFGSMPP",
    "RAP",
    "RFGSM",
    "SMIFGRM",
    "TAIG",
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


def GIFGSM(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    pre_epoch: int = 5,
    s: float = 10.0,
    **options: Unpack[Options],
) -> Attack:
    """Momentum that begins as after pre_epoch steps of s alpha (Wang et al., arXiv 2022)."""
    return build(source, eps, alpha, steps, step=GlobalMomentum(decay, steps=pre_epoch, factor=s), **options)


def IFGSSM(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 0.0,
    stairs: int = 64,
    **options: Unpack[Options],
) -> Attack:
    """Steps in as many sizes as there are stairs, by the quantiles of the gradient (Gao et al., arXiv 2021)."""
    return build(source, eps, alpha, steps, step=StaircaseStep(decay, stairs=stairs), **options)


def PIFGSM(
    source: nn.Module,
    eps: float = EPS,
    alpha: float | None = None,
    steps: int = STEPS,
    decay: float = 0.0,
    amplification: float = 10.0,
    kern_size: int = 3,
    project_factor: float = 1.0,
    **options: Unpack[Options],
) -> Attack:
    """Amplified steps whose excess goes to the neighbourhood; alpha, or else eps / steps (Gao et al., ECCV 2020)."""
    step = PatchwiseStep(decay, amplification=amplification, factor=project_factor, size=kern_size)
    return build(source, eps, even(eps, alpha, steps), steps, step=step, **options)


def PIFGSMPP(
    source: nn.Module,
    eps: float = EPS,
    alpha: float | None = None,
    steps: int = STEPS,
    decay: float = 0.0,
    amplification: float = 10.0,
    project_factor: float = 0.8,
    **options: Unpack[Options],
) -> Attack:
    """PI-FGSM on the smoothed gradient, with a smaller spread part that is not summed up (Gao et al., arXiv 2020).

    The kernel is the authors'; torchattacks' is 3 x 3 and, by an exchange of axes, even along each row.
    """
    step = PatchwiseStep(decay, amplification=amplification, factor=project_factor, feedback=False)
    shaping, size = [Smoothing("gaussian", 5, 3.0)], even(eps, alpha, steps)
    return build(source, eps, size, steps, shaping=shaping, step=step, **options)


def AIFGTM(
    source: nn.Module,
    eps: float = EPS,
    alpha: float | None = None,
    steps: int = STEPS,
    beta_1: float = 0.9,
    beta_2: float = 0.99,
    mu_1: float = 1.5,
    mu_2: float = 1.9,
    lam: float = 1.3,
    **options: Unpack[Options],
) -> Attack:
    """Adaptive moments, tanh for sign; the mean step size is alpha, or else eps / steps (Zou et al., AAAI 2022)."""
    step = AdaptiveTanhStep(beta_1, beta_2, mu_1, mu_2, lam)
    return build(source, eps, even(eps, alpha, steps), steps, step=step, **options)


def LFIFGSM(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 0.0,
    kept: float = 0.25,
    **options: Unpack[Options],
) -> Attack:
    """BIM along the low frequencies of the gradient (Guo et al., UAI 2019; Sharma et al., IJCAI 2019)."""
    return build(source, eps, alpha, steps, shaping=[FrequencyMask(kept)], step=SignStep(decay), **options)


def IEFGSM(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    **options: Unpack[Options],
) -> Attack:
    """Momentum over the mean of the present and the anticipated gradient (Peng et al., ICASSP 2023)."""
    return build(source, eps, alpha, steps, estimator=EulerMean(), step=SignStep(decay), **options)


def GNP(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    r: float = 0.01,
    beta: float = 0.8,
    **options: Unpack[Options],
) -> Attack:
    """Momentum with a penalty on the gradient's norm (Wu et al., ICIP 2023)."""
    return build(source, eps, alpha, steps, estimator=NormPenalty(r, beta), step=SignStep(decay), **options)


def RAP(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    transpoint: int | None = None,
    epsilon_n: float = 16 / 255,
    alpha_n: float = 2 / 255,
    adv_steps: int = 8,
    **options: Unpack[Options],
) -> Attack:
    """Momentum at the worst point around, from step transpoint or a quarter on (Qin et al., NeurIPS 2022)."""
    late_start = steps // 4 if transpoint is None else transpoint
    estimator = WorstCase(adv_steps, epsilon_n, alpha_n, late_start)
    return build(source, eps, alpha, steps, estimator=estimator, step=SignStep(decay), **options)


def MIG(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    s_factor: int = 20,
    **options: Unpack[Options],
) -> Attack:
    """Momentum along integrated gradients of the probability, from black (Ma et al., ICCV 2023)."""
    estimator, step = IntegratedGradients(s_factor), SignStep(decay)
    return build(source, eps, alpha, steps, objective=Probability, estimator=estimator, step=step, **options)


def SMIFGRM(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    num_neighbor: int = 12,
    beta: float = 1.5,
    rescale_factor: float = 2.0,
    **options: Unpack[Options],
) -> Attack:
    """Momentum over a random walk, rescaled instead of its sign alone (Han et al., arXiv 2023)."""
    estimator, step = RandomWalk(num_neighbor, beta), RescaledStep(decay, factor=rescale_factor)
    return build(source, eps, alpha, steps, estimator=estimator, step=step, **options)


def TAIG(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    s_factor: int = 20,
    **options: Unpack[Options],
) -> Attack:
    """BIM along integrated gradients of the logit, from black: TAIG-S (Huang and Kong, ECCV 2022)."""
    estimator = IntegratedGradients(s_factor)
    return build(source, eps, alpha, steps, objective=Logit, estimator=estimator, **options)


def PCIFGSM(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    K: int = 1,
    **options: Unpack[Options],
) -> Attack:
    """Momentum over the present and K predicted gradients (Wan and Huang, arXiv 2023)."""
    estimator, step = PredictionCorrection(K, decay), SignStep(decay)
    return build(source, eps, alpha, steps, estimator=estimator, step=step, **options)


def DTA(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    K: int = 10,
    u: float = 0.0,
    **options: Unpack[Options],
) -> Attack:
    """Momentum over K small inner steps with look-ahead, whose decay is u (Yang et al., Information Sciences 2023)."""
    return build(source, eps, alpha, steps, estimator=DirectionTuning(K, decay, u), **options)


def MUMODIG(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    N_trans: int = 6,
    region_num: int = 2,
    lamb: float = 0.65,
    **options: Unpack[Options],
) -> Attack:
    """Momentum along integrated gradients of views, from these quantised downward (Ren et al., AAAI 2025)."""
    estimator = QuantisedPaths(N_trans, region_num, lamb)
    return build(source, eps, alpha, steps, estimator=estimator, step=SignStep(decay), **options)
