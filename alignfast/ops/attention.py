"""Attention of queries, keys and values that lie side by side, and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alignfast.checks import check_shape
from alignfast.native import CPU_DEVICES
from alignfast.ops.dense import check_dense, wide_dtype
from alignfast.reference import attention as reference


def attention(packed: Tensor) -> Tensor:
    """softmax(q k' / sqrt(width)) v of every head (Vaswani et al., NeurIPS 2017, eq. 1).

    The softmax is never stored whole: for the gradient it is computed again from two numbers a query (Dao et al.,
    NeurIPS 2022, sec. 3.1), which besides needs neither the result nor a copy of queries, keys and values. It can be
    differentiated again, by plain products.

    On the CPU half precision is computed in float32 and rounded once; on other devices plain products serve.

    Args:
        packed: [N, tokens, 3, heads, width] of queries, keys and values, floating point; copied where it has gaps.

    Returns:
        [N, tokens, heads * width] of the same dtype.

    Raises:
        ValueError: another shape or dtype.
    """
    _check(packed)
    if packed.device.type not in CPU_DEVICES:
        return reference.attention(packed)
    result: Tensor = torch.ops.alignfast.attention(packed.contiguous())[0]
    return result


def _check(packed: Tensor) -> None:
    check_shape("packed", packed.shape, (None, None, 3, None, None))
    if not packed.is_floating_point():
        raise ValueError(f"packed: got dtype {packed.dtype}; allowed is a floating-point tensor")


def _fake(packed: Tensor) -> tuple[Tensor, Tensor]:
    _check(packed)
    check_dense("packed", packed, packed.shape, packed.dtype, packed.device)
    count, length, _, heads, width = packed.shape
    return packed.new_empty(count, length, heads * width), packed.new_empty(
        count, heads, length, 2, dtype=wide_dtype(packed.dtype)
    )


def _fake_backward(grad: Tensor, packed: Tensor, sums: Tensor) -> Tensor:
    result, wanted = _fake(packed)
    check_dense("grad", grad, result.shape, packed.dtype, packed.device)
    check_dense("sums", sums, wanted.shape, wanted.dtype, packed.device)
    return torch.empty_like(packed)


def _keep(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx: Any, grad: Tensor, _: Any) -> Tensor:
    packed, sums = ctx.saved_tensors
    if torch.is_grad_enabled():
        return reference.attention_backward(grad, packed)
    result: Tensor = torch.ops.alignfast.attention_backward(grad.contiguous(), packed, sums)
    return result


torch.library.register_fake("alignfast::attention", _fake)
torch.library.register_fake("alignfast::attention_backward", _fake_backward)
torch.library.register_autograd("alignfast::attention", _backward, setup_context=_keep)
