"""Transforms that move the pixels of an image."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from alignfast.attacks.transforms.sampling import take, weights
from alignfast.attacks.transforms.transform import Transform
from alignfast.attacks.transforms.warps import warp
from alignfast.attacks.views import Views
from alignfast.checks import check_count, check_number
from alignfast.draws import Draws

__all__ = ["RandomCrop", "ShiftGrid", "Translation", "Warp"]


@dataclass(frozen=True)
class Translation(Transform):
    """TI before its approximation (Dong et al., CVPR 2019): shifts by whole pixels, with zeros moving in.

    Down and right are drawn from -reach to reach, each alike and for each image and copy.

    Raises:
        ValueError: no copy, or a negative reach.
    """

    reach: int
    copies: int = 1

    def __post_init__(self) -> None:
        check_count("reach", self.reach, low=0)
        check_count("copies", self.copies)

    def view(self, views: Views, which: Tensor, draws: Draws) -> Views:
        return views.apply(lambda rows: self._shift(rows, draws))

    def _shift(self, rows: Tensor, draws: Draws) -> Tensor:
        down, along = (draws.integers(purpose, -self.reach, self.reach + 1).flatten() for purpose in (0, 1))
        (height, width), device = rows.shape[-2:], rows.device
        y = torch.arange(height, device=device)[:, None] - down[:, None, None]
        x = torch.arange(width, device=device) - along[:, None, None]
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        moved: Tensor = take(rows, *torch.broadcast_tensors(y.clamp(0, height - 1), x.clamp(0, width - 1)))
        return moved * inside[:, None]


@dataclass(frozen=True)
class ShiftGrid(Transform):
    """ANDA's views (Fang et al., CVPR 2024): shifts by a grid of side x side steps, with zeros moving in.

    View side i + j shows at each place what the image has (2 i / (side - 1) - 1) `reach` half widths to the right of it
    and (2 j / (side - 1) - 1) `reach` half heights below, bilinear.

    side: at least 2. reach: at least 0.

    Raises:
        ValueError: a number outside its range.
    """

    side: int = 5
    reach: float = 0.3
    copies: int = field(init=False)

    def __post_init__(self) -> None:
        check_number("reach", self.reach, low=0.0)
        object.__setattr__(self, "copies", check_count("side", self.side, low=2) ** 2)

    def view(self, views: Views, which: Tensor, draws: Draws) -> Views:
        number, (height, width) = which[:, None].expand(-1, len(draws.images)).flatten(), views.images.shape[-2:]
        down = self._shifted(number % self.side, height, views.images.dtype)
        along = self._shifted(number // self.side, width, views.images.dtype)
        return views.apply(lambda rows: down[:, None] @ rows @ along[:, None].mT)

    def _shifted(self, step: Tensor, size: int, dtype: torch.dtype) -> Tensor:
        """[B, size, size]: one axis moved by step [B] of the grid."""
        pixels = torch.arange(size, dtype=dtype, device=step.device)
        shift = (2 * step.to(dtype) / (self.side - 1) - 1) * (self.reach * size / 2)
        return weights(pixels + shift[:, None], size)


@dataclass(frozen=True)
class RandomCrop(Transform):
    """A part of the image resized to the whole by bilinear interpolation, and flipped sideways with probability `flip`.

    Height and width of the part are drawn from [smallest, 1) of the image's, and its place from all there are, each
    for every image and copy.

    smallest: in (0, 1]. flip: in [0, 1].

    Raises:
        ValueError: a number outside its range.
    """

    smallest: float = 0.8
    flip: float = 0.5
    copies: int = 1

    def __post_init__(self) -> None:
        check_number("smallest", self.smallest, low=0.0, high=1.0, open_low=True)
        check_number("flip", self.flip, low=0.0, high=1.0)
        check_count("copies", self.copies)

    def view(self, views: Views, which: Tensor, draws: Draws) -> Views:
        return views.apply(lambda rows: self._crop(rows, draws))

    def _crop(self, rows: Tensor, draws: Draws) -> Tensor:
        height, width = rows.shape[-2:]
        y, x = self._sampled(height, 0, rows, draws), self._sampled(width, 2, rows, draws)
        x = torch.where(draws.uniform(4).flatten()[:, None] < self.flip, x.flip(1), x)
        return weights(y, height)[:, None] @ rows @ weights(x, width)[:, None].mT

    def _sampled(self, size: int, purpose: int, rows: Tensor, draws: Draws) -> Tensor:
        """[B, size]: where the pixels of one axis come from."""
        part, place = (draws.uniform(purpose + i).flatten()[:, None].to(rows.dtype) for i in (0, 1))
        part = self.smallest + (1 - self.smallest) * part
        middle = torch.arange(size, dtype=rows.dtype, device=rows.device) + 0.5
        return (place * (1 - part) * size + part * middle - 0.5).clamp(0, size - 1)


@dataclass(frozen=True)
class Warp(Transform):
    """The warps of DeCowA (Lin et al., AAAI 2024) without their constraint: thin-plate splines with random offsets.

    The inner points of a mesh x mesh grid over the image, which reaches from -1 to 1, move by draws from
    [-strength / 2, strength / 2) in both directions.

    mesh: from 3 to 8.

    Raises:
        ValueError: a number outside its range.
    """

    copies: int = 20
    mesh: int = 3
    strength: float = 2.0

    def __post_init__(self) -> None:
        check_count("copies", self.copies)
        check_count("mesh", self.mesh, low=3, high=8)
        check_number("strength", self.strength, low=0.0)

    def view(self, views: Views, which: Tensor, draws: Draws) -> Views:
        offsets = draws.uniform(0, ((self.mesh - 2) ** 2, 2), -self.strength / 2, self.strength / 2).flatten(0, 1)
        return views.apply(lambda rows: warp(rows, offsets.to(rows.dtype)))
