"""Convolutions of 3 x 3 that `ops.winograd_conv2d` does in less time than torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

from alignfast._C import cpu_isa
from alignfast.models.frozen import FrozenConv2d, FrozenConv2dSame, exchange, is_plain
from alignfast.native import CPU_DEVICES
from alignfast.ops.winograd_conv2d import TILE, winograd_conv2d

# Below so many channels the kernel's vectors are not full.
FEWEST_CHANNELS = 16
# Below so many tiles of all images the weights, which are transformed for each call, take what is saved.
FEWEST_TILES = 48
# In software, fused multiply-adds take longer than anything saves.
FUSED = cpu_isa() != "baseline"


def use_minimal_filtering(module: nn.Module) -> None:
    """Exchange, in place, frozen convolutions of 3 x 3 for those that the kernel does where it is faster."""
    exchange(module, KINDS, lambda part: is_plain(part) and is_minimal(part))


def is_minimal(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether the kernel is for this kind of convolution, whatever it is given."""
    return (
        isinstance(layer, nn.Conv2d)
        and layer.kernel_size == (3, 3)
        and layer.stride == layer.dilation == (1, 1)
        and layer.groups == 1
        and isinstance(layer.padding, tuple)
        and max(layer.padding) <= 2
        and layer.padding_mode == "zeros"
        and min(layer.in_channels, layer.out_channels) >= FEWEST_CHANNELS
    )


def is_served(images: Tensor, padding: Sequence[int]) -> bool:
    """Whether the kernel is faster for these: float32 in channels-last memory on a CPU, and enough of them.

    In half precision torch's products are faster on some CPUs, and slower on others.
    """
    return (
        FUSED
        and images.dtype == torch.float32
        and images.device.type in CPU_DEVICES
        and images.ndim == 4
        and _tiles(images, padding) >= FEWEST_TILES
        and images.is_contiguous(memory_format=torch.channels_last)
        and not torch.is_autocast_enabled("cpu")
    )


class Minimal:
    """Mixed into a layer that `is_minimal`."""

    weight: Tensor
    bias: Tensor | None
    padding: Any

    def forward(self, input: Tensor) -> Tensor:
        # TensorFlow's, for a kernel of 3 x 3 and a stride of 1, is one zero all around whatever the size.
        padding = (1, 1) if isinstance(self, Conv2dSame) else self.padding
        if not is_served(input, padding):
            # Of the layer that it is mixed into.
            alone: Tensor = super().forward(input)  # type: ignore[misc]
            return alone
        return winograd_conv2d(input, self.weight, self.bias, padding=padding)


class MinimalConv2d(Minimal, FrozenConv2d):
    pass


class MinimalConv2dSame(Minimal, FrozenConv2dSame):
    pass


KINDS: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: MinimalConv2d, Conv2dSame: MinimalConv2dSame}


def _tiles(images: Tensor, padding: Sequence[int]) -> int:
    down, across = (-(-(side + 2 * more - 2) // TILE) for side, more in zip(images.shape[2:], padding, strict=True))
    return images.shape[0] * down * across
