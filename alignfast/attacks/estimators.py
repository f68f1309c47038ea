"""Gradient estimators: which gradient a step follows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from alignfast.attacks.transforms import Neighbors, Transform
from alignfast.checks import check_count, check_number

# The mean input gradient at a point over its views, after the given transforms and those of the attack.
Gradient = Callable[[Tensor, Sequence[Transform]], Tensor]


@dataclass(frozen=True)
class Moment:
    """Where an attack stands.

    adv: [N, C, H, W], the images so far. point: the same, or ahead of it where the step rule looks ahead.
    last: no step follows this one. memory: what the estimator keeps between the steps of one call, to be changed in
    place.
    """

    adv: Tensor
    point: Tensor
    eps: float
    last: bool
    memory: Mapping[str, Tensor]


class Estimator(Protocol):
    def memory(self, images: Tensor) -> dict[str, Tensor]:
        """What the estimator keeps, before the first step; empty if nothing, and then `last` makes no difference."""
        ...

    def estimate(self, gradient: Gradient, moment: Moment) -> Tensor:
        """The gradient [N, C, H, W] to follow from `moment.adv`."""
        ...


@dataclass(frozen=True)
class Plain:
    """The gradient at the point itself."""

    def memory(self, images: Tensor) -> dict[str, Tensor]:
        return {}

    def estimate(self, gradient: Gradient, moment: Moment) -> Tensor:
        return gradient(moment.point, ())


@dataclass(frozen=True)
class VarianceTuning:
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

    def memory(self, images: Tensor) -> dict[str, Tensor]:
        return {"variance": torch.zeros_like(images)}

    def estimate(self, gradient: Gradient, moment: Moment) -> Tensor:
        here, variance = gradient(moment.point, ()), moment.memory["variance"]
        tuned = here + variance
        # The variance of the last step would serve no other.
        if not moment.last:
            around = gradient(moment.adv, (Neighbors(self.neighbors, self.beta * moment.eps),))
            torch.sub(around, here, out=variance)
        return tuned
