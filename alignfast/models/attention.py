"""Attention of frozen transformers on CPUs, by the package's own kernel."""

from __future__ import annotations

import torch
from timm.layers.attention import Attention
from torch import Tensor, nn

from alignfast._C import cpu_isa
from alignfast.models.dataflow import has_hooks
from alignfast.models.frozen import exchange
from alignfast.ops.attention import attention


def use_packed_attention(module: nn.Module) -> None:
    """Exchange, in place, timm's attention layers for those that keep queries, keys and values together.

    The kernel computes in float32 at least, which on CPUs is faster than torch's in half precision too; and the
    gradient is written once, where torch stacks, transposes and copies the three. Subclasses and layers with hooks are
    left alone, and all where fused multiply-adds are computed in software.
    """
    if cpu_isa() == "baseline":
        return
    exchange(module, {Attention: PackedAttention}, lambda part: not has_hooks(part))


class PackedAttention(Attention):
    """Does what timm's does where that calls torch's fused kernel, and is timm's everywhere else."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal or not self.serves(x):
            result: Tensor = super().forward(x, attn_mask, is_causal)
            return result
        attended = attention(self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)))
        dropped: Tensor = self.proj_drop(self.proj(attended))
        return dropped

    def serves(self, x: Tensor) -> bool:
        """Whether the kernel does what timm would."""
        between = (self.q_norm, self.k_norm, self.norm)
        plain = all(type(part) is nn.Identity and not has_hooks(part) for part in between)
        # torch.nn.attention.sdpa_kernel asks for other kernels.
        fused = self.fused_attn and torch.backends.cuda.flash_sdp_enabled()
        return plain and fused and self.gate is None and not self.training and x.numel() > 0
