"""Layers of the source that the package's own kernels train on a CPU, in place of torch's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from alignfast.models.dataflow import Unseen, followed, has_hooks
from alignfast.models.depthwise import convolved, is_depthwise, same_padding
from alignfast.models.minimal_filtering import Minimal, is_minimal
from alignfast.native import CPU_DEVICES
from alignfast.ops import batch_norm
from alignfast.ops.interleaved import EVERYTHING

# What the activation behind a normalisation clips to.
CLIPS: dict[type[nn.Module], tuple[float, float]] = {
    nn.Identity: EVERYTHING,
    nn.ReLU: (0.0, inf),
    nn.ReLU6: (0.0, 6.0),
}


@contextmanager
def trained_by_kernels(module: nn.Module, images: Tensor, *, half: bool) -> Iterator[None]:
    """Let the kernels serve where torch's are slow, in a model whose activations are channels-last.

    That is batch normalisations with the rectifiers behind them, or that timm has inside of them; convolutions of 3 x 3
    of stride 1, except in half precision; depthwise convolutions with kernels above 3 x 3, for whose weights torch
    takes some five times as long; and in half precision, where it takes up to thirty times as long, all depthwise ones.
    The layers are the same objects throughout, with their hooks and their parameters.

    images: are passed through the model once, to see which rectifiers are behind which normalisations.
    half: whether the passes are under autocast to half precision.
    """
    slow = {part for part in module.modules() if _is_slow(part, half)}
    norms = {part for part in slow if type(part) is nn.BatchNorm2d}
    pairs = followed(module, lambda: module(images), norms.__contains__, _is_rectifier) if norms else []
    kinds = {part: type(part) for part in slow.union(one.follower for one in pairs)}
    try:
        for part in kinds:
            part.__class__ = _trained(part)
        for one in pairs:
            layer: Any = one.layer
            rectifier: Any = one.follower
            layer.behind = Behind(rectifier, CLIPS[kinds[rectifier]], Unseen(one.seen_by))
        yield
    finally:
        for part, kind in kinds.items():
            part.__class__ = kind
            part.__dict__.pop("behind", None)
            part.__dict__.pop("clipped", None)


def _is_slow(part: nn.Module, half: bool) -> bool:
    weight = part._parameters.get("weight")
    if type(part) not in TRAINED or weight is None or weight.device.type not in CPU_DEVICES:
        return False
    if isinstance(part, nn.BatchNorm2d):
        return weight.dtype == torch.float32 and part.track_running_stats
    if is_minimal(part):
        return weight.dtype == torch.float32 and not half
    return (
        is_depthwise(part)
        and part.padding_mode == "zeros"
        and isinstance(part.padding, tuple)
        and (half or max(part.kernel_size) > 3)
    )


def _trained(part: nn.Module) -> type[nn.Module]:
    return (MINIMAL if is_minimal(part) else TRAINED)[type(part)]


class TrainedConv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        padding: Any = self.padding
        down, right = padding
        return convolved(input, self, (down, down, right, right))


class TrainedConv2dSame(Conv2dSame):
    def forward(self, input: Tensor) -> Tensor:
        return convolved(input, self, same_padding(input, self))


class TrainedMinimalConv2d(Minimal, nn.Conv2d):
    pass


class TrainedMinimalConv2dSame(Minimal, Conv2dSame):
    pass


class Spared(nn.Module):
    """A rectifier that has nothing to do for the very tensor that a normalisation has just clipped for it; it may be
    behind other layers as well."""

    clipped: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        clipped, self.clipped = self.clipped, None
        if clipped is input:
            return input
        rectified: Tensor = super().forward(input)
        return rectified


class TrainedReLU(Spared, nn.ReLU):
    pass


class TrainedReLU6(Spared, nn.ReLU6):
    pass


@dataclass(frozen=True)
class Behind:
    """The rectifier that is given what a normalisation returns."""

    rectifier: Spared
    clip: tuple[float, float]
    unseen: Unseen


class TrainedBatchNorm2d(nn.BatchNorm2d):
    behind: Behind | None = None

    def forward(self, input: Tensor) -> Tensor:
        if not _served(input, self):
            return super().forward(input)
        behind = self.behind
        if behind is None or not behind.unseen:
            return _normalised(input, self, EVERYTHING)
        behind.rectifier.clipped = result = _normalised(input, self, behind.clip)
        return result


class TrainedBatchNormAct2d(BatchNormAct2d):
    def forward(self, input: Tensor) -> Tensor:
        if not _served(input, self):
            # Timm's own has no types.
            alone: Tensor = super().forward(input)  # type: ignore[no-untyped-call]
            return alone
        clip = CLIPS.get(type(self.act))
        if clip is not None and type(self.drop) is nn.Identity and not (has_hooks(self.act) or has_hooks(self.drop)):
            return _normalised(input, self, clip)
        result: Tensor = self.act(self.drop(_normalised(input, self, EVERYTHING)))
        return result


TRAINED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: TrainedConv2d,
    Conv2dSame: TrainedConv2dSame,
    nn.BatchNorm2d: TrainedBatchNorm2d,
    BatchNormAct2d: TrainedBatchNormAct2d,
    nn.ReLU: TrainedReLU,
    nn.ReLU6: TrainedReLU6,
}

# Of those, convolutions of 3 x 3 of stride 1.
MINIMAL: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: TrainedMinimalConv2d,
    Conv2dSame: TrainedMinimalConv2dSame,
}


def _is_rectifier(part: nn.Module) -> bool:
    return type(part) in (nn.ReLU, nn.ReLU6)


def _served(images: Tensor, layer: nn.BatchNorm2d) -> bool:
    """Torch's own normalises by running statistics, takes plain means of them while it recalibrates, and refuses
    batches of one value a channel."""
    usual = layer.training and layer.momentum is not None
    return usual and images.ndim == 4 and images.dtype != torch.float64 and _values(images) > 1


def _values(images: Tensor) -> int:
    """Of a channel."""
    return images.shape[0] * images.shape[2] * images.shape[3]


def _normalised(images: Tensor, layer: nn.BatchNorm2d, clip: tuple[float, float]) -> Tensor:
    """With running statistics moved as torch's are, by the unbiased variance."""
    result, mean, variance = batch_norm(images, layer.weight, layer.bias, eps=layer.eps, clip=clip)
    running_mean, running_var, batches = layer.running_mean, layer.running_var, layer.num_batches_tracked
    momentum, count = layer.momentum, _values(images)
    if running_mean is None or running_var is None or batches is None or momentum is None:
        raise AssertionError("layers without running statistics are left to torch")
    batches.add_(1)
    running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
    running_var.mul_(1 - momentum).add_(variance, alpha=momentum * count / (count - 1))
    return result
