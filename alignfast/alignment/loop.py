"""The alignment loop."""

from __future__ import annotations

import copy
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from alignfast.alignment.cache import WitnessCache
from alignfast.alignment.config import AlignConfig
from alignfast.alignment.held_out import MOST_CLEAN, CleanAccuracy, accuracy, device_of, of_this_rank
from alignfast.alignment.logs import Log
from alignfast.alignment.run import Run, share_buffers
from alignfast.alignment.snapshots import Snapshots
from alignfast.alignment.stream import Stream, keeping_generators
from alignfast.alignment.terms import Perturb, terms_of
from alignfast.alignment.training_kernels import trained_by_kernels
from alignfast.checks import check_images, check_labels
from alignfast.data import Batch, Loader, as_batches
from alignfast.data.loading import is_stream
from alignfast.data.views import stream_seed
from alignfast.distributed import Ranks, any_rank, barrier, current, main
from alignfast.models import Classifier, as_classifier, evaluating, fingerprint, keeping_modes, save_checkpoint
from alignfast.progress import progress as show_progress

# Batches over which batch-norm statistics are taken anew.
RECALIBRATION = 100


@dataclass(frozen=True)
class AlignResult:
    """model: the aligned source, in evaluation mode. history: one entry a step, with step (from 1), lr, loss, the
    terms (unweighted; kd and cls are None where they are not computed) and grad_norm (before clipping); where it was
    measured, held_out_kd and gradient_cosine. clean: accuracy before and after."""

    model: Classifier
    history: list[dict[str, Any]]
    config: AlignConfig
    clean: CleanAccuracy


def align(
    source: nn.Module,
    witness: nn.Module | Sequence[nn.Module],
    loader: Iterable[Any],
    config: AlignConfig | None = None,
    *,
    in_place: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    held_out: Iterable[Any] | None = None,
    clean: Iterable[Any] | None = None,
    perturb: Perturb | None = None,
    cache: WitnessCache | None = None,
    snapshots: Snapshots | None = None,
    resume: bool = False,
    logs: Sequence[Log] = (),
    progress: bool = False,
) -> AlignResult:
    """Fine-tune `source` so that its predictions match those of `witness` (Ma et al., ECCV 2024, section 3).

    Args:
        source: maps images in [0, 1] to logits [N, C]. Only parameters that require a gradient are trained.
        witness: one model or several of the same classes; in evaluation mode and without a gradient throughout.
        loader: batches (images, labels) or (images, labels, indices), images float [N, C, H, W] in [0, 1]. Its
            `set_epoch`, where it has one, is called before every pass. Witnesses of another input size are given the
            images resized.
        config: the recipe; the paper's if None.
        in_place: align `source` itself; otherwise a copy is aligned and `source` stays as it is.
        checkpoint: also write the aligned weights to this .safetensors file, whole or not at all.
        held_out: batches as of `loader`, which are not trained on, for a stand-in for transfer, see `Proxy`.
        clean: batches as of `loader`, for clean accuracy; None for `held_out`, or else the first images trained on.
        perturb: from the model that is aligned, an attack on it whose adversarial images are trained on, such as
            `alignfast.attacks.PGD` or `functools.partial(alignfast.attacks.PGD, eps=4/255, alpha=1/255, steps=3)`.
        cache: keeps the witnesses' logits on disk, by data-set index, for a loader that shows the same view of an image
            in every pass; without `perturb`.
        snapshots: where and how often the state of the run is written. On SIGTERM it is written after the step, and the
            process exits with 0.
        resume: go on from the newest whole snapshot, if there is one; the final weights are those of a run that was
            not interrupted, on the CPU to the last bit.
        logs: are told of every step.
        progress: show progress on standard error.

    Among several processes (torchrun, `alignfast.distributed`), each takes its part of every batch of an `alignfast`
    loader, whose batch_size is that of all together; other loaders give each its own. A step is then that of one
    process with the whole batch, but for what is of the batch: its statistics, and embedding losses, which compare the
    images of one process. Rank 0 alone writes and shows.

    Returns:
        The aligned model, on the device of the source, with the history of the run.

    Raises:
        ValueError: witnesses of other classes, images outside [0, 1] or of another size, a loader without images, a
            source without trainable parameters, `resume` without snapshots or with one of another run, which is told
            by models, config, ranks and what a loader says of itself, but not by its images.
            FloatingPointError: a loss or, but for fp16, a gradient that is not finite; the source passed in is then
            unchanged unless `in_place`, and so are the snapshots.
    """
    config = config or AlignConfig()
    witnesses = [as_classifier(model) for model in (witness if isinstance(witness, Sequence) else [witness])]
    model = as_classifier(source)
    if checkpoint is not None and Path(checkpoint).suffix != ".safetensors":
        raise ValueError(f"checkpoint: got {checkpoint}; allowed is a .safetensors file")
    if resume and snapshots is None:
        raise ValueError("resume: got True without snapshots; allowed with the snapshots of the run only")
    _check_models(model, witnesses, loader, config)
    if cache is not None and (perturb is not None or config.embeddings):
        raise ValueError("cache: got one with perturbed images or embeddings; allowed with neither")
    _check_held_out(held_out, config)
    kept = list(as_batches(held_out)) if held_out is not None else []
    measured = list(as_batches(clean)) if clean is not None else list(kept)
    given = of_this_rank(measured)
    first: list[Batch] = []
    counted: list[tuple[float, int]] = []
    # Images that training is to read first are counted afterwards only, by the source as it was.
    original = copy.deepcopy(model) if in_place and not measured else model
    model = model if in_place else copy.deepcopy(model)
    history = fit(
        model,
        witnesses,
        loader,
        config,
        progress=progress,
        before=(lambda: counted.append(accuracy(model, given))) if measured else None,
        held_out=kept,
        perturb=perturb,
        cache=cache,
        snapshots=snapshots,
        resume=resume,
        logs=logs,
        first=None if measured else first,
    )
    model.eval()
    before, count = counted[0] if measured else accuracy(original, first)
    after, _ = accuracy(model, given if measured else first)
    if checkpoint is not None and main():
        save_checkpoint(model, checkpoint, {"alignfast.config": repr(asdict(config))})
    return AlignResult(model, history, config, CleanAccuracy(before, after, count, bool(measured)))


