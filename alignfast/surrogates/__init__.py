"""Sources whose passes are changed, on the way forward or back, while their models stay as they are."""

from alignfast.surrogates.residual import SkipGradient
from alignfast.surrogates.surrogate import Surgery, Surrogate, surrogate

__all__ = ["SkipGradient", "Surgery", "Surrogate", "surrogate"]
