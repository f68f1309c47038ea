"""Frozen basic blocks, whose images between the two convolutions are never stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alignfast.checks import check_shape
from alignfast.native import CPU_DEVICES
from alignfast.ops.dense import check_dense
from alignfast.ops.depthwise_conv2d import _check_like
from alignfast.ops.interleaved import check_interleaved, check_interleaved_images, interleaved
from alignfast.reference import basic_block as reference

# Bits in a word of their masks.
WORD = 16


def basic_block(
    images: Tensor,
    first: Tensor,
    first_bias: Tensor | None,
    second: Tensor,
    second_bias: Tensor | None,
) -> Tensor:
    """relu(images + second(relu(first(images)))), of convolutions of 3 x 3 (He et al., CVPR 2016, fig. 2 and eq. 1).

    Both are computed by minimal filtering as in `winograd_conv2d`, one after the other for a few images at a time, so
    that what lies between them stays in the processor's cache. For a gradient of the images, the only one there is, a
    bit each is kept of what goes through the rectifiers. It can be differentiated again. What is infinite or NaN
    spreads as it does in `winograd_conv2d`.

    On the CPU half precision is computed in float32 and rounded behind each rectifier; on other devices torch's
    convolutions serve.

    Args:
        images: [N, C, H, W], floating point; copied to channels-last memory where they are not.
        first: [M, C, 3, 3] of the images' dtype and device, which requires no gradient; one zero lies all around.
        first_bias: [M], or None.
        second: [C, M, 3, 3], likewise.
        second_bias: [C], or None.

    Returns:
        [N, C, H, W] of the images' dtype, on the CPU channels-last.

    Raises:
        ValueError: sizes, dtypes or devices that do not fit, or a weight or bias that requires a gradient.
    """
    _check(images, first, first_bias, second, second_bias)
    weights = {"first": first, "first_bias": first_bias, "second": second, "second_bias": second_bias}
    for name, weight in weights.items():
        if weight is not None and weight.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: got a tensor that requires a gradient; allowed is one that does not")
    if images.device.type not in CPU_DEVICES:
        return reference.basic_block(images, first, first_bias, second, second_bias)
    biases = (None if bias is None else bias.contiguous() for bias in (first_bias, second_bias))
    result: Tensor = torch.ops.alignfast.basic_block(interleaved(images), first, next(biases), second, next(biases))[0]
    return result


def _check(
    images: Tensor, first: Tensor, first_bias: Tensor | None, second: Tensor, second_bias: Tensor | None
) -> None:
    check_interleaved_images("images", images)
    channels = images.shape[1]
    _check_like("first", first, images, (None, channels, 3, 3))
    middle = first.shape[0]
    _check_like("second", second, images, (channels, middle, 3, 3))
    for name, bias, count in (("first_bias", first_bias, middle), ("second_bias", second_bias, channels)):
        if bias is not None:
            _check_like(name, bias, images, (count,))


def _fake(
    images: Tensor, first: Tensor, first_bias: Tensor | None, second: Tensor, second_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    _check(images, first, first_bias, second, second_bias)
    check_interleaved("images", images)
    for name, bias in (("first_bias", first_bias), ("second_bias", second_bias)):
        if bias is not None:
            check_dense(name, bias, bias.shape, images.dtype, images.device)
    first_bits, second_bits = (
        images.new_empty(_bits_shape(images, channels), dtype=torch.int16) for channels in second.shape[1::-1]
    )
    return _empty(images), first_bits, second_bits


def _fake_linear(
    images: Tensor, first: Tensor, second: Tensor, first_bits: Tensor, second_bits: Tensor, adjoint: bool
) -> Tensor:
    _check(images, first, None, second, None)
    check_interleaved("images", images)
    sides = zip(("first_bits", "second_bits"), (first_bits, second_bits), second.shape[1::-1], strict=True)
    for name, bits, channels in sides:
        shape = _bits_shape(images, channels)
        check_shape(name, bits.shape, shape)
        check_dense(name, bits, shape, torch.int16, images.device)
    return _empty(images)


def _bits_shape(images: Tensor, channels: int) -> tuple[int, ...]:
    return (len(images), *images.shape[2:], -(-channels // WORD))


def _empty(images: Tensor) -> Tensor:
    return torch.empty_like(images, memory_format=torch.channels_last)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, first, _, second, _ = inputs
    _, *bits = output
    ctx.mark_non_differentiable(*bits)
    ctx.save_for_backward(first, second, *bits)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    for_images = torch.ops.alignfast.basic_block_linear(interleaved(grad), *ctx.saved_tensors, True)
    return for_images, None, None, None, None


def _keep_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *others, ctx.adjoint = inputs
    ctx.save_for_backward(*others)


def _backward_linear(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    back = torch.ops.alignfast.basic_block_linear(interleaved(grad), *ctx.saved_tensors, not ctx.adjoint)
    return back, None, None, None, None, None


torch.library.register_fake("alignfast::basic_block", _fake)
torch.library.register_fake("alignfast::basic_block_linear", _fake_linear)
torch.library.register_autograd("alignfast::basic_block", _backward, setup_context=_keep)
torch.library.register_autograd("alignfast::basic_block_linear", _backward_linear, setup_context=_keep_linear)
