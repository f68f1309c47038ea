"""Sources whose passes are changed, on the way forward or back, while their models stay as they are."""

from alignfast.surrogates.collection import Collection, lgv
from alignfast.surrogates.rectifiers import LinearBackward
from alignfast.surrogates.residual import GhostSkips, SkipGradient
from alignfast.surrogates.surrogate import Surgery, Surrogate, surrogate
from alignfast.surrogates.transformers import NoAttention, TokenGradients

__all__ = [
    "Collection",
    "GhostSkips",
    "LinearBackward",
    "NoAttention",
    "SkipGradient",
    "Surgery",
    "Surrogate",
    "TokenGradients",
    "lgv",
    "surrogate",
]
