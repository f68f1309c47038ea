"""What an estimator is, and those that look at the point alone."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from alignfast.attacks.component import Component, Memory, Position
from alignfast.attacks.gradient import Gradient
from alignfast.checks import check_count

__all__ = ["Estimator", "Expectation", "Plain"]


class Estimator(Component):
    """Which gradient to follow. An estimator that keeps nothing does the same at the last step as at any other.

    norm: of the steps that it takes on its own, in which the attack must be, too; None if it takes none, or such as do
    not depend on the attack's. has_momentum: whether what it gives is a momentum already.
    """

    norm: ClassVar[Literal["linf"] | None] = None
    has_momentum: ClassVar[bool] = False

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
class Expectation(Estimator):
    """EOT (Athalye et al., ICML 2018): the mean gradient at the point over `samples` draws.

    Transforms and a source that change at random draw anew for each.

    Raises:
        ValueError: no sample.
    """

    samples: int = 2

    def __post_init__(self) -> None:
        check_count("samples", self.samples)

    @property
    def passes(self) -> int:
        return self.samples

    def estimate(self, gradient: Gradient, position: Position, memory: Memory) -> Tensor:
        point = position.point
        return gradient.mean(self.samples, lambda look: look.gradient(point.expand(len(look.which), *point.shape)))
