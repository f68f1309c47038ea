"""Draws of many streams: one of Philox's blocks makes four of them."""

import math

import torch
import triton
import triton.language as tl

from alignfast.kernels.launch import Choice, blocks_of, launch
from alignfast.ops.philox_uniform import _check

WORD = tl.constexpr(2**32)
LEFT, RIGHT = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
LEFT_WEYL, RIGHT_WEYL = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)
MAX_COPIES = tl.constexpr(2**24)
# The number of a block is one word of the counter.
MAX_DRAWS = 4 * 2**32

# Each of 128 threads has two of Philox's blocks.
DRAWS = Choice(block=1024, warps=4)


def philox_uniform(images, copies, shape, seed_low, seed_high, step, purpose, low=0.0, high=1.0, step_offset=None):
    """float32 [K, N, *shape], as torch.ops.alignfast.philox_uniform."""
    _check(images, copies, shape, seed_low, seed_high, step, purpose, low, high, step_offset)
    elements = math.prod(shape)
    check_draws("shape", elements)
    out = images.new_empty((len(copies), len(images), *shape), dtype=torch.float32)
    if out.numel() == 0:
        return out
    blocks = blocks_of(DRAWS.block, elements)
    key = (seed_low, seed_high, step, step_offset, purpose)
    indices = (images, images.stride(0), copies, copies.stride(0), len(images))
    launch(
        _philox_uniform_kernel,
        images,
        len(copies) * len(images) * blocks,
        DRAWS,
        *key,
        indices,
        low,
        high - low,
        elements,
        blocks,
        out,
        BLOCK=DRAWS.block,
    )
    return out


def check_draws(name, elements):
    if elements > MAX_DRAWS:
        raise ValueError(f"{name}: got {elements} draws; allowed is up to {MAX_DRAWS}")


@triton.jit
def philox_words(block, stream):
    """The four words of a block of uint32 numbers; a stream is (key, key, image, step, copy and purpose)."""
    c0 = block
    k0, k1, c1, c2, c3 = stream
    for _ in tl.static_range(10):
        before = c0
        c0 = tl.umulhi(c2, RIGHT) ^ c1 ^ k0
        c1 = c2 * RIGHT
        c2 = tl.umulhi(before, LEFT) ^ c3 ^ k1
        c3 = before * LEFT
        k0 += LEFT_WEYL
        k1 += RIGHT_WEYL
    return c0, c1, c2, c3


@triton.jit
def philox_stream(seed_low, seed_high, step, step_offset, purpose, image, copy):
    """The stream of an image and a copy, and whether all numbers are in their ranges."""
    number = step.to(tl.int64)
    if step_offset is not None:
        number += tl.load(step_offset)
    known = (image >= 0) & (image < WORD) & (copy >= 0) & (copy < MAX_COPIES) & (number >= 0) & (number < WORD)
    last = (copy.to(tl.uint32) << 8) | purpose.to(tl.uint32)
    words = (seed_low.to(tl.uint32), seed_high.to(tl.uint32), image.to(tl.uint32), number.to(tl.uint32), last)
    return words, known


@triton.jit
def uniform_of(word, low, width):
    """The upper 24 bits are what a float32 holds exactly, so every draw is below 1."""
    return (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08 * width + low


@triton.jit
def uniform_in_fours(first, stream, low, width, BLOCK: tl.constexpr):
    """Draws first .. first + BLOCK of a stream, where `first` is a multiple of four."""
    block = (first // 4).to(tl.uint32) + tl.arange(0, BLOCK // 4).to(tl.uint32)
    w0, w1, w2, w3 = philox_words(block, stream)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK,))
    return uniform_of(words, low, width)


@triton.jit
def uniform_at(element, stream, low, width):
    """Draws of a stream at any places."""
    w0, w1, w2, w3 = philox_words((element // 4).to(tl.uint32), stream)
    lane = element % 4
    word = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
    return uniform_of(word, low, width)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "step", "purpose"])
def _philox_uniform_kernel(
    seed_low: tl.int64,
    seed_high: tl.int64,
    step: tl.int64,
    step_offset,
    purpose: tl.int64,
    indices,
    low: tl.float32,
    width: tl.float32,
    elements,
    blocks,
    out,
    BLOCK: tl.constexpr,
):
    images, image_stride, copies, copy_stride, count = indices
    row = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    image = tl.load(images + row % count * image_stride)
    copy = tl.load(copies + row // count * copy_stride)
    stream, known = philox_stream(seed_low, seed_high, step, step_offset, purpose, image, copy)
    draws = tl.where(known, uniform_in_fours(first, stream, low, width, BLOCK), float("nan"))
    element = first + tl.arange(0, BLOCK)
    tl.store(out + row * elements + element, draws, mask=element < elements)
