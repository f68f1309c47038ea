"""Transforms that draw which of many operators they apply, and the parts that these are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from alignfast.attacks.transforms.sampling import interpolate, weights
from alignfast.attacks.transforms.transform import Transform
from alignfast.attacks.views import Views
from alignfast.checks import check_count, check_number
from alignfast.draws import Draws

__all__ = ["DiversityEnsemble", "Operators"]

# The operators of OPS by their first numbers; 0 changes nothing.
FLIP_DOWN, FLIP_RIGHT, SHIFT_DOWN, SHIFT_RIGHT, TURN, SCALE, DIVERSITY, OPERATORS = 1, 2, 3, 4, 5, 14, 21, 31
DEGREES = (5, -5, 15, -15, 45, -45, 90, -90, 180)
FEWEST, MOST = 2, 4
SHELLS = 6


@dataclass(frozen=True)
class Operators(Transform):
    """OPS (Guo et al., CVPR 2025): the image itself, and `neighbors` x `operators` views o(x + e) of it.

    e is uniform in [-r, r) with r drawn from k / 4 `radius`, k = 1, ..., 6, and o a chain of two to four operators,
    drawn with equal chances from: none; a flip of either axis; a cyclic shift on either; a turn by 5, -5, 15, -15, 45,
    -45, 90, -90 or 180 degrees; division by 2, 3, ..., 8; and the input diversity of TransferAttack with the rates 1.1,
    1.3, ..., 2.9. Turns are bilinear, with zeros from outside, where the authors' code takes the nearest pixel; and
    every view has an e of its own, where there the views of a neighbour share one, drawn before the first step.

    radius: in units of [0, 1] images.

    Raises:
        ValueError: no neighbour or operator, or a negative radius.
    """

    neighbors: int = 30
    operators: int = 30
    radius: float = 32 / 255
    copies: int = field(init=False)

    def __post_init__(self) -> None:
        check_number("radius", self.radius, low=0.0)
        neighbors, operators = (check_count(name, getattr(self, name)) for name in ("neighbors", "operators"))
        object.__setattr__(self, "copies", 1 + neighbors * operators)

    def view(self, views: Views, which: Tensor, draws: Draws) -> Views:
        return views.apply(lambda rows: self._change(rows, which, draws))

    def _change(self, rows: Tensor, which: Tensor, draws: Draws) -> Tensor:
        # Of level and shell; of each operator, which it is and what it draws of its own. Few tables, as each is work.
        level, shell = draws.uniform(0, (2,)).flatten(0, 1).unbind(1)
        number, *own = draws.uniform(1, (MOST, 5)).flatten(0, 1).unbind(2)
        noise = draws.uniform(2, tuple(rows.shape[1:]), -1.0, 1.0).flatten(0, 1).to(rows.dtype)
        changed = which[:, None].expand(-1, len(draws.images)).flatten() > 0
        length = torch.where(changed, FEWEST + below(level, MOST - FEWEST + 1), 0)
        number = torch.where(torch.arange(MOST, device=rows.device) < length[:, None], below(number, OPERATORS), 0)
        radius = torch.where(changed, (self.radius / 4) * (1 + below(shell, SHELLS)).to(rows.dtype), 0)
        down, along = (_matrices(size, axis, number, own, rows.dtype) for axis, size in enumerate(rows.shape[-2:]))
        scale = torch.where((number >= SCALE) & (number < DIVERSITY), number - (SCALE - 2), 1).to(rows.dtype)
        angle = torch.zeros_like(scale)
        for i, degrees in enumerate(DEGREES, TURN):
            angle = torch.where(number == i, math.radians(degrees), angle)
        rows = rows + radius[:, None, None, None] * noise
        for i in range(MOST):
            turned = turned_by(rows, angle[:, i]) / scale[:, i, None, None, None]
            rows = down[:, i, None] @ turned @ along[:, i, None].mT
        return rows


@dataclass(frozen=True)
class DiversityEnsemble(Transform):
    """DEM's views (Zou et al., ECCV 2020): one for each of `rates`, resized, padded and resized back at that rate.

    As in `InputDiversity` with a rate above 1 and p = 1, but images need not be square: for a side S, the new side is
    drawn from [S, floor(rate S)) and its place from [0, floor(rate S) - new side), for each image and copy.

    rates: at least one, each at least 1.

    Raises:
        ValueError: no rate, or one below 1.
    """

    rates: Sequence[float] = (1.14, 1.27, 1.4, 1.53, 1.66)
    copies: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rates", tuple(check_number("rates", rate, low=1.0) for rate in self.rates))
        if not self.rates:
            raise ValueError("rates: got none; allowed is at least one number of at least 1")
        object.__setattr__(self, "copies", len(self.rates))

    def view(self, views: Views, which: Tensor, draws: Draws) -> Views:
        size, *places = draws.uniform(0, (3,)).flatten(0, 1)[..., None].unbind(1)
        number = which[:, None].expand(-1, len(draws.images)).reshape(-1, 1)

        def matrix(side: int, place: Tensor) -> Tensor:
            larger = torch.full_like(number, side)
            for i, rate in enumerate(self.rates):
                larger = torch.where(number == i, int(side * rate), larger)
            resized = side + below(size, larger - side)
            pixel = torch.arange(side, device=number.device)
            return resized_and_padded(pixel, larger, resized, below(place, larger - resized), views.images.dtype)

        down, along = (matrix(*given) for given in zip(views.images.shape[-2:], places, strict=True))
        return views.apply(lambda rows: down[:, None] @ rows @ along[:, None].mT)


def below(share: Tensor, count: int | Tensor) -> Tensor:
    """int64 in [0, count), or 0 where that is empty, from uniform draws in [0, 1)."""
    return (share.double() * count).long().clamp(max=count - 1).clamp(min=0)


def _matrices(size: int, axis: int, number: Tensor, own: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """[B, MOST, size, size]: what operators `number` [B, MOST] do on one axis, but for turns and scales.

    own: [B, MOST] each, draws for the size, the place on either axis, and the shift.
    """
    drawn_size, drawn_place, drawn_shift = own[0], own[1 + axis], own[3]
    larger = size * torch.where(number >= DIVERSITY, 11 + 2 * (number - DIVERSITY), 10) // 10
    resized = size + below(drawn_size, larger - size)
    first = below(drawn_place, larger - resized)
    shift = torch.where(number == SHIFT_DOWN + axis, below(drawn_shift, size), 0)
    pixel = torch.arange(size, device=number.device)
    flipped = torch.where((number == FLIP_DOWN + axis)[..., None], size - 1 - pixel, pixel)
    place = (flipped - shift[..., None]) % size
    return resized_and_padded(place, larger[..., None], resized[..., None], first[..., None], dtype)


def resized_and_padded(place: Tensor, larger: Tensor, resized: Tensor, first: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., S, S]: an axis of S pixels resized to `resized`, padded with zeros to `larger`, and resized to S again.

    Both bilinear (align_corners=False). place: int64 [..., S], which pixels of the result to show. larger, resized,
    first: int64 [..., 1], with `first` zeros before the image; larger >= resized >= S.
    """
    size = place.shape[-1]
    point = ((place + 0.5).to(dtype) * (larger.to(dtype) / size) - 0.5).clamp(min=0)
    table: Tensor | int = 0
    for tap in (point.floor(), point.floor() + 1):
        local = tap - first
        shown = (local >= 0) & (local < resized)
        source = ((local + 0.5) * (size / resized.to(dtype)) - 0.5).clamp(0, size - 1)
        share = torch.where(shown, 1 - (point - tap).abs(), 0)
        table = table + share[..., None] * weights(source, size)
    assert isinstance(table, Tensor)
    return table


def turned_by(rows: Tensor, angle: Tensor) -> Tensor:
    """Rows [B, C, H, W] by `angle` [B] in radians, counter-clockwise about their middle, bilinear between zeros."""
    (height, width), cos, sin = rows.shape[-2:], angle.cos()[:, None, None], angle.sin()[:, None, None]
    y, x = (torch.arange(size, dtype=rows.dtype, device=rows.device) - (size - 1) / 2 for size in (height, width))
    y, x = y[:, None].expand(height, width), x.expand(height, width)
    return interpolate(rows, (height - 1) / 2 + cos * y + sin * x, (width - 1) / 2 + cos * x - sin * y)
