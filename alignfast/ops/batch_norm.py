"""Batch normalisation in training, with the rectifier behind it, and its gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alignfast.checks import check_number, check_shape
from alignfast.native import CPU_DEVICES
from alignfast.ops.interleaved import EVERYTHING, check_clip, check_interleaved, check_interleaved_images, interleaved
from alignfast.reference import batch_norm as reference


def batch_norm(
    images: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5, clip: tuple[float, float] = EVERYTHING
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise every channel by its mean and variance over the batch, scale, shift and clip.

    Ioffe and Szegedy (ICML 2015), algorithm 1, with a ReLU or ReLU6 behind it as a clip to (0, inf) or (0, 6). A
    gradient passes the clip strictly inside of it. Only the images and the statistics are kept for it. On the CPU
    statistics are summed in stretches of rows that no number of threads changes; on other devices torch's own serves.

    Args:
        images: [N, C, H, W], floating point, at least one pixel; copied to channels-last memory where they are not.
        weight, bias: [C], in the type that is computed in: float64 for images of float64, else float32.
        eps: added to the variance, at least 0.
        clip: lowest and highest value of the result, either may be infinite.

    Returns:
        The result, of the images' shape and dtype and on the CPU channels-last; the mean and the biased variance, [C],
        without a gradient.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, images without a pixel, or a clip whose lowest value is
            not below the highest.
    """
    _check(images, weight, bias, eps, *clip)
    if images.device.type not in CPU_DEVICES:
        return reference.batch_norm(images, weight, bias, eps, *clip)
    result, mean, variance = torch.ops.alignfast.batch_norm(interleaved(images), weight, bias, eps, *clip)
    return result, mean, variance


def _check(images: Tensor, weight: Tensor, bias: Tensor, eps: float, low: float, high: float) -> None:
    check_interleaved_images("images", images)
    wide = torch.promote_types(images.dtype, torch.float32)
    for name, values in (("weight", weight), ("bias", bias)):
        check_shape(name, values.shape, (images.shape[1],))
        if (values.dtype, values.device) != (wide, images.device):
            raise ValueError(
                f"{name}: got {values.dtype} on {values.device} for images of {images.dtype} on {images.device}; "
                f"allowed is {wide} on one device"
            )
    check_number("eps", eps, low=0.0)
    check_clip("clip", low, high)
    if images.shape[0] * images.shape[2] * images.shape[3] == 0:
        raise ValueError("images: got no pixel; allowed is at least one")


def _fake(
    images: Tensor, weight: Tensor, bias: Tensor, eps: float, low: float, high: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check(images, weight, bias, eps, low, high)
    check_interleaved("images", images)
    result = torch.empty_like(images, memory_format=torch.channels_last, requires_grad=False)
    return result, weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _fake_backward(
    grad: Tensor,
    images: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor, Tensor]:
    check_shape("grad", grad.shape, images.shape)
    check_interleaved("grad", grad)
    check_shape("mean", mean.shape, weight.shape)
    check_shape("variance", variance.shape, weight.shape)
    return _fake(images, weight, bias, eps, low, high)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    images, weight, bias, *ctx.settings = inputs
    _, mean, variance = output
    ctx.mark_non_differentiable(mean, variance)
    ctx.save_for_backward(images, weight, bias, mean, variance)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    return (
        *torch.ops.alignfast.batch_norm_backward(interleaved(grad), *ctx.saved_tensors, *ctx.settings),
        None,
        None,
        None,
    )


torch.library.register_fake("alignfast::batch_norm", _fake)
torch.library.register_fake("alignfast::batch_norm_backward", _fake_backward)
torch.library.register_autograd("alignfast::batch_norm", _backward, setup_context=_keep)
