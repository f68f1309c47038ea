"""`alignfast align`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from alignfast.alignment import AlignConfig, Snapshots, align
from alignfast.alignment.cache import WitnessCache, witness_key
from alignfast.alignment.config import BATCH_NORMS, OPTIMIZERS, PRECISIONS
from alignfast.alignment.embeddings import EMBEDDINGS, EmbeddingLoss
from alignfast.alignment.logs import JsonLines, Log, TensorBoard
from alignfast.alignment.outputs import OUTPUT_LOSSES, OUTPUTS, OutputLoss
from alignfast.attacks import create
from alignfast.checks import check_choice, check_device
from alignfast.commands.options import (
    DATA_HELP,
    MODEL_HELP,
    Data,
    Device,
    NumClasses,
    Seed,
    Workers,
    by_ranks,
    parameters_given,
    side_of,
    spread_over,
    text_of,
    verify,
)
from alignfast.config import attack_spec, trained_model
from alignfast.data import Batch, augmented, load_dataset, loader
from alignfast.distributed import current, on_main
from alignfast.files import claim_folder, write_json
from alignfast.models import save_checkpoint
from alignfast.versions import package_versions

Loss = TypeVar("Loss", OutputLoss, EmbeddingLoss)

# Without a name.
PERTURBED_BY = "pgd"
# Images of the data and of the held-out ones on which an alignment is measured.
MOST_SHOWN = 256
# Settings of the alignment that are given by options of the same names.
SETTINGS = {field.name for field in fields(AlignConfig)} - {"outputs", "embeddings", "nesterov", "compile"}


@by_ranks
def align_command(
    source: Annotated[str, typer.Option(help=f"The model to align. {MODEL_HELP}")],
    witness: Annotated[list[str], typer.Option(help=f"The model to align to; repeat for several. {MODEL_HELP}")],
    data: Data,
    out: Annotated[Path, typer.Option(help="A new or empty folder, or with --resume that of the same run.")],
    source_checkpoint: Annotated[Path | None, typer.Option(help="Weights of the source.")] = None,
    witness_checkpoint: Annotated[
        list[Path] | None, typer.Option(help="Weights of the witnesses, in their order.")
    ] = None,
    num_classes: NumClasses = None,
    batch_size: Annotated[int, typer.Option(help="Images a batch, of all devices together.")] = 32,
    accumulate: Annotated[int, typer.Option(help="Batches a step.")] = AlignConfig.accumulate,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = AlignConfig.epochs,
    steps: Annotated[int | None, typer.Option(help="Stop after so many iterations instead.")] = None,
    optimizer: Annotated[str, typer.Option(help=", ".join(OPTIMIZERS))] = AlignConfig.optimizer,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = AlignConfig.lr,
    momentum: Annotated[float, typer.Option()] = AlignConfig.momentum,
    weight_decay: Annotated[float, typer.Option()] = AlignConfig.weight_decay,
    schedule: Annotated[str, typer.Option(help="cosine, along which the rate falls to 0, or constant.")] = "cosine",
    warmup: Annotated[int, typer.Option(help="Steps in which the rate first rises.")] = AlignConfig.warmup,
    temperature: Annotated[float, typer.Option(help="Of the loss of predictions.")] = AlignConfig.temperature,
    loss: Annotated[str, typer.Option(help=f"Of predictions: {', '.join(OUTPUTS)}.")] = AlignConfig.loss,
    direction: Annotated[str, typer.Option(help="forward, reverse, symmetric or jsd.")] = AlignConfig.direction,
    combine: Annotated[str, typer.Option(help="Several witnesses: mean, max or min.")] = AlignConfig.combine,
    output: Annotated[
        list[str] | None,
        typer.Option(help=f"A further loss of predictions, NAME[=WEIGHT]; repeat: {', '.join(OUTPUT_LOSSES)}."),
    ] = None,
    embedding: Annotated[
        list[str] | None, typer.Option(help=f"NAME[=WEIGHT], repeat for several: {', '.join(EMBEDDINGS)}.")
    ] = None,
    source_layer: Annotated[str | None, typer.Option(help="Of the source's embedding.")] = None,
    witness_layer: Annotated[str | None, typer.Option(help="Of the witnesses' embeddings.")] = None,
    lambda_kd: Annotated[float, typer.Option(help="Weight of the loss of predictions.")] = AlignConfig.lambda_kd,
    lambda_cls: Annotated[float, typer.Option(help="Weight of the cross-entropy.")] = AlignConfig.lambda_cls,
    lambda_self: Annotated[
        float, typer.Option(help="Weight of the divergence from the source as it was.")
    ] = AlignConfig.lambda_self,
    clip_norm: Annotated[float | None, typer.Option(help="Bound of the gradient's norm.")] = AlignConfig.clip_norm,
    ema: Annotated[float | None, typer.Option(help="Decay of an average of the weights, the result then.")] = None,
    batch_norm: Annotated[str, typer.Option(help=", ".join(BATCH_NORMS))] = AlignConfig.batch_norm,
    precision: Annotated[str, typer.Option(help=", ".join(PRECISIONS))] = AlignConfig.precision,
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="The layout of weights and images; on a CPU, the fast one.")
    ] = False,
    compile_: Annotated[bool, typer.Option("--compile", help="The source's pass by torch.compile.")] = False,
    perturb: Annotated[
        str | None, typer.Option(help="Align on images after this attack, a name of alignfast attack --list.")
    ] = None,
    perturb_param: Annotated[
        list[str] | None,
        typer.Option(help=f"A parameter of that attack, or else of {PERTURBED_BY}, as NAME=VALUE; repeat."),
    ] = None,
    crop_scale: Annotated[float, typer.Option(help="Least area of the random crops, in (0, 1].")] = 0.08,
    fixed_views: Annotated[bool, typer.Option("--fixed-views", help="The same crops in every pass.")] = False,
    witness_cache: Annotated[
        Path | None, typer.Option(help="A folder that keeps the witnesses' logits, with --fixed-views.")
    ] = None,
    held_out: Annotated[
        str | None, typer.Option(help=f"Images that are not trained on, for a check. {DATA_HELP}")
    ] = None,
    check_every: Annotated[int, typer.Option(help="Steps between two checks.")] = AlignConfig.check_every,
    patience: Annotated[int | None, typer.Option(help="Stop after so many checks without a better one.")] = None,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between two snapshots of the run.")] = 500,
    checkpoint_minutes: Annotated[float | None, typer.Option(help="And the time between two.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last snapshot in --out.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write scalars to --out/tensorboard too.")] = False,
    workers: Workers = 0,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Fine-tune a source toward witnesses: aligned.safetensors, history.jsonl and config.json."""
    # Before anything else has a name.
    given = locals()
    config = AlignConfig(
        **{name: given[name] for name in SETTINGS},
        outputs=tuple(_weighted("output", one, OUTPUT_LOSSES) for one in output or []),
        embeddings=tuple(_weighted("embedding", one, EMBEDDINGS) for one in embedding or []),
        nesterov=momentum > 0,
        compile=compile_,
    )
    checkpoints: list[Path | None] = [*(witness_checkpoint or [])]
    if len(checkpoints) not in (0, len(witness)):
        raise ValueError(
            f"witness-checkpoint: got {len(checkpoints)}; allowed is none or one a witness, {len(witness)}"
        )
    if witness_cache is not None and not fixed_views:
        raise ValueError("witness-cache: got one without --fixed-views; allowed with it only")
    attacked = None
    if perturb or perturb_param:
        attacked = attack_spec("perturb", {"name": perturb or PERTURBED_BY} | parameters_given(perturb_param or []))
    place = check_device(device)
    dataset = load_dataset(data, num_classes=num_classes)
    on_main(lambda: verify(dataset))
    model = trained_model(source, source_checkpoint, num_classes).to(place)
    witnesses = [
        trained_model(spec, checkpoint, num_classes).to(place)
        for spec, checkpoint in zip(witness, checkpoints or [None] * len(witness), strict=True)
    ]
    side = side_of(model, source)
    views = augmented(dataset, side, scale=(crop_scale, 1.0), seed=seed, fixed=fixed_views)
    # A last smaller batch would weigh its images more; it is kept only where it is all there is.
    batches = loader(views, batch_size, shuffle=True, seed=seed, workers=workers, drop_last=len(dataset) >= batch_size)
    shown = {
        name: _plain(spec, side, model.num_classes, batch_size) for name, spec in (("data", data), ("held", held_out))
    }
    run_with = {
        "command": "align",
        "source": source,
        "witness": witness,
        "source_checkpoint": text_of(source_checkpoint),
        "witness_checkpoint": [str(path) for path in checkpoints],
        "data": data,
        "held_out": held_out,
        "num_classes": num_classes,
        "batch_size": batch_size,
        "crop_scale": crop_scale,
        "fixed_views": fixed_views,
        "perturb": attacked,
        **asdict(config),
        "outputs": [repr(one) for one in config.outputs],
        "embeddings": [repr(one) for one in config.embeddings],
        "versions": package_versions(),
    }
    folder = on_main(lambda: claim_folder(out, run_with, resume=resume))
    logs: list[Log] = [JsonLines(folder / "history.jsonl")]
    logs += [TensorBoard(folder / "tensorboard")] if tensorboard else []
    caching: AbstractContextManager[WitnessCache | None] = nullcontext()
    if witness_cache is not None:
        key = witness_key(witnesses, f"{data} {side} {crop_scale}", seed, precision)
        classes = model.num_classes or len(model.logits(shown["data"][0].images[:1])[0])
        caching = WitnessCache(witness_cache, key, len(dataset), (len(witnesses), classes), current().rank)
    with caching as cache:
        result = align(
            model,
            witnesses,
            batches,
            config,
            in_place=True,
            held_out=shown["held"] or None,
            clean=shown["held"] or shown["data"],
            perturb=None if attacked is None else lambda one: create(source=one, **attacked),
            cache=cache,
            snapshots=Snapshots(folder / "snapshots", checkpoint_every, checkpoint_minutes),
            resume=resume,
            logs=logs,
            progress=True,
        )
    if current().rank > 0:
        return
    # One entry, since the format keeps several in any order, and equal runs should leave equal files.
    made_of = json.dumps({"source": source, "witness": witness})
    save_checkpoint(result.model, folder / "aligned.safetensors", {"alignfast": made_of})
    write_json(folder / "clean.json", asdict(result.clean))
    first, last = result.history[0], result.history[-1]
    print(f"loss {first['loss']:.4f} -> {last['loss']:.4f} in {last['step']} steps; {folder / 'aligned.safetensors'}")
    seen = "held-out images" if held_out is not None else "of the images that it was trained on"
    print(
        f"clean accuracy {100 * result.clean.before:.1f} -> {100 * result.clean.after:.1f} % on {result.clean.n} {seen}"
    )


def _weighted(option: str, given: str, losses: Mapping[str, Loss]) -> Loss:
    """The loss of NAME or NAME=WEIGHT."""
    name, equals, weight = given.partition("=")
    loss = losses[check_choice(option, name, losses)]
    if not equals:
        return loss
    try:
        return replace(loss, weight=float(weight))
    except ValueError as error:
        raise ValueError(
            f"{option}: got {given!r}; allowed is NAME or NAME=WEIGHT with a weight of at least 0"
        ) from error


def _plain(spec: str | None, side: tuple[int, int], classes: int | None, batch_size: int) -> list[Batch]:
    """Some images of a data set as they are, for measuring."""
    if spec is None:
        return []
    dataset = load_dataset(spec, image_size=side, num_classes=classes)
    return list(loader(spread_over(dataset, MOST_SHOWN), batch_size))
