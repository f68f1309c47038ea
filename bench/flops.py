"""Floating-point operations of a model's passes, counted by torch, with its error about groups put right.

Importing this tells torch's counters about this package's convolutions too.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

import alignfast.ops  # noqa: F401  (Its operators are named below.)

KINDS = ("forward", "input gradient", "training")
Sizes = list[int]


def count_flops(model: nn.Module, images: Tensor, kind: str) -> int:
    """Operations, a multiply-add being two, of one of `KINDS`; the gradients include the forward pass.

    model: maps images to logits; left with gradients and `requires_grad` as the kind needs them, so a copy that
        nobody else uses, on torch's "meta" device for one without memory.
    images: [N, C, H, W], without a gradient.
    """
    model.requires_grad_(kind == "training")
    leaf = images.detach().requires_grad_(kind == "input gradient")
    with FlopCounterMode(display=False, custom_mapping=CORRECTED) as counter:
        logits = model(leaf)
        if kind != "forward":
            logits.sum().backward()
    flops: int = counter.get_total_flops()
    return flops


def convolution_backward(
    grad: Sizes,
    images: Sizes,
    weight: Sizes,
    bias: Any,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    transposed: bool,
    output_padding: Sizes,
    groups: int,
    wanted: list[bool],
    **others: Any,
) -> int:
    """Of the gradients that are wanted: (of the images, of the weights, of the bias, which is not counted).

    Either takes as many multiply-adds as the forward pass: each weight meets each position that it was at. The weight
    has [out, in / groups, ...], so the groups are in its size. torch 2.14 counts the gradient of the weights from the
    channels of `images` and of `grad`, as if every one met every other: too many by a factor of `groups`, which for a
    depthwise convolution is the number of channels.
    """
    return _meetings(images if transposed else grad, weight) * (wanted[0] + wanted[1])


@register_flop_formula(torch.ops.alignfast.depthwise_conv2d)
def depthwise_conv2d(images: Sizes, weight: Sizes, *others: Any, out_shape: Sizes, **named: Any) -> int:
    """Each weight meets each position of the result, as in both gradients."""
    return _meetings(out_shape, weight)


@register_flop_formula(torch.ops.alignfast.depthwise_conv2d_backward)
def depthwise_conv2d_backward(grad: Sizes, weight: Sizes, *others: Any, **named: Any) -> int:
    return _meetings(grad, weight)


@register_flop_formula(torch.ops.alignfast.depthwise_conv2d_weight)
def depthwise_conv2d_weight(grad: Sizes, images: Sizes, *others: Any, out_shape: Sizes, **named: Any) -> int:
    return _meetings(grad, out_shape)


@register_flop_formula(torch.ops.alignfast.inverted_residual)
def inverted_residual(
    images: Sizes,
    entering: Sizes,
    entering_bias: Sizes,
    depthwise: Sizes,
    depthwise_bias: Sizes,
    leaving: Sizes,
    *others: Any,
    out_shape: tuple[Sizes, ...],
    **named: Any,
) -> int:
    """Of three convolutions, with the channels that fill up the last block of those between."""
    result = out_shape[0]
    return _meetings(images, entering) + _meetings(result, depthwise) + _meetings(result, [*leaving[:2], result[1]])


@register_flop_formula(torch.ops.alignfast.inverted_residual_linear)
def inverted_residual_linear(
    images: Sizes, entering: Sizes, depthwise: Sizes, leaving: Sizes, *others: Any, out_shape: Sizes, **named: Any
) -> int:
    """Its depthwise weights meet each position on the smaller side."""
    smaller = min(images, out_shape, key=lambda shape: prod(shape[2:]))
    return (
        _meetings(images, entering) + _meetings(smaller, depthwise) + _meetings(out_shape, [*leaving[:2], out_shape[1]])
    )


@register_flop_formula(torch.ops.alignfast.attention)
def attention(packed: Sizes, *others: Any, **named: Any) -> int:
    """Two products of each head."""
    count, tokens, _, heads, width = packed
    return 4 * count * heads * tokens**2 * width


@register_flop_formula(torch.ops.alignfast.attention_backward)
def attention_backward(grad: Sizes, packed: Sizes, *others: Any, **named: Any) -> int:
    """Four products, without that of queries and keys again."""
    return 2 * attention(packed)


@register_flop_formula(torch.ops.alignfast.winograd_conv2d)
def winograd_conv2d(
    images: Sizes,
    weight: Sizes,
    bias: Sizes | None,
    padding: Sequence[int],
    adjoint: bool,
    *,
    out_shape: Sizes,
    **named: Any,
) -> int:
    """As those of a plain convolution, of which the kernel needs a fourth and the transformations."""
    return _meetings(images if adjoint else out_shape, weight)


@register_flop_formula(torch.ops.alignfast.basic_block)
def basic_block(images: Sizes, first: Sizes, *others: Any, **named: Any) -> int:
    """Likewise those of both convolutions."""
    return 2 * _meetings(images, first)


@register_flop_formula(torch.ops.alignfast.basic_block_linear)
def basic_block_linear(images: Sizes, first: Sizes, *others: Any, **named: Any) -> int:
    return basic_block(images, first)


def _meetings(images: Sizes, weight: Sizes) -> int:
    return 2 * images[0] * prod(images[2:]) * prod(weight)


CORRECTED = {torch.ops.aten.convolution_backward: convolution_backward}
