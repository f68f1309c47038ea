"""`alignfast evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alignfast.checks import check_device
from alignfast.commands.options import BatchSize, Device, NumClasses, Out, Workers, finish, named_specs, subset_of
from alignfast.config import named_model
from alignfast.data import load_dataset, loader, read_adversarial
from alignfast.evaluation.images import evaluate_images
from alignfast.files import claim_folder
from alignfast.versions import package_versions


def evaluate_command(
    images: Annotated[Path, typer.Option(help="A folder that `alignfast attack` wrote.")],
    targets: Annotated[list[str], typer.Option(help="Models as [NAME=]SPEC[@CHECKPOINT], one or more.")],
    out: Out,
    data: Annotated[str | None, typer.Option(help="The images before the attack, for clean accuracies.")] = None,
    num_classes: NumClasses = None,
    batch_size: BatchSize = 32,
    workers: Workers = 0,
    device: Device = "cpu",
) -> None:
    """Measure targets on written adversarial images: matrix.json, pictures and report.html."""
    place = check_device(device)
    dataset, manifest = read_adversarial(images)
    specs = named_specs(targets)
    models = {name: named_model(spec, num_classes).to(place) for name, spec in specs.items()}
    clean = None
    if data is not None:
        size = tuple(dataset[0].image.shape[-2:])
        original = load_dataset(data, image_size=(size[0], size[1]), num_classes=manifest.num_classes)
        clean = loader(subset_of(original, manifest.indices), batch_size, workers=workers, ahead=True)
    run_with = {"command": "evaluate", "images": str(images), "targets": specs, "data": data}
    folder = claim_folder(out, run_with | {"num_classes": num_classes, "versions": package_versions()})
    source = str(manifest.parameters.get("model", manifest.model))
    matrix = evaluate_images(
        loader(dataset, batch_size, workers=workers, ahead=True),
        models,
        source=source,
        attack=manifest.attack,
        clean=clean,
        progress=True,
    )
    finish(matrix, folder, f"{manifest.attack} on {source}")
