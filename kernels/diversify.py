"""From images to the model's input batch, and the adjoint.

Both gather, per pixel of what is written: where images are resized, from tables of taps that a kernel of their own
makes for every copy, image and dimension. What a copy is resized from has to lie in memory, so if it is noisy or mixed
it is built there first.
"""

import torch
import triton
import triton.language as tl

from alignfast.kernels.launch import Choice, blocks_of, for_elements, for_pixels, launch
from alignfast.kernels.philox_uniform import check_draws, philox_stream, uniform_at, uniform_in_fours
from alignfast.kernels.scalar import divide, flat_offset, is_flat, narrow, wide_dtype, widen
from alignfast.ops.diversify import _check, _check_backward

# Positions of a table that a program makes at a time, and those it looks at to find the first that takes from a pixel.
TAPS = Choice(block=128, warps=4)
CANDIDATES = tl.constexpr(8)


def diversify(
    images,
    copies,
    noise_radius,
    noise_key,
    noise_images,
    noise_copies,
    pool,
    partner,
    weight,
    scale,
    resized,
    top,
    left,
    padded,
    mean,
    std,
    dtype,
    channels_last,
    noise_step=None,
):
    """[K N, C, H, W], as torch.ops.alignfast.diversify."""
    geometry = (scale, resized, top, left, padded)
    noise = (noise_radius, noise_key, noise_images, noise_copies)
    _check(images, copies, *noise, pool, partner, weight, *geometry, mean, std, dtype, channels_last, noise_step)
    shape = (copies * len(images), *images.shape[1:])
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty(shape, dtype=dtype, device=images.device, memory_format=memory_format)
    if out.numel() == 0:
        return out
    wide, value = wide_dtype(images.dtype)
    # The [K, N] and [C] numbers are a few hundred, and one layout of them all keeps the kernels apart from theirs.
    grid = [None if part is None else part.contiguous() for part in (partner, weight, scale)]
    mean, std = (None if part is None else part.contiguous() for part in (mean, std))
    if noise_images is not None:
        check_draws("images", images.shape[1:].numel())
        seed_low, seed_high, step, purpose = noise_key
        indices = (noise_images, noise_images.stride(0), noise_copies, noise_copies.stride(0))
        noise = (seed_low, seed_high, step, noise_step, purpose, indices, -noise_radius, 2 * noise_radius)
    else:
        noise = (0, 0, 0, None, 0, None, 0.0, 0.0)
    mixing = (None, None, None, None, 0) if pool is None else (pool, pool.stride(), *grid[:2], len(pool))
    if resized is None:
        _copy(images, out, value, noise, mixing, grid[2], (mean, std))
        return out
    source = images
    if noise_images is not None or pool is not None:
        source = images.new_empty(shape, dtype=wide)
        _copy(images, source, value, noise, mixing, None, (None, None))
    taps = 2 if padded == images.shape[2] else 4
    index, weights = _tables(resized, top, left, padded, images.shape[2], taps, wide, _forward_taps_kernel)
    pixels, channels = images.shape[2:].numel(), images.shape[1]
    choice = for_pixels(pixels)
    blocks = blocks_of(choice.block, pixels)
    launch(
        _resize_kernel,
        images,
        len(out) * blocks,
        choice,
        source,
        source.stride(),
        len(source),
        (index, weights),
        grid[2],
        (mean, std),
        out,
        _pixel_strides(out),
        (channels, images.shape[2], pixels),
        blocks,
        TAPS=taps,
        BLOCK=choice.block,
        WIDE=value,
    )
    return out


