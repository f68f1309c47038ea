"""Attention of frozen transformers on CPUs, by torch's fused kernels."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.attention import Attention
from torch import Tensor, nn
from torch.autograd import Function

from alignfast.models.dataflow import has_hooks
from alignfast.models.frozen import reclassed, signed


def use_packed_attention(module: nn.Module) -> None:
    """Exchange, in place, timm's attention layers for those that keep queries, keys and values together.

    In half precision the kernels then compute in float32, whose gradient takes a third of the time; and the gradient is
    written once, where torch stacks, transposes and copies the three. Subclasses and layers with hooks are left alone.
    """
    for name, part in list(module.named_modules()):
        if name and type(part) is Attention and not has_hooks(part):
            module.set_submodule(name, reclassed(PackedAttention, part), strict=True)


class PackedAttention(Attention):
    """Does what timm's does where that calls torch's fused kernel, and is timm's everywhere else."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal or not self._served(x):
            result: Tensor = super().forward(x, attn_mask, is_causal)
            return result
        packed = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        attended, _ = _Attended.apply(packed)
        dropped: Tensor = self.proj_drop(self.proj(attended))
        return dropped

    def _served(self, x: Tensor) -> bool:
        between = (self.q_norm, self.k_norm, self.norm)
        plain = all(type(part) is nn.Identity and not has_hooks(part) for part in between)
        # torch.nn.attention.sdpa_kernel asks for other kernels.
        fused = self.fused_attn and torch.backends.cuda.flash_sdp_enabled()
        return plain and fused and self.gate is None and not self.training and x.numel() > 0


class _Attended(Function):
    """Of queries, keys and values [N, tokens, 3, heads, width], softmax(q k' / sqrt(width)) v as [N, tokens, heads *
    width], and the logarithms of the sums that it divides by (Dao et al., NeurIPS 2022, section 3.1)."""

    @staticmethod
    @signed
    def forward(packed: Tensor) -> tuple[Tensor, Tensor]:
        result, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*_apart(packed))
        return result.transpose(1, 2).flatten(2).to(packed.dtype), sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Tensor:
        packed, result, sums = ctx.saved_tensors
        parts = _apart(packed)
        grad, result = (_by_heads(rows.to(parts[0].dtype), packed.shape[3]) for rows in (grad, result))
        if torch.is_grad_enabled():
            return torch.stack([one.transpose(1, 2) for one in _differentiable(grad, *parts)], 2).to(packed.dtype)
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, *parts, result, sums, 0.0, False
        )
        together = torch.empty_like(packed)
        for part, one in zip(together.unbind(2), found, strict=True):
            part.copy_(one.transpose(1, 2))
        return together


def _differentiable(grad: Tensor, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by plain products, since torch's kernel has no derivative."""
    scale = queries.shape[-1] ** -0.5
    shares = (scale * queries @ keys.mT).softmax(-1)
    of_shares = grad @ values.mT
    of_products = scale * shares * (of_shares - (shares * of_shares).sum(-1, keepdim=True))
    return of_products @ keys, of_products.mT @ queries, shares.mT @ grad


def _by_heads(rows: Tensor, heads: int) -> Tensor:
    """From [N, tokens, heads * width], [N, heads, tokens, width]."""
    apart: Tensor = rows.unflatten(-1, (heads, -1))
    return apart.transpose(1, 2)


def _apart(packed: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values [N, heads, tokens, width], at least in float32."""
    wide = packed.to(torch.promote_types(packed.dtype, torch.float32))
    return wide.permute(2, 0, 3, 1, 4).unbind(0)
