"""Transforms that mix in other images."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from alignfast.attacks.transforms.transform import Transform
from alignfast.attacks.views import Views
from alignfast.checks import check_count, check_images, check_number
from alignfast.draws import Draws
from alignfast.models import Classifier, in_range
from alignfast.ops import Mixing

__all__ = ["MixMask", "Mixes"]


@dataclass(frozen=True, eq=False, repr=False)
class _OfPool(Transform):
    """A transform with images to mix in, `pool`, which it shows by their number, size and checksum only."""

    pool: Tensor | None
    copies: int

    def __post_init__(self) -> None:
        check_count("copies", self.copies)
        if self.pool is not None:
            check_images("pool", self.pool)
            if len(self.pool) == 0:
                raise ValueError("pool: got no image; allowed is at least one")

    def check(self, source: Classifier, images: Tensor) -> None:
        if self.pool is None:
            raise ValueError(
                "pool: got None; allowed is a tensor [M, C, H, W] of images to mix in, with values in [0, 1], best of "
                "other classes than those attacked"
            )
        if self.pool.shape[1:] != images.shape[1:]:
            raise ValueError(
                f"pool: got images of {list(self.pool.shape[1:])}; allowed is the size of the images attacked, "
                f"{list(images.shape[1:])}"
            )
        if self.pool.device != images.device:
            raise ValueError(f"pool: on {self.pool.device}; allowed is the device of images, {images.device}")

    def _drawn(self, draws: Draws, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The pool in this dtype, and int64 [K, N]: which of its images are drawn."""
        assert self.pool is not None
        return self.pool.detach().to(dtype), draws.integers(0, 0, len(self.pool))

    def _numbers(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "pool"}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, type(self)) or self._numbers() != other._numbers():
            return False
        if self.pool is None or other.pool is None:
            return self.pool is other.pool
        return self.pool.device == other.pool.device and torch.equal(self.pool, other.pool)

    def __hash__(self) -> int:
        return hash((type(self), *self._numbers().items()))

    def __repr__(self) -> str:
        pool = None if self.pool is None else f"<{_digest(self.pool)}>"
        numbers = "".join(f", {name}={value!r}" for name, value in self._numbers().items())
        return f"{type(self).__name__}(pool={pool}{numbers})"


@dataclass(frozen=True, eq=False, repr=False)
class Mixes(_OfPool):
    """Admix (Wang et al., ICCV 2021): x + strength x', with x' an image drawn from `pool`.

    Drawn for each image and copy, so that a result does not depend on the batch. The paper takes x' from other
    categories than x: choose `pool` so; a transform does not know the labels. In the paper's attack, x' is the same
    for the scale copies of a mix, here it is drawn for each.

    pool: [M, C, H, W], floating point in [0, 1], on the device of the images; None is refused when images come.
    copies: mixes of an image.

    Raises:
        ValueError, TypeError: a pool of anything else, no copy, or a negative strength.
    """

    copies: int = 3
    strength: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("strength", self.strength, low=0.0)

    def view(self, views: Views, which: Tensor, draws: Draws) -> Views:
        pool, partner = self._drawn(draws, views.images.dtype)
        weight = torch.full_like(partner, self.strength, dtype=views.images.dtype)
        return views.with_mixing(Mixing(pool, partner, weight))


@dataclass(frozen=True, eq=False, repr=False)
class MixMask(_OfPool):
    """US-MM's mask (Wang et al., 2023): clip(x ((1 - r) + 2 r x'), 0, 1), x' drawn from `pool`, r being `mix_range`.

    The gradient is that of x; TransferAttack takes that of the masked image, so that all scales weigh alike.

    pool: [M, C, H, W], floating point in [0, 1], on the device of the images; None is refused when images come.
    copies: masks of an image. mix_range: in [0, 1].

    Raises:
        ValueError, TypeError: a pool of anything else, no copy, or a range outside [0, 1].
    """

    copies: int = 3
    mix_range: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("mix_range", self.mix_range, low=0.0, high=1.0)

    def view(self, views: Views, which: Tensor, draws: Draws) -> Views:
        pool, partner = self._drawn(draws, views.images.dtype)
        mask = 1 - self.mix_range + 2 * self.mix_range * pool[partner.flatten()]
        return views.apply(lambda rows: in_range(rows * mask))


def _digest(pool: Tensor) -> str:
    content = zlib.crc32(pool.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return f"{str(pool.dtype).removeprefix('torch.')} {list(pool.shape)} {content:08x}"