def diversify_backward(grad, copies, scale, resized, top, left, padded, std, dtype):
    """[N, C, H, W], as torch.ops.alignfast.diversify_backward."""
    _check_backward(grad, copies, scale, resized, top, left, padded, std, dtype)
    count, channels, height, width = len(grad) // copies, *grad.shape[1:]
    out = grad.new_empty((count, channels, height, width), dtype=dtype)
    if out.numel() == 0:
        return out
    wide, value = wide_dtype(dtype)
    scale, std = (None if part is None else part.contiguous() for part in (scale, std))
    tables, span = (None, None), 0
    if resized is not None:
        span = sources_of(width, padded)
        tables = _tables(resized, top, left, padded, width, span, wide, _adjoint_taps_kernel)
    pixels = height * width
    if resized is None:
        itemsize = max(grad.element_size(), out.element_size())
        choice = for_elements(itemsize, scattered=grad.stride(3) != 1)
    else:
        choice = for_pixels(pixels)
    blocks = blocks_of(choice.block, pixels)
    launch(
        _adjoint_kernel,
        grad,
        count * blocks,
        choice,
        grad,
        grad.stride(),
        copies,
        tables,
        scale,
        std,
        out,
        (count, channels, height, width, pixels),
        blocks,
        SPAN=span,
        FLAT=is_flat(grad),
        BLOCK=choice.block,
        WIDE=value,
    )
    return out


def sources_of(size, padded):
    """How many neighbouring positions of the result take from one pixel, at most.

    Those that do lie less than (resized + size) / padded from a point, or less than resized / size where nothing is
    resized back.
    """
    return 2 if padded == size else 4


def _copy(images, out, value, noise, mixing, scale, normalisation):
    """Into `out` what does not need the neighbours of a pixel."""
    pixels = images.shape[2:].numel()
    choice = for_elements(images.element_size(), scattered=not out.is_contiguous())
    blocks = blocks_of(choice.block, pixels)
    launch(
        _copy_kernel,
        images,
        len(out) * blocks,
        choice,
        images,
        images.stride(),
        *noise,
        mixing,
        scale,
        normalisation,
        out,
        _pixel_strides(out),
        (len(images), images.shape[1], images.shape[3], pixels),
        blocks,
        FLAT=is_flat(images),
        FLAT_POOL=mixing[0] is None or is_flat(mixing[0]),
        IN_FOURS=pixels % 4 == 0,
        BLOCK=choice.block,
        WIDE=value,
    )


def _pixel_strides(out):
    """From image to image, channel to channel and pixel to pixel."""
    channels, pixels = out.shape[1], out.shape[2:].numel()
    interleaved = not out.is_contiguous()
    return (channels * pixels, *((1, channels) if interleaved else (pixels, 1)))


def _tables(resized, top, left, padded, size, taps, wide, kernel):
    rows = resized.numel()
    heads = 1 if kernel is _adjoint_taps_kernel else taps
    index = resized.new_empty((rows, 2, size, heads), dtype=torch.int32)
    weights = resized.new_empty((rows, 2, size, taps), dtype=wide)
    places = tuple(part.contiguous() for part in (resized, top, left))
    blocks = blocks_of(TAPS.block, size)
    launch(
        kernel,
        resized,
        2 * rows * blocks,
        TAPS,
        places,
        padded,
        size,
        blocks,
        index,
        weights,
        TAPS=taps,
        BLOCK=TAPS.block,
    )
    return index, weights


@triton.jit
def _place_of(places, padded, row, dimension):
    """Side and offset of a copy, whether they are allowed, and whether the copy is resized."""
    resized = tl.load(places[0] + row)
    top = tl.load(places[1] + row)
    left = tl.load(places[2] + row)
    room = padded - resized
    inside = (top >= 0) & (top <= room) & (left >= 0) & (left <= room)
    allowed = (resized >= 0) & (room >= 0) & ((resized == 0) | inside)
    return resized, tl.where(dimension == 0, top, left), allowed


@triton.jit
def _bilinear_taps(point, size, weight):
    """Index and weight of the two samples around a point, border values repeated."""
    last = tl.cast(size, tl.int64) - 1
    within = tl.minimum(tl.maximum(point, 0.0), last.to(tl.float64))
    index = within.to(tl.int64)
    share = within - index.to(tl.float64)
    return index, weight * (1 - share), tl.minimum(index + 1, last), weight * share


