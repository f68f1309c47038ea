"""What the values of single images say together."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from alignfast.evaluation.statistics import bootstrap, paired, wilson
from alignfast.geometry.measures import DIAGNOSTICS
from alignfast.geometry.result import Difference, Estimate, Floats, Row

# Measures that are 0 or 1 for an image, whose means are rates.
RATES = ("agreement", "fooled")


def estimates(rows: Sequence[Row], resamples: int, seed: int) -> tuple[Estimate, ...]:
    """The mean of each row over its images: bootstrap intervals, and Wilson's for rates."""
    return tuple(_estimate(row, resamples, seed) for row in rows)


def differences(rows: Sequence[Row], baseline: str, resamples: int, seed: int) -> tuple[Difference, ...]:
    """Each model's row minus that of the baseline, image by image: bootstrap intervals, and Newcombe's for rates."""
    by_key = {(row.model, row.other, row.point, row.measure): row for row in rows}
    found = []
    for row in rows:
        before = by_key.get((baseline, row.other, row.point, row.measure))
        if row.model != baseline and before is not None and row.measure not in DIAGNOSTICS:
            found.append(_difference(before, row, resamples, seed))
    return tuple(found)


def _estimate(row: Row, resamples: int, seed: int) -> Estimate:
    values = row.values[~np.isnan(row.values)]
    named = (row.model, row.other, row.point, row.measure)
    if len(values) == 0:
        return Estimate(*named, math.nan, math.nan, math.nan, math.nan, 0)
    if row.measure in RATES:
        low, high = wilson(int(values.sum()), len(values))
    else:
        low, high = bootstrap(values, resamples, seed)
    return Estimate(*named, float(values.mean()), low, high, float(np.median(values)), len(values))


def _difference(before: Row, after: Row, resamples: int, seed: int) -> Difference:
    both = ~(np.isnan(before.values) | np.isnan(after.values))
    first, second = before.values[both], after.values[both]
    named = (before.model, after.model, after.other, after.point, after.measure)
    if len(first) == 0:
        return Difference(*named, math.nan, math.nan, math.nan, 0)
    low, high = _interval(first, second, after.measure, resamples, seed)
    fell, changed = int((second < first).sum()), int((second != first).sum())
    share = fell / changed if changed else math.nan
    return Difference(*named, float((second - first).mean()), low, high, len(first), share, *wilson(fell, changed))


def _interval(first: Floats, second: Floats, measure: str, resamples: int, seed: int) -> tuple[float, float]:
    if measure not in RATES:
        return bootstrap(second - first, resamples, seed)
    result = paired(first > 0, second > 0)
    return result.low, result.high
