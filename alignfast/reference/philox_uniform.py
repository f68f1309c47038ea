"""Philox4x32-10 (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3") on int64 tensors."""

from __future__ import annotations

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four 32-bit words for every counter; words are held in int64 tensors of one broadcast shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(MULTIPLIERS[0], c0)
        high1, low1 = _multiply(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def philox_uniform(
    images: Tensor,
    copies: Tensor,
    shape: tuple[int, ...],
    seed: int,
    step: int | Tensor,
    purpose: int,
    low: float,
    high: float,
) -> Tensor:
    count = 1
    for size in shape:
        count *= size
    blocks = torch.arange((count + 3) // 4, device=images.device)
    grid = (len(copies), len(images), len(blocks))
    counter = (
        blocks.expand(grid),
        images[:, None].expand(grid),
        torch.as_tensor(step, device=images.device).expand(grid),
        ((copies[:, None, None] << 8) | purpose).expand(grid),
    )
    words = torch.stack(philox4x32(counter, (seed & MASK, seed >> 32)), -1)
    # The upper 24 bits are what a float32 holds exactly, so every draw is below 1.
    unit = (words >> 8).to(torch.float32) * 2.0**-24
    unit = unit.flatten(2)[:, :, :count].reshape(len(copies), len(images), *shape)
    return unit if (low, high) == (0.0, 1.0) else unit * (high - low) + low


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32-bit product, through halves that fit int64."""
    high = (a * (b >> 16) + ((a * (b & 0xFFFF)) >> 16)) >> 16
    return high, (a * b) & MASK
