"""Gradient estimators: which gradient a step follows."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from alignfast.attacks.component import Component, Memory, Position, Start
from alignfast.attacks.gradient import Gradient
from alignfast.checks import check_count, check_number

__all__ = ["Estimator", "Plain", "VarianceTuning"]


class Estimator(Component):
    """Which gradient to follow. An estimator that keeps nothing does the same at the last step as at any other."""

    @property
    @abstractmethod
    def passes(self) -> int:
        """Gradients of one point that a step takes, each over all views; the most, where steps differ."""

    @abstractmethod
    def estimate(self, gradient: Gradient, position: Position, memory: Memory) -> Tensor:
        """The gradient [N, C, H, W] to follow from `position.adv`."""


@dataclass(frozen=True)
class Plain(Estimator):
    """The gradient at the point itself."""

    @property
    def passes(self) -> int:
        return 1

    def estimate(self, gradient: Gradient, position: Position, memory: Memory) -> Tensor:
        return gradient(position.point)


@dataclass(frozen=True)
class VarianceTuning(Estimator):
    """VT (Wang and He, CVPR 2021, eq. 6 and 7): g + v, with v the last step's mean gradient of neighbours less g.

    The neighbours are `neighbors` points within `beta` eps of the images so far, not of the look-ahead point (as in
    torchattacks; TransferAttack takes the latter).

    Raises:
        ValueError: no neighbour, or a negative beta.
    """

    neighbors: int = 5
    beta: float = 1.5

    def __post_init__(self) -> None:
        check_count("neighbors", self.neighbors)
        check_number("beta", self.beta, low=0.0)

    @property
    def passes(self) -> int:
        return 1 + self.neighbors

    def memory(self, start: Start) -> Memory:
        return {"variance": torch.zeros_like(start.images)}

    def estimate(self, gradient: Gradient, position: Position, memory: Memory) -> Tensor:
        here, variance = gradient(position.point), memory["variance"]
        tuned = here + variance
        # The variance of the last step would serve no other.
        if not position.last:
            radius = self.beta * position.eps
            around = gradient.mean(self.neighbors, lambda look: look.gradient(look.neighbors(position.adv, radius)))
            torch.sub(around, here, out=variance)
        return tuned
