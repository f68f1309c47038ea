"""A convolution of every channel by itself, between two clips."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import conv2d, hardtanh, pad, threshold


def depthwise_conv2d(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    before: tuple[float, float],
    after: tuple[float, float],
) -> Tensor:
    top, bottom, left, right = padding
    padded = pad(clip(images, *before), (left, right, top, bottom))
    return clip(conv2d(padded, weight, bias, list(stride), groups=images.shape[1]), *after)


def clip(values: Tensor, low: float, high: float) -> Tensor:
    """To [low, high], where either may be infinite. The gradient passes strictly inside."""
    if low > -float("inf") and high < float("inf"):
        return hardtanh(values, low, high)
    if low > -float("inf"):
        return threshold(values, low, low)
    return -threshold(-values, -high, -high) if high < float("inf") else values
