"""Defences that stand in front of a classifier while it is measured."""

from __future__ import annotations

import io
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import one_hot

from alignfast.checks import check_choice, check_count, check_number
from alignfast.draws import FIRST_SLOT, OBJECTIVE_SLOT, Draws
from alignfast.models.classifier import Classifier, Render, as_classifier
from alignfast.ops import diversify
from alignfast.ops.diversify import ResizePad

LEVELS = 255
# One draw of one image has this many copy numbers at most.
MOST_SAMPLES = 2**24

# From images [N, C, H, W] and their draws to logits [N, classes].
Predict = Callable[[Tensor, Draws], Tensor]


class Defence(ABC):
    """What is done to images before a model sees them. Subclasses are frozen dataclasses that hold numbers.

    samples: passes of the model an image.
    """

    samples: int = 1

    def predict(self, images: Tensor, draws: Draws, model: Predict) -> Tensor:
        """Logits [N, classes] of `model` behind this defence, of images [N, C, H, W].

        draws: of the N images and one copy, in the slot of this defence.
        """
        return model(self.change(images, draws), draws)

    @abstractmethod
    def change(self, images: Tensor, draws: Draws) -> Tensor:
        """Images [N, C, H, W] in place of `images`; each a function of its own image and draws alone."""


@dataclass(frozen=True)
class Jpeg(Defence):
    """JPEG compression of the 8-bit image (Dziugaite et al., 2016; Guo et al., ICLR 2018, section 3.2).

    Pixels are rounded to 8 bits, written by Pillow, with chroma at half the resolution, and read again.

    quality: 1 to 100; Guo et al. use 75.

    Raises:
        ValueError: a quality outside its range; when used, images of other than 1 or 3 channels.
    """

    quality: int = 75

    def __post_init__(self) -> None:
        check_count("quality", self.quality, high=100)

    def change(self, images: Tensor, draws: Draws) -> Tensor:
        if images.shape[1] not in (1, 3):
            raise ValueError(f"images: got {images.shape[1]} channels; allowed with JPEG are 1 and 3")
        levels = (images.clamp(0, 1) * LEVELS).round().to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
        read = np.stack([self._read(pixels) for pixels in levels]) if len(levels) else levels
        return torch.from_numpy(read).permute(0, 3, 1, 2).to(images) / LEVELS

    def _read(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """What is read of [H, W, C] pixels that were written."""
        buffer = io.BytesIO()
        Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, "JPEG", quality=self.quality)
        return np.array(Image.open(buffer)).reshape(pixels.shape)


@dataclass(frozen=True)
class BitDepth(Defence):
    """Fewer levels a channel, 2^bits of them from 0 to 1 (Xu et al., NDSS 2018, section III-A).

    bits: 1 to 8; Xu et al. use 4 or 5 for colour photos.

    Raises:
        ValueError: bits outside their range.
    """

    bits: int = 4

    def __post_init__(self) -> None:
        check_count("bits", self.bits, high=8)

    def change(self, images: Tensor, draws: Draws) -> Tensor:
        most = int(2**self.bits) - 1
        return (images.clamp(0, 1) * most).round() / most


@dataclass(frozen=True)
class MedianFilter(Defence):
    """The median of size x size pixels of a channel, by SciPy, mirrored at the edges (Xu et al., NDSS 2018, section
    III-B).

    size: at least 1; of an even one, the window reaches one pixel further up and left. Xu et al. use 2.

    Raises:
        ValueError: a size below 1.
    """

    size: int = 2

    def __post_init__(self) -> None:
        check_count("size", self.size)

    def change(self, images: Tensor, draws: Draws) -> Tensor:
        from scipy.ndimage import median_filter

        filtered = median_filter(images.cpu().numpy(), size=(1, 1, self.size, self.size), mode="reflect")
        result: Tensor = torch.from_numpy(filtered).to(images)
        return result


@dataclass(frozen=True)
class RandomResizePad(Defence):
    """Resizing and padding with zeros, both at random (Xie et al., ICLR 2018, section 3).

    An image of side S is resized to a side drawn from [smallest S, S) and put at a place drawn among zeros of side S.
    Xie et al. resize images of side 299 to [299, 331) and pad them to 331; here the padded image has the side that the
    network is made for, in the same proportion, so that every network takes it. Bilinear; they take the nearest pixel.

    smallest: in (0, 1]. seed: of the draws, in [0, 2^64).

    Raises:
        ValueError: a number outside its range; when used, images that are not square.
    """

    smallest: float = 299 / 331
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("smallest", self.smallest, low=0.0, high=1.0, open_low=True)
        check_count("seed", self.seed, low=0, high=2**64 - 1)

    def change(self, images: Tensor, draws: Draws) -> Tensor:
        side, drawn = images.shape[-1], replace(draws, seed=self.seed)
        resized = drawn.integers(0, max(1, round(self.smallest * side)), side)
        top, left = (drawn.integers(purpose, 0, side - resized + 1) for purpose in (1, 2))
        return diversify(images, resize_pad=ResizePad(resized, top, left, side))


