"""Estimators that look at where a step from the point would lead."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alignfast.attacks.component import Memory, Position
from alignfast.attacks.estimators.base import Estimator
from alignfast.attacks.gradient import Gradient, Look
from alignfast.attacks.per_image import over_length, over_mean
from alignfast.checks import check_count, check_number
from alignfast.draws import MOST_PASSES
from alignfast.ops import sign_step

__all__ = ["EulerMean", "NormPenalty", "WorstCase"]


@dataclass(frozen=True)
class EulerMean(Estimator):
    """IE (Peng et al., ICASSP 2023): the mean of p = g(x) / mean|g(x)| and of the same at x + alpha p.

    A step rule with momentum divides this by its mean once more, as it does with any gradient; TransferAttack does not.
    """

    @property
    def passes(self) -> int:
        return 2

    def estimate(self, gradient: Gradient, position: Position, memory: Memory) -> Tensor:
        present = over_mean(gradient(position.point))
        anticipated = over_mean(gradient(position.point + position.alpha * present))
        return (present + anticipated) / 2


@dataclass(frozen=True)
class NormPenalty(Estimator):
    """GNP (Wu et al., ICIP 2023): (1 + beta) g - beta h, with h the gradient at x + r g / ||g||_2.

    By a finite difference this is the gradient of J - r beta ||grad J||_2. TransferAttack divides by mean|g|, which
    makes that step many times as long, and adds h instead. r: an L2 distance, in units of [0, 1] images.

    Raises:
        ValueError: an r that is not positive, or a negative beta.
    """

    r: float = 0.01
    beta: float = 0.8

    def __post_init__(self) -> None:
        check_number("r", self.r, low=0.0, open_low=True)
        check_number("beta", self.beta, low=0.0)

    @property
    def passes(self) -> int:
        return 2

    def estimate(self, gradient: Gradient, position: Position, memory: Memory) -> Tensor:
        here = gradient(position.point)
        uphill = gradient(position.point + self.r * over_length(here))
        return (1 + self.beta) * here - self.beta * uphill


@dataclass(frozen=True)
class WorstCase(Estimator):
    """RAP (Qin et al., NeurIPS 2022): the gradient at the point near x at which the attack does worst.

    That point is found by `steps` sign steps of size `alpha` down the objective, from a uniform point of the ball of
    radius `radius` around x, and stays in this ball and in [0, 1]; both are in units of [0, 1] images. Before the step
    `late_start` of the attack, counted from 0, the gradient at x itself is taken, at the same cost.

    Raises:
        ValueError: no step or too many for one step of an attack, or a negative radius, alpha or late_start.
    """

    steps: int = 8
    radius: float = 16 / 255
    alpha: float = 2 / 255
    late_start: int = 0

    def __post_init__(self) -> None:
        check_count("steps", self.steps, high=MOST_PASSES - 1)
        check_number("radius", self.radius, low=0.0)
        check_number("alpha", self.alpha, low=0.0)
        check_count("late_start", self.late_start, low=0)

    @property
    def passes(self) -> int:
        return self.steps + 1

    def estimate(self, gradient: Gradient, position: Position, memory: Memory) -> Tensor:
        point = position.point

        def at_worst(look: Look) -> Tensor:
            worst = look.neighbors(point, self.radius)[0].clamp_(0, 1)
            for _ in range(self.steps):
                sign_step(worst, point, -look.gradient(worst[None])[0], alpha=self.alpha, eps=self.radius)
            return look.gradient(torch.where(position.number >= self.late_start, worst, point)[None])

        return gradient.mean(1, at_worst)
