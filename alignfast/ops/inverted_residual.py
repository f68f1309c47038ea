"""Frozen inverted residuals, whose images between the two pointwise convolutions are never stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import pad

from alignfast.checks import check_shape
from alignfast.ops.dense import check_dense, wide_dtype
from alignfast.ops.depthwise_conv2d import _check_geometry, _check_sizes, _result_size
from alignfast.ops.interleaved import check_clip, check_interleaved, check_interleaved_images, interleaved

# Channels between the pointwise convolutions that the kernel works on at a time, and bits in a word of their masks.
BLOCK, WORD = 48, 16


class PackedResidual(NamedTuple):
    """The weights of an inverted residual as the kernel reads them, made by `of`; dense, in float32 or float64.

    entering, leaving: [B, C, 48] and [B, 48, C] of the pointwise convolutions on the way there, for B blocks of
    channels, the last of them padded by zeros, and C of the result to a multiple of 16. depthwise: [B, k, l, 48].
    back_entering, back_leaving: likewise for the way back. channels: of the images, between the pointwise convolutions
    and of the result.
    """

    entering: Tensor
    entering_bias: Tensor
    depthwise: Tensor
    depthwise_bias: Tensor
    leaving: Tensor
    leaving_bias: Tensor
    back_entering: Tensor
    back_leaving: Tensor
    channels: tuple[int, int, int]

    @classmethod
    def of(
        cls,
        expand: Tensor,
        expand_bias: Tensor | None,
        depthwise: Tensor,
        depthwise_bias: Tensor | None,
        project: Tensor,
        project_bias: Tensor | None,
    ) -> PackedResidual:
        """The weights of three convolutions for `inverted_residual`.

        Args:
            expand: [E, C, 1, 1], floating point. depthwise: [E, 1, k, l] with sides up to 32. project: [O, E, 1, 1].
                All of one dtype, on the CPU; they are widened to float32 at least.
            expand_bias, depthwise_bias, project_bias: [E], [E] and [O], or None.

        Raises:
            ValueError: shapes, dtypes or devices that do not fit.
        """
        check_shape("expand", expand.shape, (None, None, 1, 1))
        middle, channels = expand.shape[:2]
        check_shape("depthwise", depthwise.shape, (middle, 1, None, None))
        check_shape("project", project.shape, (None, middle, 1, 1))
        out = project.shape[0]
        biases = [("expand_bias", expand_bias, middle), ("depthwise_bias", depthwise_bias, middle)]
        for name, bias, count in [*biases, ("project_bias", project_bias, out)]:
            if bias is not None:
                check_shape(name, bias.shape, (count,))
                _check_alike(name, bias, expand)
        for name, weight in (("depthwise", depthwise), ("project", project)):
            _check_alike(name, weight, expand)
        _check_geometry(depthwise.shape[2:], (1, 1), (0, 0, 0, 0))
        wide = wide_dtype(expand.dtype)
        there, back = expand.detach().to(wide).flatten(1), project.detach().to(wide).flatten(1).T
        return cls(
            _entering(there),
            _bias(expand_bias, middle, BLOCK, there),
            _blocks(depthwise.detach().to(wide).flatten(1))
            .transpose(1, 2)
            .unflatten(1, depthwise.shape[2:])
            .contiguous(),
            _bias(depthwise_bias, middle, BLOCK, there),
            _leaving(back),
            _bias(project_bias, out, WORD, there),
            _entering(back),
            _leaving(there),
            (channels, middle, out),
        )


def inverted_residual(
    images: Tensor,
    packed: PackedResidual,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    clip: tuple[float, float] = (0.0, 6.0),
) -> Tensor:
    """A pointwise, a depthwise and a pointwise convolution with clips between them (Sandler et al., CVPR 2018).

    Images between the convolutions, several times as large as those that go in and come out, are computed row by row in
    the processor's cache. For a gradient of the images, the only one there is, a bit each is kept of them: whether they
    lie strictly inside of the clip. It can be differentiated again.

    What lies between is in float32, or in float64 for images of float64; half precision is rounded once, at the end.

    Args:
        images: [N, C, H, W] on the CPU, floating point; copied to channels-last memory where they are not.
        packed: weights, by `PackedResidual.of`; in float64 for images of float64, else in float32.
        stride: of rows and columns of the depthwise convolution.
        padding: zeros above, below, on the left and on the right of what goes into it.
        clip: lowest and highest value before and behind it, either may be infinite.

    Returns:
        [N, O, (H + above + below - k) // stride + 1, ...] of the images' dtype, channels-last.

    Raises:
        ValueError: sizes, dtypes or devices that do not fit, or a clip whose lowest value is not below the highest.
    """
    stride, padding = list(stride), list(padding)
    _check(images, packed, stride, padding, clip)
    result: Tensor = _Residual.apply(images, packed, stride, padding, clip)
    return result


class _Residual(Function):
    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        packed: PackedResidual,
        stride: list[int],
        padding: list[int],
        clip: tuple[float, float],
    ) -> Tensor:
        result, *bits = torch.ops.alignfast.inverted_residual(
            interleaved(images), *packed[:6], *packed.channels[1:], stride, padding, *clip
        )
        ctx.save_for_backward(*bits)
        ctx.rest = packed, list(images.shape[2:]), stride, padding
        made: Tensor = result
        return made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        in_bits, out_bits = ctx.saved_tensors
        return _Linear.apply(grad, out_bits, in_bits, *ctx.rest, True), None, None, None, None


class _Linear(Function):
    """The three convolutions without biases, in which bits say what a clip lets through; or their adjoint."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, in_bits: Tensor, out_bits: Tensor, *rest: Any) -> Tensor:
        packed, size, stride, padding, adjoint = rest
        ctx.save_for_backward(in_bits, out_bits)
        ctx.rest = rest
        first, between, last = packed.channels
        if adjoint:
            weights = (packed.back_entering, packed.depthwise, packed.back_leaving)
        else:
            weights = (packed.entering, packed.depthwise, packed.leaving)
        bits, made = (in_bits, out_bits), first if adjoint else last
        result: Tensor = torch.ops.alignfast.inverted_residual_linear(
            interleaved(images), *weights, *bits, between, made, size, stride, padding, adjoint
        )
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        in_bits, out_bits = ctx.saved_tensors
        *rest, adjoint = ctx.rest
        return _Linear.apply(grad, out_bits, in_bits, *rest, not adjoint), *[None] * 7


def _check_alike(name: str, weight: Tensor, expand: Tensor) -> None:
    if (weight.dtype, weight.device) != (expand.dtype, expand.device):
        raise ValueError(
            f"{name}: got {weight.dtype} on {weight.device}; allowed is what expand has, {expand.dtype} on "
            f"{expand.device}"
        )


def _blocks(weight: Tensor) -> Tensor:
    """[B, 48, C], of [E, C]."""
    return pad(weight, (0, 0, 0, -len(weight) % BLOCK)).view(-1, BLOCK, weight.shape[1])


def _entering(weight: Tensor) -> Tensor:
    return _blocks(weight).transpose(1, 2).contiguous()


def _leaving(weight: Tensor) -> Tensor:
    return pad(_blocks(weight), (0, -weight.shape[1] % WORD)).contiguous()


def _bias(bias: Tensor | None, count: int, multiple: int, like: Tensor) -> Tensor:
    values = like.new_zeros(count) if bias is None else bias.detach().to(like.dtype)
    return pad(values, (0, -count % multiple)).contiguous()


def _check(
    images: Tensor, packed: PackedResidual, stride: Sequence[int], padding: Sequence[int], clip: tuple[float, float]
) -> None:
    check_interleaved_images("images", images)
    check_clip("clip", *clip)
    check_shape("images", images.shape, (None, packed.channels[0], None, None))
    wide = wide_dtype(images.dtype)
    if (packed.entering.dtype, packed.entering.device) != (wide, images.device) or images.device.type != "cpu":
        raise ValueError(
            f"packed: got {packed.entering.dtype} on {packed.entering.device} for images of {images.dtype} on "
            f"{images.device}; allowed is {wide} on the CPU, for images there"
        )
    kernel = packed.depthwise.shape[1:3]
    _check_geometry(kernel, stride, padding)
    _result_size(images.shape[2:], kernel, stride, padding)


def _fake(
    images: Tensor,
    entering: Tensor,
    entering_bias: Tensor,
    depthwise: Tensor,
    depthwise_bias: Tensor,
    leaving: Tensor,
    leaving_bias: Tensor,
    between: int,
    channels: int,
    stride: list[int],
    padding: list[int],
    low: float,
    high: float,
) -> tuple[Tensor, Tensor, Tensor]:
    check_clip("clip", low, high)
    size = _checked_size(images, entering, depthwise, leaving, between, channels, images.shape[2:], stride, padding)
    for name, bias, count in (
        ("entering_bias", entering_bias, len(depthwise) * BLOCK),
        ("depthwise_bias", depthwise_bias, len(depthwise) * BLOCK),
        ("leaving_bias", leaving_bias, leaving.shape[2]),
    ):
        _check_packed(name, bias, images, (count,))
    blocks = (len(images), len(depthwise))
    result = _empty(images, channels, size)
    in_bits, out_bits = (
        images.new_empty((*blocks, *side, BLOCK // WORD), dtype=torch.int16) for side in (images.shape[2:], size)
    )
    return result, in_bits, out_bits


def _fake_linear(
    images: Tensor,
    entering: Tensor,
    depthwise: Tensor,
    leaving: Tensor,
    in_bits: Tensor,
    out_bits: Tensor,
    between: int,
    channels: int,
    size: list[int],
    stride: list[int],
    padding: list[int],
    adjoint: bool,
) -> Tensor:
    _check_sizes("size", size, 2, 0)
    small = _checked_size(images, entering, depthwise, leaving, between, channels, size, stride, padding)
    going_in, coming_out = (small, size) if adjoint else (size, small)
    check_shape("images", images.shape, (None, None, *going_in))
    for name, bits, side in (("in_bits", in_bits, going_in), ("out_bits", out_bits, coming_out)):
        shape = (len(images), len(depthwise), *side, BLOCK // WORD)
        check_dense(name, bits, shape, torch.int16, images.device)
    return _empty(images, channels, coming_out)


def _empty(images: Tensor, channels: int, size: Sequence[int]) -> Tensor:
    shape = (len(images), channels, *size)
    return torch.empty(shape, dtype=images.dtype, device=images.device, memory_format=torch.channels_last)


def _checked_size(
    images: Tensor,
    entering: Tensor,
    depthwise: Tensor,
    leaving: Tensor,
    between: int,
    channels: int,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> list[int]:
    """Rows and columns of what the depthwise convolution makes of images of `size`."""
    check_interleaved_images("images", images)
    check_interleaved("images", images)
    check_shape("depthwise", depthwise.shape, (None, None, None, BLOCK))
    if channels < 1:
        raise ValueError(f"channels: got {channels}; allowed is at least 1")
    blocks = len(depthwise)
    if -(-between // BLOCK) != blocks:
        raise ValueError(f"between: got {between}; allowed is what fills {blocks} blocks of {BLOCK}")
    _check_packed("depthwise", depthwise, images, depthwise.shape)
    _check_packed("entering", entering, images, (blocks, images.shape[1], BLOCK))
    _check_packed("leaving", leaving, images, (blocks, BLOCK, channels + -channels % WORD))
    _check_geometry(depthwise.shape[1:3], stride, padding)
    return _result_size(size, depthwise.shape[1:3], stride, padding)


def _check_packed(name: str, weight: Tensor, images: Tensor, shape: Sequence[int | None]) -> None:
    check_dense(name, weight, shape, wide_dtype(images.dtype), images.device)


torch.library.register_fake("alignfast::inverted_residual", _fake)
torch.library.register_fake("alignfast::inverted_residual_linear", _fake_linear)
