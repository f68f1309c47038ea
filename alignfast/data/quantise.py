"""From float adversarial images to 8 bits, without leaving the ball around the 8-bit original."""

from __future__ import annotations

import torch
from torch import Tensor

from alignfast.checks import check_choice, check_images, check_number

TOLERANCE = 1e-4  # of a level


def quantise(adversarial: Tensor, originals: Tensor, eps: float, norm: str = "linf") -> Tensor:
    """The nearest 8-bit images that lie in the `eps` ball around `originals`, exactly.

    L-inf: each value goes to the nearest level, then into [original - k, original + k] and [0, 255], with k the whole
    number of levels in `eps`. An `eps` that misses k / 255 by less than 1e-4 of a level, as 4/255 in floating point
    may, counts as k. L2: each image goes to the nearest levels; one that this takes out of the ball has its
    perturbation rounded towards zero instead, which never lengthens it; the same tolerance applies to the radius.

    Args:
        adversarial: float [N, C, H, W] in [0, 1].
        originals: uint8 [N, C, H, W], on the same device.
        eps: radius in the units of `adversarial`; in [0, 1] for L-inf, at least 0 for L2.
        norm: "linf" or "l2".

    Returns:
        uint8 [N, C, H, W] on the device of `adversarial`.

    Raises:
        ValueError: values outside [0, 1] or NaN, another dtype or shape, or a bad `eps` or `norm`.
    """
    check_choice("norm", norm, ("linf", "l2"))
    check_images("adversarial", adversarial)
    if originals.dtype != torch.uint8 or originals.shape != adversarial.shape:
        wanted = f"torch.uint8 {list(adversarial.shape)}"
        raise ValueError(f"originals: got {originals.dtype} {list(originals.shape)}; allowed is {wanted}")
    levels = adversarial.detach().float() * 255
    if norm == "linf":
        return _into_box(levels, originals, check_number("eps", eps, low=0.0, high=1.0))
    return _into_sphere(levels, originals, check_number("eps", eps, low=0.0))


def _into_box(levels: Tensor, originals: Tensor, eps: float) -> Tensor:
    radius = int(eps * 255 + TOLERANCE)
    centre = originals.to(torch.int16)
    nearest = levels.round().to(torch.int16)
    bounded = torch.minimum(torch.maximum(nearest, centre - radius), centre + radius)
    return bounded.clamp(0, 255).to(torch.uint8)


def _into_sphere(levels: Tensor, originals: Tensor, eps: float) -> Tensor:
    centre = originals.double()
    radius = eps * 255 + TOLERANCE
    nearest = levels.round().double()
    outside = _lengths(nearest - centre) > radius
    change = levels.double() - centre
    # The attack's own rounding may leave it a hair outside, so shrink it into the ball before truncating.
    change = change * (radius / _lengths(change).clamp_min(radius))
    return torch.where(outside, centre + change.trunc(), nearest).to(torch.uint8)


def _lengths(change: Tensor) -> Tensor:
    """L2 norm of each image: [N, 1, 1, 1]."""
    lengths: Tensor = torch.linalg.vector_norm(change, dim=(1, 2, 3), keepdim=True)
    return lengths
