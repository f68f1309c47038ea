"""Transforms that do something else to every block of an image."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum, auto

import torch
from torch import Tensor

from alignfast.attacks.transforms.sampling import interpolate, take
from alignfast.attacks.transforms.transform import Transform
from alignfast.attacks.views import Views
from alignfast.checks import check_count, check_number
from alignfast.draws import Draws
from alignfast.models import in_range

__all__ = ["BlockMasks", "BlockOperations", "BlockShuffle"]

NOISE = 16 / 255
DROPPED = 0.1


class Op(IntEnum):
    """What `BlockOperations` may do to a block."""

    SHIFT_DOWN = 0
    SHIFT_RIGHT = auto()
    FLIP_DOWN = auto()
    FLIP_RIGHT = auto()
    TURN = auto()
    SCALE = auto()
    NOISE = auto()
    RESIZE = auto()
    LOW_PASS = auto()
    DROP = auto()


@dataclass(frozen=True)
class Blocks:
    """Where the pixels of an axis of size S lie: all [B, S].

    number: of a pixel's block, from 0. first: the first pixel of that block. length: of that block.
    """

    number: Tensor
    first: Tensor
    length: Tensor

    @property
    def local(self) -> Tensor:
        """A pixel's place in its block."""
        return torch.arange(self.number.shape[1], device=self.number.device) - self.first

    @property
    def together(self) -> Tensor:
        """bool [B, S, S]: pixels of the same block."""
        return self.number[:, :, None] == self.number[:, None, :]


@dataclass(frozen=True)
class BlockOperations(Transform):
    """SIA (Wang et al., ICCV 2023): to each of blocks x blocks blocks, one of ten operations.

    The cuts are drawn from all places between two pixels, on each axis; the operation of a block with equal chances
    from: a cyclic shift down or right by less than the block, a flip of either axis, a turn by 180 degrees, a factor
    from [0, 1), noise from [-16/255, 16/255) and clipping to [0, 1], resizing to floor(0.8 L) + 1 of length L and
    back, a DCT without the highest floor(0.4 L) frequencies, and dropping channels with probability 0.1, the others
    divided by 0.9. (TransferAttack has the first seven.) Axes shorter than `blocks` have a block for each pixel.

    Raises:
        ValueError: no copy or no block.
    """

    copies: int = 20
    blocks: int = 3

    def __post_init__(self) -> None:
        check_count("copies", self.copies)
        check_count("blocks", self.blocks)

    def view(self, views: Views, which: Tensor, draws: Draws) -> Views:
        return views.apply(lambda rows: self._change(rows, draws))

    def _change(self, rows: Tensor, draws: Draws) -> Tensor:
        channels, height, width = rows.shape[1:]
        grid = (self.blocks, self.blocks)
        down, along = self._cut(height, 0, draws), self._cut(width, 1, draws)
        block = (down.number[:, :, None] * self.blocks + along.number[:, None, :]).flatten(1)

        def of_blocks(table: Tensor) -> Tensor:
            """[B, H, W] from [K, N, blocks, blocks]."""
            return table.flatten(0, 1).flatten(1).gather(1, block).reshape(-1, height, width)

        op = of_blocks(draws.integers(2, 0, len(Op), grid))
        share = of_blocks(draws.uniform(3, grid)).to(rows.dtype)
        y = _moved(down.local[:, :, None], down.length[:, :, None], share, op, Op.SHIFT_DOWN, Op.FLIP_DOWN)
        x = _moved(along.local[:, None, :], along.length[:, None, :], share, op, Op.SHIFT_RIGHT, Op.FLIP_RIGHT)
        moved = take(rows, down.first[:, :, None] + y, along.first[:, None, :] + x)
        noise = draws.uniform(4, (channels, height, width), -NOISE, NOISE).flatten(0, 1)
        drop = torch.stack([of_blocks(table) for table in draws.uniform(5, (channels, *grid)).unbind(2)], 1) < DROPPED
        result = moved * torch.where(op == Op.SCALE, share, 1)[:, None]
        result = torch.where(_chosen(op, Op.NOISE), in_range(rows + noise), result)
        result = torch.where(_chosen(op, Op.RESIZE), in_range(_both(_resized, rows, down, along)), result)
        result = torch.where(_chosen(op, Op.LOW_PASS), _both(_low_pass, rows, down, along), result)
        return torch.where(_chosen(op, Op.DROP), torch.where(drop, 0, rows / (1 - DROPPED)), result)

    def _cut(self, size: int, purpose: int, draws: Draws) -> Blocks:
        cuts = min(self.blocks, size) - 1
        places = draws.uniform(purpose, (size - 1,)).flatten(0, 1).argsort(stable=True, dim=1)[:, :cuts] + 1
        places = torch.nn.functional.pad(places.sort(1).values, (1, 0))
        ends = torch.nn.functional.pad(places[:, 1:], (0, 1), value=size)
        pixels = torch.arange(size, device=places.device)
        number = (pixels >= places[:, 1:, None]).sum(1)
        first = places.gather(1, number)
        return Blocks(number, first, ends.gather(1, number) - first)


