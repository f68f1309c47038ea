"""Transfer matrices made of numbers, without a model."""

from __future__ import annotations

import numpy as np

from alignfast.evaluation.matrix_result import Cell, Comparison, TransferMatrix
from alignfast.evaluation.statistics import paired


def build(
    shifts: dict[str, float],
    attacks: tuple[str, ...] = ("pgd", "mi"),
    targets: tuple[str, ...] = ("vgg", "vit"),
    n: int = 400,
) -> TransferMatrix:
    """Rates of 40 % for "vanilla", and `shifts` more from the others on nested sets of images."""
    cells, comparisons = [], []
    order = np.arange(n)
    for attack in attacks:
        for target in targets:
            base = order < round(0.4 * n)
            for source, shift in {"vanilla": 0.0, **shifts}.items():
                flags = order < round((0.4 + shift) * n)
                numbers = {"clean_accuracy": 0.917, "white_box": 0.983}
                cells.append(Cell.counted(source, attack, target, errors=int(flags.sum()), n=n, **numbers))
                if source != "vanilla":
                    comparisons.append(Comparison.of("vanilla", source, attack, target, paired(base, flags)))
    config = {"protocol": "qualified", "attacks": {"mi": {"eps": 0.0156}}}
    return TransferMatrix(tuple(cells), tuple(comparisons), config, {"torch": "2.14.1"})
