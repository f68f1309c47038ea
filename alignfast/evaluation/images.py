"""Adversarial images made before, measured on targets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from alignfast.checks import check_labels
from alignfast.evaluation.judging import errors_of, labels_of
from alignfast.evaluation.matrix_result import Cell, TransferMatrix
from alignfast.models import Defended, as_classifier, evaluating, fingerprint
from alignfast.progress import progress as show_progress
from alignfast.versions import package_versions


def evaluate_images(
    data: Iterable[Any],
    targets: Mapping[str, nn.Module],
    *,
    source: str,
    attack: str,
    clean: Iterable[Any] | None = None,
    progress: bool = False,
) -> TransferMatrix:
    """Error rates of `targets` on adversarial images, one cell a target.

    Args:
        data: batches (images, labels[, indices]) of adversarial images with their true labels.
        targets: by name. A model of another input size is given the images resized.
        source, attack: what the cells are named after.
        clean: batches of the same images before the attack, for the clean accuracies; NaN without.

    Raises:
        ValueError: no target, no image, labels outside a target's classes, or clean images with other labels.
    """
    if not targets:
        raise ValueError("targets: got none; allowed is at least one")
    labels = labels_of(data)
    models = {name: as_classifier(model) for name, model in targets.items()}
    for name, model in models.items():
        check_labels(f"data's labels for target {name}", labels, len(labels), model.num_classes)
    cells = []
    with evaluating(*models.values()), show_progress("evaluate", len(models), "targets", shown=progress) as advance:
        for name, model in models.items():
            wrong = errors_of(model, [model], data, None, labels)[0]
            rates = {}
            if clean is not None:
                (missed,) = errors_of(model, [model], clean, None, labels)
                rates["clean_accuracy"] = float((~missed).mean())
            cells.append(Cell.counted(source, attack, name, errors=int(wrong.sum()), n=len(labels), **rates))
            advance(1, name)
    config = {
        "protocol": "all",
        "images": len(labels),
        "defences": {name: model.text for name, model in models.items() if isinstance(model, Defended)},
        "targets": {name: fingerprint(model) for name, model in models.items()},
    }
    return TransferMatrix(tuple(cells), (), config, package_versions())
