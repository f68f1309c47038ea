"""The discrete cosine transform as a matrix."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def waves(size: int, device: torch.device) -> Tensor:
    """float64 [size, size]: row k holds the k-th wave of the orthonormal DCT-II."""
    number = torch.arange(size, dtype=torch.float64, device=device)
    rows = torch.cos(math.pi / size * number[:, None] * (number + 0.5)) * math.sqrt(2 / size)
    return torch.where(number[:, None] == 0, math.sqrt(1 / size), rows)
