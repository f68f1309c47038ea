"""Prints, for every op and pass, the peak memory beyond what was there before, less the outputs, in bytes a thread.

Needs counted_malloc.c, built and preloaded.
"""

import ctypes
import json
from functools import partial

import torch

from alignfast.ops import (
    Mixing,
    Noise,
    PackedResidual,
    ResizePad,
    attention,
    basic_block,
    batch_norm,
    depthwise_conv2d,
    diversify,
    inverted_residual,
    kl_div_with_logits,
    philox_uniform,
    sign_step,
    smooth,
    winograd_conv2d,
)

THREADS = 2
COUNTED = ctypes.CDLL(None)
COUNTED.counted_current.restype = COUNTED.counted_peak.restype = ctypes.c_long


def beyond_outputs(compute):
    """compute() returns its outputs. Called twice, since at first torch fills its caches."""
    for _ in range(2):
        COUNTED.counted_reset()
        before = COUNTED.counted_current()
        outputs = compute()
        peak = COUNTED.counted_peak() - before
        size = sum(output.numel() * output.element_size() for output in outputs)
        del outputs
    return (peak - size) / THREADS


def adjoint(output, *inputs):
    grad = torch.randn_like(output)
    return lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True)


def divergence(dtype, direction):
    student = torch.randn(256, 21841).to(dtype).requires_grad_()
    teacher = torch.randn(2, 256, 21841).to(dtype)

    def loss():
        return kl_div_with_logits(student, teacher, direction=direction)

    # The gradient is found with the loss, so both of them are outputs of the first pass.
    yield (
        f"kl_div_with_logits {direction}",
        lambda: torch.ops.alignfast.kl_div_with_logits(
            student.detach(), teacher, 4.0, direction, "batchmean", "max", True
        ),
    )
    yield f"kl_div_with_logits {direction} backward", adjoint(loss(), student)


def batches(images, dtype, memory_format):
    grid, count = (5, len(images)), len(images)
    index = torch.arange(count)
    resized = torch.randint(200, 247, grid)
    batch = diversify(
        images,
        copies=5,
        noise=Noise(0.1, 1, 2, 3, index, torch.arange(5)),
        mixing=Mixing(images.detach(), index.expand(grid).contiguous(), torch.rand(grid)),
        scale=torch.rand(grid),
        resize_pad=ResizePad(resized, torch.zeros_like(resized), torch.zeros_like(resized), 246),
        mean=torch.rand(3),
        std=torch.rand(3) + 0.2,
        dtype=dtype,
        memory_format=memory_format,
    )
    return [batch]


def images_ops(dtype):
    images, grad, momentum = (torch.rand(16, 3, 224, 224).to(dtype) for _ in range(3))
    adv, kernel = images.clone(), torch.rand(15).to(dtype)
    for norm in ("linf", "l2"):

        def step(norm=norm):
            sign_step(adv, images, grad, momentum, alpha=0.01, eps=0.1, norm=norm)
            return []

        yield f"sign_step {norm}", step
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf = grad.contiguous(memory_format=layout).requires_grad_()
        yield f"smooth {layout}", lambda leaf=leaf: [smooth(leaf.detach(), kernel)]
        yield f"smooth {layout} backward", adjoint(smooth(leaf, kernel), leaf)
        leaf = images.clone().requires_grad_()
        yield f"diversify {layout}", lambda layout=layout: batches(images, dtype, layout)
        yield f"diversify {layout} backward", adjoint(batches(leaf, dtype, layout)[0], leaf)


def convolutions(dtype):
    images = torch.randn(16, 144, 56, 56).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(144, 1, 3, 3).to(dtype), torch.randn(144).to(dtype)
    for stride in (1, 2):
        convolved = partial(depthwise_conv2d, bias=bias, stride=(stride, stride), padding=(1, 1, 1, 1))
        clipped = partial(convolved, before=(0.0, 6.0), after=(0.0, 6.0))
        name, leaf = f"depthwise_conv2d {stride}", images.clone().requires_grad_()
        yield name, lambda clipped=clipped: [clipped(images, weight)]
        yield f"{name} backward", adjoint(clipped(leaf, weight), leaf)
        # With clips a copy of the images and one of the gradient are made first.
        leaf = weight.clone().requires_grad_()
        yield f"{name} weight", adjoint(convolved(images, leaf), leaf)
    narrow = torch.randn(16, 24, 56, 56).to(dtype).contiguous(memory_format=torch.channels_last)
    packed = PackedResidual.of(
        torch.randn(144, 24, 1, 1).to(dtype), None, weight, bias, torch.randn(24, 144, 1, 1).to(dtype), None
    )
    residual = partial(inverted_residual, packed=packed, padding=(1, 1, 1, 1))
    leaf = narrow.clone().requires_grad_()
    yield "inverted_residual", lambda: [residual(narrow)]
    yield "inverted_residual backward", adjoint(residual(leaf), leaf)
    features = torch.randn(16, 64, 56, 56).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(64, 64, 3, 3).to(dtype)
    leaf = features.clone().requires_grad_()
    yield "winograd_conv2d", lambda: [winograd_conv2d(features, weight)]
    yield "winograd_conv2d backward", adjoint(winograd_conv2d(leaf, weight), leaf)
    weights = weight, None, weight, None
    yield "basic_block", lambda: [basic_block(features, *weights)]
    leaf = features.clone().requires_grad_()
    yield "basic_block backward", adjoint(basic_block(leaf, *weights), leaf)
    leaf = torch.randn(8, 197, 3, 6, 64).to(dtype).requires_grad_()
    yield "attention", lambda leaf=leaf: [attention(leaf.detach())]
    yield "attention backward", adjoint(attention(leaf), leaf)
    channels = torch.rand(144), torch.rand(144)
    leaf = images.clone().requires_grad_()
    yield "batch_norm", lambda: batch_norm(images, *channels, clip=(0.0, 6.0))
    yield "batch_norm backward", adjoint(batch_norm(leaf, *channels, clip=(0.0, 6.0))[0], leaf)


def cases():
    for dtype in (torch.float32, torch.bfloat16):
        for direction in ("forward", "jsd"):
            yield from ((f"{name} {dtype}", compute) for name, compute in divergence(dtype, direction))
        yield from ((f"{name} {dtype}", compute) for name, compute in images_ops(dtype))
        yield from ((f"{name} {dtype}", compute) for name, compute in convolutions(dtype))
    index = torch.arange(16)
    yield "philox_uniform", lambda: [philox_uniform(index, torch.arange(5), (3, 224, 224), seed=1)]


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    print(json.dumps({name: beyond_outputs(compute) for name, compute in cases()}))