def fit(
    model: Classifier,
    witnesses: Sequence[Classifier],
    loader: Iterable[Any],
    config: AlignConfig,
    *,
    progress: bool = False,
    before: Callable[[], None] | None = None,
    after: Callable[[int], None] | None = None,
    held_out: Sequence[Batch] = (),
    perturb: Perturb | None = None,
    cache: WitnessCache | None = None,
    snapshots: Snapshots | None = None,
    resume: bool = False,
    logs: Sequence[Log] = (),
    first: list[Batch] | None = None,
) -> list[dict[str, Any]]:
    """Train `model` in place, as `align` does, and leave its modes and the global generators as they were.

    witnesses: none where the config needs none. before: called with `model` as it came, when all is checked, also where
    the run is one that goes on. after: called with the number of each step, from 1, when it is done. first: takes the
    first batches, of a few hundred images.
    """
    total, ranks = total_steps(loader, config), current()
    loader = _of_rank(loader, ranks)
    named = _named(config) | {"source": fingerprint(model), "witnesses": [fingerprint(one) for one in witnesses]}
    named |= {"steps": total, "ranks": ranks.world} | _named_loader(loader)
    state = snapshots.latest(named) if snapshots is not None and resume else None
    with (
        keeping_generators(_cuda_devices(model)),
        evaluating(*witnesses),
        _training(model, config),
        show_progress("align", total, "steps", shown=progress and ranks.rank == 0) as advance,
    ):
        torch.manual_seed(config.seed)
        stream = Stream(loader)
        batches = iter(stream) if state is None else stream.go_to(state["positions"][ranks.rank])
        example = next(batches, None)
        if example is None:
            raise ValueError("loader: holds no batch; allowed is a loader with at least one image")
        example = _moved(example, device_of(model))
        _check_batch(model, example, config)
        batches = chain([example], batches)
        if first is not None:
            batches = _keeping(batches, first)
        if ranks.world > 1 and config.batch_norm == "synchronise":
            model.module = convert_sync_batchnorm(model.module)
        with terms_of(model, witnesses, config, example.images, perturb, cache) as terms, ExitStack() as closing:
            if ranks.world > 1:
                terms.spread(example.images[:2])
                torch.manual_seed(stream_seed("rank", config.seed, ranks.rank))
            elif config.compile:
                terms.compile()
            run = Run(terms, stream, config, total, witnesses, held_out)
            if config.channels_last:
                half = config.precision != "fp32"
                closing.enter_context(trained_by_kernels(model, example.images[:1], half=half))
            if before is not None:
                with keeping_generators(_cuda_devices(model)):
                    before()
            if state is not None:
                run.load(state)
            logs = logs if ranks.rank == 0 else ()
            for log in logs:
                log.begin(run.history)
                closing.callback(log.close)
            promised = total_batches(loader, config)
            _steps(run, batches, promised, snapshots, named, logs, advance, after)
            run.finish()
            if config.batch_norm == "recalibrate":
                _recalibrate(model, loader)
    return run.history


