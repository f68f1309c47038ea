"""Runs every op on fixed inputs, forward and backward, and prints a hash of each result as JSON.

    python tests/native/every_op.py [THREADS]

ALIGNFAST_EMULATED may name a library whose kernels serve instead of the CPU's.
Needs torch alone: the package is taken without its __init__, which would import the models.
"""

import hashlib
import json
import math
import os
import sys
import types
from itertools import product
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def import_ops():
    package = types.ModuleType("alignfast")
    package.__path__ = [str(ROOT / "alignfast")]
    sys.modules["alignfast"] = package
    # Instead of the script's own folder, whose modules are not top-level ones.
    sys.path[0] = str(ROOT)
    from alignfast import ops
    from tests import cases

    return ops, cases


ops, cases = import_ops()


def hash_of(*tensors):
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def with_gradient(result, *inputs):
    weight = cases.random(result.shape, 99, result.dtype, low=-1)
    return hash_of(result, *torch.autograd.grad(result, inputs, weight))


def label(*parts):
    return " ".join(getattr(part, "__name__", str(part)) for part in parts)


def sign_step():
    images = [*product(cases.IMAGES, cases.DTYPES, [cases.contiguous])]
    images += product([(2, 3, 7, 5), (5, 3, 9, 33)], cases.DTYPES, cases.IMAGE_LAYOUTS)
    images += product([(2, 3, 96, 101)], cases.DTYPES, [cases.contiguous, cases.channels_last])
    for (shape, dtype, layout), norm, moving in product(images, ["linf", "l2"], [False, True]):
        image = cases.random(shape, 1, dtype)
        adv = layout((image + cases.random(shape, 2, dtype, low=-0.1, high=0.1)).clamp(0, 1))
        grad = layout(cases.random(shape, 3, dtype, low=-0.02, high=0.02))
        momentum = layout(cases.random(shape, 4, dtype, low=-1)) if moving else None
        ops.sign_step(adv, image, grad, momentum, alpha=0.03, eps=0.11, decay=0.9 if moving else 0.0, norm=norm)
        yield label(shape, dtype, layout, norm, moving), hash_of(adv, *([momentum] if moving else []))


def philox_uniform():
    for shape, (low, high) in product([(), (0,), (1,), (3, 7, 5), (3, 96, 101)], [(0.0, 1.0), (-0.3, 0.7)]):
        images, copies = cases.integers((4,), 1, 0, 2**32), cases.integers((3,), 2, 0, 2**24)
        draws = ops.philox_uniform(images, copies, shape, seed=2**63 + 5, step=7, purpose=3, low=low, high=high)
        yield label(shape, low), hash_of(draws)


def smooth():
    for (shape, size), dtype, layout in product(
        [*cases.SMOOTHING, ((2, 3, 24, 101), 9)], cases.DTYPES, cases.IMAGE_LAYOUTS
    ):
        grad = layout(cases.random(shape, 1, dtype, low=-1)).requires_grad_()
        kernel = cases.random((size,), 2, dtype, low=-0.5)
        yield label(shape, size, dtype, layout), with_gradient(ops.smooth(grad, kernel), grad)


