"""An estimator that warps images as little as the model lets it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from alignfast.attacks.component import Memory, Position
from alignfast.attacks.estimators.base import Estimator
from alignfast.attacks.gradient import Gradient, Look
from alignfast.attacks.transforms.warps import warp
from alignfast.checks import check_count, check_number

__all__ = ["ConstrainedWarps"]


@dataclass(frozen=True)
class ConstrainedWarps(Estimator):
    """DeCowA (Lin et al., AAAI 2024): the mean over warps of grad J(W(x; t - rho dJ(W(x; t)) / dt)).

    W(x; t) is the warp of `Warp`, whose inner points move by t, drawn from [-strength / 2, strength / 2) for each image
    and copy; a step down the objective J keeps a warp from taking away what the image shows.

    copies: of an image. mesh: from 3 to 8, points of the mesh on each axis. rho: the size of that step.

    Raises:
        ValueError: a number outside its range.
    """

    copies: int = 20
    mesh: int = 3
    strength: float = 2.0
    rho: float = 0.01

    def __post_init__(self) -> None:
        check_count("copies", self.copies)
        check_count("mesh", self.mesh, low=3, high=8)
        check_number("strength", self.strength, low=0.0)
        check_number("rho", self.rho, low=0.0)

    @property
    def passes(self) -> int:
        return 2 * self.copies

    def estimate(self, gradient: Gradient, position: Position, memory: Memory) -> Tensor:
        return gradient.mean(self.copies, lambda look: self._through_warps(look, position.point))

    def _through_warps(self, look: Look, point: Tensor) -> Tensor:
        """[K, N, C, H, W]: the gradient with respect to the point through a constrained warp for each sample."""
        shape = ((self.mesh - 2) ** 2, 2)
        drawn = look.draws.uniform(0, shape, -self.strength / 2, self.strength / 2).flatten(0, 1).to(point.dtype)
        rows = point.repeat(len(look.which), 1, 1, 1)
        slope = _gradient(look, lambda offsets: warp(rows, offsets), drawn)
        constrained = drawn - self.rho * slope
        return _gradient(look, lambda images: warp(images, constrained), rows).reshape(-1, *point.shape)


def _gradient(look: Look, warped_by: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Of the objective of warped images, with respect to what they were made of."""
    leaf = at.detach().requires_grad_()
    with torch.enable_grad():
        warped = warped_by(leaf)
        grad = look.gradient(warped.detach().unflatten(0, (len(look.which), -1)))
        (result,) = torch.autograd.grad((warped * grad.flatten(0, 1)).sum(), leaf)
    return result
