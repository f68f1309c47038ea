"""Which images models get wrong."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alignfast.attacks import Attack
from alignfast.data import as_batches
from alignfast.evaluation.shares import device_of, on_device
from alignfast.models import Classifier, Defended, fit_size
from alignfast.progress import Advance

Flags = NDArray[np.bool_]


def labels_of(data: Iterable[Any]) -> Tensor:
    """int64 [N] on the CPU, in the order of the batches; ValueError where there is no image."""
    labels = [batch.labels for batch in as_batches(data)]
    if sum(map(len, labels)) == 0:
        raise ValueError("data: holds no image; allowed is a loader with at least one")
    return torch.cat(labels).cpu()


def errors_of(
    source: Classifier,
    judges: list[Classifier],
    data: Iterable[Any],
    attack: Attack | None,
    labels: Tensor,
    tick: Advance | None = None,
) -> Flags:
    """[judges, N]: which of the images each judge gets wrong after `attack` on `source`, or clean where it is None."""
    wrong: list[Tensor] = []
    seen: list[Tensor] = []
    done, began = 0, time.monotonic()
    for batch in as_batches(data):
        images, truth, indices = on_device(batch, source)
        images = fit_size(images, source)
        if attack is not None:
            images = attack(images, truth, indices=indices)
        wrong.append(torch.stack([_predict(judge, images, indices).to(truth.device) != truth for judge in judges]))
        seen.append(truth)
        done += len(images)
        if tick is not None:
            tick(1, rate_of(done, began))
    if not torch.equal(torch.cat(seen).cpu() if seen else labels[:0], labels):
        raise ValueError("data: the order changes from pass to pass; allowed is a loader that does not shuffle")
    return torch.cat(wrong, 1).cpu().numpy() if wrong else np.zeros((len(judges), 0), dtype=np.bool_)


def rate_of(images: int, began: float) -> str:
    """Images a second since `began`, of the monotonic clock, in words."""
    return f"{images / max(time.monotonic() - began, 1e-9):.1f} images/s"


@torch.no_grad()
def _predict(model: Classifier, images: Tensor, indices: Tensor) -> Tensor:
    fitted = fit_size(images.to(device_of(model)), model)
    return (model.logits(fitted, indices) if isinstance(model, Defended) else model.logits(fitted)).argmax(1)