@triton.jit
def _resize_taps(position, size, resized, offset, weight):
    """Those of a position in the padded image; in the padding all weights are zero."""
    inner = position - offset
    inside = (inner >= 0) & (inner < resized)
    step = tl.cast(size, tl.float64) / tl.maximum(resized, 1).to(tl.float64)
    return _bilinear_taps((inner.to(tl.float64) + 0.5) * step - 0.5, size, tl.where(inside, weight, 0.0))


@triton.jit
def _taps(position, size, resized, offset, padded, COUNT: tl.constexpr):
    """Those of a position in the result, always as four; without padding the last two have no weight."""
    one = tl.full(position.shape, 1.0, tl.float64)
    if COUNT == 2:
        i0, w0, i1, w1 = _resize_taps(position, size, resized, offset, one)
        i2, w2, i3, w3 = i1, w1 * 0, i1, w1 * 0
    else:
        back = tl.cast(padded, tl.float64) / tl.cast(size, tl.float64)
        first, near, second, far = _bilinear_taps((position.to(tl.float64) + 0.5) * back - 0.5, padded, one)
        i0, w0, i1, w1 = _resize_taps(first, size, resized, offset, near)
        i2, w2, i3, w3 = _resize_taps(second, size, resized, offset, far)
    whole = resized == 0
    i0 = tl.where(whole, position, i0)
    w0 = tl.where(whole, 1.0, w0)
    w1 = tl.where(whole, 0.0, w1)
    w2 = tl.where(whole, 0.0, w2)
    w3 = tl.where(whole, 0.0, w3)
    return (i0, i1, i2, i3), (w0, w1, w2, w3)


