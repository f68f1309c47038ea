"""What a model shows of itself in one pass: its logits, and the features of named layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from alignfast.checks import hint
from alignfast.draws import Draws
from alignfast.models import Classifier
from alignfast.models.classifier import Render

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Seen:
    """One pass over B rows, row k N + n being view k of image n.

    heads: [M, B, classes], the sets of logits whose gains are averaged; one for a single model. features: what the
    named layers gave, [B, ...], in float32 where that was in half precision. In a step also points: [B, C, H, W], what
    the rows are views of, and draws: of the objective's own, for these copies and images.
    """

    heads: Tensor
    features: Mapping[str, Tensor]
    points: Tensor | None = None
    draws: Draws | None = None

    @property
    def logits(self) -> Tensor:
        """[M B, classes]"""
        return self.heads.flatten(0, 1)

    def rows(self, kept: Tensor) -> Tensor:
        """[M B, ...]: what is kept for an image, [N, ...], for every row."""
        times = self.heads.shape[0] * self.heads.shape[1] // max(len(kept), 1)
        return kept.repeat(times, *[1] * (kept.ndim - 1))


def observe(source: Classifier, render: Render, layers: Sequence[str] = (), draws: Draws | None = None) -> Seen:
    """One forward pass over the batch that `render` builds."""
    with _keeping(source.module, layers) as features:
        heads = source.heads(render, draws)
    for layer in layers:
        if layer not in features:
            raise ValueError(f"layers: {layer!r} has no part in a pass through the model; allowed are layers that have")
    return Seen(heads, features)


def check_layers(source: Classifier, layers: Sequence[str]) -> None:
    """Each of `layers` is a module of the source's own module, and there is one such module; else ValueError."""
    names = [name for name, _ in source.module.named_modules() if name]
    for layer in layers:
        if layer not in names:
            top = ", ".join(name for name, _ in source.module.named_children())
            raise ValueError(
                f"layers: got {layer!r}{hint(layer, names)}; allowed are names of the model's modules, on top {top}"
            )


@contextmanager
def _keeping(module: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    features: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, inputs: Any, output: Any) -> Any:
        given = output if isinstance(output, Tensor) else output[0]
        features[name] = wide = given.float() if given.dtype in HALF else given
        if wide is given:
            return None
        # What follows takes what was kept, so that its gradient is there to be had.
        narrow = wide.to(given.dtype)
        return narrow if isinstance(output, Tensor) else (narrow, *output[1:])

    handles = [module.get_submodule(name).register_forward_hook(partial(keep, name)) for name in layers]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()
