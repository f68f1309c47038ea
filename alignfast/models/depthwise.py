"""Depthwise convolutions of frozen models by the package's own kernel, which does the rectifiers around them too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.padding import get_same_padding
from torch import Tensor, nn

from alignfast.models.dataflow import Followed, Unseen, changed_in_place, followed, paths_of
from alignfast.models.frozen import FrozenConv2d, FrozenConv2dSame, is_plain, reclassed, relu6_in_place
from alignfast.ops.depthwise_conv2d import LARGEST, depthwise_conv2d
from alignfast.ops.interleaved import EVERYTHING

RELU6 = (0.0, 6.0)


@dataclass(frozen=True)
class Rectifier:
    """Name of a ReLU6 that nothing else comes between and its convolution.

    seen_by: names of all parts that see what goes from the one to the other, these two among them.
    """

    name: str
    seen_by: tuple[str, ...]


@dataclass(frozen=True)
class Chain:
    """Name of a depthwise convolution, and the ReLU6 before and behind it."""

    layer: str
    before: Rectifier | None = None
    after: Rectifier | None = None


def chains_of(module: nn.Module, run: Callable[[], Any]) -> list[Chain]:
    """One for each depthwise convolution with a ReLU6 on either side, as one pass shows.

    Args:
        module: names are those in it; not changed.
        run: passes through it.
    """
    paths = paths_of(module)
    if not any(map(is_depthwise, paths)):
        return []
    # What goes into those left out and comes out of them is the convolution's own, which the backward pass needs.
    changed = changed_in_place(module, run, _is_relu6)

    def is_rectifier(part: nn.Module) -> bool:
        return _is_relu6(part) and part not in changed and len(paths[part]) == 1

    def is_layer(part: nn.Module) -> bool:
        return is_depthwise(part) and len(paths[part]) == 1

    def named(rectifier: nn.Module, one: Followed) -> Rectifier:
        return Rectifier(paths[rectifier][0], tuple(paths[part][0] for part in one.seen_by))

    behind = [one for one in followed(module, run, is_layer, is_rectifier) if not one.shared]
    # Between two convolutions the first does it.
    taken = {one.follower for one in behind}
    ahead = [one for one in followed(module, run, is_rectifier, is_layer) if not one.shared and one.layer not in taken]
    after = {one.layer: named(one.follower, one) for one in behind}
    before = {one.follower: named(one.layer, one) for one in ahead}
    layers = [part for part in paths if part in before or part in after]
    return [Chain(paths[part][0], before.get(part), after.get(part)) for part in layers]


def use_kernel(module: nn.Module, chains: Sequence[Chain]) -> None:
    """Exchange, in place, depthwise convolutions and the rectifiers of chains for those of the kernel.

    Those in chains, which save passes over their images, and all in half precision, where torch's gradients of strided
    ones are some thirty times slower than in float32.
    """
    around = {chain.layer: chain for chain in chains}
    for name, part in list(module.named_modules()):
        if not is_depthwise(part) or not is_plain(part):
            continue
        chain = around.get(name, Chain(name))
        if chain.before is None and chain.after is None and part.weight.dtype in (torch.float32, torch.float64):
            continue
        layer = reclassed(KINDS[type(part)], part)
        module.set_submodule(name, layer, strict=True)
        layer.before, layer.after = (_left(module, rectifier) for rectifier in (chain.before, chain.after))


class DepthwiseConv2d(FrozenConv2d):
    before: Unseen | None
    after: Unseen | None

    def forward(self, input: Tensor) -> Tensor:
        padding: Any = self.padding
        down, right = padding
        return _rectified(input, self, (down, down, right, right))


class DepthwiseConv2dSame(FrozenConv2dSame):
    """Behind TensorFlow's padding, which depends on the size of the input."""

    before: Unseen | None
    after: Unseen | None

    def forward(self, input: Tensor) -> Tensor:
        return _rectified(input, self, same_padding(input, self))


class ReLU6Left(nn.ReLU6):
    """Left to its convolution as long as no hook looks at what goes from the one to the other."""

    unseen: Unseen

    def forward(self, input: Tensor) -> Tensor:
        if self.unseen:
            return input
        return relu6_in_place(input) if self.inplace else nn.functional.relu6(input)


def same_padding(images: Tensor, layer: nn.Conv2d) -> tuple[int, int, int, int]:
    """TensorFlow's, which depends on the size of the images: above, below, on the left and on the right."""
    sizes = zip(images.shape[-2:], layer.kernel_size, layer.stride, layer.dilation, strict=True)
    down, right = (get_same_padding(*each) for each in sizes)
    return down // 2, down - down // 2, right // 2, right - right // 2


def convolved(images: Tensor, layer: nn.Conv2d, padding: Sequence[int], **clips: tuple[float, float]) -> Tensor:
    """By a depthwise layer's weights, as torch's convolution, to which autocast gives everything in half precision."""
    weight, bias = layer.weight, layer.bias
    if torch.is_autocast_enabled(images.device.type):
        dtype = torch.get_autocast_dtype(images.device.type)
        images, weight, bias = images.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return depthwise_conv2d(images, weight, bias, stride=layer.stride, padding=padding, **clips)


KINDS: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: DepthwiseConv2d, Conv2dSame: DepthwiseConv2dSame}


def _rectified(images: Tensor, layer: DepthwiseConv2d | DepthwiseConv2dSame, padding: Sequence[int]) -> Tensor:
    before, after = (RELU6 if unseen else EVERYTHING for unseen in (layer.before, layer.after))
    return convolved(images, layer, padding, before=before, after=after)


def _left(module: nn.Module, rectifier: Rectifier | None) -> Unseen | None:
    if rectifier is None:
        return None
    part = reclassed(ReLU6Left, module.get_submodule(rectifier.name))
    module.set_submodule(rectifier.name, part, strict=True)
    part.unseen = unseen = Unseen(module.get_submodule(name) for name in rectifier.seen_by)
    return unseen


def _is_relu6(part: nn.Module) -> bool:
    return type(part) is nn.ReLU6


def is_depthwise(part: nn.Module) -> TypeGuard[nn.Conv2d]:
    return (
        isinstance(part, nn.Conv2d)
        and type(part) in KINDS
        and part.groups == part.in_channels == part.out_channels
        and part.dilation == (1, 1)
        and max(part.kernel_size) <= LARGEST
    )
