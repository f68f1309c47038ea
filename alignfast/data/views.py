"""Training views of a data set: random crops and flips that depend on nothing but (seed, epoch, index)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

import torch
from torch.utils.data import Dataset
from torchvision.transforms import v2

from alignfast.checks import check_count, check_number
from alignfast.data.datasets import ImageDataset, Sample
from alignfast.data.images import pixels_of, to_float, to_pil, to_pixels, to_tensor


class AugmentedDataset(Dataset[Sample]):
    """`dataset` seen through a random crop and flip; made by `augmented`. `set_epoch` changes every draw, unless the
    views are fixed."""

    def __init__(
        self,
        dataset: ImageDataset,
        size: tuple[int, int],
        scale: tuple[float, float],
        flip: bool,
        seed: int,
        indices: Sequence[int],
        fixed: bool,
    ) -> None:
        self.dataset = dataset
        self.num_classes = dataset.num_classes
        self._seed = seed
        self._indices = indices
        self._epoch = 0
        self._fixed = fixed
        crop = v2.RandomResizedCrop(size, scale=scale, antialias=True)
        self._view = v2.Compose([crop, v2.RandomHorizontalFlip(0.5 if flip else 0.0)])

    def set_epoch(self, epoch: int) -> None:
        self._epoch = 0 if self._fixed else check_count("epoch", epoch, low=0)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: int) -> Sample:
        index = self._indices[position]
        image = self.dataset.read(index)
        # torchvision draws from the global CPU generator. `torch.manual_seed` would reseed the GPUs as well.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(stream_seed("view", self._seed, self._epoch, index))
            view = self._view(to_pil(to_pixels(image)))
        pixels = pixels_of(view, image.shape[0])
        return Sample(to_float(to_tensor(pixels)), int(self.dataset.labels[index]), index)


def augmented(
    dataset: ImageDataset,
    size: tuple[int, int],
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    flip: bool = True,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    fixed: bool = False,
) -> AugmentedDataset:
    """Random resized crops and horizontal flips of the 8-bit images in full resolution.

    The draw for an image is a pure function of (seed, epoch, index): neither workers nor order nor batch matter. The
    crop is resized bilinearly in 8 bits. The `image_size` of `dataset` is not applied first.

    Args:
        dataset: the images.
        size: (height, width) of the views.
        scale: smallest and largest part of the image's area in a crop, 0 < smallest <= largest <= 1.
        flip: mirror half of the views.
        seed: of all draws, at least 0.
        indices: the images to take, by data-set index; None for all.
        fixed: every pass sees the same view of an image, so that what a witness says of it can be kept.
    """
    height, width = (check_count("size", side) for side in size)
    low, high = scale
    check_number("scale", high, low=0.0, high=1.0, open_low=True)
    check_number("scale", low, low=0.0, high=high, open_low=True)
    chosen = range(len(dataset)) if indices is None else list(indices)
    for index in chosen:
        check_count("indices", index, low=0, high=len(dataset) - 1)
    return AugmentedDataset(
        dataset, (height, width), (low, high), flip, check_count("seed", seed, low=0), chosen, fixed
    )


def stream_seed(purpose: str, *keys: int) -> int:
    """A generator seed that is a pure function of its arguments, in every process (`hash` is not)."""
    text = os.fsencode(" ".join([purpose, *map(str, keys)]))
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
