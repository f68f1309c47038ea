"""A module with its normalisation: images in [0, 1] in, logits out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from alignfast.checks import check_count, check_shape, check_unit_range
from alignfast.draws import Draws
from alignfast.ops import diversify

# Beyond [0, 1], at most: of means of pixels in float32.
ROUNDING = 1e-5

if TYPE_CHECKING:
    from alignfast.models.preparation import Preparation


class Render(Protocol):
    def __call__(
        self,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        dtype: torch.dtype | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Tensor:
        """The model's input batch, normalised by (mean, std), in the given dtype and layout."""
        ...


class Classifier(nn.Module):
    """`module` behind its normalisation, (images - mean) / std per channel.

    Args:
        module: maps normalised images [N, C, H, W] to logits [N, num_classes].
        mean, std: one value a channel, in units of [0, 1] images; both None for a module that takes [0, 1] images.
        num_classes: columns of the logits; None if not known.
        input_size: (C, H, W) that images must have; None for any H and W (the channels are those of `mean`).

    Raises:
        ValueError: mean and std of different lengths, a std that is not positive, or sizes below 1.

    Attributes:
        dtype, memory_format: in which `module` takes its input, as `prepare` sets them; None for that of the images.
        preparation: what `prepare` chose; None for a model that is as it was loaded.
    """

    mean: Tensor | None
    std: Tensor | None
    preparation: Preparation | None = None

    def __init__(
        self,
        module: nn.Module,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        num_classes: int | None = None,
        input_size: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__()
        if (mean is None) != (std is None):
            raise ValueError("mean, std: got one of them; allowed is both or neither")
        if mean is not None and std is not None:
            if len(mean) != len(std):
                raise ValueError(f"std: got {len(std)} values for {len(mean)} of mean; allowed is one a channel each")
            if any(not value > 0 for value in std):
                raise ValueError(f"std: got {list(std)}; allowed are numbers greater than 0")
        if num_classes is not None:
            check_count("num_classes", num_classes)
        for size in input_size or ():
            check_count("input_size", size)
        self.module = module
        self.dtype: torch.dtype | None = None
        self.memory_format = torch.contiguous_format
        self.num_classes = num_classes
        self.input_size = None if input_size is None else (input_size[0], input_size[1], input_size[2])
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, None if values is None else torch.tensor(values), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, C, H, W] in [0, 1].

        Raises:
            ValueError: another rank, channel count or size, a non-floating dtype, NaN, or values outside [0, 1]. The
                values of images that require a gradient are not read: those are inside an attack, where a look-ahead
                may leave the range and nothing should wait for the device.
        """
        self.check_shape(images)
        if not (images.requires_grad or torch.compiler.is_compiling()):
            check_unit_range("images", images)
        return self.logits(images)

    def logits(self, images: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, C, H, W], without any check."""
        return self.logits_of(partial(_normalised, images))

    def logits_of(self, render: Render, draws: Draws | None = None) -> Tensor:
        """Logits [B, num_classes] of the batch that `render` builds, without any check.

        draws: of the copies and images in the rows of the batch, for models that change at random; None outside an
        attack.
        """
        output = self.module(render(self.mean, self.std, self.dtype, self.memory_format))
        # Networks with auxiliary heads (Inception-v3, GoogLeNet) give a tuple in training mode, the logits first.
        logits: Tensor = output if isinstance(output, Tensor) else output[0]
        return logits if self.dtype is None else logits.float()

    def heads(self, render: Render, draws: Draws | None = None) -> Tensor:
        """[1, B, num_classes]: the logits whose losses an attack averages; one set for a single model."""
        return self.logits_of(render, draws)[None]

    @property
    def members(self) -> list[Classifier]:
        """The models that this one is made of; itself if it is not made of others."""
        return [self]

    def compute_in(self, dtype: torch.dtype) -> None:
        """Turn the module's weights into `dtype`, in which its passes are then computed; logits stay float32."""
        self.module.to(dtype)
        self.dtype = dtype

    def check_shape(self, images: Tensor) -> None:
        if not images.is_floating_point():
            raise ValueError(f"images: got dtype {images.dtype}; allowed is floating point with values in [0, 1]")
        channels = None if self.mean is None else len(self.mean)
        check_shape("images", images.shape, (None, *(self.input_size or (channels, None, None))))


def _normalised(
    images: Tensor,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    return diversify(images, mean=mean, std=std, dtype=dtype, memory_format=memory_format)


def as_classifier(model: nn.Module) -> Classifier:
    """`model` itself if it is a Classifier, else a Classifier around a module that takes images in [0, 1]."""
    if isinstance(model, Classifier):
        return model
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; allowed is a torch.nn.Module that maps images to logits")
    return Classifier(model)


def fit_size(images: Tensor, model: Classifier) -> Tensor:
    """`images` at the model's own height and width: bilinear, antialiased, differentiable; unchanged if they fit."""
    if model.input_size is None or tuple(images.shape[-2:]) == model.input_size[1:]:
        return images
    # Torch has no antialiasing of half precision on CPUs.
    wide = images if images.dtype == torch.float64 else images.float()
    fitted = interpolate(wide, size=model.input_size[1:], mode="bilinear", antialias=True)
    return in_range(fitted).to(images.dtype)


def in_range(images: Tensor) -> Tensor:
    """Clamped to [0, 1], with a derivative of 1 at both ends, where images have many pixels and torch's clamp has 0 in
    some releases, and as far beyond as rounding leads means of such pixels."""
    clamped = images.detach().clamp(0, 1)
    near = (images >= -ROUNDING) & (images <= 1 + ROUNDING)
    return torch.where(near, clamped + (images - images.detach()), clamped)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models into evaluation mode, and every module back into its own mode afterwards."""
    with keeping_modes(*models):
        for model in models:
            model.eval()
        yield


@contextmanager
def keeping_modes(*models: nn.Module) -> Iterator[None]:
    """Put every module of the models back into its own mode, training or evaluation, at the end."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
