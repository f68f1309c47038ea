"""The passes over a batch of a sign_step. Every program has a stretch of one image; what is summed over an image is
summed for each stretch first, and by every program of the next pass once more, in a fixed order.
"""

import torch
import triton
import triton.language as tl

from alignfast.kernels.launch import blocks_of, for_elements, launch
from alignfast.kernels.scalar import clamped, divide, narrow, number, rounded_to, wide_dtype, widen
from alignfast.ops.sign_step import _check

# Partial results that a program folds at a time.
FOLD = tl.constexpr(256)


def sign_step(adv, images, grad, momentum, alpha, eps, decay, low, high, norm):
    """In place, as torch.ops.alignfast.sign_step."""
    _check(adv, images, grad, momentum, alpha, eps, decay, low, high, norm)
    _check_memory(adv, images, grad, momentum)
    if images.numel() == 0:
        return
    tensors = (adv, images, grad, adv if momentum is None else momentum)
    order = _memory_order(adv)
    strides = tuple((x.stride(0), *(x.stride(dim) for dim in order)) for x in tensors)
    sizes = tuple(images.shape[dim] for dim in order)
    elements = sizes[0] * sizes[1] * sizes[2]
    choice = for_elements(images.element_size())
    blocks = blocks_of(choice.block, elements)
    batch = (*zip(tensors, strides, strict=True), elements, sizes[1:], blocks)
    wide = wide_dtype(images.dtype)[1]
    constants = {
        "BLOCK": choice.block,
        "DENSE": all(_is_dense(s[1:], sizes) for s in strides),
        "WIDE": wide,
        "MOMENTUM": momentum is not None,
    }
    steps = _linf if norm == "linf" else _l2
    steps(batch, (alpha, eps, decay, low, high), len(images) * blocks, choice, constants)


def _check_memory(adv, images, grad, momentum):
    written = {"adv": adv} if momentum is None else {"momentum": momentum, "adv": adv}
    for name, tensor in written.items():
        for dim, size in enumerate(tensor.shape):
            if size > 1 and tensor.stride(dim) == 0:
                raise ValueError(
                    f"{name}: got a tensor expanded along dimension {dim}; allowed is one with memory for every element"
                )
        for other_name, other in {"adv": adv, "images": images, "grad": grad}.items():
            if name != other_name and tensor.numel() and tensor.data_ptr() == other.data_ptr() and not adv.is_meta:
                raise ValueError(f"{name}, {other_name}: got one memory for both; allowed is tensors of their own")


def _memory_order(adv):
    """The dimensions of an image from the longest stride to the shortest."""
    order = [1, 2, 3]
    return sorted(order, key=lambda dim: (adv.shape[dim] != 1) * adv.stride(dim), reverse=True)


