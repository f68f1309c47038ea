"""The gradient of a network's first convolution, which only attacks ask for."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from alignfast.native import CPU_DEVICES

# A vector register holds sixteen values, and oneDNN fills one with the channels of a pixel.
LANES = 16
# Blocks of pixels make channels, and kernels larger by the zeros that fill the last blocks: what that may cost.
MOST_WASTED = 1.5


def image_gradient(
    grad: Tensor, weight: Tensor, size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor | None:
    """Of a convolution of images of few channels, with regard to them; None where torch's own is as fast.

    oneDNN takes four to ten times as long as for the convolution itself, since three channels fill three of sixteen
    lanes. Kernels that do not overlap are a product of matrices. Those of a stride are a convolution of stride 1 whose
    channels are all values of a block of pixels, as many as a step passes over (Shi et al., CVPR 2016, section 2.2).

    Args:
        grad: [N, K, h, w]. weight: [K, C, kernel, kernel], of the same dtype. size: [N, C, H, W] of the images.
        stride, padding: down and right; not dilated, and of one group.
    """
    kernel = weight.shape[2:]
    by_onednn = grad.device.type in CPU_DEVICES and grad.dtype != torch.float64
    if not by_onednn or weight.shape[1] >= LANES or grad.numel() == 0:
        return None
    if tuple(kernel) == tuple(stride) and not any(padding):
        return _of_patches(grad, weight, size)
    blocks = [-(-side // step) for side, step in zip(kernel, stride, strict=True)]
    wasted = prod(count * step / side for count, step, side in zip(blocks, stride, kernel, strict=True))
    if prod(stride) == 1 or wasted > MOST_WASTED:
        return None
    return _of_blocks(grad, weight, size, stride, padding, blocks)


def _of_patches(grad: Tensor, weight: Tensor, size: Sequence[int]) -> Tensor:
    """Each pixel lies in one patch, or behind the last one."""
    outputs, channels, down, right = weight.shape
    count, _, rows, columns = grad.shape
    pixels = weight.permute(0, 2, 3, 1).reshape(outputs, -1)
    patches = grad.permute(0, 2, 3, 1).reshape(-1, outputs) @ pixels
    images = patches.view(count, rows, columns, down, right, channels).permute(0, 5, 1, 3, 2, 4)
    return _cut(images.reshape(count, channels, rows * down, columns * right), size, (0, 0))


def _of_blocks(
    grad: Tensor,
    weight: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    blocks: Sequence[int],
) -> Tensor:
    outputs, channels, *kernel = weight.shape
    (down, right), (high, wide) = stride, blocks
    whole = F.pad(weight, (0, wide * right - kernel[1], 0, high * down - kernel[0]))
    whole = whole.view(outputs, channels, high, down, wide, right).permute(0, 3, 5, 1, 2, 4)
    whole = whole.reshape(outputs, -1, high, wide).contiguous(memory_format=torch.channels_last)
    count, rows, columns = grad.shape[0], grad.shape[2] + high - 1, grad.shape[3] + wide - 1
    # Asked for its shape only.
    like = grad.new_empty((count, whole.shape[1], rows, columns)).contiguous(memory_format=torch.channels_last)
    found, _, _ = torch.ops.aten.convolution_backward(
        grad, like, whole, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, False, False]
    )
    images = found.view(count, down, right, channels, rows, columns).permute(0, 3, 4, 1, 5, 2)
    return _cut(images.reshape(count, channels, rows * down, columns * right), size, padding)


def _cut(images: Tensor, size: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Without the padding, and with zeros where no kernel reached."""
    (top, left), (height, width) = padding, size[2:]
    return F.pad(images, (-left, left + width - images.shape[3], -top, top + height - images.shape[2]))
