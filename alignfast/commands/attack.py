"""`alignfast attack`."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated, cast, get_args

import typer
from rich.console import Console
from rich.table import Table

from alignfast.attacks import create
from alignfast.attacks.presets import parameters_of
from alignfast.checks import check_choice, check_device
from alignfast.commands.options import (
    MODEL_HELP,
    BatchSize,
    Data,
    Device,
    Limit,
    NumClasses,
    Out,
    Seed,
    Workers,
    by_ranks,
    parameters_given,
    pooled,
    side_of,
    spread_over,
    text_of,
    verify,
)
from alignfast.config import attack_spec, trained_model
from alignfast.data import AdversarialWriter, Batch, Manifest, eight_bit, load_dataset, loader, quantise
from alignfast.distributed import current, on_main
from alignfast.evaluation.shares import form_of, prepared_alike
from alignfast.files import check_unused, claim_folder
from alignfast.models import fingerprint
from alignfast.models.preparation import Precision
from alignfast.progress import progress
from alignfast.versions import package_versions

# Columns of a table that goes to a file.
LINE = 200


def _list_attacks(wanted: bool) -> None:
    if not wanted:
        return
    from alignfast.attacks.catalog import catalog

    table = Table(box=None)
    for title in ("name", "copies", "passes", "components", "paper"):
        table.add_column(title, overflow="fold", no_wrap=title == "name")
    for entry in catalog():
        table.add_row(entry.name, str(entry.copies), str(entry.passes), " ".join(entry.components), entry.paper)
    Console(width=None if sys.stdout.isatty() else LINE, markup=False).print(table)
    print("copies: views of an image in each gradient. passes: forward and backward passes an image and step.")
    raise typer.Exit


@by_ranks
def attack_command(
    model: Annotated[str, typer.Option(help=f"The source. {MODEL_HELP}")],
    attack: Annotated[str, typer.Option(help='A name of --list, or several combined as in "dim+tim+sim+vmifgsm".')],
    data: Data,
    out: Out,
    list_: Annotated[
        bool, typer.Option("--list", is_eager=True, callback=_list_attacks, help="Print all attacks, and leave.")
    ] = False,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights of the source.")] = None,
    eps: Annotated[str | None, typer.Option(help="Radius, such as 8/255.")] = None,
    alpha: Annotated[str | None, typer.Option(help="Step size, such as 2/255.")] = None,
    steps: Annotated[int | None, typer.Option(help="Number of steps.")] = None,
    param: Annotated[list[str] | None, typer.Option(help="Another parameter as NAME=VALUE; repeat.")] = None,
    targeted: Annotated[bool, typer.Option("--targeted", help="Toward the targeted_label of labels.csv.")] = False,
    precision: Annotated[str, typer.Option(help=f"Of the source's passes: {', '.join(get_args(Precision))}.")] = "fp32",
    compile_: Annotated[bool, typer.Option("--compile", help="The source's passes by torch.compile.")] = False,
    num_classes: NumClasses = None,
    batch_size: BatchSize = 16,
    workers: Workers = 0,
    limit: Limit = None,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Write adversarial images as PNG, within eps of their 8-bit originals, with a manifest."""
    began = time.monotonic()
    named = {"eps": eps, "alpha": alpha, "steps": steps}
    given = {name: value for name, value in named.items() if value is not None} | parameters_given(param or [])
    spec = attack_spec("attack", {"name": attack, **given, "seed": seed, "targeted": targeted})
    check_choice("precision", precision, get_args(Precision))
    place = check_device(device)
    source = trained_model(model, checkpoint, num_classes).to(place)
    dataset = load_dataset(data, image_size=side_of(source, model), num_classes=source.num_classes)
    attack_on = partial(create, **pooled(spec, dataset, place))
    # What it refuses is known before the source is prepared.
    attack_on(source=source)
    if targeted and dataset.targets is None:
        raise ValueError(f"targeted: {data} lists no targeted labels; allowed is a labels.csv with targeted_label")
    subset = spread_over(dataset, limit)
    on_main(lambda: check_unused(out))
    on_main(lambda: verify(dataset))
    batches = loader(subset, batch_size, workers=workers, ahead=True)
    example = next(iter(loader(subset, batch_size))).images.to(place)
    prepared = prepared_alike(source, example, cast(Precision, precision), compiled=compile_)
    engine = attack_on(source=prepared)
    spec = parameters_of(spec["name"]) | spec
    passes = {"precision": precision, "form": form_of(prepared)}
    run_with = {"command": "attack", "model": model, "checkpoint": text_of(checkpoint), "data": data, "attack": spec}
    more = {"limit": limit, **passes, "versions": package_versions()}
    folder = on_main(lambda: claim_folder(out, run_with | more))
    manifest = Manifest(
        attack=spec["name"],
        parameters={"model": model, "checkpoint": text_of(checkpoint), **spec, **passes},
        model=fingerprint(source),
        seed=seed,
        eps=engine.eps,
        norm=engine.step.norm,
        data=data,
        num_classes=source.num_classes,
    )
    ranks = current()
    own = batches.deal(ranks.rank, ranks.world)
    if ranks.rank == 0:
        print(f"precision {precision}: {prepared.preparation}", file=sys.stderr)
    with (
        AdversarialWriter(folder, manifest, dataset.filenames) as writer,
        progress(spec["name"], own.images, "images", shown=ranks.rank == 0) as advance,
    ):
        done, started = 0, time.monotonic()
        for images, labels, indices in own:
            aims = None if dataset.targets is None else dataset.targets[indices]
            batch = Batch(images, aims if targeted and aims is not None else labels, indices)
            # A model is compiled for one number of images.
            rows = Batch(*(each.to(place) for each in (batch.filled(len(example)) if compile_ else batch)))
            adversarial = engine(rows.images, rows.labels, indices=rows.indices)
            levels = quantise(adversarial, eight_bit(rows.images), engine.eps, engine.step.norm)
            writer.add(levels[: len(images)], labels, indices, aims)
            done += len(images)
            advance(len(images), f"{done / (time.monotonic() - started):.1f} images/s")
    if ranks.rank == 0:
        seconds = time.monotonic() - began
        print(f"{len(subset)} images in {folder}, {seconds:.1f} s, {len(subset) / seconds:.1f} images/s")