def _named(config: AlignConfig) -> dict[str, Any]:
    """The settings as a snapshot can hold them."""
    return {name: repr(value) if isinstance(value, tuple) else value for name, value in vars(config).items()}


def _named_loader(loader: Iterable[Any]) -> dict[str, Any]:
    """What can be told of a loader without reading it."""
    if isinstance(loader, Loader):
        settings = loader.settings
    else:
        images = getattr(loader, "dataset", None)
        settings = {
            "images": len(images) if isinstance(images, Sized) else None,
            "batch_size": getattr(loader, "batch_size", None),
            "batches": len(loader) if isinstance(loader, Sized) else None,
        }
    return {f"loader's {name}": value for name, value in settings.items()}


def _steps(
    run: Run,
    batches: Iterator[Batch],
    promised: int,
    snapshots: Snapshots | None,
    named: dict[str, Any],
    logs: Sequence[Log],
    advance: Callable[[int, str], None],
    after: Callable[[int], None] | None,
) -> None:
    written = began = time.monotonic()
    images, ending = 0, False
    advance(run.step, "")
    with terminating(snapshots is not None) as told:
        while run.step < run.total and not run.stopped:
            given = run.step * run.config.accumulate
            wanted = min(run.config.accumulate, promised - given)
            group = [_moved(batch, run.device) for batch in islice(batches, wanted)]
            if len(group) < wanted:
                raise ValueError(
                    f"loader: gave {given + len(group)} batches; allowed is the {promised} that it promised"
                )
            run.take(group)
            images += sum(len(batch.images) for batch in group)
            if after is not None:
                after(run.step)
            due = snapshots is not None and snapshots.due(run.step)
            if snapshots is not None and run.readable:
                # Ranks have clocks of their own, and are told to end one after another.
                ending = any_rank(told.is_set())
                due = due or ending or any_rank(snapshots.overdue(written))
            if run.readable or due:
                entries = run.read()
                # Of all ranks, whose parts of a batch differ by one image at most.
                rate = run.ranks.world * images / (time.monotonic() - began)
                for log in logs:
                    log.add(entries, rate)
                advance(len(entries), f"loss {entries[-1]['loss']:.4f}, {rate:.0f} images/s")
            if snapshots is not None and due:
                state = run.state(named)
                if run.ranks.rank == 0:
                    snapshots.write(run.step, state)
                barrier()
                written = time.monotonic()
            if ending:
                raise SystemExit(0)


@contextmanager
def terminating(handled: bool) -> Iterator[threading.Event]:
    """An event that SIGTERM sets instead of ending the process, where it is handled and this is the main thread."""
    told = threading.Event()
    if not handled or threading.current_thread() is not threading.main_thread():
        yield told
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.set())
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)


def total_steps(loader: Iterable[Any], config: AlignConfig) -> int:
    """Of a run; ValueError where they cannot be told or there are none."""
    return math.ceil(total_batches(loader, config) / config.accumulate)


