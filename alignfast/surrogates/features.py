"""Surgery on what layers are given or give, at random."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from alignfast.checks import check_number, hint
from alignfast.draws import Draws
from alignfast.surrogates.surrogate import Surgery, of_layer, on_outputs, removing

__all__ = ["FeatureNoise", "GhostDropout"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class GhostDropout(Surgery):
    """Ghost networks, dropout erosion (Li et al., AAAI 2020): what a convolution is given is r x / (1 - rate), r
    being 0 with probability `rate` and else 1, for every element, image and copy anew in every pass.

    The first convolution is given the image whole. The authors' code and TransferAttack drop what each block of
    Inception-v3 is given, once for all of its branches. Without draws, outside an attack, nothing is dropped.

    Args:
        rate: in [0, 1). The paper has 0.006 for Inception-v3.

    Raises:
        ValueError: rate out of its range; in `check`, a model without two convolutions.
    """

    rate: float = 0.006

    def __post_init__(self) -> None:
        check_number("rate", self.rate, low=0.0, high=1 - 2**-24)

    def check(self, module: nn.Module) -> None:
        if len(_convolutions(module)) < 2:
            raise ValueError(
                f"source: {type(module).__name__} has one convolution; allowed are models with two or more"
            )

    @contextmanager
    def operating(self, module: nn.Module, draws: Draws | None) -> Iterator[None]:
        handles: list[Any] = []
        if draws is not None:
            for number, layer in enumerate(_convolutions(module)[1:], 1):
                # Behind the hooks of other surgery, which know what they have given to a block when they see it.
                handles.append(layer.register_forward_pre_hook(partial(self._eroded, of_layer(draws, number))))
        with removing(handles):
            yield

    def _eroded(self, draws: Draws, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        given: Tensor = inputs[0]
        drawn = draws.uniform(1, tuple(given.shape[1:])).flatten(0, 1)
        return (torch.where(drawn < self.rate, 0, given / (1 - self.rate)), *inputs[1:])


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
            raise ValueError(
                f"layer: got {self.layer!r}{hint(self.layer, names)}; allowed are names of the source's layers"
            )

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


def _convolutions(module: nn.Module) -> list[nn.Module]:
    layers: list[nn.Module] = [part for part in module.modules() if isinstance(part, CONVOLUTIONS)]
    if not layers:
        raise ValueError(
            f"source: {type(module).__name__} has no convolution; allowed are models with modules of type Conv2d"
        )
    return layers
