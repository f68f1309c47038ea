"""Attacks that differ in the model that they take gradients of.

Every preset takes eps and alpha in units of [0, 1] images, and the keywords of `Options`.
"""

from __future__ import annotations

from typing import Unpack

from torch import nn

from alignfast.attacks.engine import Attack
from alignfast.attacks.estimators import PatchOut
from alignfast.attacks.presets.build import ALPHA, EPS, STEPS, Options, build
from alignfast.attacks.steps import SignStep
from alignfast.models import as_classifier
from alignfast.surrogates import (
    Collection,
    FeatureNoise,
    GhostDropout,
    GhostSkips,
    LinearBackward,
    NoAttention,
    SkipGradient,
    SmoothBackward,
    Surrogate,
    TokenGradients,
    TokenShuffle,
    surrogate,
)

__all__ = [
    "BPA",
    "FAUG",
    "LGV",
    "SAPR",
    "SGM",
    "TGR",
    "GhostNetwork",
    "LinBP",
    "PNA_PatchOut",
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


def LinBP(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    linbp_layer: str | None = None,
    **options: Unpack[Options],
) -> Attack:
    """ReLUs that are linear on the way back, from a layer on (Guo et al., NeurIPS 2020)."""
    return build(surrogate(source, LinearBackward(linbp_layer)), eps, alpha, steps, step=SignStep(decay), **options)


def GhostNetwork(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    ghost_random_range: float = 0.22,
    ghost_keep_prob: float = 0.994,
    **options: Unpack[Options],
) -> Attack:
    """Skip connections scaled at random, or features dropped where there are none (Li et al., AAAI 2020)."""
    skips, dropout = GhostSkips(ghost_random_range), GhostDropout(1 - ghost_keep_prob)
    ghost = surrogate(source, skips if skips.fits(as_classifier(source).module) else dropout)
    return build(ghost, eps, alpha, steps, step=SignStep(decay), **options)


def TGR(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    attn_gamma: float = 0.25,
    qkv_gamma: float = 0.75,
    mlp_gamma: float = 0.5,
    **options: Unpack[Options],
) -> Attack:
    """Transformers' gradients without their extreme tokens (Zhang et al., CVPR 2023)."""
    regular = surrogate(source, TokenGradients(attn_gamma, qkv_gamma, mlp_gamma))
    return build(regular, eps, alpha, steps, step=SignStep(decay), **options)


def PNA_PatchOut(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    crop_length: int = 16,
    sample_num_patches: int = 130,
    lamb: float = 0.1,
    **options: Unpack[Options],
) -> Attack:
    """Transformers' gradients past attention, from some patches of the perturbation (Wei et al., AAAI 2022)."""
    blind, estimator = surrogate(source, NoAttention()), PatchOut(crop_length, sample_num_patches, lamb)
    return build(blind, eps, alpha, steps, estimator=estimator, step=SignStep(decay), **options)


def LGV(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 0.0,
    **options: Unpack[Options],
) -> Attack:
    """Another set of a collection's weights in every step (Gubri et al., ECCV 2022)."""
    for member in as_classifier(source).members:
        model = member.source if isinstance(member, Surrogate) else member
        if not isinstance(model, Collection):
            raise ValueError(
                f"source: got {type(model).__name__}; allowed is a Collection, as lgv(source, loader) makes it"
            )
    return build(source, eps, alpha, steps, step=SignStep(decay), **options)


def BPA(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    bpa_layer: str | None = None,
    temperature: float = 10.0,
    **options: Unpack[Options],
) -> Attack:
    """ReLUs and max-pooling that let more through on the way back (Wang et al., NeurIPS 2023)."""
    smooth = surrogate(source, SmoothBackward(bpa_layer, temperature))
    return build(smooth, eps, alpha, steps, step=SignStep(decay), **options)


def FAUG(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    layer: str | None = None,
    std1: float = 0.3,
    **options: Unpack[Options],
) -> Attack:
    """Noise on the features of a layer, the first convolution's if None (Wang et al., TNNLS 2025)."""
    return build(surrogate(source, FeatureNoise(layer, std1)), eps, alpha, steps, step=SignStep(decay), **options)


def SAPR(
    source: nn.Module,
    eps: float = EPS,
    alpha: float = ALPHA,
    steps: int = STEPS,
    decay: float = 1.0,
    prob: float = 0.15,
    **options: Unpack[Options],
) -> Attack:
    """Transformers' tokens shuffled before attention (Zhou et al., arXiv 2022)."""
    return build(surrogate(source, TokenShuffle(prob)), eps, alpha, steps, step=SignStep(decay), **options)
