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
    # Half precision is computed in float32 and rounded once: the mean of a small gradient would round to zero.
    wide = torch.float64 if adv.dtype == torch.float64 else torch.float32
    direction = grad
    if momentum is not None:
        # A sum in float64 is the same float32 in whatever order it is taken.
        mean = grad.abs().mean((1, 2, 3), keepdim=True, dtype=torch.float64).to(wide)
        momentum.copy_(momentum.to(wide) * decay + _divide(grad.to(wide), mean))
        direction = momentum
    if norm == "linf":
        delta = (adv.to(wide) + alpha * direction.sign().to(wide) - images.to(wide)).clamp_(-eps, eps)
    else:
        adv.add_(_unit(direction.to(wide)), alpha=alpha)
        delta = adv - images
        length = _l2(delta.to(wide))
        delta = torch.where(length > eps, delta * (eps / length), delta).to(adv.dtype)
    torch.clamp((images + delta).to(adv.dtype), low, high, out=adv)


def _unit(direction: Tensor) -> Tensor:
    """direction / ||direction||_2 per image, and zero where it is zero throughout."""
    # With a largest element of 1, squares neither vanish nor overflow, and only an image of zeros is shorter than 1.
    scaled = _divide(direction, direction.abs().amax((1, 2, 3), keepdim=True))
    return scaled / _l2(scaled).clamp(min=1)


def _divide(grad: Tensor, size: Tensor) -> Tensor:
    """grad / size, and zero where the whole gradient of an image is zero."""
    return torch.where(size > 0, grad / size, 0)


def _l2(x: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True, dtype=torch.float64).to(x.dtype)
    return length
