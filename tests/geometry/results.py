"""Geometries made of numbers, without a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from alignfast.geometry.measures import MEASURES, PAIR_MEASURES
from alignfast.geometry.result import Example, Floats, GeometryResult, Profile, Row, Surface
from alignfast.geometry.summary import differences, estimates

POINTS = ("clean", "random", "step 10", "step 20")
EPS = 4 / 255
# How the first model's numbers change to those of the second, and on to the third.
FACTORS = {"curvature": 0.5, "gradient_l1": 0.8, "gradient_cosine": 1.6, "kl": 0.7}


def build(
    models: Sequence[str] = ("vanilla", "aligned"),
    others: Sequence[str] = ("vgg", "vit"),
    points: Sequence[str] = POINTS,
    n: int = 60,
    images: int = 2,
    channels: int = 3,
) -> GeometryResult:
    """`FACTORS` lower or raise some measures from model to model; the rest is the same but for noise."""
    random = np.random.default_rng(0)
    rows = tuple(_rows(models, others, points, n, random))
    axis = np.linspace(-1.5 * EPS, 1.5 * EPS, 21)
    t = np.linspace(-EPS, EPS, 11)
    return GeometryResult(
        rows=rows,
        indices=np.arange(n, dtype=np.int64) * 3,
        estimates=estimates(rows, 200, 0),
        differences=differences(rows, models[0], 200, 0),
        surfaces=tuple(
            Surface(index * 3, models[0], axis, axis, {name: bowl(axis, k, index) for k, name in enumerate(models)})
            for index in range(images)
        ),
        profile=Profile(t, {name: slopes(t, n, k, random) for k, name in enumerate(models)}),
        examples=tuple(_example(index, models, channels, random) for index in range(images)),
        config={"baseline": models[0], "eps": EPS, "span": 1.5, "resamples": 200, "seed": 0, "attack": {"name": "pgd"}},
        versions={"torch": "2.14.1", "numpy": "2.4.6"},
    )


def bowl(axis: Floats, model: int, image: int) -> Floats:
    """[K, K]: a valley that grows along x, less for later models."""
    x, y = np.meshgrid(axis / EPS, axis / EPS)
    height: Floats = (3.0 + image) * 0.6**model / (1.0 + np.exp(-3.0 * (x - 0.4))) + 0.15 * y**2
    return height


def slopes(t: Floats, n: int, model: int, random: np.random.Generator) -> Floats:
    """[n, K]: losses that rise along t."""
    steep = random.lognormal(0.0, 0.5, (n, 1)) * 0.7**model
    rise: Floats = steep * np.logaddexp(0.0, 3.0 * t / EPS)
    return rise


def _rows(
    models: Sequence[str], others: Sequence[str], points: Sequence[str], n: int, random: np.random.Generator
) -> Iterator[Row]:
    hard = random.lognormal(0.0, 0.8, n)
    for place, point in enumerate(points):
        for number, model in enumerate(models):
            for measure in MEASURES:
                scale = FACTORS.get(measure, 1.0) ** number * (1.0 + place)
                values = hard * scale * random.lognormal(0.0, 0.1, n)
                yield Row(model, None, point, measure, values - (0.8 if measure == "curvature" else 0.0))
            for index, other in enumerate(others):
                for measure in PAIR_MEASURES:
                    yield Row(model, other, point, measure, _pair(measure, number, place, index, n, random))


def _pair(measure: str, model: int, place: int, other: int, n: int, random: np.random.Generator) -> Floats:
    if measure in ("agreement", "fooled"):
        share = 0.85 - 0.05 * other if measure == "agreement" else 0.1 + 0.12 * place + 0.12 * model - 0.04 * other
        return (random.random(n) < share).astype(np.float64)
    base = 0.15 - 0.03 * other if measure == "gradient_cosine" else 0.6
    return base * FACTORS[measure] ** model + random.normal(0.0, 0.05, n)


def _example(index: int, models: Sequence[str], channels: int, random: np.random.Generator) -> Example:
    ramp = np.add.outer(np.arange(16), np.arange(16))[..., None] * (6 - np.arange(channels))
    clean = (40 + ramp + 10 * index).clip(0, 255).astype(np.uint8)
    adversarial = {name: (clean + random.choice([-4, 4], clean.shape)).clip(0, 255).astype(np.uint8) for name in models}
    return Example(index * 3, index, clean, adversarial)
