"""What a geometry is measured with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from alignfast.attacks import names_of, parameters_of
from alignfast.checks import check_choice, check_count, check_known, check_number
from alignfast.geometry.measures import MEASURES

# Measures that come with another one.
WITH = {"curvature_residual": "curvature"}


@dataclass(frozen=True)
class GeometryConfig:
    """The defaults look where Ma et al. (ECCV 2024) do: at the image, at a random point, after 10 and 20 steps of PGD.

    Args:
        attack: the name of an attack and its parameters besides eps, alpha, steps and seed.
        eps: radius of the attack and of the random point. alpha: the attack's step. In units of [0, 1] images.
        steps: numbers of steps after which the attack is looked at, the last of them its whole length.
        measures: those of `MEASURES` to take; those of pairs are taken wherever there are other models.
        radius: of the neighbourhood in which the loss is followed, in the L-inf norm; None for eps.
        samples: random points of it. ascent: steps to its highest point, and of the search for the fastest turn of the
            gradient.
        second_derivatives: "exact", or "finite" for models that have none.
        lanczos: most products for an eigenvalue. tolerance: of its relative residual, at which it stops.
        surfaces: images of which a plane of the loss is drawn; the plane of the attack on `along`, the first model if
            None. grid: points a side. span: half a side over the attack's largest change of a pixel.
        profile: points of the line along each gradient's sign, over [-radius, radius].
        examples: images that are kept, with what the attacks made of them.
        resamples: of the bootstrap. seed: of everything random.

    Raises:
        ValueError: a number, name or parameter outside what is allowed.
    """

    attack: Mapping[str, Any] = field(default_factory=lambda: {"name": "pgd"})
    eps: float = 4 / 255
    alpha: float = 1 / 255
    steps: tuple[int, ...] = (10, 20)
    measures: tuple[str, ...] = tuple(MEASURES)
    radius: float | None = None
    samples: int = 8
    ascent: int = 5
    second_derivatives: Literal["exact", "finite"] = "exact"
    lanczos: int = 20
    tolerance: float = 1e-3
    surfaces: int = 2
    along: str | None = None
    grid: int = 21
    span: float = 1.5
    profile: int = 21
    examples: int = 4
    resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        if "name" not in self.attack:
            raise ValueError(f"attack: got {dict(self.attack)} without a name; allowed is a mapping with one")
        allowed = set(parameters_of("+".join(names_of(str(self.attack["name"]))))) - {"eps", "alpha", "steps", "seed"}
        check_known("attack", "parameter", [key for key in self.attack if key != "name"], sorted(allowed))
        for name in ("eps", "alpha", "span", "tolerance"):
            check_number(name, getattr(self, name), low=0.0, open_low=True)
        if self.radius is not None:
            check_number("radius", self.radius, low=0.0, open_low=True)
        for name in ("samples", "ascent", "lanczos", "resamples"):
            check_count(name, getattr(self, name))
        for name in ("surfaces", "examples"):
            check_count(name, getattr(self, name), low=0)
        for name in ("grid", "profile"):
            check_count(name, getattr(self, name), low=3)
        if not self.steps or sorted(set(self.steps)) != list(self.steps):
            raise ValueError(f"steps: got {list(self.steps)}; allowed are rising numbers, at least one")
        for count in self.steps:
            check_count("steps", count)
        check_known("measures", "measure", self.measures, MEASURES)
        check_choice("second_derivatives", self.second_derivatives, ("exact", "finite"))
        check_count("seed", self.seed, low=0, high=2**63 - 1)

    def takes(self, measure: str) -> bool:
        """Whether it is among the measures, or one that comes with it is."""
        return measure in self.measures or any(WITH.get(other) == measure for other in self.measures)

    @property
    def reach(self) -> float:
        """The radius of the neighbourhood."""
        return self.eps if self.radius is None else self.radius
