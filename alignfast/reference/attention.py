"""Scaled dot-product attention of queries, keys and values that lie side by side."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(packed: Tensor) -> Tensor:
    """Of [N, tokens, 3, heads, width], at least in float32: [N, tokens, heads * width]."""
    queries, keys, values = _parts(packed)
    made: Tensor = _shares(queries, keys) @ values
    return made.transpose(1, 2).flatten(2).to(packed.dtype)


def attention_backward(grad: Tensor, packed: Tensor) -> Tensor:
    """The gradient of `packed`, which can be differentiated again."""
    queries, keys, values = _parts(packed)
    given = grad.to(queries.dtype).unflatten(-1, packed.shape[3:]).transpose(1, 2)
    shares = _shares(queries, keys)
    of_shares = given @ values.mT
    of_products = packed.shape[-1] ** -0.5 * shares * (of_shares - (shares * of_shares).sum(-1, keepdim=True))
    parts = (of_products @ keys, of_products.mT @ queries, shares.mT @ given)
    return torch.stack([part.transpose(1, 2) for part in parts], 2).to(packed.dtype)


def _parts(packed: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values [N, heads, tokens, width], at least in float32."""
    wide = packed.to(torch.promote_types(packed.dtype, torch.float32))
    return wide.permute(2, 0, 3, 1, 4).unbind(0)


def _shares(queries: Tensor, keys: Tensor) -> Tensor:
    products: Tensor = queries.shape[-1] ** -0.5 * queries @ keys.mT
    return products.softmax(-1)
