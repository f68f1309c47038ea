"""From images to the batch a model is given: copies with noise, mixing, scale, geometry and normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignfast.checks import check_count, check_number, check_shape
from alignfast.native import NATIVE_DEVICES
from alignfast.ops.philox_uniform import MAX_PURPOSE, WORD, check_step_offset, split_step
from alignfast.reference import diversify as reference


@dataclass(frozen=True)
class Noise:
    """Uniform noise in [-radius, radius), drawn per element by `philox_uniform` with these keys.

    images: int64 [N]. copies: int64 [K]. step: a number, or int64 [] that is read on the device.
    """

    radius: float
    seed: int
    step: int | Tensor
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
    It flows to nothing else.

    Args:
        images: [N, C, H, W], floating point; computed in float32, or in float64 if given so.
        copies: K.
        scale: [K, N] factors.
        mean, std: [C], both or neither.
        dtype: of the result; that of the images if None.
        memory_format: torch.contiguous_format or torch.channels_last.

    Raises:
        ValueError: shapes, dtypes or devices that do not match, a number outside what is allowed, or a weight, scale,
            mean or std that requires grad while gradients are recorded. Values held by tensors are read on the CPU
            alone, since that would wait for a device; one outside its range is a RuntimeError.
    """
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(f"memory_format: got {memory_format}; allowed is contiguous_format or channels_last")
    if (mean is None) != (std is None):
        raise ValueError("mean, std: got one of them; allowed is both or neither")
    *noise_arguments, noise_step = _noise_arguments(noise)
    arguments = (
        images,
        copies,
        *noise_arguments,
        *((None, None, None) if mixing is None else (mixing.pool.detach(), mixing.partner, mixing.weight)),
        scale,
        *(
            (None, None, None, 0)
            if resize_pad is None
            else (resize_pad.resized, resize_pad.top, resize_pad.left, resize_pad.padded)
        ),
        mean,
        std,
        images.dtype if dtype is None else dtype,
        memory_format == torch.channels_last,
        noise_step,
    )
    _check(*arguments)
    _check_constants(None if mixing is None else mixing.weight, scale, mean, std)
    if images.device.type in NATIVE_DEVICES:
        batch: Tensor = torch.ops.alignfast.diversify(*arguments)
        return batch
    return reference.diversify(
        images, copies, noise, mixing, scale, resize_pad, mean, std, dtype or images.dtype, memory_format
    )


def _noise_arguments(
    noise: Noise | None,
) -> tuple[float, tuple[int, ...], Tensor | None, Tensor | None, Tensor | None]:
    if noise is None:
        return 0.0, (), None, None, None
    check_count("noise.seed", noise.seed, low=0, high=2**64 - 1)
    step, offset = split_step(noise.step)
    key = (noise.seed & WORD, noise.seed >> 32, step, noise.purpose)
    return noise.radius, key, noise.images, noise.copies, offset


def _check(
    images: Tensor,
    copies: int,
    noise_radius: float,
    noise_key: Sequence[int],
    noise_images: Tensor | None,
    noise_copies: Tensor | None,
    pool: Tensor | None,
    partner: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    resized: Tensor | None,
    top: Tensor | None,
    left: Tensor | None,
    padded: int,
    mean: Tensor | None,
    std: Tensor | None,
    dtype: torch.dtype,
    channels_last: bool,
    noise_step: Tensor | None = None,
) -> None:
    _check_images("images", images)
    check_count("copies", copies)
    grid = (copies, len(images))
    if noise_images is not None:
        check_number("noise.radius", noise_radius, low=0.0)
        names = ("noise.seed", "noise.seed", "noise.step", "noise.purpose")
        for name, value, high in zip(names, noise_key, (WORD, WORD, WORD, MAX_PURPOSE), strict=True):
            check_count(name, value, low=0, high=high)
        _check_part("noise.images", noise_images, (len(images),), images, torch.int64)
        _check_part("noise.copies", noise_copies, (copies,), images, torch.int64)
        check_step_offset("noise.step", noise_step, images)
    if pool is not None:
        _check_part("mixing.pool", pool, (None, *images.shape[1:]), images)
        _check_part("mixing.partner", partner, grid, images, torch.int64)
        _check_part("mixing.weight", weight, grid, images)
    if mean is not None:
        _check_part("mean", mean, (images.shape[1],), images)
    _check_linear(images, grid, scale, resized, top, left, padded, std, dtype)


