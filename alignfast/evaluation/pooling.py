"""Several repetitions of one matrix as a single one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from alignfast.evaluation.matrix_result import Cell, Comparison, TransferMatrix
from alignfast.evaluation.statistics import paired_counts


def pool(matrices: Sequence[TransferMatrix]) -> TransferMatrix:
    """The counts of all `matrices` added up, as if their images were one set.

    For repetitions over seeds, with models trained anew and images split anew. The intervals then speak of images, as
    if outcomes were independent; they do not hold the spread between seeds, which the single matrices show.

    Raises:
        ValueError: no matrix, matrices of different cells, or comparisons over fewer images than their cells (as the
            qualified protocol gives), whose pairs cannot be told from counts.
    """
    if not matrices:
        raise ValueError("matrices: got none; allowed is at least one")
    first = matrices[0]
    keys = [(cell.source, cell.attack, cell.target) for cell in first.cells]
    if any([(c.source, c.attack, c.target) for c in matrix.cells] != keys for matrix in matrices):
        raise ValueError("matrices: their cells differ; allowed are matrices of the same sources, attacks and targets")
    cells = tuple(_cell([matrix.cell(*key) for matrix in matrices]) for key in keys)
    comparisons = tuple(
        _comparison(group, matrices) for group in zip(*(matrix.comparisons for matrix in matrices), strict=True)
    )
    config = {"repetitions": len(matrices), **first.config}
    for role in ("sources", "targets"):
        config[role] = [dict(matrix.config[role]) for matrix in matrices if role in matrix.config]
    return TransferMatrix(cells, comparisons, config, first.versions)


def _cell(cells: Sequence[Cell]) -> Cell:
    first, n = cells[0], sum(cell.n for cell in cells)
    errors = sum(cell.errors for cell in cells)
    means = {
        name: sum(getattr(cell, name) * cell.n for cell in cells) / n if n else math.nan
        for name in ("clean_accuracy", "white_box")
    }
    return Cell.counted(first.source, first.attack, first.target, errors=errors, n=n, **means)


def _comparison(group: Sequence[Comparison], matrices: Sequence[TransferMatrix]) -> Comparison:
    first = group[0]
    baselines = [matrix.cell(first.baseline, first.attack, first.target) for matrix in matrices]
    if any(comparison.n != cell.n for comparison, cell in zip(group, baselines, strict=True)):
        raise ValueError("matrices: comparisons over fewer images than their cells; allowed are those over all images")
    n = sum(comparison.n for comparison in group)
    only_baseline = sum(comparison.only_baseline for comparison in group)
    only_source = sum(comparison.only_source for comparison in group)
    both = sum(cell.errors for cell in baselines) - only_baseline
    result = paired_counts(both, only_baseline, only_source, n)
    return Comparison.of(first.baseline, first.source, first.attack, first.target, result)
