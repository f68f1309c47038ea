"""Random numbers that belong to an image, not to the batch it happens to be in."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from alignfast.ops import philox_uniform

# A slot is a component's place in the attack; each may make this many different draws.
DRAWS_PER_SLOT = 8
SLOTS = 32
START_SLOT = 0
# Transforms have the slots from here on, in their order.
FIRST_SLOT = 1
# What an objective draws of its own, an estimator, and a source.
OBJECTIVE_SLOT = SLOTS - 3
SAMPLE_SLOT = SLOTS - 2
SOURCE_SLOT = SLOTS - 1
# The passes of one step draw under copy numbers of their own, so many each.
COPIES_PER_PASS = 2**16
MOST_PASSES = 2**8


@dataclass(frozen=True)
class Draws:
    """Draws of one step for N images and K copies, a pure function of (seed, image, step, copy, slot, purpose).

    step: a number, or int64 [] on the device. images: int64 [N], data-set indices. copies: int64 [K].
    """

    seed: int
    step: int | Tensor
    images: Tensor
    copies: Tensor
    slot: int = START_SLOT

    def at(self, slot: int) -> Draws:
        return replace(self, slot=slot)

    def purpose(self, purpose: int) -> int:
        return DRAWS_PER_SLOT * self.slot + purpose

    def uniform(self, purpose: int = 0, shape: tuple[int, ...] = (), low: float = 0.0, high: float = 1.0) -> Tensor:
        """float32 [K, N, *shape] in [low, high)."""
        return philox_uniform(
            self.images,
            self.copies,
            shape,
            seed=self.seed,
            step=self.step,
            purpose=self.purpose(purpose),
            low=low,
            high=high,
        )

    def integers(self, purpose: int, low: int | Tensor, high: int | Tensor, shape: tuple[int, ...] = ()) -> Tensor:
        """int64 [K, N, *shape] in [low, high), and low where the range is empty; bounds may differ by image."""
        width = high - low
        drawn = (self.uniform(purpose, shape).double() * width).floor().long()
        return low + drawn.clamp(max=width - 1).clamp(min=0)

    def normal(self, purpose: int, shape: tuple[int, ...] = ()) -> Tensor:
        """float32 [K, N, *shape], standard normal (Box and Muller, 1958); takes the draws `purpose` and the next."""
        radius = (-2 * (1 - self.uniform(purpose, shape)).log()).sqrt()
        return radius * (2 * math.pi * self.uniform(purpose + 1, shape)).cos()
