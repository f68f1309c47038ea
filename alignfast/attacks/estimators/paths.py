"""Estimators that look at points on a line through the point."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alignfast.attacks.component import Memory, Position, Start
from alignfast.attacks.estimators.base import Estimator
from alignfast.attacks.gradient import Gradient, Look
from alignfast.attacks.per_image import over_mean
from alignfast.checks import check_count, check_number

__all__ = ["EnhancedMomentum", "IntegratedGradients"]


@dataclass(frozen=True)
class EnhancedMomentum(Estimator):
    """EMI (Wang et al., BMVC 2021): h_t = the mean gradient at x + c_i alpha h_{t-1} / mean|h_{t-1}|.

    The factors c_i are `samples` equidistant numbers from -radius to radius ("linear" sampling); alpha is the step
    size, as in the authors' code.

    Raises:
        ValueError: fewer than two samples, or a negative radius.
    """

    samples: int = 11
    radius: float = 7.0

    def __post_init__(self) -> None:
        check_count("samples", self.samples, low=2)
        check_number("radius", self.radius, low=0.0)

    @property
    def passes(self) -> int:
        return self.samples

    def memory(self, start: Start) -> Memory:
        return {"direction": torch.zeros_like(start.images)}

    def estimate(self, gradient: Gradient, position: Position, memory: Memory) -> Tensor:
        direction, reach = memory["direction"], self.radius * position.alpha

        def along(look: Look) -> Tensor:
            factors = torch.linspace(-reach, reach, self.samples, dtype=direction.dtype, device=direction.device)
            return look.gradient(position.point + factors[look.which, None, None, None, None] * direction)

        mean = gradient.mean(self.samples, along)
        direction.copy_(over_mean(mean))
        return mean


@dataclass(frozen=True)
class IntegratedGradients(Estimator):
    """IG (Sundararajan et al., ICML 2017, eq. 3) from black, as in MIG (Ma et al., ICCV 2023): x times a mean gradient.

    The mean is over the points i / S x, i = 1, ..., S = `samples`. Unlike TransferAttack's, the gradients at these are
    not multiplied by i / S. TAIG's code (Huang and Kong, ECCV 2022) has the gradient at black itself in the mean, too.

    Raises:
        ValueError: no sample.
    """

    samples: int = 20

    def __post_init__(self) -> None:
        check_count("samples", self.samples)

    @property
    def passes(self) -> int:
        return self.samples

    def estimate(self, gradient: Gradient, position: Position, memory: Memory) -> Tensor:
        point = position.point

        def along(look: Look) -> Tensor:
            shares = (look.which + 1).to(point.dtype) / self.samples
            return look.gradient(shares[:, None, None, None, None] * point)

        return point * gradient.mean(self.samples, along)
