"""Transforms that `diversify` carries out together with the model's normalisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alignfast.attacks.transforms.transform import Transform
from alignfast.attacks.views import Views
from alignfast.checks import check_count, check_number
from alignfast.draws import Draws
from alignfast.models import Classifier
from alignfast.ops import ResizePad

__all__ = ["InputDiversity", "Neighbors", "Scales", "UniformScales"]


@dataclass(frozen=True)
class InputDiversity(Transform):
    """DI (Xie et al., CVPR 2019): with probability p, resize at random and pad at random with zeros.

    For an image of side S: with `rate` below 1 the new side is drawn from [floor(rate S), S) and padded back to S
    (torchattacks' definition); with `rate` above 1 it is drawn from [S, floor(rate S)), padded to floor(rate S), and
    all is resized back to S (TransferAttack's definition). The place is drawn from [0, r) on either axis, r being what
    is padded. Size, place and whether it is done at all are drawn for
    each image and copy. copies: how many such views are shown. Square images only.

    Raises:
        ValueError: `rate` not in (0, 2] or equal to 1, `p` outside [0, 1], or no copy.
    """

    rate: float = 0.9
    p: float = 0.5
    copies: int = 1

    def __post_init__(self) -> None:
        check_number("rate", self.rate, low=0.0, high=2.0, open_low=True)
        check_number("p", self.p, low=0.0, high=1.0)
        check_count("copies", self.copies)
        if self.rate == 1.0:
            raise ValueError("rate: got 1; allowed is a number in (0, 2] other than 1, which would change nothing")

    def check(self, source: Classifier, images: Tensor) -> None:
        if images.shape[-1] != images.shape[-2]:
            raise ValueError(f"images: got {images.shape[-2]} x {images.shape[-1]}; allowed is square images")

    def view(self, views: Views, which: Tensor, draws: Draws) -> Views:
        side = views.images.shape[-1]
        bound = max(int(side * self.rate), 1)
        low, high = min(side, bound), max(side, bound)
        resized = draws.integers(0, low, high)
        top = draws.integers(1, 0, high - resized)
        left = draws.integers(2, 0, high - resized)
        done = draws.uniform(3) < self.p
        return views.with_resize_pad(ResizePad(torch.where(done, resized, 0), top, left, high))


@dataclass(frozen=True)
class Scales(Transform):
    """SIM (Lin et al., ICLR 2020, section 3.3): `copies` copies of each image, copy i scaled by 2^-i.

    Raises:
        ValueError: fewer than one copy.
    """

    copies: int = 5

    def __post_init__(self) -> None:
        check_count("copies", self.copies, high=64)

    def view(self, views: Views, which: Tensor, draws: Draws) -> Views:
        scale = torch.exp2(-which.to(torch.float32))
        return views.with_scale(scale[:, None].expand(-1, len(draws.images)))


@dataclass(frozen=True)
class UniformScales(Transform):
    """US-MM's scales (Wang et al., 2023): copy i of m is scaled by low + (high - low) i / (m - 1).

    A single copy is scaled by `low`.

    Raises:
        ValueError: no copy, or not 0 <= low <= high <= 1.
    """

    copies: int = 5
    low: float = 0.1
    high: float = 0.75

    def __post_init__(self) -> None:
        check_count("copies", self.copies)
        check_number("high", self.high, low=0.0, high=1.0)
        check_number("low", self.low, low=0.0, high=self.high)

    def view(self, views: Views, which: Tensor, draws: Draws) -> Views:
        scale = self.low + (self.high - self.low) / max(self.copies - 1, 1) * which.to(views.images.dtype)
        return views.with_scale(scale[:, None].expand(-1, len(draws.images)))


@dataclass(frozen=True)
class Neighbors(Transform):
    """`copies` points drawn uniformly from the cube of half-side `radius` around each image, in units of [0, 1] images.

    Raises:
        ValueError: fewer than one copy, or a negative radius.
    """

    copies: int
    radius: float

    def __post_init__(self) -> None:
        check_count("copies", self.copies)
        check_number("radius", self.radius, low=0.0)

    def view(self, views: Views, which: Tensor, draws: Draws) -> Views:
        return views.with_noise(self.radius, draws)
