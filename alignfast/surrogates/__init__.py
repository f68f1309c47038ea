"""Sources whose passes are changed, on the way forward or back, while their models stay as they are."""

from alignfast.surrogates.collection import Collection, lgv
from alignfast.surrogates.features import FeatureNoise, GhostDropout
from alignfast.surrogates.rectifiers import LinearBackward, SmoothBackward
from alignfast.surrogates.residual import GhostSkips, SkipGradient
from alignfast.surrogates.surrogate import Surgery, Surrogate, surrogate
from alignfast.surrogates.transformers import NoAttention, TokenGradients, TokenShuffle

__all__ = [
    "Collection",
    "FeatureNoise",
    "GhostDropout",
    "GhostSkips",
    "LinearBackward",
    "NoAttention",
    "SkipGradient",
    "SmoothBackward",
    "Surgery",
    "Surrogate",
    "TokenGradients",
    "TokenShuffle",
    "lgv",
    "surrogate",
]
