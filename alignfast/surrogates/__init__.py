"""Sources whose passes are changed, on the way forward or back, while their models stay as they are."""

from alignfast.surrogates.rectifiers import LinearBackward
from alignfast.surrogates.residual import GhostSkips, SkipGradient
from alignfast.surrogates.surrogate import Surgery, Surrogate, surrogate

__all__ = ["GhostSkips", "LinearBackward", "SkipGradient", "Surgery", "Surrogate", "surrogate"]
