"""A convolution of 3 x 3, or its adjoint."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import conv2d


def winograd_conv2d(
    images: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int], adjoint: bool = False
) -> Tensor:
    if adjoint:
        weight = weight.transpose(0, 1).flip(2, 3)
    return conv2d(images, weight, bias, padding=list(padding))
