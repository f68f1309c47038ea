"""What the ops on channels-last images share: checks, memory and the clips of rectifiers."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from alignfast.checks import check_shape

EVERYTHING = (-inf, inf)


def check_interleaved_images(name: str, images: Tensor) -> None:
    check_shape(name, images.shape, (None, None, None, None))
    if not images.is_floating_point():
        raise ValueError(f"{name}: got dtype {images.dtype}; allowed is a floating-point tensor")


def check_clip(name: str, low: float, high: float) -> None:
    if not low < high:
        raise ValueError(f"{name}: got {(low, high)}; allowed is a lowest value below the highest")


def check_interleaved(name: str, images: Tensor) -> None:
    if images.numel() > 0 and not images.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"{name}: not in channels-last memory; allowed is that alone")


def interleaved(images: Tensor) -> Tensor:
    """In the memory that the kernels read."""
    return images.contiguous(memory_format=torch.channels_last)
