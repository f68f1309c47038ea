"""The alignment loop."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from alignfast.alignment.config import AlignConfig
from alignfast.checks import check_images, check_labels
from alignfast.data import Batch, as_batches
from alignfast.models import Classifier, as_classifier, evaluating, fit_size, keeping_modes, save_checkpoint
from alignfast.ops import kl_div_with_logits
from alignfast.progress import progress as show_progress

# How often the losses are brought to the host: between these steps nothing waits for the device.
STEPS_BETWEEN_READINGS = 10


@dataclass(frozen=True)
class AlignResult:
    """model: the aligned source, in evaluation mode. history: one entry a step, with step (from 1), lr, loss, kd and
    cls (the two terms unweighted; cls is None where labels are not read) and grad_norm (before clipping)."""

    model: Classifier
    history: list[dict[str, Any]]
    config: AlignConfig


def align(
    source: nn.Module,
    witness: nn.Module | Sequence[nn.Module],
    loader: Iterable[Any],
    config: AlignConfig | None = None,
    *,
    in_place: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
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
        progress: show progress on standard error.

    Returns:
        The aligned model, on the device of the source, with the history of the run.

    Raises:
        ValueError: witnesses of other classes, images outside [0, 1] or of another size, a loader without images, a
            source without trainable parameters. FloatingPointError: a loss that is not finite; the source passed in
            is then unchanged unless `in_place`.
    """
    config = config or AlignConfig()
    witnesses = [as_classifier(model) for model in (witness if isinstance(witness, Sequence) else [witness])]
    model = as_classifier(source)
    if checkpoint is not None and Path(checkpoint).suffix != ".safetensors":
        raise ValueError(f"checkpoint: got {checkpoint}; allowed is a .safetensors file")
    _check_models(model, witnesses)
    if not in_place:
        model = copy.deepcopy(model)
    history = fit(model, witnesses, loader, config, progress=progress)
    model.eval()
    if checkpoint is not None:
        save_checkpoint(model, checkpoint, {"alignfast.config": repr(asdict(config))})
    return AlignResult(model, history, config)


