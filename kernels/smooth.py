"""Smoothing by two passes: down the columns into values as they are computed, then along the rows.

A tile is rows of a plane. In channels-last memory the channels of an image are one plane with a wider step.
"""

import torch
import triton
import triton.language as tl

from alignfast.kernels.launch import blocks_of, for_tiles, launch
from alignfast.kernels.scalar import narrow, wide_dtype, widen
from alignfast.ops.smooth import _check


def smooth(grad, kernel):
    """[N, C, H, W], as torch.ops.alignfast.smooth."""
    return _smoothed(grad, kernel, 1)


def smooth_backward(grad, kernel):
    """The adjoint, which smooths with the kernel back to front."""
    return _smoothed(grad, kernel, -1)


def _smoothed(grad, kernel, direction):
    _check(grad, kernel)
    interleaved = not grad.is_contiguous() and grad.is_contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(grad, memory_format=torch.channels_last if interleaved else torch.contiguous_format)
    if out.numel() == 0:
        return out
    images, channels, height, width = grad.shape
    wide, value = wide_dtype(grad.dtype)
    # Half precision is rounded at the end alone, so what is between the passes is wider and has to be in memory.
    between = torch.empty_like(out, dtype=wide)
    step = channels if interleaved else 1
    planes = images if interleaved else images * channels
    length = width * step
    # Taps further out than the image is large see zeros only.
    radius = min(len(kernel) // 2, max(height, width) - 1)
    taps = (kernel, len(kernel) // 2 * kernel.stride(0), direction * kernel.stride(0), radius)
    rows, choice = for_tiles(length, grad.element_size())
    tiles = (blocks_of(rows, height), blocks_of(choice.block, length))
    programs = planes * tiles[0] * tiles[1]
    strides = (grad.stride(0), 0, grad.stride(2), 1) if interleaved else grad.stride()
    inner = 1 if interleaved else channels
    constants = {"ROWS": rows, "BLOCK": choice.block, "WIDE": value}
    launch(
        _columns_kernel, grad, programs, choice, grad, strides, inner, between, taps, height, length, tiles, **constants
    )
    launch(_rows_kernel, grad, programs, choice, between, out, taps, height, length, step, tiles, **constants)
    return out


@triton.jit
def _tile(height, length, tiles, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The plane of this program, the rows and places in a row of its tile, and which of them exist."""
    program = tl.program_id(0)
    plane = (program // (tiles[0] * tiles[1])).to(tl.int64)
    y = program // tiles[1] % tiles[0] * ROWS + tl.arange(0, ROWS)[:, None]
    x = program % tiles[1] * BLOCK + tl.arange(0, BLOCK)[None, :]
    return plane, y.to(tl.int64), x.to(tl.int64), (y < height) & (x < length)


@triton.jit
def _tap(taps, offset, WIDE: tl.constexpr):
    return widen(tl.load(taps[0] + (taps[1] + offset * taps[2])), WIDE)


@triton.jit
def _columns_kernel(
    grad,
    strides,
    channels,
    out,
    taps,
    height,
    length,
    tiles,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    plane, y, x, inside = _tile(height, length, tiles, ROWS, BLOCK)
    start = grad + plane // channels * strides[0] + plane % channels * strides[1]
    total = tl.zeros((ROWS, BLOCK), WIDE)
    for offset in range(-taps[3], taps[3] + 1):
        row = y + offset
        value = tl.load(start + row * strides[2] + x * strides[3], mask=inside & (row >= 0) & (row < height), other=0.0)
        total += widen(value, WIDE) * _tap(taps, offset, WIDE)
    tl.store(out + (plane * height + y) * length + x, total, mask=inside)


@triton.jit
def _rows_kernel(
    values,
    out,
    taps,
    height,
    length,
    step,
    tiles,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    plane, y, x, inside = _tile(height, length, tiles, ROWS, BLOCK)
    start = (plane * height + y) * length
    total = tl.zeros((ROWS, BLOCK), WIDE)
    for offset in range(-taps[3], taps[3] + 1):
        at = x + offset * step
        value = tl.load(values + start + at, mask=inside & (at >= 0) & (at < length), other=0.0)
        total += value * _tap(taps, offset, WIDE)
    tl.store(out + start + x, narrow(total, out.dtype.element_ty), mask=inside)
