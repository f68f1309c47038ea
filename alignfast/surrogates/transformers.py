"""Surgery on the attention and the tokens of vision transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from timm.layers.attention import Attention
from torch import Tensor, nn

from alignfast.checks import check_number
from alignfast.draws import Draws
from alignfast.surrogates.surrogate import Surgery, of_layer, on_gradients, on_outputs, removing

__all__ = ["NoAttention", "TokenGradients", "TokenShuffle"]


@dataclass(frozen=True)
class NoAttention(Surgery):
    """PNA (Wei et al., AAAI 2022): attention maps are constants in the backward pass.

    With Z = A V, A = softmax(Q K / sqrt(d)), no gradient flows through A, hence none to Q and K. The forward pass stays
    the same to the bit.

    Raises:
        ValueError: in `check`, a model without timm's attention layers.
    """

    def check(self, module: nn.Module) -> None:
        _check_attention(module)

    def operating(self, module: nn.Module, draws: Draws | None) -> AbstractContextManager[None]:
        # Queries and keys pass through these and serve for nothing else.
        normed = [norm for attention in _attentions(module) for norm in (attention.q_norm, attention.k_norm)]
        return on_outputs(normed, Tensor.detach)


@dataclass(frozen=True)
class TokenGradients(Surgery):
    """TGR (Zhang et al., CVPR 2023): gradients without the tokens that they are most extreme in.

    In every block, of the gradients of attention maps [B, heads, T, T], of queries, keys and values [B, T, 3 D], and
    of the output of the perceptron [B, T, D]: for each head or channel the largest and the smallest entry is found,
    set to zero with the rest of its row and column (attention) or alone (the others), and all is scaled. Each image
    has extreme tokens of its own. The authors' code (and TransferAttack's) takes the gradient before the softmax,
    where its hook of the inactive dropout ends up.

    Args:
        attention, qkv, mlp: factors, in [0, 1]; the defaults are those of the authors' code.

    Raises:
        ValueError: a factor out of its range; in `check`, a model without timm's transformer blocks.
    """

    attention: float = 0.25
    qkv: float = 0.75
    mlp: float = 0.5

    def __post_init__(self) -> None:
        for item in fields(self):
            check_number(item.name, getattr(self, item.name), low=0.0, high=1.0)

    def check(self, module: nn.Module) -> None:
        _check_attention(module)
        if not _perceptrons(module):
            raise ValueError(
                f"source: {type(module).__name__} has attention without an mlp beside it; allowed are {_KNOWN}"
            )

    @contextmanager
    def operating(self, module: nn.Module, draws: Draws | None) -> Iterator[None]:
        attentions = _attentions(module)
        with ExitStack() as stack:
            stack.enter_context(_with_maps(attentions))
            for layers, change in (
                ([attention.attn_drop for attention in attentions], partial(_without_cross, factor=self.attention)),
                ([attention.qkv for attention in attentions], partial(_without_extremes, factor=self.qkv)),
                (_perceptrons(module), partial(_without_extremes, factor=self.mlp)),
            ):
                stack.enter_context(on_gradients(layers, change))
            yield


@dataclass(frozen=True)
class TokenShuffle(Surgery):
    """SAPR (Zhou et al., 2022, arXiv 2204.12680): before an attention layer, with probability `prob`, the tokens of the
    patches change places at random.

    Every layer, image and copy draws anew in every pass (TransferAttack: a layer alike for the whole batch); without
    draws tokens stay. Class and register tokens stay where they are.

    Args:
        prob: in [0, 1].

    Raises:
        ValueError: prob out of its range; in `check`, a model without timm's attention layers.
    """

    prob: float = 0.15

    def __post_init__(self) -> None:
        check_number("prob", self.prob, low=0.0, high=1.0)

    def check(self, module: nn.Module) -> None:
        _check_attention(module)

    @contextmanager
    def operating(self, module: nn.Module, draws: Draws | None) -> Iterator[None]:
        layers, fixed = _attentions(module), _prefix(module)
        handles: list[Any] = []
        if draws is not None:
            chosen = draws.uniform(4, (len(layers),)).flatten(0, 1) < self.prob
            for number, layer in enumerate(layers):
                hook = partial(_shuffled, of_layer(draws, number + 1), chosen[:, number], fixed)
                handles.append(layer.register_forward_pre_hook(hook, prepend=True))
        with removing(handles):
            yield


_KNOWN = "vision transformers of timm whose blocks have an attn of type timm.layers.Attention and an mlp"


def _attentions(module: nn.Module) -> list[Attention]:
    return [part for part in module.modules() if isinstance(part, Attention)]


def _perceptrons(module: nn.Module) -> list[nn.Module]:
    children = [dict(part.named_children()) for part in module.modules()]
    return [parts["mlp"] for parts in children if isinstance(parts.get("attn"), Attention) and "mlp" in parts]


def _check_attention(module: nn.Module) -> None:
    if not _attentions(module):
        raise ValueError(f"source: {type(module).__name__} has no attention that is known; allowed are {_KNOWN}")


@contextmanager
def _with_maps(attentions: list[Attention]) -> Iterator[None]:
    """Attention layers that compute their maps, which a fused kernel does not show."""
    fused = [attention.fused_attn for attention in attentions]
    try:
        for attention in attentions:
            vars(attention)["fused_attn"] = False
        yield
    finally:
        for attention, was in zip(attentions, fused, strict=True):
            vars(attention)["fused_attn"] = was


def _without_cross(grad: Tensor, factor: float) -> Tensor:
    flat, tokens = grad.flatten(2), torch.arange(grad.shape[-1], device=grad.device)
    for place in (flat.argmax(2), flat.argmin(2)):
        row, column = place // grad.shape[-1], place % grad.shape[-1]
        cross = (tokens == row[..., None])[..., :, None] | (tokens == column[..., None])[..., None, :]
        grad = torch.where(cross, 0, grad)
    return grad * factor


def _without_extremes(grad: Tensor, factor: float) -> Tensor:
    largest, smallest = grad.argmax(1, keepdim=True), grad.argmin(1, keepdim=True)
    return grad.scatter(1, largest, 0).scatter(1, smallest, 0) * factor


def _prefix(module: nn.Module) -> int:
    """How many tokens precede those of patches: as the network says, else the class token alone."""
    said = (getattr(part, "num_prefix_tokens", None) for part in module.modules())
    return next((number for number in said if isinstance(number, int)), 1)


def _shuffled(
    draws: Draws, chosen: Tensor, fixed: int, module: nn.Module, inputs: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    tokens = inputs[0]
    places = torch.arange(tokens.shape[1], device=tokens.device)
    order = draws.uniform(5, (tokens.shape[1] - fixed,)).flatten(0, 1).argsort(1) + fixed
    order = torch.cat([places[:fixed].expand(len(order), -1), order], 1)
    order = torch.where(chosen[:, None], order, places)
    return (tokens.gather(1, order[..., None].expand_as(tokens)), *inputs[1:])
