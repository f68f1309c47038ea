"""Depthwise convolutions with the rectifiers around them, and all their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor

from alignfast.checks import check_shape
from alignfast.native import CPU_DEVICES
from alignfast.ops.interleaved import (
    EVERYTHING,
    check_clip,
    check_interleaved,
    check_interleaved_images,
    interleaved,
)
from alignfast.reference import depthwise_conv2d as reference

# Rows and columns of the largest kernel.
LARGEST = 32


def depthwise_conv2d(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    before: tuple[float, float] = EVERYTHING,
    after: tuple[float, float] = EVERYTHING,
) -> Tensor:
    """Clip, convolve every channel by itself, add the bias and clip again, in one pass over the images.

    With `before` and `after` of (0, 6) it is what lies between the two pointwise convolutions of an inverted residual
    (Sandler et al., CVPR 2018, sec. 3.3), whose rectifiers otherwise are passes of their own. A gradient passes a clip
    strictly inside of it, as in torch's ReLU and ReLU6. For it only the images are kept if `before` clips or the weight
    requires a gradient, and only the result if `after` clips.

    On the CPU half precision is summed in float32 and rounded once; on other devices torch's convolution serves.

    Args:
        images: [N, C, H, W], floating point; copied to channels-last memory where they are not.
        weight: [C, 1, k, l] with sides up to 32, of the images' dtype and device.
        bias: [C], or None.
        stride: of rows and columns.
        padding: zeros above, below, on the left and on the right; after the first clip.
        before: lowest and highest value of the images, either may be infinite.
        after: of the result.

    Returns:
        [N, C, (H + above + below - k) // stride + 1, ...] of the images' dtype, on the CPU channels-last.

    Raises:
        ValueError: sizes, dtypes or devices that do not fit, or a clip whose lowest value is not below the highest.
    """
    stride, padding = list(stride), list(padding)
    _check(images, weight, bias, stride, padding, *before, *after)
    if images.device.type not in CPU_DEVICES:
        return reference.depthwise_conv2d(images, weight, bias, stride, padding, before, after)
    result: Tensor = torch.ops.alignfast.depthwise_conv2d(
        interleaved(images), weight, bias, stride, padding, *before, *after
    )
    return result


def _check(
    images: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], *clips: float
) -> None:
    check_interleaved_images("images", images)
    _check_clips(*clips)
    _check_weight(weight, images, stride, padding)
    if bias is not None:
        _check_like("bias", bias, images, (images.shape[1],))
    _result_size(images.shape[2:], weight.shape[2:], stride, padding)


def _check_clips(low_before: float, high_before: float, low_after: float, high_after: float) -> None:
    for name, low, high in (("before", low_before, high_before), ("after", low_after, high_after)):
        check_clip(name, low, high)


def _check_weight(weight: Tensor, images: Tensor, stride: Sequence[int], padding: Sequence[int]) -> None:
    _check_like("weight", weight, images, (images.shape[1], 1, None, None))
    _check_geometry(weight.shape[2:], stride, padding)


def _check_like(name: str, tensor: Tensor, images: Tensor, shape: Sequence[int | None]) -> None:
    check_shape(name, tensor.shape, shape)
    if (tensor.dtype, tensor.device) != (images.dtype, images.device):
        raise ValueError(
            f"{name}: got {tensor.dtype} on {tensor.device} for images of {images.dtype} on {images.device}; "
            "allowed is one dtype and device"
        )


def _check_geometry(kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> None:
    if not all(1 <= side <= LARGEST for side in kernel):
        raise ValueError(f"weight: got sides of {list(kernel)}; allowed is 1 to {LARGEST}")
    _check_sizes("stride", stride, 2, 1)
    _check_sizes("padding", padding, 4, 0)


def _check_sizes(name: str, values: Sequence[int], count: int, lowest: int) -> None:
    if len(values) != count or min(values) < lowest:
        raise ValueError(f"{name}: got {list(values)}; allowed is {count} sizes from {lowest} on")


def _result_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> list[int]:
    padded = (size[0] + padding[0] + padding[1], size[1] + padding[2] + padding[3])
    for side, wanted in zip(padded, kernel, strict=True):
        if side < wanted:
            raise ValueError(f"images: got a padded side of {side}; allowed is at least the kernel's {wanted}")
    return [(side - wanted) // step + 1 for side, wanted, step in zip(padded, kernel, stride, strict=True)]


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _fake(
    images: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], *clips: float
) -> Tensor:
    _check(images, weight, bias, stride, padding, *clips)
    check_interleaved("images", images)
    size = _result_size(images.shape[2:], weight.shape[2:], stride, padding)
    return _empty(images, *images.shape[:2], *size)


def _fake_backward(
    grad: Tensor,
    weight: Tensor,
    images: Tensor | None,
    result: Tensor | None,
    size: list[int],
    stride: list[int],
    padding: list[int],
    *clips: float,
) -> Tensor:
    check_interleaved_images("grad", grad)
    _check_clips(*clips)
    _check_weight(weight, grad, stride, padding)
    _check_sizes("size", size, 2, 0)
    going_in = (*grad.shape[:2], *size)
    coming_out = (*grad.shape[:2], *_result_size(size, weight.shape[2:], stride, padding))
    for name, tensor, shape in (
        ("grad", grad, coming_out),
        ("result", result, coming_out),
        ("images", images, going_in),
    ):
        if tensor is not None:
            _check_like(name, tensor, grad, shape)
            check_interleaved(name, tensor)
    return _empty(grad, *going_in)


def _fake_weight(grad: Tensor, images: Tensor, size: list[int], stride: list[int], padding: list[int]) -> Tensor:
    check_interleaved_images("grad", grad)
    _check_sizes("size", size, 2, 1)
    _check_geometry(size, stride, padding)
    _check_like("images", images, grad, (*grad.shape[:2], None, None))
    check_shape("grad", grad.shape, (*grad.shape[:2], *_result_size(images.shape[2:], size, stride, padding)))
    for name, tensor in (("grad", grad), ("images", images)):
        check_interleaved(name, tensor)
    return grad.new_empty(grad.shape[1], 1, *size)


def _gated(values: Tensor, gate: Tensor | None, low: float, high: float) -> Tensor:
    """values where the gate lies inside the clip, else zero.

    By the kernel, whose weight is a one, so that bounds are rounded as in all other passes; torch's `masked_fill` also
    takes some twenty times as long.
    """
    if gate is None or not _clips(low, high):
        return values
    ones = values.new_ones(values.shape[1], 1, 1, 1)
    result: Tensor = torch.ops.alignfast.depthwise_conv2d_backward(
        interleaved(values), ones, None, gate, list(values.shape[2:]), [1, 1], [0, 0, 0, 0], *EVERYTHING, low, high
    )
    return result


def _clips(low: float, high: float) -> bool:
    return low > -inf or high < inf


def _convolved(images: Tensor, weight: Tensor, ctx: Any) -> Tensor:
    result: Tensor = torch.ops.alignfast.depthwise_conv2d(
        interleaved(images), weight, None, ctx.stride, ctx.padding, *EVERYTHING, *EVERYTHING
    )
    return result


def _for_weight(grad: Tensor, images: Tensor, size: Sequence[int], ctx: Any) -> Tensor:
    result: Tensor = torch.ops.alignfast.depthwise_conv2d_weight(
        interleaved(grad), interleaved(images), list(size), ctx.stride, ctx.padding
    )
    return result


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, weight, _, ctx.stride, ctx.padding, *clips = inputs
    ctx.before, ctx.after = tuple(clips[:2]), tuple(clips[2:])
    ctx.size = list(images.shape[2:])
    needs_images = _clips(*ctx.before) or weight.requires_grad
    ctx.save_for_backward(images if needs_images else None, weight, output if _clips(*ctx.after) else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    images, weight, result = ctx.saved_tensors
    for_images = for_weight = for_bias = None
    if ctx.needs_input_grad[0]:
        gate = images if _clips(*ctx.before) else None
        for_images = torch.ops.alignfast.depthwise_conv2d_backward(
            interleaved(grad), weight, gate, result, ctx.size, ctx.stride, ctx.padding, *ctx.before, *ctx.after
        )
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        grad = _gated(grad, result, *ctx.after)
    if ctx.needs_input_grad[1]:
        for_weight = _for_weight(grad, reference.clip(images, *ctx.before), weight.shape[2:], ctx)
    if ctx.needs_input_grad[2]:
        for_bias = grad.sum((0, 2, 3))
    return for_images, for_weight, for_bias, *[None] * 6


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, weight, images, result, _, ctx.stride, ctx.padding, *clips = inputs
    ctx.before, ctx.after = tuple(clips[:2]), tuple(clips[2:])
    ctx.save_for_backward(grad if weight.requires_grad else None, weight, images, result)


def _backward_of_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """It is linear in the gradient it was given, and in the weight; gates are steps, without a slope."""
    given, weight, images, result = ctx.saved_tensors
    grad = _gated(grad, images, *ctx.before)
    for_grad = for_weight = None
    if ctx.needs_input_grad[0]:
        for_grad = _gated(_convolved(grad, weight, ctx), result, *ctx.after)
    if ctx.needs_input_grad[1]:
        for_weight = _for_weight(_gated(given, result, *ctx.after), grad, weight.shape[2:], ctx)
    return for_grad, for_weight, *[None] * 9


def _keep_for_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, images, _, ctx.stride, ctx.padding = inputs
    ctx.save_for_backward(grad, images)


def _backward_of_weight(ctx: Any, weight: Tensor) -> tuple[Any, ...]:
    grad, images = ctx.saved_tensors
    for_grad = for_images = None
    if ctx.needs_input_grad[0]:
        for_grad = _convolved(images, weight, ctx)
    if ctx.needs_input_grad[1]:
        for_images = torch.ops.alignfast.depthwise_conv2d_backward(
            grad, weight, None, None, list(images.shape[2:]), ctx.stride, ctx.padding, *EVERYTHING, *EVERYTHING
        )
    return for_grad, for_images, *[None] * 3


for _name, _made, _adjoint, _context in (
    ("depthwise_conv2d", _fake, _backward, _keep),
    ("depthwise_conv2d_backward", _fake_backward, _backward_of_backward, _keep_for_backward),
    ("depthwise_conv2d_weight", _fake_weight, _backward_of_weight, _keep_for_weight),
):
    torch.library.register_fake(f"alignfast::{_name}", _made)
    torch.library.register_autograd(f"alignfast::{_name}", _adjoint, setup_context=_context)
