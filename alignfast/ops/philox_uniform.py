"""Uniform draws that are a pure function of seed, image, step, copy and purpose."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alignfast.checks import check_count, check_number, check_shape
from alignfast.native import NATIVE_DEVICES
from alignfast.reference import philox_uniform as reference

MAX_COPY = 2**24 - 1
MAX_PURPOSE = 255
WORD = 0xFFFFFFFF


def philox_uniform(
    images: Tensor,
    copies: Tensor,
    shape: Sequence[int],
    *,
    seed: int,
    step: int | Tensor = 0,
    purpose: int = 0,
    low: float = 0.0,
    high: float = 1.0,
) -> Tensor:
    """float32 [K, N, *shape] in [low, high): the draws of N images and K copies, by Philox4x32-10.

    Word `lane` of block b serves element 4 b + lane of an image's draws; its counter is
    (b, image, step, copy << 8 | purpose) and its key is (low word of seed, high word of seed). The upper 24 bits of
    the word, times 2^-24, are the draw (Salmon et al., SC 2011). Other bounds than 0 and 1 are reached by a multiply
    and an add in float32, whose rounding may give `high` itself.

    Args:
        images: int64 [N], data-set indices in [0, 2^32).
        copies: int64 [K], copy numbers in [0, 2^24).
        shape: the shape of one image's draws.
        seed: in [0, 2^64).
        step: in [0, 2^32); or int64 [] on the device of `images`, which is read there, so that a captured graph
            draws anew.
        purpose: in [0, 256); keeps draws for different uses apart.

    Raises:
        ValueError: an argument outside its range or of another shape or dtype. The values of `images` and `copies`
            are read on the CPU alone, since that would wait for a device; one outside its range is a RuntimeError.
    """
    check_count("seed", seed, low=0, high=2**64 - 1)
    sizes = tuple(shape)
    number, offset = split_step(step)
    arguments = (images, copies, sizes, seed & WORD, seed >> 32, number, purpose, low, high, offset)
    _check(*arguments)
    if images.device.type in NATIVE_DEVICES:
        draws: Tensor = torch.ops.alignfast.philox_uniform(*arguments)
        return draws
    return reference.philox_uniform(images, copies, sizes, seed, step, purpose, low, high)


def split_step(step: int | Tensor) -> tuple[int, Tensor | None]:
    """As the ops take it: a number, and a tensor whose number is added to it."""
    return (0, step) if isinstance(step, Tensor) else (step, None)


def check_step_offset(name: str, offset: Tensor | None, images: Tensor) -> None:
    if offset is None:
        return
    check_shape(name, offset.shape, ())
    if offset.dtype != torch.int64:
        raise ValueError(f"{name}: got dtype {offset.dtype}; allowed is torch.int64")
    if offset.device != images.device:
        raise ValueError(f"{name}: on {offset.device}; allowed is the device of images, {images.device}")


def _check(
    images: Tensor,
    copies: Tensor,
    shape: Sequence[int],
    seed_low: int,
    seed_high: int,
    step: int,
    purpose: int,
    low: float,
    high: float,
    step_offset: Tensor | None = None,
) -> None:
    for name, index in (("images", images), ("copies", copies)):
        check_shape(name, index.shape, (None,))
        if index.dtype != torch.int64:
            raise ValueError(f"{name}: got dtype {index.dtype}; allowed is torch.int64")
    if images.device != copies.device:
        raise ValueError(f"copies: on {copies.device}; allowed is the device of images, {images.device}")
    check_count("seed_low", seed_low, low=0, high=WORD)
    check_count("seed_high", seed_high, low=0, high=WORD)
    check_count("step", step, low=0, high=WORD)
    check_step_offset("step", step_offset, images)
    check_count("purpose", purpose, low=0, high=MAX_PURPOSE)
    for size in shape:
        check_count("shape", size, low=0)
    check_number("low", low)
    check_number("high", high)
    if low > high:
        raise ValueError(f"low, high: got {low}, {high}; allowed is low <= high")


def _fake(
    images: Tensor,
    copies: Tensor,
    shape: Sequence[int],
    seed_low: int,
    seed_high: int,
    step: int,
    purpose: int,
    low: float,
    high: float,
    step_offset: Tensor | None = None,
) -> Tensor:
    _check(images, copies, shape, seed_low, seed_high, step, purpose, low, high, step_offset)
    return images.new_empty((len(copies), len(images), *shape), dtype=torch.float32)


torch.library.register_fake("alignfast::philox_uniform", _fake)
