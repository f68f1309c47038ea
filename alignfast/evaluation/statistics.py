"""Intervals and tests for error rates: counts in, fractions in [0, 1] out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from alignfast.checks import check_count, check_number

# Values that the bootstrap holds at a time.
RESAMPLED_AT_ONCE = 2**22

BoolArray = NDArray[np.bool_] | Tensor


@dataclass(frozen=True)
class Paired:
    """Two error rates on the same `n` images, and what separates them.

    Attributes:
        n: images.
        only_first, only_second: images that fooled in one of the two and not in the other.
        difference: the second rate minus the first, in [-1, 1]; NaN where n is 0.
        low, high: 95 % interval of the difference; -1 and 1 where n is 0.
        p_value: exact two-sided McNemar test of no difference; 1 where n is 0.
    """

    n: int
    only_first: int
    only_second: int
    difference: float
    low: float
    high: float
    p_value: float


def wilson(errors: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (low, high) of the rate errors / n; (0, 1) where n is 0 and the rate itself is NaN.

    E. B. Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 22, 1927.

    Raises:
        ValueError: errors outside 0 to n, or confidence outside (0, 1).
    """
    check_count("n", n, low=0)
    check_count("errors", errors, low=0, high=n)
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence: got {confidence!r}; allowed is a number in (0, 1)")
    if n == 0:
        return 0.0, 1.0
    # Importing scipy.stats takes about a second, which programs that never ask for an interval should not wait for.
    from scipy.stats import binomtest

    interval = binomtest(errors, n).proportion_ci(confidence, method="wilson")
    # The closed form leaves a rounding error where the bound is exact.
    return (0.0 if errors == 0 else float(interval.low)), (1.0 if errors == n else float(interval.high))


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value that the discordant counts are two halves of a fair coin; 1 where both are 0.

    Q. McNemar, "Note on the sampling error of the difference between correlated proportions or percentages",
    Psychometrika 12, 1947; the conditional binomial form.

    Raises:
        ValueError: a negative count.
    """
    check_count("only_first", only_first, low=0)
    check_count("only_second", only_second, low=0)
    discordant = only_first + only_second
    if discordant == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(only_first, discordant, 0.5).pvalue)


def paired(first_fooled: BoolArray, second_fooled: BoolArray) -> Paired:
    """Compare two error rates measured on the same images.

    The interval is method 10 of R. G. Newcombe, "Improved confidence intervals for the difference between binomial
    proportions based on paired data", Statistics in Medicine 17, 1998: two Wilson intervals, joined through the
    continuity-corrected correlation. It and the exact test may disagree by a hair about "no difference": the test is
    the more cautious.

    Args:
        first_fooled, second_fooled: bool [n], NumPy or torch, in the same order of images.

    Raises:
        ValueError: another dtype or rank, or two lengths.
    """
    first, second = _flags("first_fooled", first_fooled), _flags("second_fooled", second_fooled)
    if first.size != second.size:
        raise ValueError(f"second_fooled: got {second.size} images; allowed is the {first.size} of first_fooled")
    both = int((first & second).sum())
    return paired_counts(both, int(first.sum()) - both, int(second.sum()) - both, int(first.size))


def paired_counts(both: int, only_first: int, only_second: int, n: int) -> Paired:
    """`paired` of `n` images, of which so many fooled in both, in the first alone and in the second alone."""
    if n == 0:
        return Paired(0, 0, 0, math.nan, -1.0, 1.0, 1.0)
    low, high = _newcombe(both, only_first, only_second, n)
    difference = (only_second - only_first) / n
    return Paired(n, only_first, only_second, difference, low, high, mcnemar(only_first, only_second))


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """p-values adjusted so that comparing each with alpha keeps the chance of any false alarm at alpha or below.

    S. Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of Statistics 6, 1979.

    Raises:
        ValueError: a value outside [0, 1].
    """
    for value in p_values:
        check_number("p_values", value, low=0.0, high=1.0)
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return tuple(adjusted)


def bootstrap(
    values: NDArray[np.float64], resamples: int = 2000, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of the mean of `values`, float64 [n] without NaN; (NaN, NaN) for n < 2.

    B. Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7, 1979. Equal seeds give equal
    intervals.

    Raises:
        ValueError: another rank, fewer than one resample, or confidence outside (0, 1).
    """
    check_count("resamples", resamples)
    if values.ndim != 1:
        raise ValueError(f"values: got shape {list(values.shape)}; allowed is [n]")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence: got {confidence!r}; allowed is a number in (0, 1)")
    if len(values) < 2:
        return math.nan, math.nan
    from scipy.stats import bootstrap as resampled

    found = resampled(
        (values,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, RESAMPLED_AT_ONCE // len(values)),
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def _flags(name: str, fooled: BoolArray) -> NDArray[np.bool_]:
    values = fooled.detach().cpu().numpy() if isinstance(fooled, Tensor) else np.asarray(fooled)
    if values.dtype != np.bool_ or values.ndim != 1:
        raise ValueError(f"{name}: got {values.dtype} {list(values.shape)}; allowed is bool [n]")
    return values


def _newcombe(both: int, only_first: int, only_second: int, n: int) -> tuple[float, float]:
    """Method 10 for the second rate minus the first."""
    first, second = both + only_first, both + only_second
    low_1, high_1 = wilson(first, n)
    low_2, high_2 = wilson(second, n)
    down_1, up_1 = first / n - low_1, high_1 - first / n
    down_2, up_2 = second / n - low_2, high_2 - second / n
    phi = _corrected_phi(both, only_first, only_second, n - both - only_first - only_second)
    difference = (only_second - only_first) / n
    low = difference - _join(down_2, up_1, phi)
    high = difference + _join(up_2, down_1, phi)
    return max(-1.0, low), min(1.0, high)


def _join(a: float, b: float, phi: float) -> float:
    # Rounding may leave a tiny negative number under the root where phi is 1.
    return math.sqrt(max(0.0, a * a - 2.0 * phi * a * b + b * b))


def _corrected_phi(both: int, only_first: int, only_second: int, neither: int) -> float:
    n = both + only_first + only_second + neither
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    if margins == 0:
        return 0.0
    association = float(both * neither - only_first * only_second)
    if association > 0:
        association = max(association - n / 2, 0.0)
    return association / math.sqrt(margins)
