"""Estimators that look at random neighbours of the point."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alignfast.attacks.component import Memory, Position, Start
from alignfast.attacks.estimators.base import Estimator
from alignfast.attacks.gradient import Gradient, Look
from alignfast.attacks.per_image import cosine, over_mean
from alignfast.checks import check_count, check_number

__all__ = ["GradientRelevance", "PenalizedNorm", "RandomWalk", "VarianceTuning"]


@dataclass(frozen=True)
class VarianceTuning(Estimator):
    """VT (Wang and He, CVPR 2021, eq. 6 and 7): g + v, with v the last step's mean gradient of neighbours less g.

    The neighbours are `neighbors` points within `beta` eps of the images so far, as in torchattacks, or of the point
    where the gradient is taken with `ahead`. These differ for step rules that look ahead; TransferAttack looks ahead,
    too, but from the momentum that the step is only about to make.

    Raises:
        ValueError: no neighbour, or a negative beta.
    """

    neighbors: int = 5
    beta: float = 1.5
    ahead: bool = False

    def __post_init__(self) -> None:
        _check(self.neighbors, self.beta)

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
            radius, centre = self.beta * position.eps, position.point if self.ahead else position.adv
            around = gradient.mean(self.neighbors, lambda look: look.gradient(look.neighbors(centre, radius)))
            torch.sub(around, here, out=variance)
        return tuned


@dataclass(frozen=True)
class PenalizedNorm(Estimator):
    """PGN (Ge et al., NeurIPS 2023, algorithm 1): the mean over neighbours x' of (1 - delta) g(x') + delta g(x*).

    x* = x' - alpha g(x') / mean|g(x')|, as in the authors' code, where the paper writes the L1 norm. The neighbours are
    `neighbors` points within `beta` eps of the point. delta, in [0, 1]: how much the gradient's norm is penalised.

    Raises:
        ValueError: no neighbour, a negative beta, or a delta outside [0, 1].
    """

    neighbors: int = 20
    beta: float = 3.0
    delta: float = 0.5

    def __post_init__(self) -> None:
        _check(self.neighbors, self.beta)
        check_number("delta", self.delta, low=0.0, high=1.0)

    @property
    def passes(self) -> int:
        return 2 * self.neighbors

    def estimate(self, gradient: Gradient, position: Position, memory: Memory) -> Tensor:
        def flattened(look: Look) -> Tensor:
            around = look.neighbors(position.point, self.beta * position.eps)
            here = look.gradient(around)
            downhill = look.gradient(around - position.alpha * over_mean(here))
            return (1 - self.delta) * here + self.delta * downhill

        return gradient.mean(self.neighbors, flattened)


@dataclass(frozen=True)
class GradientRelevance(Estimator):
    """GRA (Zhu et al., ICCV 2023): s g + (1 - s) h, with s the cosine between g and h.

    g is the gradient at the point and h the mean gradient of `neighbors` points within `beta` eps of it.

    Raises:
        ValueError: no neighbour, or a negative beta.
    """

    neighbors: int = 20
    beta: float = 3.5

    def __post_init__(self) -> None:
        _check(self.neighbors, self.beta)

    @property
    def passes(self) -> int:
        return 1 + self.neighbors

    def estimate(self, gradient: Gradient, position: Position, memory: Memory) -> Tensor:
        here, radius = gradient(position.point), self.beta * position.eps
        around = gradient.mean(self.neighbors, lambda look: look.gradient(look.neighbors(position.point, radius)))
        relevance = cosine(here, around)
        return relevance * here + (1 - relevance) * around


@dataclass(frozen=True)
class RandomWalk(Estimator):
    """The depth-first sampling of SMI-FGRM (Han et al., arXiv 2307.02828): the mean gradient along a walk from x.

    Of its `samples` points the first is x itself, and each is uniform within `beta` eps of the one before. The authors'
    code takes so many besides x.

    Raises:
        ValueError: no sample, or a negative beta.
    """

    samples: int = 12
    beta: float = 1.5

    def __post_init__(self) -> None:
        check_count("samples", self.samples)
        check_number("beta", self.beta, low=0.0)

    @property
    def passes(self) -> int:
        return self.samples

    def estimate(self, gradient: Gradient, position: Position, memory: Memory) -> Tensor:
        point, radius = position.point, self.beta * position.eps

        def on_the_way(look: Look) -> Tensor:
            # A sample needs the draws of all before it, whichever are asked for together.
            first, own = look.which[:1], look.draws
            draws = replace(own, copies=own.copies[:1] - first + torch.arange(self.samples, device=first.device))
            strides = draws.uniform(shape=tuple(point.shape[1:]), low=-radius, high=radius).to(point.dtype)
            return look.gradient(point + (strides.cumsum(0) - strides)[look.which])

        return gradient.mean(self.samples, on_the_way)


def _check(neighbors: int, beta: float) -> None:
    check_count("neighbors", neighbors)
    check_number("beta", beta, low=0.0)
