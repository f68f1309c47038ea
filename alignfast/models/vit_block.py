"""Blocks of frozen vision transformers on CPUs, a few images at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers.drop import DropPath
from timm.layers.layer_scale import LayerScale
from timm.layers.mlp import Mlp
from timm.layers.norm import LayerNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.autograd import Function
from torch.overrides import has_torch_function

from alignfast.models.attention import PackedAttention
from alignfast.models.dataflow import has_hooks
from alignfast.models.frozen import exchange, signed

aten = torch.ops.aten
ops = torch.ops.alignfast
# Tokens that go through a block at a time: of fewer, products of matrices fall below their full rate.
MOST_TOKENS = 1600
# Of fewer in all, what is done in Python for a block takes longer than anything saves.
FEWEST_TOKENS = 700
# What stands in a block's places; subclasses may do something else.
NORM, LINEAR, DROP = (LayerNorm, nn.LayerNorm), (nn.Linear,), (nn.Dropout,)
SCALE, PATH = (nn.Identity, LayerScale), (nn.Identity, DropPath)


def use_partwise_blocks(module: nn.Module) -> None:
    """Exchange, in place, timm's blocks of vision transformers for those that take a few images at a time.

    What lies between layers and is not kept for the gradient then takes little memory, and leaves few gaps between what
    is. Behind the exchange of attention. Subclasses and blocks with hooks are left alone.
    """
    exchange(module, {Block: PartwiseBlock}, lambda part: not has_hooks(part))


class PartwiseBlock(Block):
    """Does what timm's does where all in it is as in the paper (Dosovitskiy et al., ICLR 2021, eq. 2 and 3), frozen and
    to be differentiated, and is timm's everywhere else."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal or not self._served(x):
            result: Tensor = super().forward(x, attn_mask, is_causal)
            return result
        return _applied(MLP, _applied(ATTENTION, x.contiguous(), self), self)

    def _served(self, x: Tensor) -> bool:
        return (
            x.ndim == 3
            and x.shape[0] * x.shape[1] >= FEWEST_TOKENS
            and x.requires_grad
            and torch.is_grad_enabled()
            and x.device.type == "cpu"
            and not torch.is_autocast_enabled("cpu")
            # Which gives functions another meaning.
            and not has_torch_function((x,))
            and type(self.attn) is PackedAttention
            and type(self.mlp) is Mlp
            and self.attn.serves(x)
            and all(_is_plain(part, kinds, x.dtype) for part, kinds in self._inside())
        )

    def _inside(self) -> list[tuple[nn.Module, tuple[type[nn.Module], ...]]]:
        """What is left out or computed otherwise, with what it has to be for that."""
        attn: Any = self.attn
        mlp: Any = self.mlp
        return [
            (self, (PartwiseBlock,)),
            (self.norm1, NORM),
            (attn, (PackedAttention,)),
            (attn.qkv, LINEAR),
            (attn.attn_drop, DROP),
            (attn.proj, LINEAR),
            (attn.proj_drop, DROP),
            (self.ls1, SCALE),
            (self.drop_path1, PATH),
            (self.norm2, NORM),
            (mlp, (Mlp,)),
            (mlp.fc1, LINEAR),
            (mlp.act, (nn.GELU,)),
            (mlp.drop1, DROP),
            (mlp.norm, (nn.Identity,)),
            (mlp.fc2, LINEAR),
            (mlp.drop2, DROP),
            (self.ls2, SCALE),
            (self.drop_path2, PATH),
        ]


@dataclass(frozen=True)
class Branch:
    """The tokens that go in, and what one of a block's two residual branches adds to them.

    plain: as timm computes it. made: its result and, behind that, what its gradient needs beside the tokens, from these
    and a block. gradient: of the tokens, from the result's, the block, the tokens and all that `made` kept.
    """

    plain: Callable[[PartwiseBlock, Tensor], Tensor]
    made: Callable[[Tensor, PartwiseBlock], tuple[Tensor, ...]]
    gradient: Callable[..., Tensor]


class _Branch(Function):
    @staticmethod
    @signed
    def forward(x: Tensor, block: PartwiseBlock, branch: Branch) -> tuple[Tensor, ...]:
        return branch.made(x, block)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, PartwiseBlock, Branch], output: tuple[Tensor, ...]) -> None:
        x, ctx.block, ctx.branch = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, None, None]:
        if grad is None:
            return None, None, None
        x, *kept = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return ctx.branch.gradient(grad.contiguous(), ctx.block, x, *kept), None, None
        (result,) = torch.autograd.grad(ctx.branch.plain(ctx.block, x), x, grad, create_graph=True)
        return result, None, None


def _attended(x: Tensor, block: PartwiseBlock) -> tuple[Tensor, ...]:
    attn: Any = block.attn
    packed = x.new_empty(*x.shape[:2], 3, attn.num_heads, attn.head_dim)
    result = torch.empty_like(x)
    weight, bias = _scaled(attn.proj, block.ls1)
    kept: list[Tensor] = []
    for some in _parts(x):
        normed, mean, scale = _normed(x[some], block.norm1)
        _linear(normed, attn.qkv, packed[some].flatten(2))
        attended, sums = ops.attention(packed[some])
        _add_linear(x[some], attended, weight, bias, result[some])
        kept += (mean, scale, sums)
    return result, packed, *kept


