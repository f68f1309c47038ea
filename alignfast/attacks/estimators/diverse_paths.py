"""An estimator that looks along paths from quantised images, of many views of an image."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from alignfast.attacks.component import Memory, Position
from alignfast.attacks.estimators.base import Estimator
from alignfast.attacks.gradient import Gradient, Look
from alignfast.attacks.transforms.operators import below, resized_and_padded, turned_by
from alignfast.checks import check_count, check_number
from alignfast.draws import Draws

__all__ = ["QuantisedPaths"]

# What a view is, of ten equally likely numbers: from PADDED on, all the same.
SHIFT_DOWN, SHIFT_RIGHT, FLIP_DOWN, FLIP_RIGHT, TURN, PADDED, NUMBERS = 0, 1, 2, 3, 4, 5, 10
DEGREES = 45.0


@dataclass(frozen=True)
class QuantisedPaths(Estimator):
    """MuMoDIG (Ren et al., AAAI 2025): the mean of (v - b) T^T g(b + position (v - b)) over views v = T x.

    The first view is the image itself; each of the `views` others is with probability 1/2 resized by up to 245 / 224,
    padded and resized back, and else one of a cyclic shift or a flip of either axis and a turn by up to 45 degrees, all
    equally likely. b is v quantised downward, channel by channel: each pixel becomes the largest level not above it, of
    the channel's least value and `regions` - 1 uniform draws between that and its largest. As in the authors' code,
    with its defaults of one baseline and one point of the path for each view.

    position: of that point, in [0, 1].

    Raises:
        ValueError: no view or region, or a position outside [0, 1].
    """

    views: int = 6
    regions: int = 2
    position: float = 0.65

    def __post_init__(self) -> None:
        check_count("views", self.views)
        check_count("regions", self.regions)
        check_number("position", self.position, low=0.0, high=1.0)

    @property
    def passes(self) -> int:
        return 1 + self.views

    def estimate(self, gradient: Gradient, position: Position, memory: Memory) -> Tensor:
        return gradient.mean(1 + self.views, lambda look: self._attributed(look, position.point))

    def _attributed(self, look: Look, point: Tensor) -> Tensor:
        """[K, N, C, H, W]"""
        draws, samples = look.draws, len(look.which)
        leaf = point.repeat(samples, 1, 1, 1).requires_grad_()
        first = (look.which == 0).repeat_interleave(len(point), output_size=len(leaf))
        with torch.enable_grad():
            view = viewed(leaf, first, draws)
            base = self._quantised(view.detach(), draws)
            path = view.detach() - base
            grad = look.gradient((base + self.position * path).unflatten(0, (samples, -1)))
            (pulled,) = torch.autograd.grad((view * grad.flatten(0, 1)).sum(), leaf)
        attributed: Tensor = (path * pulled).unflatten(0, (samples, -1))
        return attributed

    def _quantised(self, view: Tensor, draws: Draws) -> Tensor:
        least, most = view.amin((2, 3), keepdim=True), view.amax((2, 3), keepdim=True)
        base = least
        for share in draws.uniform(1, (view.shape[1], self.regions - 1)).flatten(0, 1).to(view.dtype).unbind(2):
            level = least + share[..., None, None] * (most - least)
            base = torch.where(view >= level, torch.maximum(base, level), base)
        return base.expand_as(view)


def viewed(rows: Tensor, first: Tensor, draws: Draws) -> Tensor:
    """Rows [B, C, H, W] as they are where `first` is set, and else each in its own way."""
    number, share, size, *places = draws.uniform(0, (5,)).flatten(0, 1)[..., None].unbind(1)
    # The number of an image itself is none of the others.
    number = torch.where(first[:, None], NUMBERS, below(number, NUMBERS))
    padded = (number >= PADDED) & (number < NUMBERS)

    def matrix(axis: int) -> Tensor:
        side = rows.shape[2 + axis]
        larger = torch.where(padded, side * 245 // 224, side)
        resized = side + below(size, larger - side)
        pixel = torch.arange(side, device=rows.device)
        flipped = torch.where(number == FLIP_DOWN + axis, side - 1 - pixel, pixel)
        place = (flipped - torch.where(number == SHIFT_DOWN + axis, below(share, side), 0)) % side
        return resized_and_padded(place, larger, resized, below(places[axis], larger - resized), rows.dtype)

    degrees = torch.where(number == TURN, DEGREES * (2 * share - 1), 0).to(rows.dtype)
    turned = turned_by(rows, degrees[:, 0] * (math.pi / 180))
    return matrix(0)[:, None] @ turned @ matrix(1)[:, None].mT
