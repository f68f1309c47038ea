"""Two 3 x 3 convolutions with rectifiers behind them, the second behind the sum with what went in."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import conv2d, relu


def basic_block(
    images: Tensor, first: Tensor, first_bias: Tensor | None, second: Tensor, second_bias: Tensor | None
) -> Tensor:
    return relu(images + conv2d(relu(conv2d(images, first, first_bias, padding=1)), second, second_bias, padding=1))
