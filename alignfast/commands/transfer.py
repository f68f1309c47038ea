"""`alignfast transfer`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from alignfast.checks import check_device
from alignfast.commands.options import Device, Workers, by_ranks, finish, pooled, side_of, spread_over, verify
from alignfast.config import MatrixConfig, build_model
from alignfast.data import load_dataset, loader
from alignfast.distributed import current, on_main
from alignfast.evaluation import transfer_matrix
from alignfast.evaluation.kept import clear_temporaries
from alignfast.files import claim_folder
from alignfast.models import fingerprint
from alignfast.versions import package_versions


@by_ranks
def transfer_command(
    config: Annotated[Path, typer.Option(help="A YAML file with data, sources, targets and attacks; docs/matrix.md.")],
    out: Annotated[Path, typer.Option(help="A new or empty folder, or that of the same matrix, to go on with it.")],
    workers: Workers = 0,
    device: Device = "cpu",
) -> None:
    """The whole matrix: matrix.json, pictures and report.html. What is done is kept, and taken up on a new call."""
    settings = MatrixConfig.read(config)
    place = check_device(device)
    sources = {name: build_model(spec).to(place) for name, spec in settings.sources.items()}
    targets = {name: model.to(place) for name, model in settings.build_targets().items()}
    first = next(iter(sources.values()))
    dataset = load_dataset(settings.data, image_size=side_of(first, "sources"), num_classes=first.num_classes)
    subset = spread_over(dataset, settings.limit)
    on_main(lambda: verify(dataset))
    models = {"sources": sources, "targets": targets}
    prints = {role: {name: fingerprint(model) for name, model in group.items()} for role, group in models.items()}
    run_with = {"command": "transfer", **asdict(settings), "fingerprints": prints, "versions": package_versions()}
    folder = on_main(lambda: claim_folder(out, run_with, resume=True))
    on_main(lambda: clear_temporaries(folder))
    matrix = transfer_matrix(
        sources,
        targets,
        {name: pooled(spec, dataset, place) for name, spec in settings.attacks.items()},
        loader(subset, settings.batch_size, workers=workers, ahead=True),
        qualified=settings.qualified,
        baseline=settings.baseline,
        precision=settings.precision,
        parts=folder / "parts",
        images=folder / "adversarial",
        progress=True,
    )
    if current().rank == 0:
        finish(matrix, folder, f"Transfer on {settings.data}")
