"""From images to the model's input batch, as a chain of plain tensor operations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alignfast.reference.philox_uniform import philox_uniform

if TYPE_CHECKING:
    from alignfast.ops.diversify import Mixing, Noise, ResizePad


def diversify(
    images: Tensor,
    copies: int,
    noise: Noise | None,
    mixing: Mixing | None,
    scale: Tensor | None,
    resize_pad: ResizePad | None,
    mean: Tensor | None,
    std: Tensor | None,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Tensor:
    wide = images if images.dtype == torch.float64 else images.float()
    x = wide.expand(copies, *images.shape)
    if noise is not None:
        draws = philox_uniform(
            noise.images,
            noise.copies,
            tuple(images.shape[1:]),
            noise.seed,
            noise.step,
            noise.purpose,
            -noise.radius,
            noise.radius,
        )
        x = x + draws
    if mixing is not None:
        x = x + _per_image(mixing.weight, x) * mixing.pool.detach()[mixing.partner]
    if scale is not None:
        x = x * _per_image(scale, x)
    if resize_pad is not None:
        x = _resize_pad(x, resize_pad)
    batch = x.reshape(-1, *x.shape[2:])
    if mean is not None and std is not None:
        batch = (batch - _per_channel(mean, batch)) / _per_channel(std, batch)
    return batch.to(dtype).contiguous(memory_format=memory_format)


def _resize_pad(x: Tensor, geometry: ResizePad) -> Tensor:
    """Both steps are linear and separable, so an image becomes rows @ image @ columns^T."""
    height, width = x.shape[-2:]
    rows = resize_pad_matrix(height, geometry.resized, geometry.top, geometry.padded, x.dtype)
    columns = resize_pad_matrix(width, geometry.resized, geometry.left, geometry.padded, x.dtype)
    return rows[:, :, None] @ x @ columns[:, :, None].mT


def resize_pad_matrix(size: int, resized: Tensor, offset: Tensor, padded: int, dtype: torch.dtype) -> Tensor:
    """[K, N, size, size]: bilinear from `size` to `resized`, zero-padded at `offset` to `padded`, bilinear to `size`.

    Sampling points are those of `torch.nn.functional.interpolate(mode="bilinear", align_corners=False)`. A `resized`
    of 0 leaves the image as it is.
    """
    target = resized[..., None].to(dtype)
    position = torch.arange(padded, device=resized.device) - offset[..., None]
    inside = (position >= 0) & (position < resized[..., None])
    point = (position.to(dtype) + 0.5) * (size / target.clamp(min=1)) - 0.5
    matrix = _bilinear(point, size) * inside[..., None]
    identity = torch.eye(size, dtype=dtype, device=resized.device)
    if padded != size:
        back = (torch.arange(size, device=resized.device, dtype=dtype) + 0.5) * (padded / size) - 0.5
        matrix = _bilinear(back, padded) @ matrix
    return torch.where((resized == 0)[..., None, None], identity, matrix)


def _bilinear(point: Tensor, size: int) -> Tensor:
    """[..., size]: the weight of each of `size` samples at `point`, border values repeated."""
    samples = torch.arange(size, device=point.device, dtype=point.dtype)
    return (1 - (point.clamp(0, size - 1)[..., None] - samples).abs()).clamp(min=0)


def _per_image(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.dtype)[:, :, None, None, None]


def _per_channel(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.dtype)[:, None, None]
