"""The update of an iterative attack: momentum, sign, step, projection and clamp."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from alignfast.checks import check_choice, check_number
from alignfast.native import NATIVE_DEVICES
from alignfast.reference import sign_step as reference

Norm = Literal["linf", "l2"]


def sign_step(
    adv: Tensor,
    images: Tensor,
    grad: Tensor,
    momentum: Tensor | None = None,
    *,
    alpha: float,
    eps: float,
    decay: float = 0.0,
    low: float = 0.0,
    high: float = 1.0,
    norm: Norm = "linf",
) -> None:
    """Update `adv`, and `momentum` if given, in place.

    With momentum (MI-FGSM, Dong et al., CVPR 2018, eq. 6 and 7): m <- decay m + g / mean|g|, where mean|g| is taken
    per image, and d = m; without, d = g. Then "linf" takes adv <- adv + alpha sign(d), projected on the ball of radius
    eps around `images`; "l2" takes adv <- adv + alpha d / ||d||_2, projected on the L2 ball per image. Last, adv is
    clamped to [low, high]. An image whose gradient is zero throughout adds nothing to its momentum; one whose
    direction is zero makes no step. Half precision is computed in float32.

    Args:
        adv, images, grad, momentum: [N, C, H, W] of one floating dtype and device. `grad` is not changed.
        alpha: step size, at least 0. eps: radius, at least 0. decay: at least 0.

    Raises:
        ValueError: shapes, dtypes or devices differ, a number is outside what is allowed, or a tensor requires grad
            while gradients are recorded; nothing is changed then.
    """
    arguments = (adv, images, grad, momentum, alpha, eps, decay, low, high, norm)
    _check(*arguments)
    _check_detached(adv, images, grad, momentum)
    if adv.device.type in NATIVE_DEVICES:
        torch.ops.alignfast.sign_step(*arguments)
        # As any in-place operation does, so that autograd notices where it kept one of them for a backward pass.
        torch.autograd.graph.increment_version([adv] if momentum is None else [adv, momentum])
    else:
        reference.sign_step(*arguments)


def _check(
    adv: Tensor,
    images: Tensor,
    grad: Tensor,
    momentum: Tensor | None,
    alpha: float,
    eps: float,
    decay: float,
    low: float,
    high: float,
    norm: str,
) -> None:
    for name, tensor in (("adv", adv), ("images", images), ("grad", grad), ("momentum", momentum)):
        if tensor is not None:
            _check_like(name, tensor, images)
    check_number("alpha", alpha, low=0.0)
    check_number("eps", eps, low=0.0)
    check_number("decay", decay, low=0.0)
    check_choice("norm", norm, ("linf", "l2"))
    if math.isnan(low) or math.isnan(high) or low > high:
        raise ValueError(f"low, high: got {low}, {high}; allowed is low <= high")


def _check_detached(*tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise ValueError(
            "adv, images, grad, momentum: got one that requires grad; allowed is detached tensors, or any under "
            "torch.no_grad(), since a step has no gradient"
        )


def _check_like(name: str, tensor: Tensor, images: Tensor) -> None:
    if tensor.ndim != 4 or not tensor.is_floating_point():
        raise ValueError(f"{name}: got {tensor.dtype} {list(tensor.shape)}; allowed is floating-point [N, C, H, W]")
    given = (tensor.shape, tensor.dtype, tensor.device)
    if given != (images.shape, images.dtype, images.device):
        raise ValueError(
            f"{name}: got {tensor.dtype} {list(tensor.shape)} on {tensor.device}; allowed is that of images, "
            f"{images.dtype} {list(images.shape)} on {images.device}"
        )


# There is no result to describe, so checking the arguments is the whole of the fake.
torch.library.register_fake("alignfast::sign_step", _check)
