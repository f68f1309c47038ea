"""One step of an iterative attack, in place."""

from __future__ import annotations

import torch
from torch import Tensor


def sign_step(
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
    if adv.numel() == 0:
        return
    direction = grad
    if momentum is not None:
        momentum.mul_(decay).add_(_divide(grad, grad.abs().mean((1, 2, 3), keepdim=True)))
        direction = momentum
    if norm == "linf":
        adv.add_(direction.sign(), alpha=alpha)
        delta = (adv - images).clamp_(-eps, eps)
    else:
        adv.add_(_divide(direction, _l2(direction)), alpha=alpha)
        delta = adv - images
        length = _l2(delta)
        delta = torch.where(length > eps, delta * (eps / length), delta)
    torch.clamp(images + delta, low, high, out=adv)


def _divide(grad: Tensor, size: Tensor) -> Tensor:
    """grad / size, and zero where the whole gradient of an image is zero."""
    return torch.where(size > 0, grad / size, torch.zeros_like(grad))


def _l2(x: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True)
    return length
