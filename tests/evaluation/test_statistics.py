from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from alignfast.evaluation.statistics import holm, mcnemar, paired, wilson


def flags(both: int, only_first: int, only_second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    first = [True] * (both + only_first) + [False] * (only_second + neither)
    second = [True] * both + [False] * only_first + [True] * only_second + [False] * neither
    return np.array(first, bool), np.array(second, bool)


# Newcombe, Statistics in Medicine 17, 857-872 (1998), table I, method 3.
@pytest.mark.parametrize(
    ("errors", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(errors: int, n: int, low: float, high: float) -> None:
    assert wilson(errors, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_at_the_ends() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 7)[0] == 0.0
    assert wilson(7, 7)[1] == 1.0
    low, high = wilson(3, 7)
    assert wilson(4, 7) == pytest.approx((1 - high, 1 - low))


def test_wilson_narrows_with_less_confidence() -> None:
    wide, narrow = wilson(40, 100), wilson(40, 100, confidence=0.8)
    assert wide[0] < narrow[0] < 0.4 < narrow[1] < wide[1]


@pytest.mark.parametrize(
    ("errors", "n", "confidence", "name"),
    [(3, 2, 0.95, "errors"), (-1, 2, 0.95, "errors"), (0, -1, 0.95, "n"), (1, 2, 1.0, "confidence")],
)
def test_wilson_refuses_impossible_counts(errors: int, n: int, confidence: float, name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: "):
        wilson(errors, n, confidence)


# Fagerland, Lydersen and Laake, "Statistical Analysis of Contingency Tables" (2017), chapter 8, consolidation therapy.
def test_mcnemar_gives_the_published_p_value() -> None:
    assert mcnemar(6, 16) == pytest.approx(0.052479, abs=5e-7)


def test_mcnemar_by_hand() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(0, 6) == mcnemar(6, 0) == pytest.approx(2 / 2**6)
    assert mcnemar(5, 5) == 1.0
    with pytest.raises(ValueError, match="only_second: "):
        mcnemar(1, -1)


# (both, only first, only second, neither) and the interval of first minus second: Altman et al., "Statistics with
# Confidence" (2000), table 6.2; Fagerland et al. (2014), airway reactivity; Fagerland et al. (2017), consolidation.
@pytest.mark.parametrize(
    ("counts", "low", "high", "digits"),
    [
        ((14, 5, 0, 22), 0.011, 0.226, 3),
        ((1, 1, 7, 12), -0.507, -0.026, 3),
        ((59, 6, 16, 80), -0.1186, -0.0046, 4),
    ],
)
def test_paired_gives_the_published_intervals(
    counts: tuple[int, int, int, int], low: float, high: float, digits: int
) -> None:
    first, second = flags(*counts)
    backward = paired(second, first)
    assert (round(backward.low, digits), round(backward.high, digits)) == (low, high)
    forward = paired(first, second)
    assert (forward.low, forward.high) == pytest.approx((-backward.high, -backward.low))
    assert forward.difference == pytest.approx((counts[2] - counts[1]) / sum(counts))
    assert (forward.n, forward.only_first, forward.only_second) == (sum(counts), counts[1], counts[2])
    assert forward.p_value == mcnemar(counts[1], counts[2])


@pytest.mark.parametrize("counts", [(10, 0, 0, 10), (10, 0, 0, 0), (0, 0, 0, 10), (0, 10, 0, 0), (0, 5, 5, 0)])
def test_paired_at_the_ends(counts: tuple[int, int, int, int]) -> None:
    result = paired(*flags(*counts))
    assert -1.0 <= result.low <= result.difference <= result.high <= 1.0
    assert not math.isnan(result.low + result.high)


def test_paired_of_no_images() -> None:
    result = paired(np.zeros(0, bool), np.zeros(0, bool))
    assert math.isnan(result.difference)
    assert (result.n, result.low, result.high, result.p_value) == (0, -1.0, 1.0, 1.0)


def test_paired_takes_tensors() -> None:
    first, second = flags(3, 2, 7, 9)
    assert paired(torch.from_numpy(first), torch.from_numpy(second)) == paired(first, second)


def test_paired_covers_the_true_difference() -> None:
    random = np.random.default_rng(0)
    shared = random.random((400, 150))
    second_draw = np.where(random.random(shared.shape) < 0.5, shared, random.random(shared.shape))
    covered = 0
    for one, other in zip(shared < 0.5, second_draw < 0.6, strict=True):
        result = paired(one, other)
        covered += result.low <= 0.1 <= result.high
    # 95 % of 400 is 380 with a standard deviation of 4.4.
    assert 365 <= covered <= 394


def test_paired_refuses_what_is_not_a_pair_of_flags() -> None:
    with pytest.raises(ValueError, match="second_fooled: got 2 images"):
        paired(np.zeros(3, bool), np.zeros(2, bool))
    with pytest.raises(ValueError, match="first_fooled: got int64"):
        paired(np.zeros(3, np.int64), np.zeros(3, bool))
    with pytest.raises(ValueError, match="second_fooled: got bool"):
        paired(np.zeros(3, bool), np.zeros((3, 1), bool))


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert holm([0.9, 0.8]) == (1.0, 1.0)
    assert holm([]) == ()
    with pytest.raises(ValueError, match="p_values: "):
        holm([1.5])
