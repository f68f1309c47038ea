"""Gradient estimators over the members of an `Ensemble`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from alignfast.attacks.component import Memory, Position, Start
from alignfast.attacks.estimators.base import Estimator
from alignfast.attacks.gradient import Gradient
from alignfast.attacks.steps import SignStep
from alignfast.checks import check_count, check_number
from alignfast.draws import Draws
from alignfast.models import Classifier
from alignfast.models.classifier import Render

__all__ = ["AdaptiveEnsemble", "CommonWeakness", "EnsembleEstimator", "ReducedVariance"]

# Below this, what is divided by is taken to be this: where it is 0, so is what it divides.
TINY = 1e-12


class EnsembleEstimator(Estimator):
    """Looks at the members of the source one by one. passes: of a member, since each shows it one model.

    Where it moves images itself, it moves them in the L-inf ball, by the sign.
    """

    norm: ClassVar = "linf"

    def check(self, source: Classifier, images: Tensor) -> None:
        if len(source.members) < 2:
            raise ValueError("source: got one model; allowed is an Ensemble of at least two here")


@dataclass(frozen=True)
class ReducedVariance(EnsembleEstimator):
    """SVRE (Xiong et al., CVPR 2022, algorithm 1): the inner momentum G after an inner loop over the members.

    From the point x, with the ensemble's gradient g and those of its members g_k, the inner loop takes gradients
    g_k(x') - (g_k(x) - g), accumulates each over its mean absolute value in G, with `decay`, and moves x' by
    `beta` alpha sign(G) within the ball. The members take turns in their order, `rounds` times, where the paper draws
    one each time, so that all have the same part in it and a step is the same at any time.
    rounds: at least 1. beta: in units of alpha, at least 0. decay: at least 0.

    Raises:
        ValueError: a number outside its range.
    """

    rounds: int = 4
    beta: float = 1.0
    decay: float = 1.0

    def __post_init__(self) -> None:
        check_count("rounds", self.rounds)
        check_number("beta", self.beta, low=0.0)
        check_number("decay", self.decay, low=0.0)

    @property
    def passes(self) -> int:
        return 2 + self.rounds

    def estimate(self, gradient: Gradient, position: Position, memory: Memory) -> Tensor:
        whole, members = gradient(position.point), gradient.members
        corrections = [whole - member(position.point) for member in members]
        rule, momentum = SignStep(self.decay), torch.zeros_like(whole)
        inner = replace(position, adv=position.point.clone(), alpha=self.beta * position.alpha)
        for _ in range(self.rounds):
            for member, correction in zip(members, corrections, strict=True):
                rule.update(inner, member(inner.adv) + correction, {"momentum": momentum})
        return momentum


@dataclass(frozen=True)
class AdaptiveEnsemble(EnsembleEstimator):
    """AdaEA (Chen et al., ICCV 2023, section 3): the gradient of members weighted by how well their steps transfer.

    A member's own step, alpha sign(g_k) within the ball, gives x_k. Its weight is the softmax over members of
    `beta` sum_{i != k} J_i(x_k) / J_i(x_i), with the objective J_i of member i; logits are added up with these weights,
    whatever the ensemble combines. The gradient of that is kept at pixels where the cosine of the members' gradients,
    along the channels and on average over pairs of members, is at least `threshold`, and is 0 elsewhere. Weights are an
    image's own. (The authors' code and TransferAttack have a batch's, the former those of the first step throughout,
    and leave the last member out of the average over pairs.) For objectives above 0 that grow with success, as
    untargeted cross-entropy.
    beta: at least 0. threshold: in [-1, 1].

    Raises:
        ValueError: a number outside its range.
    """

    beta: float = 10.0
    threshold: float = -0.3

    def __post_init__(self) -> None:
        check_number("beta", self.beta, low=0.0)
        check_number("threshold", self.threshold, low=-1.0, high=1.0)

    @property
    def passes(self) -> int:
        return 2

    def estimate(self, gradient: Gradient, position: Position, memory: Memory) -> Tensor:
        members = gradient.members
        grads = [member(position.point) for member in members]
        fused = gradient.through(Fused(gradient.source, self._weights(members, grads, position)))(position.point)
        pairs = [cosine_similarity(one, other, dim=1) for one, other in combinations(grads, 2)]
        alike = torch.stack(pairs).mean(0) >= self.threshold
        return fused * alike[:, None]

    def _weights(self, members: list[Gradient], grads: list[Tensor], position: Position) -> Tensor:
        """[M, N]"""
        # gains[k][i]: of member i at what member k's own step leads to.
        gains = [[member.gain(point) for member in members] for point in (_stepped(position, grad) for grad in grads)]
        ratios = [
            torch.stack([gain / gains[i][i].clamp(min=TINY) for i, gain in enumerate(of_step) if i != k]).sum(0)
            for k, of_step in enumerate(gains)
        ]
        return (self.beta * torch.stack(ratios)).softmax(0)


@dataclass(frozen=True)
class CommonWeakness(EnsembleEstimator):
    """CWA (Chen et al., ICLR 2024, algorithm 2, MI-CWA): how far a pass over the members moves the images.

    A step of size `reverse` against the sign of the ensemble's gradient (sharpness-aware) comes first. Then each member
    in turn adds its gradient there, over its L2 norm, to a momentum with `decay` that lasts from step to step, and the
    images move by `inner` times that momentum within the ball (cosine similarity encourager). As in TransferAttack the
    first step stays in the ball and is taken by targeted attacks too; in the authors' code it does not and is not.
    reverse, inner: in units of [0, 1] images, at least 0; of an L-inf and of an L2 step. decay: at least 0.

    Raises:
        ValueError: a number outside its range.
    """

    reverse: float = 16 / 255 / 15
    inner: float = 250.0
    decay: float = 1.0

    def __post_init__(self) -> None:
        for name in ("reverse", "inner", "decay"):
            check_number(name, getattr(self, name), low=0.0)

    @property
    def passes(self) -> int:
        return 2

    def memory(self, start: Start) -> Memory:
        return {"momentum": torch.zeros_like(start.images)}

    def estimate(self, gradient: Gradient, position: Position, memory: Memory) -> Tensor:
        low = (position.images - position.eps).clamp(min=0)
        high = (position.images + position.eps).clamp(max=1)
        inner = _stepped(replace(position, alpha=self.reverse), -gradient(position.point))
        for member in gradient.members:
            grad = member(inner)
            length = torch.linalg.vector_norm(grad, dim=(1, 2, 3), keepdim=True).clamp(min=TINY)
            memory["momentum"].mul_(self.decay).add_(grad / length)
            inner = (inner + self.inner * memory["momentum"]).clamp(low, high)
        return inner - position.point


class Fused(Classifier):
    """The sum of the members' logits, with weights [M, N] of their own for each of N images."""

    def __init__(self, source: Classifier, weights: Tensor) -> None:
        super().__init__(source.module, num_classes=source.num_classes, input_size=source.input_size)
        self._parts = source.members
        self._weights = weights

    def logits_of(self, render: Render, draws: Draws | None = None) -> Tensor:
        logits = torch.stack([member.logits_of(render, draws) for member in self._parts])
        rows = self._weights.repeat(1, logits.shape[1] // self._weights.shape[1])
        return (logits * rows[:, :, None]).sum(0)


def _stepped(position: Position, grad: Tensor) -> Tensor:
    """The point after a step of its own along the sign of `grad`."""
    point = position.point.clone()
    SignStep().update(replace(position, adv=point), grad, {})
    return point