def _is_dense(strides, sizes):
    expected = 1
    for stride, size in zip(reversed(strides), reversed(sizes), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _linf(batch, numbers, programs, choice, constants):
    adv = batch[0][0]
    partials = None
    if constants["MOMENTUM"]:
        partials = _partials(adv, programs)
        launch(_l1_kernel, adv, programs, choice, batch, partials, **_without(constants, "MOMENTUM"))
    launch(_linf_kernel, adv, programs, choice, batch, partials, *numbers, **constants)


def _l2(batch, numbers, programs, choice, constants):
    adv = batch[0][0]
    alpha, eps, decay, low, high = numbers
    l1, largest, squares, distances = (_partials(adv, programs) for _ in range(4))
    if constants["MOMENTUM"]:
        launch(_l1_kernel, adv, programs, choice, batch, l1, **_without(constants, "MOMENTUM"))
    launch(_l2_direction_kernel, adv, programs, choice, batch, l1, largest, decay, **constants)
    launch(_l2_length_kernel, adv, programs, choice, batch, largest, squares, **constants)
    launch(_l2_move_kernel, adv, programs, choice, batch, largest, squares, distances, alpha, **constants)
    rest = _without(constants, "MOMENTUM")
    launch(_l2_project_kernel, adv, programs, choice, batch, distances, eps, low, high, **rest)


def _partials(adv, programs):
    return adv.new_empty(programs, dtype=torch.float64)


def _without(constants, name):
    return {key: value for key, value in constants.items() if key != name}


# A batch is (adv, images, grad, momentum, elements, sizes, blocks): four pairs of a tensor and its strides, that of the
# images first and then those of an image in the order of adv's memory; the elements of an image; the last two of the
# sizes of an image; the blocks of an image.


@triton.jit
def _part(batch, BLOCK: tl.constexpr):
    """The image of this program, and its elements in the order of adv's memory."""
    program = tl.program_id(0)
    image = (program // batch[6]).to(tl.int64)
    element = (program % batch[6]).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return image, element, element < batch[4]


@triton.jit
def _place(tensor, image, element, sizes, DENSE: tl.constexpr):
    strides = tensor[1]
    start = tensor[0] + image * strides[0]
    if DENSE:
        return start + element
    row = element // sizes[1]
    first, second = row // sizes[0], row % sizes[0]
    return start + first * strides[1] + second * strides[2] + element % sizes[1] * strides[3]


@triton.jit
def _load(tensor, image, element, inside, sizes, DENSE: tl.constexpr, WIDE: tl.constexpr):
    return widen(tl.load(_place(tensor, image, element, sizes, DENSE), mask=inside, other=0.0), WIDE)


@triton.jit
def _store(value, tensor, image, element, inside, sizes, DENSE: tl.constexpr):
    tl.store(_place(tensor, image, element, sizes, DENSE), narrow(value, tensor[0].dtype.element_ty), mask=inside)


@triton.jit
def _sum_of(partials, image, blocks):
    total = tl.zeros((FOLD,), tl.float64)
    for start in range(0, blocks, FOLD):
        index = start + tl.arange(0, FOLD)
        total += tl.load(partials + image * blocks + index, mask=index < blocks, other=0.0)
    return tl.sum(total)


@triton.jit
def _max(x):
    """NaN wins, as it does in torch.amax."""
    return tl.where(tl.sum((x != x).to(tl.int32)) > 0, float("nan"), tl.max(tl.where(x != x, 0.0, x)))


@triton.jit
def _max_of(partials, image, blocks):
    largest = tl.zeros((FOLD,), tl.float64)
    for start in range(0, blocks, FOLD):
        index = start + tl.arange(0, FOLD)
        found = tl.load(partials + image * blocks + index, mask=index < blocks, other=0.0)
        largest = tl.where((largest > found) | (largest != largest), largest, found)
    return _max(largest)


@triton.jit
def _normalised(grad, size):
    """grad / size, and zero where the whole gradient of an image is zero."""
    return tl.where(size > 0, divide(grad, tl.where(size > 0, size, 1.0)), 0.0)


@triton.jit
def _next_momentum(momentum, grad, decay, mean, T: tl.constexpr):
    return rounded_to(momentum * decay + _normalised(grad, mean), T)


@triton.jit
def _direction(batch, image, element, inside, DENSE: tl.constexpr, WIDE: tl.constexpr, MOMENTUM: tl.constexpr):
    """What the L2 rule follows: the momentum, or the gradient where there is none."""
    if MOMENTUM:
        return _load(batch[3], image, element, inside, batch[5], DENSE, WIDE)
    return _load(batch[2], image, element, inside, batch[5], DENSE, WIDE)


@triton.jit
def _l1_kernel(batch, partials, BLOCK: tl.constexpr, DENSE: tl.constexpr, WIDE: tl.constexpr):
    """Sum of |grad| for every program."""
    image, element, inside = _part(batch, BLOCK)
    grad = _load(batch[2], image, element, inside, batch[5], DENSE, WIDE)
    tl.store(partials + tl.program_id(0), tl.sum(tl.abs(grad.to(tl.float64))))


@triton.jit
def _linf_kernel(
    batch,
    l1,
    alpha: tl.float64,
    eps: tl.float64,
    decay: tl.float64,
    low: tl.float64,
    high: tl.float64,
    BLOCK: tl.constexpr,
    DENSE: tl.constexpr,
    WIDE: tl.constexpr,
    MOMENTUM: tl.constexpr,
):
    """The whole L-infinity step."""
    T: tl.constexpr = batch[0][0].dtype.element_ty
    image, element, inside = _part(batch, BLOCK)
    sizes = batch[5]
    # Asked for before the mean is found, which takes as long as memory takes to answer.
    adv = _load(batch[0], image, element, inside, sizes, DENSE, WIDE)
    clean = _load(batch[1], image, element, inside, sizes, DENSE, WIDE)
    direction = _load(batch[2], image, element, inside, sizes, DENSE, WIDE)
    if MOMENTUM:
        momentum = _load(batch[3], image, element, inside, sizes, DENSE, WIDE)
        mean = (_sum_of(l1, image, batch[6]) / batch[4]).to(WIDE)
        direction = _next_momentum(momentum, direction, number(decay, WIDE), mean, T)
        _store(direction, batch[3], image, element, inside, sizes, DENSE)
    sign = (direction > 0).to(WIDE) - (direction < 0).to(WIDE)
    radius = number(eps, WIDE)
    delta = clamped(adv + number(alpha, WIDE) * sign - clean, -radius, radius)
    moved = rounded_to(clean + delta, T)
    moved = clamped(moved, rounded_to(number(low, WIDE), T), rounded_to(number(high, WIDE), T))
    _store(moved, batch[0], image, element, inside, sizes, DENSE)


@triton.jit
def _l2_direction_kernel(
    batch,
    l1,
    largest,
    decay: tl.float64,
    BLOCK: tl.constexpr,
    DENSE: tl.constexpr,
    WIDE: tl.constexpr,
    MOMENTUM: tl.constexpr,
):
    """Brings the momentum up to date, if there is one; finds the largest |direction| for every program."""
    image, element, inside = _part(batch, BLOCK)
    direction = _direction(batch, image, element, inside, DENSE, WIDE, MOMENTUM)
    if MOMENTUM:
        grad = _load(batch[2], image, element, inside, batch[5], DENSE, WIDE)
        mean = (_sum_of(l1, image, batch[6]) / batch[4]).to(WIDE)
        direction = _next_momentum(direction, grad, number(decay, WIDE), mean, batch[3][0].dtype.element_ty)
        direction = tl.where(inside, direction, 0.0)
        _store(direction, batch[3], image, element, inside, batch[5], DENSE)
    tl.store(largest + tl.program_id(0), _max(tl.abs(direction)).to(tl.float64))


@triton.jit
def _l2_length_kernel(
    batch,
    largest,
    squares,
    BLOCK: tl.constexpr,
    DENSE: tl.constexpr,
    WIDE: tl.constexpr,
    MOMENTUM: tl.constexpr,
):
    """Sum of (direction / largest)^2 for every program."""
    image, element, inside = _part(batch, BLOCK)
    direction = _direction(batch, image, element, inside, DENSE, WIDE, MOMENTUM)
    value = _normalised(direction, _max_of(largest, image, batch[6]).to(WIDE)).to(tl.float64)
    tl.store(squares + tl.program_id(0), tl.sum(value * value))


@triton.jit
def _l2_move_kernel(
    batch,
    largest,
    squares,
    distances,
    alpha: tl.float64,
    BLOCK: tl.constexpr,
    DENSE: tl.constexpr,
    WIDE: tl.constexpr,
    MOMENTUM: tl.constexpr,
):
    """adv <- adv + alpha direction / length; sum of (adv - image)^2 for every program."""
    T: tl.constexpr = batch[0][0].dtype.element_ty
    image, element, inside = _part(batch, BLOCK)
    adv = _load(batch[0], image, element, inside, batch[5], DENSE, WIDE)
    clean = _load(batch[1], image, element, inside, batch[5], DENSE, WIDE)
    direction = _direction(batch, image, element, inside, DENSE, WIDE, MOMENTUM)
    size = _max_of(largest, image, batch[6]).to(WIDE)
    # At least 1, as the largest element is 1, unless all are zero.
    root = tl.sqrt(_sum_of(squares, image, batch[6]))
    length = tl.where(root < 1.0, 1.0, root).to(WIDE)
    step = divide(_normalised(direction, size), length)
    moved = rounded_to(adv + number(alpha, WIDE) * step, T)
    _store(moved, batch[0], image, element, inside, batch[5], DENSE)
    delta = tl.where(inside, rounded_to(moved - clean, T), 0.0).to(tl.float64)
    tl.store(distances + tl.program_id(0), tl.sum(delta * delta))


@triton.jit
def _l2_project_kernel(
    batch,
    distances,
    eps: tl.float64,
    low: tl.float64,
    high: tl.float64,
    BLOCK: tl.constexpr,
    DENSE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """adv <- image + (adv - image), shortened to eps and clamped."""
    T: tl.constexpr = batch[0][0].dtype.element_ty
    image, element, inside = _part(batch, BLOCK)
    moved = _load(batch[0], image, element, inside, batch[5], DENSE, WIDE)
    clean = _load(batch[1], image, element, inside, batch[5], DENSE, WIDE)
    distance = tl.sqrt(_sum_of(distances, image, batch[6]))
    radius = number(eps, tl.float64)
    shrink = tl.where(distance > radius, radius / tl.where(distance > 0, distance, 1.0), 1.0).to(WIDE)
    delta = rounded_to(rounded_to(moved - clean, T) * shrink, T)
    moved = clamped(rounded_to(clean + delta, T), rounded_to(number(low, WIDE), T), rounded_to(number(high, WIDE), T))
    _store(moved, batch[0], image, element, inside, batch[5], DENSE)