def _chosen(op: Tensor, which: Op) -> Tensor:
    return (op == which)[:, None]


def _moved(local: Tensor, length: Tensor, share: Tensor, op: Tensor, shift: Op, flip: Op) -> Tensor:
    """int64 [B, H, W]: from which place in its block each pixel comes, on one axis."""
    shifted = (local - (share * length).long()) % length
    flipped = (op == flip) | (op == Op.TURN)
    return torch.where(op == shift, shifted, torch.where(flipped, length - 1 - local, local))


def _both(matrix: Callable[[Blocks, torch.dtype], Tensor], rows: Tensor, down: Blocks, along: Blocks) -> Tensor:
    """The same linear operation on the columns and the rows of every block."""
    return matrix(down, rows.dtype)[:, None] @ rows @ matrix(along, rows.dtype)[:, None].mT


def _resized(blocks: Blocks, dtype: torch.dtype) -> Tensor:
    """[B, S, S]: every block resized to floor(0.8 L) + 1 and back, bilinear (align_corners=False)."""
    small = blocks.length * 4 // 5 + 1
    return _between(blocks, small, blocks.length, dtype) @ _between(blocks, blocks.length, small, dtype)


def _between(blocks: Blocks, old: Tensor, new: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, S, S]: bilinear from `old` pixels at the start of every block to `new` at the same place."""
    point = ((blocks.local + 0.5).to(dtype) * (old.to(dtype) / new) - 0.5).clamp(min=0)
    point = torch.minimum(point, old.to(dtype) - 1)
    return (1 - (point[:, :, None] - blocks.local[:, None, :]).abs()).clamp(min=0) * blocks.together


def _low_pass(blocks: Blocks, dtype: torch.dtype) -> Tensor:
    """[B, S, S]: every block without the highest floor(0.4 L) frequencies of its orthonormal DCT-II."""
    wave, length = blocks.local.to(dtype), blocks.length.to(dtype)
    kept = (blocks.local < blocks.length - blocks.length * 2 // 5) * torch.where(wave == 0, 1, 2) / length
    angle = math.pi * (wave / length)[:, :, None] * (wave + 0.5)[:, None, :]
    waves = angle.cos() * blocks.together * kept.sqrt()[:, :, None]
    return waves.mT @ waves


@dataclass(frozen=True)
class BlockShuffle(Transform):
    """BSR (Wang et al., CVPR 2024): blocks x blocks blocks, shuffled, each turned by up to `degrees` about its centre.

    The image is cut into strips on one axis or the other with equal chances, and every strip into blocks, with
    lengths in the proportion of draws from [1, 2); strips change places, and blocks within their strip. What turns
    out of a block is lost, and what is left empty is 0 (bilinear). TransferAttack turns whole strips instead of
    blocks; the authors' code cuts all strips alike and draws angles from a truncated normal distribution.

    degrees: in [0, 180].

    Raises:
        ValueError: a number outside its range.
    """

    copies: int = 20
    blocks: int = 2
    degrees: float = 24.0

    def __post_init__(self) -> None:
        check_count("copies", self.copies)
        check_count("blocks", self.blocks)
        check_number("degrees", self.degrees, low=0.0, high=180.0)

    def view(self, views: Views, which: Tensor, draws: Draws) -> Views:
        return views.apply(lambda rows: self._shuffle(rows, draws))

    def _shuffle(self, rows: Tensor, draws: Draws) -> Tensor:
        (height, width), n = rows.shape[-2:], self.blocks
        # Of each image, line 0 of a table is about the strips and line 1 + i about the blocks of strip i.
        lines = (1 + n, n)
        upright = draws.uniform(0).flatten()[:, None, None] < 0.5
        share = draws.uniform(1, lines, 1.0, 2.0).flatten(0, 1).to(rows.dtype)
        order = draws.uniform(2, lines).flatten(0, 1).argsort(stable=True, dim=2)
        angle = draws.uniform(3, (n, n), -self.degrees, self.degrees).flatten(0, 1).to(rows.dtype) * (math.pi / 180)
        of_strips = torch.arange(1 + n, device=rows.device)[:, None] == 0
        size = torch.where(upright == of_strips, height, width)
        up_to = torch.ones((n, n), dtype=rows.dtype, device=rows.device).tril()
        ends = (size * (share[:, :, None] * up_to).sum(3) / share.sum(2, keepdim=True)).round().long()
        lengths = ends.diff(dim=2, prepend=torch.zeros_like(ends[..., :1]))
        placed = lengths.gather(2, order).cumsum(2)

        def source(place: Tensor, line: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            """Of places on one axis [B, H, W]: the block to come, its first pixel, its length, and where in it."""
            position = sum((place >= _at(placed, line, torch.full_like(line, k)) for k in range(n - 1)), zero)
            block = _at(order, line, position)
            length = _at(lengths, line, block)
            local = place - _at(placed, line, position) + length
            return block, _at(ends, line, block) - length, length, local

        zero = torch.zeros((len(rows), height, width), dtype=torch.int64, device=rows.device)
        y, x = (torch.arange(s, device=rows.device) for s in (height, width))
        y, x = y[:, None] + zero, x + zero
        strip, *strips = source(torch.where(upright, y, x), zero)
        block, *blocks = source(torch.where(upright, x, y), 1 + strip)
        top, high, down = (torch.where(upright, a, b) for a, b in zip(strips, blocks, strict=True))
        left, wide, along = (torch.where(upright, b, a) for a, b in zip(strips, blocks, strict=True))
        cos, sin = (_at(table, strip, block) for table in (angle.cos(), angle.sin()))
        middle_y, middle_x = (high - 1).to(rows.dtype) / 2, (wide - 1).to(rows.dtype) / 2
        off_y, off_x = down - middle_y, along - middle_x
        at_y = top + middle_y + cos * off_y - sin * off_x
        at_x = left + middle_x + sin * off_y + cos * off_x
        return interpolate(rows, at_y, at_x, (top, top + high, left, left + wide))


def _at(table: Tensor, line: Tensor, column: Tensor) -> Tensor:
    """[B, H, W]: what [B, lines, columns] has in these places."""
    places = (line * table.shape[2] + column).flatten(1)
    return table.flatten(1).gather(1, places).reshape(line.shape)


@dataclass(frozen=True)
class BlockMasks(Transform):
    """MaskBlock (Fan et al., 2022): copies with one of blocks x blocks blocks set to 0, each block in one copy.

    Pixel p of an axis of size S is in block i where floor(i S / blocks) <= p < floor((i + 1) S / blocks).

    Raises:
        ValueError: no block.
    """

    blocks: int = 4
    copies: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "copies", check_count("blocks", self.blocks) ** 2)

    def view(self, views: Views, which: Tensor, draws: Draws) -> Views:
        number = which[:, None].expand(-1, len(draws.images)).flatten()
        down = self._block(number // self.blocks, views.images.shape[2])
        along = self._block(number % self.blocks, views.images.shape[3])
        return views.apply(lambda rows: rows * ~(down[:, None, :, None] & along[:, None, None, :]))

    def _block(self, number: Tensor, size: int) -> Tensor:
        """bool [B, size]: the pixels of block `number` [B]."""
        pixels, first = torch.arange(size, device=number.device), number[:, None] * size // self.blocks
        return (pixels >= first) & (pixels < (number[:, None] + 1) * size // self.blocks)
