"""The geometry of losses: curvature, flatness, gradients and what models share, before and after alignment."""

from alignfast.geometry.config import GeometryConfig
from alignfast.geometry.measure import geometry
from alignfast.geometry.measures import MEASURES, PAIR_MEASURES
from alignfast.geometry.result import Difference, Estimate, GeometryResult, Row

__all__ = [
    "MEASURES",
    "PAIR_MEASURES",
    "Difference",
    "Estimate",
    "GeometryConfig",
    "GeometryResult",
    "Row",
    "geometry",
]
