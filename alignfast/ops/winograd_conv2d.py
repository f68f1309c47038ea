"""Convolutions of 3 x 3 with fewer products, and all their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alignfast.native import CPU_DEVICES
from alignfast.ops.dense import check_dense
from alignfast.ops.depthwise_conv2d import _check_like
from alignfast.ops.interleaved import check_interleaved, check_interleaved_images, interleaved
from alignfast.reference import winograd_conv2d as reference

# Rows and columns of the result that are made at once.
TILE = 4


def winograd_conv2d(
    images: Tensor, weight: Tensor, bias: Tensor | None = None, *, padding: Sequence[int] = (1, 1)
) -> Tensor:
    """A convolution of 3 x 3 of stride 1 by minimal filtering (Lavin and Gray, CVPR 2016, sec. 4.3, F(4 x 4, 3 x 3)).

    Every 4 x 4 pixels of the result take 36 products for each pair of channels in place of 144. Results are off by some
    ten times as much as those of a plain sum in the same precision, which in float32 is 1e-5 of their size. Gradients
    of images are computed in the same way, those of the weight by torch; both can be differentiated again.

    What is infinite or NaN spreads to all 4 x 4 pixels that are made with it, and so does an overflow on the way.

    On the CPU half precision is computed in float32 and rounded once; on other devices torch's convolution serves.

    Args:
        images: [N, C, H, W], floating point; copied to channels-last memory where they are not.
        weight: [K, C, 3, 3] of the images' dtype and device.
        bias: [K], or None.
        padding: zeros on both sides of the rows, and of the columns, 0 to 2 each.

    Returns:
        [N, K, H + 2 * padding - 2, ...] of the images' dtype, on the CPU channels-last.

    Raises:
        ValueError: sizes, dtypes or devices that do not fit.
    """
    padding = list(padding)
    _check(images, weight, bias, padding)
    if images.device.type not in CPU_DEVICES:
        return reference.winograd_conv2d(images, weight, bias, padding)
    return _convolved(images, weight, None if bias is None else bias.contiguous(), padding)


def _convolved(
    images: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int], *, adjoint: bool = False
) -> Tensor:
    """The same on the CPU, unchecked; or of [N, K, ...] with the weight of the convolution's gradient."""
    result: Tensor = torch.ops.alignfast.winograd_conv2d(interleaved(images), weight, bias, list(padding), adjoint)
    return result


def _adjoint_padding(padding: Sequence[int]) -> list[int]:
    """What is added to the gradient, so that it has the size of the images when it is convolved."""
    return [2 - side for side in padding]


def _check(
    images: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int], adjoint: bool = False
) -> list[int]:
    """The size of the result."""
    check_interleaved_images("images", images)
    channels = images.shape[1]
    _check_like("weight", weight, images, (channels, None, 3, 3) if adjoint else (None, channels, 3, 3))
    if bias is not None:
        _check_like("bias", bias, images, (weight.shape[1 if adjoint else 0],))
    if len(padding) != 2 or not all(0 <= side <= 2 for side in padding):
        raise ValueError(f"padding: got {list(padding)}; allowed is 2 sizes from 0 to 2")
    size = [side + 2 * more - 2 for side, more in zip(images.shape[2:], padding, strict=True)]
    if min(size) < 1:
        raise ValueError(f"images: got a padded side of {min(size) + 2}; allowed is at least the kernel's 3")
    return size


def _fake(images: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int], adjoint: bool) -> Tensor:
    size = _check(images, weight, bias, padding, adjoint)
    check_interleaved("images", images)
    if bias is not None:
        check_dense("bias", bias, bias.shape, images.dtype, images.device)
    shape = (len(images), weight.shape[1 if adjoint else 0], *size)
    return torch.empty(shape, dtype=images.dtype, device=images.device, memory_format=torch.channels_last)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, weight, _, ctx.padding, ctx.adjoint = inputs
    ctx.save_for_backward(images if weight.requires_grad else None, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    images, weight = ctx.saved_tensors
    for_images = for_weight = for_bias = None
    if ctx.needs_input_grad[0]:
        for_images = _convolved(grad, weight, None, _adjoint_padding(ctx.padding), adjoint=not ctx.adjoint)
    if ctx.needs_input_grad[1]:
        # The adjoint's roles are exchanged: what went in is the gradient of what comes out.
        given, behind = (grad, images) if ctx.adjoint else (images, grad)
        padding = _adjoint_padding(ctx.padding) if ctx.adjoint else ctx.padding
        _, for_weight, _ = torch.ops.aten.convolution_backward(
            interleaved(behind), given, weight, None, [1, 1], padding, [1, 1], False, [0, 0], 1, [False, True, False]
        )
    if ctx.needs_input_grad[2]:
        for_bias = grad.sum((0, 2, 3))
    return for_images, for_weight, for_bias, None, None


torch.library.register_fake("alignfast::winograd_conv2d", _fake)
torch.library.register_autograd("alignfast::winograd_conv2d", _backward, setup_context=_keep)