def fit(
    model: Classifier,
    witnesses: Sequence[Classifier],
    loader: Iterable[Any],
    config: AlignConfig,
    *,
    progress: bool = False,
    after: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Train `model` in place, as `align` does, and leave its modes and the global generators as they were.

    witnesses: none where config.lambda_kd is 0. after: called with the number of each step, from 1, when it is done.
    """
    with torch.random.fork_rng(devices=_cuda_devices(model)), evaluating(*witnesses), _training(model, config):
        torch.manual_seed(config.seed)
        return _fit(model, witnesses, loader, config, progress, after)


def _fit(
    model: Classifier,
    witnesses: Sequence[Classifier],
    loader: Iterable[Any],
    config: AlignConfig,
    shown: bool,
    after: Callable[[int], None] | None,
) -> list[dict[str, Any]]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = _optimizer(parameters, config)
    total = total_steps(loader, config)
    schedule = _schedule(optimizer, total, config)
    device = parameters[0].device
    pending: list[dict[str, Any]] = []
    history: list[dict[str, Any]] = []
    with show_progress("align", total, "steps", shown=shown) as advance:
        for step, batch in enumerate(islice(_passes(loader), total), 1):
            images, labels = batch.images.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True)
            if step == 1:
                _check_batch(model, images, labels, config)
            optimizer.zero_grad(set_to_none=True)
            terms = _losses(model, witnesses, images, labels, config)
            terms["loss"].backward()
            norm = nn.utils.clip_grad_norm_(parameters, config.clip_norm or math.inf)
            pending.append({"step": step, "lr": optimizer.param_groups[0]["lr"], **terms, "grad_norm": norm})
            optimizer.step()
            schedule.step()
            if after is not None:
                after(step)
            if step % STEPS_BETWEEN_READINGS == 0 or step == total:
                history += _read(pending)
                advance(len(pending), f"loss {history[-1]['loss']:.4f}")
                pending.clear()
    if len(history) < total:
        raise ValueError(f"loader: gave {len(history) + len(pending)} batches; allowed is the {total} that it promised")
    return history


def _optimizer(parameters: list[nn.Parameter], config: AlignConfig) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        parameters, config.lr, config.momentum, weight_decay=config.weight_decay, nesterov=config.nesterov
    )


def _schedule(
    optimizer: torch.optim.Optimizer, total: int, config: AlignConfig
) -> torch.optim.lr_scheduler.LRScheduler:
    if config.schedule == "constant":
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)


def _losses(
    model: Classifier, witnesses: Sequence[Classifier], images: Tensor, labels: Tensor, config: AlignConfig
) -> dict[str, Tensor]:
    """The weighted loss and its terms; a term of weight 0 is not computed."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        logits = model.logits(images)
        with torch.no_grad():
            taught = [witness.logits(fit_size(images, witness)) for witness in witnesses] if config.lambda_kd else []
    terms: dict[str, Tensor] = {}
    if config.lambda_kd:
        teacher = torch.stack(taught) if len(taught) > 1 else taught[0]
        terms["kd"] = kl_div_with_logits(
            logits, teacher, config.temperature, config.direction, "batchmean", config.combine
        )
    if config.lambda_cls:
        terms["cls"] = cross_entropy(logits.float(), labels)
    weights = {"kd": config.lambda_kd, "cls": config.lambda_cls}
    loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
    return {"loss": loss, **terms}


def _passes(loader: Iterable[Any]) -> Iterator[Batch]:
    """Pass after pass over the loader, for ever; stops where a pass is empty."""
    epoch = 0
    while True:
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        empty = True
        for batch in as_batches(loader):
            empty = False
            yield batch
        if empty:
            return
        epoch += 1


def total_steps(loader: Iterable[Any], config: AlignConfig) -> int:
    """Of a run; ValueError where they cannot be told or there are none."""
    if config.steps is not None:
        return config.steps
    try:
        batches = len(loader)  # type: ignore[arg-type]
    except TypeError as error:
        raise ValueError("loader: has no length; allowed with AlignConfig(steps=...) only") from error
    if batches == 0:
        raise ValueError("loader: holds no batch; allowed is a loader with at least one image")
    return batches * config.epochs


def _read(pending: list[dict[str, Any]]) -> list[dict[str, Any]]:
    entries = []
    for record in pending:
        entry: dict[str, Any] = {"cls": None, "kd": None}
        entry |= {name: float(v.detach()) if isinstance(v, Tensor) else v for name, v in record.items()}
        if not math.isfinite(entry["loss"]):
            raise FloatingPointError(
                f"loss: {entry['loss']} at step {entry['step']} of learning rate {entry['lr']:.3g}; "
                "a lower lr or clip_norm may help"
            )
        entries.append(entry)
    return entries


@contextmanager
def _training(model: Classifier, config: AlignConfig) -> Iterator[None]:
    """Training mode, with batch-norm layers in evaluation mode where their statistics are frozen."""
    with keeping_modes(model):
        model.train()
        if config.batch_norm == "freeze":
            for module in model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        yield


def _check_models(model: Classifier, witnesses: list[Classifier]) -> None:
    if not witnesses:
        raise ValueError("witness: got none; allowed is at least one model")
    for witness in witnesses:
        known = None not in (model.num_classes, witness.num_classes)
        if known and witness.num_classes != model.num_classes:
            raise ValueError(
                f"witness: has {witness.num_classes} classes; allowed is that of the source, {model.num_classes}"
            )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("source: has no parameter that requires a gradient; allowed is a source that can be trained")


def _check_batch(model: Classifier, images: Tensor, labels: Tensor, config: AlignConfig) -> None:
    if len(images) == 0:
        raise ValueError("loader: its first batch is empty; allowed are batches with at least one image")
    check_images("loader's images", images)
    model.check_shape(images)
    if config.lambda_cls:
        check_labels("loader's labels", labels, len(images), model.num_classes)


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted(
        {p.device.index for p in model.parameters() if p.device.type == "cuda" and p.device.index is not None}
    )
