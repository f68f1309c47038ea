"""Attacks that differ in what they show the model.

Every preset takes eps and alpha in units of [0, 1] images, and the keywords of `Options`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Unpack

from torch import Tensor, nn

from alignfast.attacks.engine import Attack
from alignfast.attacks.estimators import ConstrainedWarps
from alignfast.attacks.presets.build import ALPHA, EPS, STEPS, Options, build, even
from alignfast.attacks.shaping import Smoothing
from alignfast.attacks.steps import SignStep, SummedStep
from alignfast.attacks.transforms import (
    BlockMasks,
    BlockOperations,
    BlockShuffle,
    DiversityEnsemble,
    InputDiversity,
    Mixes,
    MixMask,
    Operators,
    Scales,
    ShiftGrid,
    SpectrumMask,
    UniformScales,
)
from alignfast.checks import check_count, check_number

__all__ = [
    "ANDA",
    "BSR",
    "DEM",
    "DIFGSM",
    "DIM",
    "OPS",
    "SIA",
    "SIM",
    "SINIFGSM",
    "SSM",
    "TIFGSM",
    "TIM",
    "USMM",
    "Admix",
    "DeCowA",
    "MaskBlock",
]


def SINIFGSM(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    m: int = 5,
    **options: Unpack[Options],
) -> Attack:
    """Nesterov momentum over m scale copies (Lin et al., ICLR 2020)."""
    return build(source, eps, alpha, steps, transforms=[Scales(m)], step=SignStep(decay, nesterov=True), **options)


def DIFGSM(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 0.0,
    resize_rate: float = 0.9,
    diversity_prob: float = 0.5,
    random_start: bool = False,
    **options: Unpack[Options],
) -> Attack:
    """Input diversity (Xie et al., CVPR 2019); `decay` 1 gives M-DI2-FGSM."""
    return build(
        source,
        eps,
        alpha,
        steps,
        transforms=[InputDiversity(resize_rate, diversity_prob)],
        step=SignStep(decay),
        random_start=random_start,
        **options,
    )


def TIFGSM(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 0.0,
    kernel_name: Literal["gaussian", "uniform", "linear"] = "gaussian",
    len_kernel: int = 15,
    nsig: float = 3.0,
    resize_rate: float = 0.9,
    diversity_prob: float = 0.5,
    random_start: bool = False,
    **options: Unpack[Options],
) -> Attack:
    """Translation invariance (Dong et al., CVPR 2019) over input diversity, as torchattacks defines it."""
    return build(
        source,
        eps,
        alpha,
        steps,
        transforms=[InputDiversity(resize_rate, diversity_prob)],
        shaping=[Smoothing(kernel_name, len_kernel, nsig)],
        step=SignStep(decay),
        random_start=random_start,
        **options,
    )


def DIM(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    resize_rate: float = 1.1,
    diversity_prob: float = 0.5,
    **options: Unpack[Options],
) -> Attack:
    """Momentum over enlarged, padded and shrunken images (Xie et al., CVPR 2019), as TransferAttack defines it."""
    diversity = InputDiversity(resize_rate, diversity_prob)
    return build(source, eps, alpha, steps, transforms=[diversity], step=SignStep(decay), **options)


def TIM(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    kernel_name: Literal["gaussian", "uniform", "linear"] = "gaussian",
    len_kernel: int = 15,
    nsig: float = 3.0,
    **options: Unpack[Options],
) -> Attack:
    """Momentum over the smoothed gradient, without input diversity (Dong et al., CVPR 2019)."""
    smoothing = Smoothing(kernel_name, len_kernel, nsig)
    return build(source, eps, alpha, steps, shaping=[smoothing], step=SignStep(decay), **options)


def SIM(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    m: int = 5,
    **options: Unpack[Options],
) -> Attack:
    """Momentum over m scale copies, without the look-ahead (Lin et al., ICLR 2020)."""
    return build(source, eps, alpha, steps, transforms=[Scales(m)], step=SignStep(decay), **options)


def Admix(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    num_scale: int = 5,
    num_admix: int = 3,
    admix_strength: float = 0.2,
    pool: Tensor | None = None,
    **options: Unpack[Options],
) -> Attack:
    """Momentum over scale copies of mixes with images of `pool`, see `Mixes` (Wang et al., ICCV 2021)."""
    mixes = [Mixes(pool, num_admix, admix_strength), Scales(num_scale)]
    return build(source, eps, alpha, steps, transforms=mixes, step=SignStep(decay), **options)


def USMM(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    scale_low: float = 0.1,
    scale_high: float = 0.75,
    num_scale: int = 5,
    num_mix: int = 3,
    mix_range: float = 0.5,
    pool: Tensor | None = None,
    **options: Unpack[Options],
) -> Attack:
    """Momentum over evenly scaled copies under masks of images of `pool`, see `MixMask` (Wang et al., 2023)."""
    masked = [UniformScales(num_scale, scale_low, scale_high), MixMask(pool, num_mix, mix_range)]
    return build(source, eps, alpha, steps, transforms=masked, step=SignStep(decay), **options)


def SSM(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    num_spectrum: int = 20,
    rho: float = 0.5,
    sigma: float | None = None,
    **options: Unpack[Options],
) -> Attack:
    """Momentum over copies with noise of sigma, or else eps, and randomly weighted frequencies: S2I-MI-FGSM
    (Long et al., ECCV 2022); with decay 0, S2I-FGSM."""
    noise = check_number("eps", eps, low=0.0, high=1.0) if sigma is None else sigma
    masks = SpectrumMask(num_spectrum, rho, noise)
    return build(source, eps, alpha, steps, transforms=[masks], step=SignStep(decay), **options)


def SIA(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    num_scale: int = 20,
    num_block: int = 3,
    **options: Unpack[Options],
) -> Attack:
    """Momentum over copies in which every block is changed in its own way (Wang et al., ICCV 2023)."""
    changes = BlockOperations(num_scale, num_block)
    return build(source, eps, alpha, steps, transforms=[changes], step=SignStep(decay), **options)


def BSR(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    num_scale: int = 20,
    num_block: int = 2,
    degrees: float = 24.0,
    **options: Unpack[Options],
) -> Attack:
    """Momentum over copies with blocks shuffled and turned (Wang et al., CVPR 2024)."""
    shuffle = BlockShuffle(num_scale, num_block, degrees)
    return build(source, eps, alpha, steps, transforms=[shuffle], step=SignStep(decay), **options)


def MaskBlock(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    num_block: int = 4,
    **options: Unpack[Options],
) -> Attack:
    """Momentum over num_block^2 copies, each without one block: of 56 pixels if 224 are given (Fan et al., 2022)."""
    return build(source, eps, alpha, steps, transforms=[BlockMasks(num_block)], step=SignStep(decay), **options)


def DeCowA(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    num_warping: int = 20,
    mesh: int = 3,
    noise_scale: float = 2.0,
    rho: float = 0.01,
    **options: Unpack[Options],
) -> Attack:
    """Momentum over warped copies, each warped as the model lets it (Lin et al., AAAI 2024)."""
    warps = ConstrainedWarps(num_warping, mesh, noise_scale, rho)
    return build(source, eps, alpha, steps, estimator=warps, step=SignStep(decay), **options)


def OPS(
    source: nn.Module,
    eps: float = EPS,
    alpha: float | None = None,
    steps: int = STEPS,
    decay: float = 1.0,
    beta: float = 2.0,
    num_sample_neighbor: int = 30,
    num_sample_operator: int = 30,
    **options: Unpack[Options],
) -> Attack:
    """Momentum over chains of random operators on neighbours within 1.5 beta eps, in steps of alpha or else
    eps / steps (Guo et al., CVPR 2025)."""
    radius = beta * check_number("eps", eps, low=0.0, high=1.0)
    operators = Operators(num_sample_neighbor, num_sample_operator, radius)
    size = even(eps, alpha, steps)
    return build(source, eps, size, steps, transforms=[operators], step=SignStep(decay), **options)


def DEM(
    source: nn.Module,
    eps: float = EPS,
    alpha: float | None = None,
    steps: int = STEPS,
    decay: float = 1.0,
    resize_rates: Sequence[float] = (1.14, 1.27, 1.4, 1.53, 1.66),
    **options: Unpack[Options],
) -> Attack:
    """Momentum over diverse inputs, one a rate, in steps of alpha or else eps (Zou et al., ECCV 2020).

    The gain is the mean loss of these inputs; the paper's is the loss of their mean logits.
    """
    size, ensemble = eps if alpha is None else alpha, DiversityEnsemble(resize_rates)
    return build(source, eps, size, steps, transforms=[ensemble], step=SignStep(decay), **options)


def ANDA(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    n_ens: int = 25,
    aug_max: float = 0.3,
    **options: Unpack[Options],
) -> Attack:
    """The mean gradient of n_ens shifts and all steps so far, without sampling (Fang et al., CVPR 2024)."""
    side = math.isqrt(check_count("n_ens", n_ens, low=4))
    if side**2 != n_ens:
        raise ValueError(f"n_ens: got {n_ens}; allowed is a square number of at least 4")
    return build(source, eps, alpha, steps, transforms=[ShiftGrid(side, aug_max)], step=SummedStep(), **options)
