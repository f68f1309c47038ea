"""How kernels are launched: block sizes and numbers of programs as pure functions, and the launch itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# A grid's first dimension is an int32.
MAX_PROGRAMS = 2**31 - 1
# What 16-byte accesses need of a size that bytes alone make up.
MAX_ALIGNMENT = 16


@dataclass(frozen=True)
class Choice:
    """What a program takes at a time, and its warps."""

    block: int
    warps: int


def for_elements(itemsize: int, scattered: bool = False) -> Choice:
    """Of a pass over elements that lie side by side: a thread has up to 32 bytes of every tensor.

    scattered: they do not lie side by side where they are written, whose addresses take registers; a thread has 16.
    """
    return Choice(block=512 if itemsize == 8 else 1024, warps=8 if scattered and itemsize > 2 else 4)


def for_pixels(pixels: int) -> Choice:
    """Of a pass that gathers the pixels of images, small ones in one block.

    A thread has one, since its taps, weights and addresses are many and all stay in registers.
    """
    block = min(256, max(128, power_of_two(pixels)))
    return Choice(block, warps=block // 32)


def for_classes(classes: int, itemsize: int) -> Choice:
    """Of a pass over a row of logits: up to 32 bytes a thread, and more threads where the row is long."""
    most = 1024 if itemsize == 8 else 2048
    block = min(most, max(256, power_of_two(classes)))
    return Choice(block, warps=max(1, min(8, block * itemsize // 1024)))


def for_tiles(length: int, itemsize: int) -> tuple[int, Choice]:
    """Of a pass over planes by tiles: rows of a tile, and the choice for the elements of such a row."""
    block = min(256, max(16, power_of_two(length)))
    rows = (512 if itemsize == 8 else 1024) // block
    return rows, Choice(block, warps=4)


def power_of_two(count: int) -> int:
    """The smallest power of two that is no less than `count`."""
    return 1 << max(count - 1, 0).bit_length()


def blocks_of(size: int, count: int) -> int:
    return -(-count // size)


def alignment_of(*sizes: int) -> int:
    """The largest power of two, up to 16, that divides all of them.

    A kernel is told sizes and strides as multiples of it, as Triton by itself notices multiples of 16 only: rows of
    1000 float32 start at multiples of 16 bytes without being 16 elements apart.
    """
    alignment = MAX_ALIGNMENT
    for size in sizes:
        while size % alignment:
            alignment //= 2
    return alignment


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded instead of carried out."""

    kernel: Any
    programs: int
    warps: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


_recorded: list[Launch] | None = None


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Launches are listed and not carried out, so that they can be looked at and compiled without a device."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def launch(kernel: Any, like: Tensor, programs: int, choice: Choice, *arguments: Any, **constants: Any) -> None:
    """Run `programs` programs of a kernel on the device of `like`, on torch's current stream.

    Multiply-adds are never contracted, so that results are those of the other backends.

    Raises:
        RuntimeError: the launch failed; it names the kernel, the grid and the sizes.
    """
    if _recorded is not None:
        _recorded.append(Launch(kernel, programs, choice.warps, arguments, constants))
        return
    try:
        if programs > MAX_PROGRAMS:
            raise ValueError(f"a grid has at most {MAX_PROGRAMS} programs")
        with _device_of(like):
            kernel[(programs,)](*arguments, **constants, num_warps=choice.warps, enable_fp_fusion=False)
    except Exception as error:
        raise RuntimeError(
            f"{kernel.__name__}: launch of {programs} programs of {choice.warps} warps for a tensor of "
            f"{list(like.shape)} failed: {error}"
        ) from error


def _device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