def _check_backward(
    grad: Tensor,
    copies: int,
    scale: Tensor | None,
    resized: Tensor | None,
    top: Tensor | None,
    left: Tensor | None,
    padded: int,
    std: Tensor | None,
    dtype: torch.dtype,
) -> None:
    _check_images("grad", grad)
    check_count("copies", copies)
    if len(grad) % copies != 0:
        raise ValueError(f"copies: got {copies} for a gradient of {len(grad)} images; allowed is a divisor of that")
    _check_linear(grad, (copies, len(grad) // copies), scale, resized, top, left, padded, std, dtype)


def _check_linear(
    images: Tensor,
    grid: tuple[int, int],
    scale: Tensor | None,
    resized: Tensor | None,
    top: Tensor | None,
    left: Tensor | None,
    padded: int,
    std: Tensor | None,
    dtype: torch.dtype,
) -> None:
    if scale is not None:
        _check_part("scale", scale, grid, images)
    if resized is not None:
        height, width = images.shape[2:]
        if height != width:
            raise ValueError(f"resize_pad: got images of {height} x {width}; allowed is square images")
        check_count("resize_pad.padded", padded, low=height)
        for name, part in (("resized", resized), ("top", top), ("left", left)):
            _check_part(f"resize_pad.{name}", part, grid, images, torch.int64)
    if std is not None:
        _check_part("std", std, (images.shape[1],), images)
    if not dtype.is_floating_point:
        raise ValueError(f"dtype: got {dtype}; allowed is a floating-point dtype")


def _check_images(name: str, images: Tensor) -> None:
    check_shape(name, images.shape, (None, None, None, None))
    if not images.is_floating_point():
        raise ValueError(f"{name}: got dtype {images.dtype}; allowed is a floating-point tensor")


def _check_part(
    name: str, part: Tensor | None, shape: Sequence[int | None], images: Tensor, dtype: torch.dtype | None = None
) -> None:
    if part is None:
        raise ValueError(f"{name}: got None; allowed is a tensor where its like are given")
    check_shape(name, part.shape, shape)
    if dtype is not None and part.dtype != dtype:
        raise ValueError(f"{name}: got dtype {part.dtype}; allowed is {dtype}")
    if dtype is None and not part.is_floating_point():
        raise ValueError(f"{name}: got dtype {part.dtype}; allowed is a floating-point tensor")
    if part.device != images.device:
        raise ValueError(f"{name}: on {part.device}; allowed is the device of images, {images.device}")


def _check_constants(weight: Tensor | None, scale: Tensor | None, mean: Tensor | None, std: Tensor | None) -> None:
    if not torch.is_grad_enabled():
        return
    for name, part in (("mixing.weight", weight), ("scale", scale), ("mean", mean), ("std", std)):
        if part is not None and part.requires_grad:
            raise ValueError(f"{name}: requires grad; allowed is a constant, since the gradient flows to images alone")


def _fake(images: Tensor, copies: int, *rest: Any) -> Tensor:
    _check(images, copies, *rest)
    dtype, channels_last = rest[14:16]
    return torch.empty(
        (copies * len(images), *images.shape[1:]),
        dtype=dtype,
        device=images.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


def _fake_backward(grad: Tensor, copies: int, *rest: Any) -> Tensor:
    _check_backward(grad, copies, *rest)
    return grad.new_empty((len(grad) // copies, *grad.shape[1:]), dtype=rest[-1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, copies, *_, scale, resized, top, left, padded, _mean, std, _dtype, _channels_last, _noise_step = inputs
    ctx.save_for_backward(scale, resized, top, left, std)
    ctx.copies, ctx.padded, ctx.dtype = copies, padded, images.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    scale, resized, top, left, std = ctx.saved_tensors
    adjoint = torch.ops.alignfast.diversify_backward(
        grad, ctx.copies, scale, resized, top, left, ctx.padded, std, ctx.dtype
    )
    return adjoint, *[None] * 18


def _keep_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, copies, scale, resized, top, left, padded, std, _dtype = inputs
    ctx.save_for_backward(scale, resized, top, left, std)
    ctx.copies, ctx.padded, ctx.dtype = copies, padded, grad.dtype


def _backward_of_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    scale, resized, top, left, std = ctx.saved_tensors
    nothing = (0.0, (), None, None, None, None, None)
    linear = torch.ops.alignfast.diversify(
        grad, ctx.copies, *nothing, scale, resized, top, left, ctx.padded, None, std, ctx.dtype, False
    )
    return linear, *[None] * 8


torch.library.register_fake("alignfast::diversify", _fake)
torch.library.register_autograd("alignfast::diversify", _backward, setup_context=_keep)
torch.library.register_fake("alignfast::diversify_backward", _fake_backward)
torch.library.register_autograd("alignfast::diversify_backward", _backward_of_backward, setup_context=_keep_linear)
