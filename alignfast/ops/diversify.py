"""From images to the batch a model is given: copies with noise, mixing, scale, geometry and normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignfast.checks import check_count, check_number, check_shape
from alignfast.reference import diversify as reference


@dataclass(frozen=True)
class Noise:
    """Uniform noise in [-radius, radius), drawn per element by `philox_uniform` with these keys.

    images: int64 [N]. copies: int64 [K].
    """

    radius: float
    seed: int
    step: int
    purpose: int
    images: Tensor
    copies: Tensor


@dataclass(frozen=True)
class Mixing:
    """Adds `weight` times another image (Admix, Wang et al., ICCV 2021, eq. 5).

    pool: [M, C, H, W], no gradient flows to it. partner: int64 [K, N] in [0, M). weight: [K, N].
    """

    pool: Tensor
    partner: Tensor
    weight: Tensor


@dataclass(frozen=True)
class ResizePad:
    """Input diversity (Xie et al., CVPR 2019): resize, pad with zeros, and resize back where padding enlarged.

    An image of side S is resized to `resized` by bilinear interpolation (align_corners=False), placed at (top, left)
    in zeros of side `padded` and, if `padded` is not S, resized back to S. With padded = S this is torchattacks'
    definition, with padded > S TransferAttack's. A `resized` of 0 leaves that copy as it is.

    resized, top, left: int64 [K, N] with 0 <= top, left <= padded - resized.
    """

    resized: Tensor
    top: Tensor
    left: Tensor
    padded: int


def diversify(
    images: Tensor,
    *,
    copies: int = 1,
    noise: Noise | None = None,
    mixing: Mixing | None = None,
    scale: Tensor | None = None,
    resize_pad: ResizePad | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """[K N, C, H, W], copy k of image n in row k N + n: (resize_pad(scale (x + noise + weight x')) - mean) / std.

    Every part is linear in the images and may be left out; the gradient of an image is the sum over its copies.

    Args:
        images: [N, C, H, W], floating point; computed in float32, or in float64 if given so.
        copies: K.
        scale: [K, N] factors.
        mean, std: [C], both or neither.
        dtype: of the result; that of the images if None.
        memory_format: torch.contiguous_format or torch.channels_last.

    Raises:
        ValueError: shapes, dtypes or devices that do not match, or a number outside what is allowed. Values held by
            tensors are not read, since that would wait for the device.
    """
    check_shape("images", images.shape, (None, None, None, None))
    if not images.is_floating_point():
        raise ValueError(f"images: got dtype {images.dtype}; allowed is a floating-point tensor")
    check_count("copies", copies)
    grid = (copies, len(images))
    if noise is not None:
        check_number("noise.radius", noise.radius, low=0.0)
        _check_part("noise.images", noise.images, (len(images),), images, torch.int64)
        _check_part("noise.copies", noise.copies, (copies,), images, torch.int64)
    if mixing is not None:
        _check_part("mixing.pool", mixing.pool, (None, *images.shape[1:]), images)
        _check_part("mixing.partner", mixing.partner, grid, images, torch.int64)
        _check_part("mixing.weight", mixing.weight, grid, images)
    if scale is not None:
        _check_part("scale", scale, grid, images)
    if resize_pad is not None:
        _check_geometry(resize_pad, images, grid)
    if (mean is None) != (std is None):
        raise ValueError("mean, std: got one of them; allowed is both or neither")
    for name, value in (("mean", mean), ("std", std)):
        if value is not None:
            _check_part(name, value, (images.shape[1],), images)
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype: got {dtype}; allowed is a floating-point dtype")
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(f"memory_format: got {memory_format}; allowed is contiguous_format or channels_last")
    return reference.diversify(
        images, copies, noise, mixing, scale, resize_pad, mean, std, dtype or images.dtype, memory_format
    )


def _check_geometry(geometry: ResizePad, images: Tensor, grid: tuple[int, int]) -> None:
    height, width = images.shape[2:]
    if height != width:
        raise ValueError(f"resize_pad: got images of {height} x {width}; allowed is square images")
    check_count("resize_pad.padded", geometry.padded, low=height)
    for name in ("resized", "top", "left"):
        _check_part(f"resize_pad.{name}", getattr(geometry, name), grid, images, torch.int64)


def _check_part(
    name: str, part: Tensor, shape: Sequence[int | None], images: Tensor, dtype: torch.dtype | None = None
) -> None:
    check_shape(name, part.shape, shape)
    if dtype is not None and part.dtype != dtype:
        raise ValueError(f"{name}: got dtype {part.dtype}; allowed is {dtype}")
    if part.device != images.device:
        raise ValueError(f"{name}: on {part.device}; allowed is the device of images, {images.device}")
