"""Arithmetic on the images of a batch, each on its own. Their last three dimensions are those of an image."""

from __future__ import annotations

import math

import torch
from torch import Tensor

IMAGE = (-3, -2, -1)


def total(x: Tensor) -> Tensor:
    """float64 [..., 1, 1, 1]: the sum, in the order of the indices whatever the layout in memory."""
    # In two stages: torch shares a sum with a single result among threads, and so would round an image alone otherwise.
    return x.contiguous().sum(-1, keepdim=True, dtype=torch.float64).sum((-3, -2), keepdim=True)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """float64 [..., 1, 1, 1]: the sum of products."""
    return total(a.double() * b)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """[..., 1, 1, 1] in the dtype of `a`: the cosine between each two, 0 where one of them is zero throughout."""
    lengths = (dot(a, a) * dot(b, b)).sqrt()
    return torch.where(lengths > 0, dot(a, b) / lengths, 0).to(a.dtype)


def over_mean(grad: Tensor) -> Tensor:
    """grad / mean|grad|, which attacks call their L1 normalisation; zero where the image's gradient is."""
    mean = (total(grad.abs()) / math.prod(grad.shape[-3:])).to(grad.dtype)
    return torch.where(mean > 0, grad / mean, 0)


def over_length(grad: Tensor) -> Tensor:
    """grad / ||grad||_2; zero where the image's gradient is."""
    length = dot(grad, grad).sqrt().to(grad.dtype)
    return torch.where(length > 0, grad / length, 0)


def per_row(values: Tensor, rows: Tensor) -> Tensor:
    """[B] in the shape that multiplies rows [B, ...]."""
    return values.reshape(-1, *[1] * (rows.ndim - 1))


def add_in_order(total: Tensor | None, parts: Tensor) -> Tensor:
    """`total`, or zero if None, plus parts[0], plus parts[1], and so on; in place of `total`."""
    for part in parts:
        total = part.clone() if total is None else total.add_(part)
    assert total is not None
    return total
