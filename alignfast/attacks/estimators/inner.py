"""Estimators that go a few steps on their own and come back with what they met."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from alignfast.attacks.component import Memory, Position, Start
from alignfast.attacks.estimators.base import Estimator
from alignfast.attacks.gradient import Gradient
from alignfast.attacks.per_image import over_mean
from alignfast.checks import check_count, check_number
from alignfast.draws import MOST_PASSES
from alignfast.ops import sign_step

__all__ = ["DirectionTuning", "PredictionCorrection"]


@dataclass(frozen=True)
class PredictionCorrection(Estimator):
    """PC (Wan and Huang, arXiv 2306.01809): p_K, of the gradients at x and at the points that the attack is led to.

    p_0 = u(g(x)) and p_k = decay p_{k-1} + u(g(x_k)) / K with u(g) = g / mean|g| and K = `predictions`. x_k is a sign
    step of size eps from x_{k-1} along g(x_{k-1}), x_0 = x, and stays within eps of x and in [0, 1].

    TransferAttack takes the gradient before each such step, so that its only prediction is x itself and the attack
    is MI-FGSM.

    Raises:
        ValueError: no prediction or too many for one step of an attack, or a negative decay.
    """

    norm: ClassVar = "linf"

    predictions: int = 1
    decay: float = 1.0

    def __post_init__(self) -> None:
        check_count("predictions", self.predictions, high=MOST_PASSES - 1)
        check_number("decay", self.decay, low=0.0)

    @property
    def passes(self) -> int:
        return 1 + self.predictions

    def estimate(self, gradient: Gradient, position: Position, memory: Memory) -> Tensor:
        point, eps = position.point, position.eps
        predicted, grad = point.clone(), gradient(point)
        corrected = over_mean(grad)
        for _ in range(self.predictions):
            sign_step(predicted, point, grad, alpha=eps, eps=eps)
            grad = gradient(predicted)
            corrected = self.decay * corrected + over_mean(grad) / self.predictions
        return corrected


@dataclass(frozen=True)
class DirectionTuning(Estimator):
    """DTA (Yang et al., Information Sciences 2023): m_t = decay m_{t-1} + the mean of K inner momenta v_1, ..., v_K.

    From v_0 = m_{t-1} and x_0 = x, v_k = inner_decay v_{k-1} + u(g(x_{k-1} + alpha decay v_{k-1})) with
    u(g) = g / mean|g|, and x_k is a sign step of size alpha / K along v_k, within eps of the images and in [0, 1].
    K: `steps`. The momentum is the estimator's own, so that the step rule needs none. So it is in the authors' code;
    TransferAttack looks ahead by the gradient itself, adds it to the mean, and takes inner steps of size alpha.

    Raises:
        ValueError: no step or too many for one step of an attack, or a negative decay.
    """

    norm: ClassVar = "linf"
    has_momentum: ClassVar = True

    steps: int = 10
    decay: float = 1.0
    inner_decay: float = 0.0

    def __post_init__(self) -> None:
        check_count("steps", self.steps, high=MOST_PASSES)
        check_number("decay", self.decay, low=0.0)
        check_number("inner_decay", self.inner_decay, low=0.0)

    @property
    def passes(self) -> int:
        return self.steps

    def memory(self, start: Start) -> Memory:
        return {"momentum": torch.zeros_like(start.images)}

    def estimate(self, gradient: Gradient, position: Position, memory: Memory) -> Tensor:
        momentum, point = memory["momentum"], position.point.clone()
        inner, total = momentum, torch.zeros_like(momentum)
        for _ in range(self.steps):
            ahead = point + (position.alpha * self.decay) * inner
            inner = self.inner_decay * inner + over_mean(gradient(ahead))
            sign_step(point, position.images, inner, alpha=position.alpha / self.steps, eps=position.eps)
            total += inner
        return momentum.mul_(self.decay).add_(total / self.steps)