def _of_attended(grad: Tensor, block: PartwiseBlock, x: Tensor, packed: Tensor, *kept: Tensor) -> Tensor:
    attn: Any = block.attn
    result = torch.empty_like(x)
    weight = _scaled(attn.proj, block.ls1)[0]
    for some, mean, scale, sums in zip(_parts(x), kept[::3], kept[1::3], kept[2::3], strict=True):
        of_packed = ops.attention_backward(torch.matmul(grad[some], weight), packed[some], sums)
        of_normed = torch.matmul(of_packed.flatten(2), attn.qkv.weight)
        torch.add(grad[some], _of_norm(of_normed, x[some], mean, scale, block.norm1), out=result[some])
    return result


def _perceived(x: Tensor, block: PartwiseBlock) -> tuple[Tensor, ...]:
    mlp: Any = block.mlp
    hidden = x.new_empty(*x.shape[:2], mlp.fc1.out_features)
    result = torch.empty_like(x)
    parts = _parts(x)
    active = torch.empty_like(hidden[parts[0]])
    weight, bias = _scaled(mlp.fc2, block.ls2)
    kept: list[Tensor] = []
    for some in parts:
        normed, mean, scale = _normed(x[some], block.norm2)
        _linear(normed, mlp.fc1, hidden[some])
        own = active[: len(normed)]
        aten.gelu.out(hidden[some], approximate=mlp.act.approximate, out=own)
        _add_linear(x[some], own, weight, bias, result[some])
        kept += (mean, scale)
    return result, hidden, *kept


def _of_perceived(grad: Tensor, block: PartwiseBlock, x: Tensor, hidden: Tensor, *kept: Tensor) -> Tensor:
    mlp: Any = block.mlp
    result = torch.empty_like(x)
    parts = _parts(x)
    slopes = torch.empty_like(hidden[parts[0]])
    weight = _scaled(mlp.fc2, block.ls2)[0]
    for some, mean, scale in zip(parts, kept[::2], kept[1::2], strict=True):
        own = slopes[: len(grad[some])]
        torch.mm(grad[some].flatten(0, 1), weight, out=own.flatten(0, 1))
        aten.gelu_backward.grad_input(own, hidden[some], approximate=mlp.act.approximate, grad_input=own)
        of_normed = torch.matmul(own, mlp.fc1.weight)
        torch.add(grad[some], _of_norm(of_normed, x[some], mean, scale, block.norm2), out=result[some])
    return result


ATTENTION = Branch(lambda block, x: x + block.ls1(block.attn(block.norm1(x))), _attended, _of_attended)
MLP = Branch(lambda block, x: x + block.ls2(block.mlp(block.norm2(x))), _perceived, _of_perceived)


def _is_plain(part: nn.Module, kinds: tuple[type[nn.Module], ...], dtype: torch.dtype) -> bool:
    return (
        type(part) in kinds
        and not part.training
        and not has_hooks(part)
        and not getattr(part, "_fast_norm", False)
        and all(one is None or (one.dtype == dtype and not one.requires_grad) for one in part._parameters.values())
    )


def _applied(branch: Branch, x: Tensor, block: PartwiseBlock) -> Tensor:
    result: Tensor = _Branch.apply(x, block, branch)[0]
    return result


def _parts(x: Tensor) -> list[slice]:
    """Of nearly as many images each."""
    count, tokens = x.shape[:2]
    most = max(1, MOST_TOKENS // tokens)
    most = math.ceil(count / math.ceil(count / most))
    return [slice(first, min(first + most, count)) for first in range(0, count, most)]


def _normed(x: Tensor, norm: Any) -> tuple[Tensor, Tensor, Tensor]:
    """With its mean and the factor of each token."""
    made: tuple[Tensor, Tensor, Tensor] = torch.native_layer_norm(
        x, norm.normalized_shape, norm.weight, norm.bias, norm.eps
    )
    return made


def _of_norm(grad: Tensor, x: Tensor, mean: Tensor, scale: Tensor, norm: Any) -> Tensor:
    result: Tensor = aten.native_layer_norm_backward(
        grad, x, norm.normalized_shape, mean, scale, norm.weight, norm.bias, [True, False, False]
    )[0]
    return result


def _linear(rows: Tensor, layer: Any, out: Tensor) -> None:
    out = torch.mm(rows.flatten(0, 1), layer.weight.mT, out=out.flatten(0, 1))
    if layer.bias is not None:
        out.add_(layer.bias)


def _scaled(layer: Any, factor: Any) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of a linear layer and the scale behind it, if there is one."""
    weight, bias = layer.weight, layer.bias
    if not isinstance(factor, LayerScale):
        return weight, bias
    return weight * factor.gamma[:, None], None if bias is None else bias * factor.gamma


def _add_linear(x: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """x and what the layer makes of the rows: on top of x and the bias, which saves two copies."""
    if bias is None:
        out.copy_(x)
    else:
        torch.add(x, bias, out=out)
    out.flatten(0, 1).addmm_(rows.flatten(0, 1), weight.mT)