@dataclass(frozen=True)
class RandomizedSmoothing(Defence):
    """The class that is most likely under Gaussian noise (Cohen et al., ICML 2019, eq. 1), found from a few samples.

    by: "votes" counts the class of each sample, as their PREDICT does but without abstaining; logits are then shares of
    votes, and of classes with as many the first counts. "probabilities" averages what the softmax gives; logits are
    then the logarithms of means. The model should have been trained with such noise.

    sigma: standard deviation of the noise, in units of [0, 1] images, which it may leave. samples: at least 1.
    seed: of the draws, in [0, 2^64).

    Raises:
        ValueError: a number outside its range, or another `by`.
    """

    sigma: float = 0.25
    samples: int = 16
    by: Literal["votes", "probabilities"] = "votes"
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("sigma", self.sigma, low=0.0)
        check_count("samples", self.samples, high=MOST_SAMPLES)
        check_choice("by", self.by, ("votes", "probabilities"))
        check_count("seed", self.seed, low=0, high=2**64 - 1)

    def predict(self, images: Tensor, draws: Draws, model: Predict) -> Tensor:
        # One after another, so that a pass has as many images as without the defence.
        each = (replace(draws, copies=draws.copies * self.samples + sample) for sample in range(self.samples))
        shares = sum(self._share(model(self.change(images, one), one)) for one in each) / self.samples
        assert isinstance(shares, Tensor)
        return shares if self.by == "votes" else shares.log()

    def change(self, images: Tensor, draws: Draws) -> Tensor:
        noise = replace(draws, seed=self.seed).normal(0, tuple(images.shape[1:]))[0]
        return images + (self.sigma * noise).to(images.dtype)

    def _share(self, logits: Tensor) -> Tensor:
        if self.by == "votes":
            return one_hot(logits.argmax(-1), logits.shape[-1]).double()
        return logits.double().softmax(-1)


# By the name that a matrix file gives them.
DEFENCES: Mapping[str, Callable[..., Defence]] = {
    "jpeg": Jpeg,
    "bit_depth": BitDepth,
    "median": MedianFilter,
    "resize_pad": RandomResizePad,
    "smoothing": RandomizedSmoothing,
}


class Defended(Classifier):
    """`model` behind defences, which are applied in their order to images of the model's own size.

    It is for measuring: nothing of it has a gradient. Attack the model behind it, `undefended`, and show it the images;
    that is what `transfer_matrix` does under the qualified protocol.

    Random defences draw by Philox from their seed, the image's index in its data set, the number of the sample and the
    place of the defence, so what becomes of an image depends on no other image, batch or rank.

    Args:
        model: any module that a `Classifier` can be around; its weights are shared.
        defences: at least one.

    Raises:
        ValueError: no defence, or samples of samples beyond 2^24. TypeError: a model that is no module.
    """

    def __init__(self, model: nn.Module, defences: Sequence[Defence]) -> None:
        undefended = as_classifier(model)
        super().__init__(undefended, num_classes=undefended.num_classes, input_size=undefended.input_size)
        if not 0 < len(defences) <= OBJECTIVE_SLOT - FIRST_SLOT:
            raise ValueError(f"defences: got {len(defences)}; allowed are 1 to {OBJECTIVE_SLOT - FIRST_SLOT}")
        if self.passes(defences) > MOST_SAMPLES:
            raise ValueError(f"defences: {self.passes(defences)} samples an image; allowed are {MOST_SAMPLES}")
        self.defences = tuple(defences)

    @property
    def undefended(self) -> Classifier:
        model = self.module
        assert isinstance(model, Classifier)
        return model

    @property
    def text(self) -> str:
        """The defences in words."""
        return ", ".join(map(repr, self.defences))

    @staticmethod
    def passes(defences: Sequence[Defence]) -> int:
        """Passes of the model an image."""
        return math.prod(defence.samples for defence in defences)

    def logits(self, images: Tensor, indices: Tensor | None = None) -> Tensor:
        """Logits [N, classes] of images [N, C, H, W] in [0, 1], without any check of them.

        indices: int64 [N], the images' indices in their data set; positions in the batch if None.

        Raises:
            ValueError: images that require a gradient.
        """
        if images.requires_grad:
            raise ValueError("images: require a gradient, which defences have none of; attack the model behind them")
        if indices is None:
            indices = torch.arange(len(images), device=images.device)
        draws = Draws(0, 0, indices.to(images.device), torch.zeros(1, dtype=torch.int64, device=images.device))
        return self._from(0, images, draws)

    def logits_of(self, render: Render, draws: Draws | None = None) -> Tensor:
        return self.logits(render())

    def compute_in(self, dtype: torch.dtype) -> None:
        self.undefended.compute_in(dtype)

    def check_shape(self, images: Tensor) -> None:
        self.undefended.check_shape(images)

    def _from(self, place: int, images: Tensor, draws: Draws) -> Tensor:
        """Through the defences from `place` on, and the model."""
        if place == len(self.defences):
            return self.undefended.logits(images)
        return self.defences[place].predict(images, draws.at(FIRST_SLOT + place), partial(self._from, place + 1))