def depthwise_conv2d():
    """Without the gradient of the bias, which is a sum by torch."""
    convolutions = [((0, 3, 5, 5), 3, 1), ((1, 1, 1, 1), 1, 1), ((2, 15, 7, 5), 3, 2), ((3, 18, 5, 6), 2, 3)]
    convolutions = [*product(convolutions, cases.DTYPES, cases.IMAGE_LAYOUTS)]
    convolutions += product([((9, 33, 28, 31), 3, 1), ((17, 130, 9, 14), 5, 2)], cases.DTYPES, [cases.channels_last])
    for ((shape, size, step), dtype, layout), clip in product(convolutions, [(-math.inf, math.inf), (-0.4, 0.7)]):
        images = layout(cases.random(shape, 1, dtype, low=-1)).requires_grad_()
        weight = cases.random((shape[1], 1, size, size), 2, dtype, low=-1).requires_grad_()
        bias = cases.random(shape[1:2], 3, dtype, low=-1)
        around = {"stride": (step, step), "padding": (size // 2, size // 2, 1, 0), "before": clip, "after": clip}
        result = ops.depthwise_conv2d(images, weight, bias, **around)
        yield label(shape, size, step, dtype, layout, clip), with_gradient(result, images, weight)


def inverted_residual():
    residuals = [((1, 1, 1, 1), 1, 1, 1, 1), ((2, 15, 7, 5), 49, 17, 3, 2), ((3, 8, 14, 15), 100, 33, 5, 1)]
    clips = [(-math.inf, math.inf), (-0.4, 0.7)]
    for (shape, middle, channels, size, step), dtype, clip in product(residuals, cases.DTYPES, clips):
        shapes = [(middle, shape[1], 1, 1), (middle,), (middle, 1, size, size), (middle,)]
        shapes += [(channels, middle, 1, 1), (channels,)]
        weights = [cases.random(one, seed, dtype, low=-1) for seed, one in enumerate(shapes, 2)]
        images = cases.random(shape, 1, dtype, low=-1).requires_grad_()
        around = {"stride": (step, step), "padding": (size // 2, size // 2, 1, 0), "clip": clip}
        result = ops.inverted_residual(images, ops.PackedResidual.of(*weights), **around)
        yield label(shape, middle, channels, size, step, dtype, clip), with_gradient(result, images)


def winograd_conv2d():
    """Without the gradients of the weight and the bias, which are torch's."""
    convolutions = [((1, 1, 1, 1), 1, 1), ((2, 15, 7, 5), 33, 1), ((3, 20, 6, 9), 100, 0), ((30, 16, 9, 8), 16, 1)]
    for (shape, channels, padding), dtype in product(convolutions, cases.DTYPES):
        images = cases.random(shape, 1, dtype, low=-1).requires_grad_()
        weight = cases.random((channels, shape[1], 3, 3), 2, dtype, low=-1)
        result = ops.winograd_conv2d(images, weight, cases.random((channels,), 3, dtype), padding=(padding, 1))
        yield label(shape, channels, padding, dtype), with_gradient(result, images)


def basic_block():
    blocks = [((1, 1, 1, 1), 1), ((2, 15, 7, 5), 33), ((3, 20, 6, 9), 100), ((30, 16, 9, 8), 16)]
    for (shape, middle), dtype in product(blocks, cases.DTYPES):
        channels = shape[1]
        shapes = [(middle, channels, 3, 3), (middle,), (channels, middle, 3, 3), (channels,)]
        weights = [cases.random(one, seed, dtype, low=-1) for seed, one in enumerate(shapes, 2)]
        images = cases.random(shape, 1, dtype, low=-1).requires_grad_()
        yield label(shape, middle, dtype), with_gradient(ops.basic_block(images, *weights), images)


def attention():
    shapes = [(1, 1, 1, 1), (2, 17, 3, 5), (1, 70, 2, 16), (3, 33, 5, 24)]
    for (count, length, heads, width), dtype in product(shapes, cases.DTYPES):
        packed = cases.random((count, length, 3, heads, width), 1, dtype, low=-3).requires_grad_()
        yield label(count, length, heads, width, dtype), with_gradient(ops.attention(packed), packed)


def batch_norm():
    shapes = [(2, 1, 3, 4), (1, 15, 2, 3), (3, 18, 5, 6), (2, 64, 3, 3), (9, 33, 28, 31), (40, 130, 14, 14)]
    for shape, dtype, clip in product(shapes, cases.DTYPES, [(-math.inf, math.inf), (-0.4, 0.7)]):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        images = cases.random(shape, 1, dtype, low=-1).requires_grad_()
        weight, bias = (cases.random(shape[1:2], seed, wide, low=-1).requires_grad_() for seed in (2, 3))
        result, mean, variance = ops.batch_norm(images, weight, bias, clip=clip)
        yield label(shape, dtype, clip), hash_of(mean, variance) + with_gradient(result, images, weight, bias)


def kl_div_with_logits():
    options = [
        (direction, "batchmean", "mean", witnesses)
        for direction, witnesses in product(["forward", "reverse", "symmetric", "jsd"], [None, 3])
    ]
    options += [("forward", "sum", "max", 3), ("jsd", "none", "min", 3)]
    inputs = [*product(cases.LOGITS, cases.DTYPES, [cases.contiguous])]
    inputs += product([(5, 37)], cases.DTYPES, cases.MATRIX_LAYOUTS)
    inputs += product([(20, 1000)], cases.DTYPES, [cases.contiguous])
    for (shape, dtype, layout), (direction, reduction, combine, witnesses) in product(inputs, options):
        if witnesses and shape[-1] > 1000:
            continue
        student = layout(cases.random(shape, 1, dtype, low=-9, high=9)).requires_grad_()
        wanted = shape if witnesses is None else (witnesses, *shape)
        teacher = layout(cases.random(wanted, 2, dtype, low=-9, high=9))
        loss = ops.kl_div_with_logits(student, teacher, 2.5, direction, reduction, combine)
        yield label(shape, dtype, layout, direction, reduction, combine, witnesses), with_gradient(loss, student)


def diversify():
    inputs = [*product(cases.SQUARES, cases.DTYPES, [cases.contiguous])]
    inputs += product([(2, 3, 7), (2, 3, 33)], cases.DTYPES, cases.IMAGE_LAYOUTS)
    formats = [torch.contiguous_format, torch.channels_last]
    for (shape, dtype, layout), memory_format, parts in product(inputs, formats, ["", "nmse", "l", "nmslz"]):
        count, channels, side = shape
        images = layout(cases.random((count, channels, side, side), 1, dtype)).requires_grad_()
        batch = ops.diversify(images, memory_format=memory_format, **parts_of(parts, images))
        yield label(shape, dtype, layout, memory_format, parts), with_gradient(batch, images)


def parts_of(parts, images):
    """Noise, mixing, scale, shrinking or enlarging geometry and normalisation by their letters."""
    count, channels, side = images.shape[:3]
    copies = 3 if parts else 1
    grid = (copies, count)
    wide = torch.float64 if images.dtype == torch.float64 else torch.float32
    made = {"copies": copies}
    if "n" in parts:
        indices, numbers = cases.integers((count,), 2, 0, 2**32), cases.integers((copies,), 3, 0, 2**24)
        made["noise"] = ops.Noise(0.2, 11, 3, 17, indices, numbers)
    if "m" in parts:
        pool = cases.random((5, *images.shape[1:]), 4, images.dtype)
        made["mixing"] = ops.Mixing(pool, cases.integers(grid, 5, 0, 5), cases.random(grid, 6, wide))
    if "s" in parts:
        made["scale"] = cases.random(grid, 7, wide, low=-1.0)
    if "e" in parts or "l" in parts:
        padded = side if "e" in parts else side + 1 + side // 3
        resized = cases.integers(grid, 8, 1 if padded == side else side, padded + 1)
        top, left = (cases.integers(grid, seed, 0, padded - resized + 1) for seed in (9, 10))
        made["resize_pad"] = ops.ResizePad(resized * (cases.random(grid, 11) < 0.8), top, left, padded)
    if "z" in parts:
        made |= {"mean": cases.random((channels,), 12, wide), "std": cases.random((channels,), 13, wide, low=0.2)}
    return made


OPS = [
    sign_step,
    philox_uniform,
    smooth,
    depthwise_conv2d,
    inverted_residual,
    winograd_conv2d,
    basic_block,
    attention,
    batch_norm,
    kl_div_with_logits,
    diversify,
]


def main():
    if len(sys.argv) > 1:
        torch.set_num_threads(int(sys.argv[1]))
    if "ALIGNFAST_EMULATED" in os.environ:
        torch.ops.load_library(os.environ["ALIGNFAST_EMULATED"])
    print(json.dumps({op.__name__: dict(op()) for op in OPS}))


if __name__ == "__main__":
    main()