def total_batches(loader: Iterable[Any], config: AlignConfig) -> int:
    if config.steps is not None:
        return config.steps * config.accumulate
    try:
        batches = len(loader)  # type: ignore[arg-type]
    except TypeError as error:
        raise ValueError("loader: has no length; allowed with AlignConfig(steps=...) only") from error
    if batches == 0:
        raise ValueError("loader: holds no batch; allowed is a loader with at least one image")
    return batches * config.epochs


@contextmanager
def _training(model: Classifier, config: AlignConfig) -> Iterator[None]:
    """Training mode and the layout of the run, with batch-norm layers in evaluation mode where their statistics are
    frozen."""
    layout = model.memory_format
    with keeping_modes(model):
        model.train()
        if config.channels_last:
            model.to(memory_format=torch.channels_last)
            model.memory_format = torch.channels_last
        if config.batch_norm == "freeze":
            for module in model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        try:
            yield
        finally:
            model.memory_format = layout


def _recalibrate(model: Classifier, loader: Iterable[Any]) -> None:
    """Batch-norm statistics anew, as plain means over some batches of the first pass."""
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(0)
    batches = ([batch.images] for batch in islice(as_batches(loader), RECALIBRATION))
    update_bn(batches, model, device=device_of(model))
    share_buffers(model)


def _keeping(batches: Iterator[Batch], first: list[Batch]) -> Iterator[Batch]:
    """The same, the first of which, up to some number of images, are added to `first`."""
    count = 0
    for batch in batches:
        if count < MOST_CLEAN:
            first.append(batch)
            count += len(batch.images)
        yield batch


def _of_rank(loader: Iterable[Any], ranks: Ranks) -> Iterable[Any]:
    """The part of this rank; a loader that is not of this package has been divided by who made it."""
    if ranks.world == 1 or not isinstance(loader, Loader):
        return loader
    rest = 0 if is_stream(loader.dataset) else len(loader.dataset) % loader.batch_size
    if loader.batch_size < ranks.world or (0 < rest < ranks.world and not loader._drop_last):
        raise ValueError(
            f"loader: has batches of {loader.batch_size} images and a last one of {rest} for {ranks.world} ranks; "
            "allowed is at least one image for each (drop_last leaves the last one out)"
        )
    return loader.shard(ranks.rank, ranks.world)


def _moved(batch: Batch, device: torch.device) -> Batch:
    return Batch(*(tensor.to(device, non_blocking=True) for tensor in batch))


def _check_models(model: Classifier, witnesses: list[Classifier], loader: Iterable[Any], config: AlignConfig) -> None:
    if not witnesses:
        raise ValueError("witness: got none; allowed is at least one model")
    for witness in witnesses:
        known = None not in (model.num_classes, witness.num_classes)
        if known and witness.num_classes != model.num_classes:
            raise ValueError(
                f"witness: has {witness.num_classes} classes; allowed is that of the source, {model.num_classes}"
            )
    if config.batch_norm == "synchronise" and device_of(model).type == "cpu":
        raise ValueError("batch_norm: got 'synchronise' on the CPU; allowed there is move, freeze or recalibrate")
    if config.batch_norm == "recalibrate" and isinstance(loader, Iterator):
        raise ValueError("batch_norm: got 'recalibrate' with an iterator; allowed with a loader that can be read again")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("source: has no parameter that requires a gradient; allowed is a source that can be trained")


def _check_held_out(held_out: Iterable[Any] | None, config: AlignConfig) -> None:
    if held_out is None and config.patience is not None:
        raise ValueError("patience: got a number without held_out images; allowed is None then")


def _check_batch(model: Classifier, batch: Batch, config: AlignConfig) -> None:
    if len(batch.images) == 0:
        raise ValueError("loader: its first batch is empty; allowed are batches with at least one image")
    check_images("loader's images", batch.images)
    model.check_shape(batch.images)
    if config.lambda_cls or any(loss.needs_labels for loss in config.embeddings):
        check_labels("loader's labels", batch.labels, len(batch.images), model.num_classes)


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted(
        {p.device.index for p in model.parameters() if p.device.type == "cuda" and p.device.index is not None}
    )