@triton.jit
def _forward_taps_kernel(places, padded, size, blocks, index, weights, TAPS: tl.constexpr, BLOCK: tl.constexpr):
    """What every position is made of, in one dimension of one copy."""
    line = (tl.program_id(0) // blocks).to(tl.int64)
    position = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = position < size
    resized, offset, allowed = _place_of(places, padded, line // 2, line % 2)
    found, shares = _taps(position, size, resized, offset, padded, TAPS)
    at = (line * size + position) * TAPS
    for tap in tl.static_range(TAPS):
        tl.store(index + at + tap, tl.where(allowed, found[tap], 0).to(tl.int32), mask=inside)
        share = tl.where(allowed, shares[tap], float("nan"))
        tl.store(weights + at + tap, share.to(weights.dtype.element_ty), mask=inside)


@triton.jit
def _share_of(position, source, size, resized, offset, padded, TAPS: tl.constexpr):
    """The weight of `source` in a position."""
    index, shares = _taps(position, size, resized, offset, padded, TAPS)
    share = tl.where(index[0] == source, shares[0], 0.0)
    for tap in tl.static_range(1, 4):
        share += tl.where(index[tap] == source, shares[tap], 0.0)
    return tl.where((position >= 0) & (position < size), share, 0.0)


@triton.jit
def _adjoint_taps_kernel(places, padded, size, blocks, first, weights, TAPS: tl.constexpr, BLOCK: tl.constexpr):
    """Which positions every source pixel is in, and with what weights, in one dimension of one copy."""
    line = (tl.program_id(0) // blocks).to(tl.int64)
    source = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = source < size
    resized, offset, allowed = _place_of(places, padded, line // 2, line % 2)
    wide_size = tl.cast(size, tl.float64)
    middle = (source.to(tl.float64) + 0.5) * (resized.to(tl.float64) / wide_size) + offset.to(tl.float64)
    centre = tl.where(resized == 0, source.to(tl.float64), middle * (wide_size / tl.cast(padded, tl.float64)) - 0.5)
    lowest = tl.where(allowed, tl.floor(centre), 0.0).to(tl.int64) - 3
    start = lowest + CANDIDATES
    for back in tl.static_range(CANDIDATES):
        candidate = lowest + (CANDIDATES - 1 - back)
        share = _share_of(candidate, source, size, resized, offset, padded, TAPS)
        start = tl.where(share != 0, candidate, start)
    start = tl.minimum(tl.maximum(start, 0), tl.cast(size, tl.int64) - 1)
    start = tl.where(allowed, start, 0)
    tl.store(first + line * size + source, start.to(tl.int32), mask=inside)
    for tap in tl.static_range(TAPS):
        share = _share_of(start + tap, source, size, resized, offset, padded, TAPS)
        share = tl.where(allowed, share, float("nan"))
        at = (line * size + source) * TAPS + tap
        tl.store(weights + at, share.to(weights.dtype.element_ty), mask=inside)


@triton.jit
def _normalised(value, normalisation, channel, WIDE: tl.constexpr):
    if normalisation[0] is not None:
        value = value - widen(tl.load(normalisation[0] + channel), WIDE)
    if normalisation[1] is not None:
        value = divide(value, widen(tl.load(normalisation[1] + channel), WIDE))
    return value


@triton.jit(do_not_specialize=["seed_low", "seed_high", "step", "purpose"])
def _copy_kernel(
    images,
    strides,
    seed_low: tl.int64,
    seed_high: tl.int64,
    step: tl.int64,
    step_offset,
    purpose: tl.int64,
    noise,
    noise_low: tl.float32,
    noise_width: tl.float32,
    mixing,
    scale,
    normalisation,
    out,
    out_strides,
    sizes,
    blocks,
    FLAT: tl.constexpr,
    FLAT_POOL: tl.constexpr,
    IN_FOURS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """(scale (x + noise + weight x') - mean) / std of some pixels of a copy, channel by channel."""
    count, channels, width, pixels = sizes
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    pixel = start + tl.arange(0, BLOCK)
    inside = pixel < pixels
    image = row % count
    source = images + image * strides[0] + flat_offset(pixel, width, strides[2], strides[3], FLAT)
    target = out + row * out_strides[0] + pixel * out_strides[2]
    if noise is not None:
        image_index = tl.load(noise[0] + image * noise[1])
        copy_index = tl.load(noise[2] + row // count * noise[3])
        stream, known = philox_stream(seed_low, seed_high, step, step_offset, purpose, image_index, copy_index)
    if mixing[0] is not None:
        partner = tl.load(mixing[2] + row)
        weight = widen(tl.load(mixing[3] + row), WIDE)
        exists = (partner >= 0) & (partner < mixing[4])
        weight = tl.where(exists, weight, float("nan"))
        other = tl.where(exists, partner, 0) * mixing[1][0]
        other += flat_offset(pixel, width, mixing[1][2], mixing[1][3], FLAT_POOL)
    if scale is not None:
        factor = widen(tl.load(scale + row), WIDE)
    for channel in range(channels):
        value = widen(tl.load(source + tl.cast(channel, tl.int64) * strides[1], mask=inside, other=0.0), WIDE)
        if noise is not None:
            element = tl.cast(channel, tl.int64) * pixels + start
            if IN_FOURS:
                draws = uniform_in_fours(element, stream, noise_low, noise_width, BLOCK)
            else:
                draws = uniform_at(element + tl.arange(0, BLOCK), stream, noise_low, noise_width)
            value += tl.where(known, draws, float("nan")).to(WIDE)
        if mixing[0] is not None:
            exists_here = inside & exists
            at = mixing[0] + other + tl.cast(channel, tl.int64) * mixing[1][1]
            value += weight * widen(tl.load(at, mask=exists_here, other=0.0), WIDE)
        if scale is not None:
            value = value * factor
        value = _normalised(value, normalisation, channel, WIDE)
        at = target + tl.cast(channel, tl.int64) * out_strides[1]
        tl.store(at, narrow(value, out.dtype.element_ty), mask=inside)


@triton.jit
def _resize_kernel(
    source,
    strides,
    source_count,
    tables,
    scale,
    normalisation,
    out,
    out_strides,
    sizes,
    blocks,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Some pixels of a resized copy, of up to TAPS rows times TAPS columns each, channel by channel."""
    channels, size, pixels = sizes
    row = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    down = ((2 * row) * size + pixel // size) * TAPS
    along = ((2 * row + 1) * size + pixel % size) * TAPS
    for channel in range(channels):
        start = source + row % source_count * strides[0] + tl.cast(channel, tl.int64) * strides[1]
        total = tl.zeros((BLOCK,), WIDE)
        for i in tl.static_range(TAPS):
            y = tl.load(tables[0] + down + i, mask=inside, other=0).to(tl.int64)
            weight = tl.load(tables[1] + down + i, mask=inside, other=0.0)
            line = tl.zeros((BLOCK,), WIDE)
            for j in tl.static_range(TAPS):
                x = tl.load(tables[0] + along + j, mask=inside, other=0).to(tl.int64)
                share = tl.load(tables[1] + along + j, mask=inside, other=0.0)
                # Not read where the weight is zero, as there are pixels that are no numbers.
                wanted = (weight != 0) & (share != 0)
                line += share * widen(tl.load(start + y * strides[2] + x * strides[3], mask=wanted, other=0.0), WIDE)
            total += weight * line
        if scale is not None:
            total = total * widen(tl.load(scale + row), WIDE)
        total = _normalised(total, normalisation, channel, WIDE)
        at = (
            out
            + row * out_strides[0]
            + tl.cast(channel, tl.int64) * out_strides[1]
            + tl.cast(pixel, tl.int64) * out_strides[2]
        )
        tl.store(at, narrow(total, out.dtype.element_ty), mask=inside)


@triton.jit
def _adjoint_kernel(
    grad,
    strides,
    copies,
    tables,
    scale,
    std,
    out,
    sizes,
    blocks,
    SPAN: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Some pixels of the gradient of an image: what came back for each copy, in their order."""
    count, channels, height, width, pixels = sizes
    image = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    for channel in range(channels):
        total = tl.zeros((BLOCK,), WIDE)
        for copy in range(copies):
            row = tl.cast(copy, tl.int64) * count + image
            start = grad + row * strides[0] + tl.cast(channel, tl.int64) * strides[1]
            if SPAN == 0:
                at = flat_offset(pixel, width, strides[2], strides[3], FLAT)
                found = widen(tl.load(start + at, mask=inside, other=0.0), WIDE)
            else:
                found = _gathered(start, strides, tables, row, pixel, inside, height, width, SPAN, BLOCK, WIDE)
            if std is not None:
                found = divide(found, widen(tl.load(std + channel), WIDE))
            if scale is not None:
                found = found * widen(tl.load(scale + row), WIDE)
            total += found
        at = out + (image * channels + channel) * pixels + pixel
        tl.store(at, narrow(total, out.dtype.element_ty), mask=inside)


@triton.jit
def _gathered(
    start,
    strides,
    tables,
    row,
    pixel,
    inside,
    height,
    width,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The sum over the positions that some pixels went into."""
    down = (2 * row) * height + pixel // width
    along = (2 * row + 1) * height + pixel % width
    y = tl.load(tables[0] + down, mask=inside, other=0).to(tl.int64)
    x = tl.load(tables[0] + along, mask=inside, other=0).to(tl.int64)
    total = tl.zeros((BLOCK,), WIDE)
    for i in tl.static_range(SPAN):
        weight = tl.load(tables[1] + down * SPAN + i, mask=inside, other=0.0)
        line = tl.zeros((BLOCK,), WIDE)
        for j in tl.static_range(SPAN):
            share = tl.load(tables[1] + along * SPAN + j, mask=inside, other=0.0)
            # NaN is the weight of a copy whose geometry is none, and may lie outside.
            wanted = (weight != 0) & (share != 0) & (y + i < height) & (x + j < width)
            at = start + (y + i) * strides[2] + (x + j) * strides[3]
            line += share * widen(tl.load(at, mask=wanted, other=0.0), WIDE)
        total += weight * line
    return total
