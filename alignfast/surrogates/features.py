"""Surgery on what layers give, at random."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from timm.layers.attention import Attention
from torch import Tensor, nn

from alignfast.checks import check_number
from alignfast.draws import Draws
from alignfast.surrogates.surrogate import Surgery, on_outputs, removing

__all__ = ["FeatureNoise", "GhostDropout", "TokenShuffle"]

# A layer's part of the seed: odd, so that layers differ, and far from small numbers, so that seeds do.
STRIDE = 0x9E3779B97F4A7C15
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class GhostDropout(Surgery):
    """Ghost networks, dropout erosion (Li et al., AAAI 2020, eq. 3): what a convolution gives is r x / (1 - rate), r
    being 0 with probability `rate` and else 1, for every element, image and copy anew in every pass.

    Without draws, outside an attack, nothing is dropped.

    Args:
        rate: in [0, 1). The paper has 0.006 for Inception-v3.

    Raises:
        ValueError: rate out of its range; in `check`, a model without a convolution.
    """

    rate: float = 0.006

    def __post_init__(self) -> None:
        check_number("rate", self.rate, low=0.0, high=1 - 2**-24)

    def check(self, module: nn.Module) -> None:
        _convolutions(module)

    @contextmanager
    def operating(self, module: nn.Module, draws: Draws | None) -> Iterator[None]:
        with ExitStack() as stack:
            for number, layer in enumerate(_convolutions(module), 1):
                if draws is not None:
                    # A slot has fewer purposes than a network has layers.
                    own = replace(draws, seed=(draws.seed + number * STRIDE) % 2**64)
                    stack.enter_context(on_outputs([layer], partial(self._eroded, own)))
            yield

    def _eroded(self, draws: Draws, output: Tensor) -> Tensor:
        drawn = draws.uniform(1, tuple(output.shape[1:])).flatten(0, 1)
        return torch.where(drawn < self.rate, 0, output / (1 - self.rate))


@dataclass(frozen=True)
class FeatureNoise(Surgery):
    """FAUG (Wang et al., TNNLS 2025): F + std s(F) n, n ~ N(0, 1), for the features F that a layer gives.

    s(F) is the deviation of an image's own features (TransferAttack: of the whole batch's, and its first step is
    without noise). Every element, image and copy draws anew in every pass; without draws there is no noise.

    Args:
        layer: name of a layer; None for the first convolution.
        std: at least 0.

    Raises:
        ValueError: std out of its range; in `check`, a model without this layer or any convolution.
    """

    layer: str | None = None
    std: float = 0.3

    def __post_init__(self) -> None:
        check_number("std", self.std, low=0.0)

    def check(self, module: nn.Module) -> None:
        names = [name for name, _ in module.named_modules() if name]
        if self.layer is None:
            _convolutions(module)
        elif self.layer not in names:
            raise ValueError(f"layer: got {self.layer!r}; allowed are names of the source's layers, as {names[0]}")

    @contextmanager
    def operating(self, module: nn.Module, draws: Draws | None) -> Iterator[None]:
        layer = _convolutions(module)[0] if self.layer is None else module.get_submodule(self.layer)
        with on_outputs([layer], partial(self._noisy, draws)):
            yield

    def _noisy(self, draws: Draws | None, output: Tensor) -> Tensor | None:
        if draws is None:
            return None
        noise = draws.normal(2, tuple(output.shape[1:])).flatten(0, 1).to(output.dtype)
        # The noise is what it is, wherever the features move.
        deviation = output.detach().flatten(1).std(1, correction=0).reshape(-1, *[1] * (output.ndim - 1))
        return output + self.std * deviation * noise


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
        if not _attentions(module):
            raise ValueError(
                f"source: {type(module).__name__} has no attention that is known; allowed are vision transformers of "
                "timm, with layers of type timm.layers.Attention"
            )

    @contextmanager
    def operating(self, module: nn.Module, draws: Draws | None) -> Iterator[None]:
        layers = _attentions(module)
        handles: list[Any] = []
        if draws is not None:
            chosen = draws.uniform(4, (len(layers),)).flatten(0, 1) < self.prob
            for number, (layer, fixed) in enumerate(layers):
                own = replace(draws, seed=(draws.seed + (number + 1) * STRIDE) % 2**64)
                hook = partial(_shuffled, own, chosen[:, number], fixed)
                handles.append(layer.register_forward_pre_hook(hook, prepend=True))
        with removing(handles):
            yield


def _convolutions(module: nn.Module) -> list[nn.Module]:
    layers: list[nn.Module] = [part for part in module.modules() if isinstance(part, CONVOLUTIONS)]
    if not layers:
        raise ValueError(
            f"source: {type(module).__name__} has no convolution; allowed are models with modules of type Conv2d"
        )
    return layers


def _attentions(module: nn.Module) -> list[tuple[nn.Module, int]]:
    """Attention layers, and how many tokens before those of patches their network says that it has."""
    prefix = next((n for part in module.modules() if (n := getattr(part, "num_prefix_tokens", None)) is not None), 1)
    return [(part, prefix) for part in module.modules() if isinstance(part, Attention)]


def _shuffled(
    draws: Draws, chosen: Tensor, fixed: int, module: nn.Module, inputs: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    tokens = inputs[0]
    places = torch.arange(tokens.shape[1], device=tokens.device)
    order = draws.uniform(5, (tokens.shape[1] - fixed,)).flatten(0, 1).argsort(1) + fixed
    order = torch.cat([places[:fixed].expand(len(order), -1), order], 1)
    order = torch.where(chosen[:, None], order, places)
    return (tokens.gather(1, order[..., None].expand_as(tokens)), *inputs[1:])
