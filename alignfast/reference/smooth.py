"""Separable depthwise smoothing with zero padding."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import conv2d


def smooth(grad: Tensor, kernel: Tensor) -> Tensor:
    channels, size = grad.shape[1], kernel.numel()
    rows = kernel.view(1, 1, 1, size).expand(channels, 1, 1, size)
    columns = kernel.view(1, 1, size, 1).expand(channels, 1, size, 1)
    smoothed = conv2d(grad, rows, padding=(0, size // 2), groups=channels)
    return conv2d(smoothed, columns, padding=(size // 2, 0), groups=channels)
