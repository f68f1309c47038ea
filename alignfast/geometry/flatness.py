"""How the loss goes on around every image of a batch: how far it rises, and how straight."""

from __future__ import annotations

import torch
from torch import Tensor

from alignfast.geometry.field import Field

# Steps of the ascent are so long that this many lead across the ball's radius.
STEPS_ACROSS = 4


def worst_rise(field: Field, images: Tensor, radius: float, steps: int = 10) -> Tensor:
    """[N]: max of L(x + d) - L(x) over the points d of a sign ascent in the L-inf ball of `radius`, at least 0.

    A lower bound of the maximum, exact where the gradient keeps its signs. The points may lead out of [0, 1].
    """
    here, moved = field.values(images), torch.zeros_like(images)
    # The corner to which the gradient points, where the loss is highest if it is linear.
    best = field.values(images + radius * field.gradients(images).sign()) - here
    for _ in range(steps):
        uphill = field.gradients(images + moved).sign()
        moved = (moved + radius / STEPS_ACROSS * uphill).clamp(-radius, radius)
        best = torch.maximum(best, field.values(images + moved) - here)
    return best.clamp_min(0)


def mean_rise(field: Field, images: Tensor, noise: Tensor) -> Tensor:
    """[N]: mean of L(x + d) - L(x) over `noise`, [K, N, C, H, W], such as uniform draws of the L-inf ball."""
    here = field.values(images)
    return torch.stack([field.values(images + moved) - here for moved in noise]).mean(0)


def profile(field: Field, images: Tensor, distances: Tensor) -> Tensor:
    """[N, K]: L(x + t sign(g)) at the K distances t, in units of [0, 1] images, for the input gradient g at x."""
    direction = field.gradients(images).sign()
    return torch.stack([field.values(images + t * direction) for t in distances], 1)


def nonlinearity(field: Field, images: Tensor, radius: float, steps: int = 8) -> Tensor:
    """[N]: how far the loss is from its linear model along the gradient's sign, in [0, 2],

        max |L(x + t s) - L(x) - t |g|_1| / max(|L(x + t s) - L(x)|, t |g|_1) over t = radius / steps, ..., radius,

    with s = sign(g), each maximum over all t: the violation of linearity of Qin et al. (NeurIPS 2019, equation 6) in
    this direction, as a share of the rise or of what the linear model makes of it. 0 for a straight line; near 1 where
    the gradient tells nothing of the rise. NaN where the gradient is zero.
    """
    grad = field.gradients(images)
    here, slope, direction = field.values(images), grad.flatten(1).abs().sum(1), grad.sign()
    gaps, sizes = [], []
    for step in range(1, steps + 1):
        length = radius * step / steps
        rise, predicted = field.values(images + length * direction) - here, length * slope
        gaps.append((rise - predicted).abs())
        sizes.append(torch.maximum(rise.abs(), predicted))
    return torch.where(slope > 0, torch.stack(gaps).amax(0) / torch.stack(sizes).amax(0), torch.nan)
