"""Inverted residuals of frozen models by the package's own kernel, which stores nothing of what lies inside of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alignfast._C import cpu_isa
from alignfast.models.dataflow import Unseen, followed, paths_of
from alignfast.models.depthwise import (
    RELU6,
    Chain,
    DepthwiseConv2d,
    DepthwiseConv2dSame,
    ReLU6Left,
    same_padding,
)
from alignfast.models.frozen import FrozenConv2d, is_plain, reclassed
from alignfast.native import CPU_DEVICES
from alignfast.ops.inverted_residual import PackedResidual, inverted_residual


@dataclass(frozen=True, kw_only=True)
class Residual(Chain):
    """A chain with the pointwise convolutions before and behind it.

    expand, project: their names. inside: names of all parts that see what goes from one part to the next.
    """

    expand: str
    project: str
    inside: tuple[str, ...]


def with_residuals(module: nn.Module, run: Callable[[], Any], chains: Sequence[Chain]) -> list[Chain]:
    """The same chains, as residuals where pointwise convolutions lie around them, as two passes show.

    Args:
        module: names are those in it; not changed.
        run: passes through it.
        chains: of the module, by `chains_of`.
    """
    parts = dict(module.named_modules())
    whole = [chain for chain in chains if chain.before and chain.after]
    if not whole:
        return list(chains)
    paths = paths_of(module)
    rectifiers = {parts[one.name] for chain in whole for one in (chain.before, chain.after) if one is not None}

    def is_layer(part: nn.Module) -> bool:
        return _is_pointwise(part) and len(paths[part]) == 1

    ahead = {one.follower: one for one in followed(module, run, is_layer, rectifiers.__contains__) if not one.shared}
    behind = {one.layer: one for one in followed(module, run, rectifiers.__contains__, is_layer) if not one.shared}
    result: list[Chain] = []
    for chain in chains:
        before, after = chain.before, chain.after
        first = ahead.get(parts[before.name]) if before and after else None
        last = behind.get(parts[after.name]) if before and after else None
        if before is None or after is None or first is None or last is None:
            result.append(chain)
            continue
        seen = [paths[part][0] for part in (*first.seen_by, *last.seen_by)]
        inside = tuple(dict.fromkeys([*seen, *before.seen_by, *after.seen_by]))
        around = (paths[first.layer][0], paths[last.follower][0])
        result.append(Residual(chain.layer, before, after, expand=around[0], project=around[1], inside=inside))
    return result


def use_residual_kernel(module: nn.Module, chains: Sequence[Chain]) -> None:
    """Exchange, in place, the parts of residuals for those that leave everything to the first of them.

    Behind `use_kernel` with the same chains. Not where fused multiply-adds are computed in software.
    """
    if cpu_isa() == "baseline":
        return
    for chain in chains:
        if isinstance(chain, Residual):
            _use(module, chain)


class Whole:
    """The parts of an inverted residual, of which the first does it all as long as this is true."""

    def __init__(self, expand: nn.Conv2d, depthwise: nn.Conv2d, project: nn.Conv2d, unseen: Unseen) -> None:
        self._layers = (expand, depthwise, project)
        self._unseen = unseen
        self._packed: PackedResidual | None = None
        self._packed_of: list[Any] = []

    def __bool__(self) -> bool:
        here = self._layers[0].weight.device.type in CPU_DEVICES
        return here and bool(self._unseen) and not torch.is_autocast_enabled("cpu")

    def __call__(self, images: Tensor) -> Tensor:
        depthwise = self._layers[1]
        if isinstance(depthwise, DepthwiseConv2dSame):
            padding = same_padding(images, depthwise)
        else:
            down, right = (int(each) for each in depthwise.padding)
            padding = (down, down, right, right)
        return inverted_residual(images, self.packed, stride=depthwise.stride, padding=padding, clip=RELU6)

    @property
    def packed(self) -> PackedResidual:
        """The weights as they are now."""
        expand, depthwise, project = self._layers
        weights = (expand.weight, expand.bias, depthwise.weight, depthwise.bias, project.weight, project.bias)
        now = [None if weight is None else _state(weight) for weight in weights]
        if self._packed is None or self._packed_of != now:
            self._packed, self._packed_of = PackedResidual.of(*weights), now
        return self._packed


class Expanding(FrozenConv2d):
    whole: Whole

    def forward(self, input: Tensor) -> Tensor:
        return self.whole(input) if self.whole else super().forward(input)


class _Left:
    """Done already by the first part, as long as the whole is true."""

    whole: Whole

    def forward(self, input: Tensor) -> Tensor:
        # Of the layer that it is mixed into.
        return input if self.whole else super().forward(input)  # type: ignore[misc]


class LeftReLU6(_Left, ReLU6Left):
    pass


class LeftDepthwiseConv2d(_Left, DepthwiseConv2d):
    pass


class LeftDepthwiseConv2dSame(_Left, DepthwiseConv2dSame):
    pass


class LeftConv2d(_Left, FrozenConv2d):
    pass


LEFT: dict[type[nn.Module], type[nn.Module]] = {
    ReLU6Left: LeftReLU6,
    DepthwiseConv2d: LeftDepthwiseConv2d,
    DepthwiseConv2dSame: LeftDepthwiseConv2dSame,
    nn.Conv2d: LeftConv2d,
}


def _use(module: nn.Module, residual: Residual) -> None:
    assert residual.before is not None
    assert residual.after is not None
    first = module.get_submodule(residual.expand)
    others = (residual.before.name, residual.layer, residual.after.name, residual.project)
    parts = {name: module.get_submodule(name) for name in others}
    layers_left = isinstance(parts[residual.layer], (DepthwiseConv2d, DepthwiseConv2dSame))
    if not (layers_left and is_plain(first) and is_plain(parts[residual.project])):
        return
    named = {residual.expand: reclassed(Expanding, first)}
    named |= {name: reclassed(LEFT[type(part)], part) for name, part in parts.items()}
    for name, part in named.items():
        module.set_submodule(name, part, strict=True)
    unseen = Unseen(module.get_submodule(name) for name in residual.inside)
    whole = Whole(named[residual.expand], named[residual.layer], named[residual.project], unseen)
    for part in named.values():
        part.whole = whole
    # Before the first pass, whose memory is counted.
    _ = whole.packed


def _is_pointwise(part: nn.Module) -> bool:
    return (
        type(part) is nn.Conv2d
        and part.groups == 1
        and part.kernel_size == part.stride == part.dilation == (1, 1)
        and part.padding == (0, 0)
    )


def _state(weight: Tensor) -> tuple[Any, ...]:
    """Other where a weight is another one or was changed."""
    version = 0 if weight.is_inference() else weight._version
    return id(weight), weight.data_ptr(), version, weight.dtype
