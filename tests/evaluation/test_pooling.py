"""Pooling is counting all images as one set."""

from __future__ import annotations

import numpy as np
import pytest

from alignfast.evaluation.matrix_result import Cell, Comparison, TransferMatrix
from alignfast.evaluation.pooling import pool
from alignfast.evaluation.statistics import paired


def matrix(first: np.ndarray, second: np.ndarray) -> TransferMatrix:
    cells = tuple(
        Cell.counted(name, "a", "t", errors=int(flags.sum()), n=len(flags), clean_accuracy=0.5, white_box=0.25)
        for name, flags in (("vanilla", first), ("aligned", second))
    )
    comparison = Comparison.of("vanilla", "aligned", "a", "t", paired(first, second))
    return TransferMatrix(cells, (comparison,), {"sources": {"vanilla": "x"}, "targets": {"t": "y"}}, {})


def test_pooled_counts_are_those_of_all_images() -> None:
    generator = np.random.default_rng(0)
    flags = [generator.random((2, size)) < ((0.3,), (0.5,)) for size in (40, 90)]
    pooled = pool([matrix(*pair) for pair in flags])
    whole = matrix(*np.concatenate(flags, 1))
    assert pooled.cells == whole.cells
    assert pooled.comparisons == whole.comparisons
    assert pooled.config["repetitions"] == 2


def test_matrices_that_cannot_be_pooled() -> None:
    good = matrix(np.array([True, False]), np.array([True, True]))
    with pytest.raises(ValueError, match="got none"):
        pool([])
    with pytest.raises(ValueError, match="cells differ"):
        pool([good, TransferMatrix(good.cells[:1], (), {}, {})])
    fewer = Comparison.of("vanilla", "aligned", "a", "t", paired(np.array([True]), np.array([True])))
    with pytest.raises(ValueError, match="fewer images"):
        pool([TransferMatrix(good.cells, (fewer,), {}, {})])
