"""`alignfast geometry`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, cast

import typer
from rich.console import Console

from alignfast.checks import check_choice, check_device
from alignfast.commands.options import (
    BatchSize,
    Data,
    Device,
    Limit,
    NumClasses,
    Out,
    Seed,
    Workers,
    named_specs,
    parameters_given,
    side_of,
    spread_over,
    verify,
)
from alignfast.config import attack_spec, named_model, number
from alignfast.data import load_dataset, loader
from alignfast.evaluation.findings import geometry_sentences
from alignfast.evaluation.outputs import show_paths, write_results
from alignfast.files import claim_folder
from alignfast.geometry import MEASURES, GeometryConfig, geometry
from alignfast.geometry.field import SecondDerivatives
from alignfast.models import fingerprint
from alignfast.versions import package_versions

# What `GeometryConfig` sets by itself, of the attack.
NUMBERS = ("eps", "alpha", "steps", "seed")


def geometry_command(
    models: Annotated[list[str], typer.Option(help="Models as [NAME=]SPEC[@CHECKPOINT], one or more.")],
    data: Data,
    out: Out,
    others: Annotated[
        list[str] | None, typer.Option(help="Witnesses and targets to compare with, likewise; else the models.")
    ] = None,
    baseline: Annotated[str | None, typer.Option(help="The model that others are compared with.")] = None,
    attack: Annotated[str, typer.Option(help="A name of `alignfast attack --list`.")] = "pgd",
    eps: Annotated[str, typer.Option(help="Radius, such as 8/255.")] = "4/255",
    alpha: Annotated[str, typer.Option(help="Step size, such as 2/255.")] = "1/255",
    steps: Annotated[str, typer.Option(help="Numbers of steps after which to look, such as 10,20.")] = "10,20",
    param: Annotated[list[str] | None, typer.Option(help="Another parameter as NAME=VALUE; repeat.")] = None,
    measure: Annotated[list[str] | None, typer.Option(help=f"Repeat; all by default: {', '.join(MEASURES)}.")] = None,
    radius: Annotated[str | None, typer.Option(help="Of the neighbourhood; that of the attack by default.")] = None,
    second_derivatives: Annotated[
        str, typer.Option(help="exact, or finite for models that have none.")
    ] = GeometryConfig.second_derivatives,
    lanczos: Annotated[int, typer.Option(help="Most products for an eigenvalue.")] = GeometryConfig.lanczos,
    tolerance: Annotated[float, typer.Option(help="Of its relative residual.")] = GeometryConfig.tolerance,
    surfaces: Annotated[int, typer.Option(help="Images whose loss is drawn in a plane.")] = GeometryConfig.surfaces,
    along: Annotated[str | None, typer.Option(help="The model whose attack gives the plane.")] = None,
    examples: Annotated[int, typer.Option(help="Images that are shown with perturbations.")] = GeometryConfig.examples,
    num_classes: NumClasses = None,
    batch_size: BatchSize = 16,
    workers: Workers = 0,
    limit: Limit = None,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Curvature, flatness and gradients of losses: geometry.json, geometry.csv, pictures and report.html."""
    attacked = attack_spec("attack", {"name": attack} | parameters_given(param or []))
    if "pool" in attacked:
        raise ValueError(f"attack: got {attack!r}, which mixes in other images; allowed are attacks that do not")
    config = GeometryConfig(
        attack={name: value for name, value in attacked.items() if name not in NUMBERS},
        eps=_number("eps", eps),
        alpha=_number("alpha", alpha),
        steps=_counts(steps),
        measures=tuple(measure or MEASURES),
        radius=None if radius is None else _number("radius", radius),
        second_derivatives=cast(SecondDerivatives, second_derivatives),
        lanczos=lanczos,
        tolerance=tolerance,
        surfaces=surfaces,
        along=along,
        examples=examples,
        seed=seed,
    )
    place = check_device(device)
    specs = {"models": named_specs(models), "others": named_specs(others or [])}
    for name, given in (("baseline", baseline), ("along", along)):
        if given is not None:
            check_choice(name, given, specs["models"])
    loaded = {
        role: {name: named_model(spec, num_classes).to(place) for name, spec in group.items()}
        for role, group in specs.items()
    }
    first = next(iter(loaded["models"].values()))
    dataset = load_dataset(data, image_size=side_of(first, "models"), num_classes=first.num_classes)
    subset = spread_over(dataset, limit)
    verify(dataset)
    prints = {role: {name: fingerprint(one) for name, one in group.items()} for role, group in loaded.items()}
    run_with = {"command": "geometry", **specs, "data": data, "baseline": baseline, "limit": limit, **asdict(config)}
    folder = claim_folder(out, run_with | {"fingerprints": prints, "versions": package_versions()})
    result = geometry(
        loaded["models"],
        loader(subset, batch_size, workers=workers, ahead=True),
        config,
        others=loaded["others"] or None,
        baseline=baseline,
        progress=True,
    )
    console = Console()
    paths = write_results(None, folder, geometry=result, title=f"Geometry of losses on {data}")
    for sentence in geometry_sentences(result):
        console.out(sentence, highlight=False)
    show_paths(paths, console)


def _number(name: str, text: str) -> float:
    try:
        return number(text)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _counts(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"steps: got {text!r}; allowed are whole numbers such as 10,20") from error
