"""Smoothing of the gradient (translation-invariant attacks)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alignfast.checks import check_shape
from alignfast.native import NATIVE_DEVICES
from alignfast.reference import smooth as reference


def smooth(grad: Tensor, kernel: Tensor) -> Tensor:
    """Depthwise cross-correlation with the outer product of `kernel` with itself, zero padding, same size.

    W * g of TI-FGSM (Dong et al., CVPR 2019, eq. 8) for a separable W. Half precision is summed in float32.

    Args:
        grad: [N, C, H, W], floating point.
        kernel: [k] with k odd, of grad's dtype and device. No gradient flows to it.

    Returns:
        [N, C, H, W] of grad's dtype, channels-last where grad is, else contiguous.

    Raises:
        ValueError: an even or empty kernel, one that requires grad while gradients are recorded, or shapes, dtypes or
            devices that do not match.
    """
    _check(grad, kernel)
    if torch.is_grad_enabled() and kernel.requires_grad:
        raise ValueError("kernel: requires grad; allowed is a constant, since the gradient flows to grad alone")
    if grad.device.type in NATIVE_DEVICES:
        smoothed: Tensor = torch.ops.alignfast.smooth(grad, kernel)
        return smoothed
    return reference.smooth(grad, kernel)


def _check(grad: Tensor, kernel: Tensor) -> None:
    check_shape("grad", grad.shape, (None, None, None, None))
    check_shape("kernel", kernel.shape, (None,))
    if len(kernel) % 2 == 0:
        raise ValueError(f"kernel: got size {len(kernel)}; allowed is an odd size")
    if not grad.is_floating_point():
        raise ValueError(f"grad: got dtype {grad.dtype}; allowed is a floating-point tensor")
    if kernel.dtype != grad.dtype or kernel.device != grad.device:
        raise ValueError(
            f"kernel: got {kernel.dtype} on {kernel.device} for a gradient of {grad.dtype} on {grad.device}; "
            "allowed is one dtype and device"
        )


def _fake(grad: Tensor, kernel: Tensor) -> Tensor:
    _check(grad, kernel)
    interleaved = not grad.is_contiguous() and grad.is_contiguous(memory_format=torch.channels_last)
    return torch.empty_like(
        grad, memory_format=torch.channels_last if interleaved else torch.contiguous_format, requires_grad=False
    )


def _keep_kernel(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return torch.ops.alignfast.smooth_backward(grad, *ctx.saved_tensors), None


def _backward_of_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return torch.ops.alignfast.smooth(grad, *ctx.saved_tensors), None


# Each of the two is linear and the other's adjoint.
for _name, _adjoint in (("smooth", _backward), ("smooth_backward", _backward_of_backward)):
    torch.library.register_fake(f"alignfast::{_name}", _fake)
    torch.library.register_autograd(f"alignfast::{_name}", _adjoint, setup_context=_keep_kernel)
