"""What was measured about the surfaces of losses: values image by image, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Row:
    """One measure of one model, or of two, at one point of every image.

    Attributes:
        model: whose points and loss these are. other: the second model, of measures of two; else None.
        point: "clean", "random", or "step K" of the attack on `model`.
        measure: a name of `MEASURES` or `PAIR_MEASURES`.
        values: float64 [N], an image each; NaN where it could not be measured.
    """

    model: str
    other: str | None
    point: str
    measure: str
    values: Floats


@dataclass(frozen=True)
class Estimate:
    """The mean over images of a row, with its bootstrap 95 % interval; n: images with a value."""

    model: str
    other: str | None
    point: str
    measure: str
    mean: float
    low: float
    high: float
    median: float
    n: int


@dataclass(frozen=True)
class Difference:
    """The mean over images of `model`'s value minus `baseline`'s, with its bootstrap 95 % interval over paired images.

    n: images with both values. With `other`, both are measured against that model.
    """

    baseline: str
    model: str
    other: str | None
    point: str
    measure: str
    difference: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Surface:
    """The loss of every model around one image, in a plane that is the same for all of them.

    Attributes:
        index: of the image in its data set.
        x, y: float64 [K], how far along the two directions, in units of [0, 1] images.
        loss: by model, float64 [K, K], y first. x is the direction of the attack, y a random one orthogonal to it.
        along: whose attack gives the direction.
    """

    index: int
    along: str
    x: Floats
    y: Floats
    loss: Mapping[str, Floats]


@dataclass(frozen=True)
class Profile:
    """Loss along the sign of each model's own input gradient: float64 [N, K] by model, at K distances t in [-eps, eps]."""

    t: Floats
    loss: Mapping[str, Floats]


@dataclass(frozen=True)
class Example:
    """An image and what the attack on each model made of it: uint8 [H, W, C]."""

    index: int
    label: int
    clean: NDArray[np.uint8]
    adversarial: Mapping[str, NDArray[np.uint8]]


@dataclass(frozen=True)
class GeometryResult:
    """Attributes:
    rows: what was measured, image by image.
    indices: int64 [N], of the images in their data set.
    estimates, differences: of the rows; differences where there is a baseline.
    surfaces, profile, examples: what pictures are drawn from.
    config: what it was measured with. versions: package name to version.
    """

    rows: tuple[Row, ...]
    indices: NDArray[np.int64]
    estimates: tuple[Estimate, ...]
    differences: tuple[Difference, ...]
    surfaces: tuple[Surface, ...] = ()
    profile: Profile | None = None
    examples: tuple[Example, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
