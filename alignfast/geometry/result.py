"""What was measured about the surfaces of losses: values image by image, and what follows from them."""

from __future__ import annotations

import base64
import csv
import io
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from alignfast.files import read_json, write_json, write_text

Floats = NDArray[np.float64]
Pixels = NDArray[np.uint8]

COLUMNS = ("model", "other", "point", "measure", "index", "value")


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
    fell, fell_low, fell_high: the share of the images with two different values on which the model's is the lower, with
        Wilson's 95 % interval: means of curvatures are made by few images, and this is not. NaN, 0 and 1 without such
        images.
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
    fell: float = math.nan
    fell_low: float = 0.0
    fell_high: float = 1.0


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
    """Loss along the sign of each model's own input gradient at the clean image: float64 [N, K] by model.

    t: float64 [K], the distances, in units of [0, 1] images; negative ones lead downhill.
    """

    t: Floats
    loss: Mapping[str, Floats]


@dataclass(frozen=True)
class Example:
    """An image and what the attack on each model made of it: uint8 [H, W, C]."""

    index: int
    label: int
    clean: Pixels
    adversarial: Mapping[str, Pixels]


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

    def estimate(self, model: str, measure: str, point: str = "clean", other: str | None = None) -> Estimate:
        """ValueError where this was not measured."""
        for found in self.estimates:
            if (found.model, found.other, found.point, found.measure) == (model, other, point, measure):
                return found
        raise ValueError(f"model, measure, point, other: {(model, measure, point, other)!r} was not measured")

    def difference(self, model: str, measure: str, point: str = "clean", other: str | None = None) -> Difference:
        """ValueError where this was not measured."""
        for found in self.differences:
            if (found.model, found.other, found.point, found.measure) == (model, other, point, measure):
                return found
        raise ValueError(f"model, measure, point, other: {(model, measure, point, other)!r} was not compared")

    def to_records(self) -> Iterator[dict[str, Any]]:
        """One flat record for each value of each image, as `pandas.DataFrame` takes them."""
        for row in self.rows:
            for index, value in zip(self.indices.tolist(), row.values.tolist(), strict=True):
                yield dict(zip(COLUMNS, (row.model, row.other, row.point, row.measure, index, value), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """What `save` writes; NaN becomes None, so that it is valid JSON."""
        return {
            "estimates": [_plain(asdict(one)) for one in self.estimates],
            "differences": [_plain(asdict(one)) for one in self.differences],
            "indices": self.indices.tolist(),
            "rows": [_plain(asdict(one)) for one in self.rows],
            "surfaces": [_plain(asdict(one)) for one in self.surfaces],
            "profile": None if self.profile is None else _plain(asdict(self.profile)),
            "examples": [_plain(asdict(one)) for one in self.examples],
            "config": _plain(self.config),
            "versions": dict(self.versions),
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """The geometry that `to_dict` described; KeyError or TypeError for what it did not."""
        return cls(
            rows=tuple(Row(**{**row, "values": _floats(row["values"])}) for row in value["rows"]),
            indices=np.array(value["indices"], dtype=np.int64),
            estimates=tuple(Estimate(**_numbers(one)) for one in value["estimates"]),
            differences=tuple(Difference(**_numbers(one)) for one in value["differences"]),
            surfaces=tuple(
                Surface(one["index"], one["along"], _floats(one["x"]), _floats(one["y"]), _each(one["loss"]))
                for one in value["surfaces"]
            ),
            profile=None
            if value["profile"] is None
            else Profile(_floats(value["profile"]["t"]), _each(value["profile"]["loss"])),
            examples=tuple(
                Example(
                    one["index"],
                    one["label"],
                    _pixels(one["clean"]),
                    {name: _pixels(text) for name, text in one["adversarial"].items()},
                )
                for one in value["examples"]
            ),
            config=dict(value["config"]),
            versions=dict(value["versions"]),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything as JSON; an existing file is replaced whole or not at all."""
        write_json(path, self.to_dict())

    def save_csv(self, path: str | os.PathLike[str]) -> None:
        """Write `to_records` as CSV, without a value where there is none; likewise."""
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for record in self.to_records():
            writer.writerow({**record, "value": "" if math.isnan(record["value"]) else record["value"]})
        write_text(path, text.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises:
            ValueError: the file cannot be read, is not JSON, or is not a geometry.
        """
        document = read_json("geometry", path)
        try:
            return cls.from_dict(document)
        except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:
            raise ValueError(f"geometry: {path} is not a geometry ({error!r}); give a geometry.json") from error


def _plain(value: Any) -> Any:
    """As JSON holds it: arrays as lists, pixels as PNG in base64, NaN and infinities as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, np.ndarray):
        return _png(value) if value.dtype == np.uint8 else _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(record: Mapping[str, Any]) -> dict[str, Any]:
    names = ("mean", "difference", "low", "high", "median", "fell")
    return {key: math.nan if value is None and key in names else value for key, value in record.items()}


def _floats(values: Any) -> Floats:
    # None becomes NaN.
    return np.array(values, dtype=np.float64)


def _each(values: Mapping[str, Any]) -> dict[str, Floats]:
    return {name: _floats(rows) for name, rows in values.items()}


def _png(pixels: Pixels) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _pixels(text: str) -> Pixels:
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        pixels = np.array(image, dtype=np.uint8)
    return pixels[..., None] if pixels.ndim == 2 else pixels
