from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from alignfast.evaluation.findings import FEWEST, change, geometry_sentences, summarise, summary_sentences
from alignfast.evaluation.matrix_result import Comparison, TransferMatrix
from alignfast.evaluation.statistics import paired
from alignfast.geometry.result import Difference, GeometryResult
from tests.evaluation.matrices import build


@pytest.mark.parametrize(
    ("shift", "verdict", "raised", "lowered"),
    [(0.1, "raises", 4, 0), (-0.1, "lowers", 0, 4), (0.0, "no clear change", 0, 0), (0.005, "no clear change", 0, 0)],
)
def test_summary_follows_the_numbers(shift: float, verdict: str, raised: int, lowered: int) -> None:
    matrix = build({"aligned": shift})
    (summary,) = summarise(matrix)
    assert summary.verdict == verdict
    assert (summary.raised, summary.lowered, summary.comparisons) == (raised, lowered, 4)
    assert summary.difference == pytest.approx(shift)
    sentence = summary_sentences(matrix)[0]
    opening = {"no clear change": "makes no clear change to"}.get(verdict, verdict)
    assert sentence.startswith(f"aligned {opening} the error rate of the targets")
    assert "over 4 comparisons (2 attacks and 2 targets)" in sentence


def test_opposite_changes_are_not_averaged_away() -> None:
    up, down = build({"aligned": 0.1}, attacks=("up",)), build({"aligned": -0.1}, attacks=("down",))
    matrix = TransferMatrix(up.cells + down.cells, up.comparisons + down.comparisons)
    first, second = summary_sentences(matrix)
    assert "no clear change" in first
    assert "2 of the 4 show a higher error rate, 2 a lower one and 0 no clear change" in second


def test_holm_covers_all_comparisons() -> None:
    # Six of six discordant images: p = 0.031 alone, 0.125 among four.
    alone, among = build({"aligned": 0.03}, ("mi",), ("vgg",), n=200), build({"aligned": 0.03}, n=200)
    assert summarise(alone)[0].verdict == "raises"
    assert summarise(among)[0].raised == 0


def test_a_single_comparison_needs_its_test_to_agree() -> None:
    # The published table whose interval leaves out 0 and whose exact p-value is 0.052.
    first = np.repeat([True, True, False, False], [59, 6, 16, 80])
    second = np.repeat([True, False, True, False], [59, 6, 16, 80])
    comparison = Comparison.of("a", "b", "mi", "vgg", paired(first, second))
    assert comparison.low > 0
    (summary,) = summarise(TransferMatrix((), (comparison,)))
    assert summary.verdict == "no clear change"


def difference(
    measure: str,
    low: float,
    high: float,
    *,
    point: str = "clean",
    other: str | None = None,
    n: int = 50,
    model: str = "aligned",
) -> Difference:
    return Difference("vanilla", model, other, point, measure, (low + high) / 2, low, high, n)


def sentences(*differences: Difference) -> tuple[str, ...]:
    return geometry_sentences(GeometryResult((), np.zeros(0, np.int64), (), differences))


@pytest.mark.parametrize(
    ("low", "high", "n", "expected"),
    [
        (0.1, 0.2, 50, "higher"),
        (-0.2, -0.1, 50, "lower"),
        (-0.1, 0.2, 50, "no clear change"),
        (0.0, 0.2, 50, "no clear change"),
        (-0.2, 0.0, 50, "no clear change"),
        (0.1, 0.2, FEWEST - 1, "too few images"),
        (0.1, 0.2, FEWEST, "higher"),
        (np.nan, np.nan, 0, "too few images"),
    ],
)
def test_a_change_needs_an_interval_that_leaves_out_zero(low: float, high: float, n: int, expected: str) -> None:
    assert change(difference("curvature", low, high, n=n)) == expected


def test_the_geometry_is_told_with_its_intervals() -> None:
    told = sentences(
        difference("curvature", -16.25, -8.0),
        difference("gradient_l2", 0.5, 1.5),
        difference("loss", -1.0, 1.0),
        difference("fooled", 0.25, 0.35, point="step 20", other="vgg"),
        difference("fooled", -0.1, 0.3, point="step 3", other="vgg"),
    )
    assert told == (
        "aligned against vanilla at the clean image: lowers curvature (−12.1 [−16.2, −8]); raises gradient_l2 (+1 "
        "[+0.5, +1.5]); no clear change in loss.",
        "aligned against vanilla after step 20 of the attack: raises fooled with vgg (+0.3 [+0.25, +0.35]).",
        "In brackets are 95 % intervals. 5 intervals of paired differences were looked at, each on its own and not "
        "corrected for their number: 3 leave out 0, where about 0.25 would if no two models differed.",
    )


def test_the_share_of_images_is_told_where_it_is_clear() -> None:
    """Few large values make a mean, and it may hide what most images show."""
    heavy = replace(difference("curvature", -9.0, 90.0), fell=0.82, fell_low=0.7, fell_high=0.9)
    risen = replace(difference("loss", 1.0, 2.0), fell=0.2, fell_low=0.1, fell_high=0.33)
    unclear = replace(difference("lipschitz", -2.0, -1.0), fell=0.55, fell_low=0.41, fell_high=0.68)
    assert sentences(heavy, risen, unclear)[0] == (
        "aligned against vanilla at the clean image: lowers lipschitz (−1.5 [−2, −1]); raises loss (+1.5 [+1, +2]; "
        "higher on 80 % of images [67, 90]); no clear change in curvature (lower on 82 % of images [70, 90])."
    )


def test_measures_with_several_other_models_are_counted() -> None:
    lows = {"a": 0.1, "b": 0.2, "c": -0.1}
    told = sentences(*(difference("gradient_cosine", low, low + 0.15, other=other) for other, low in lows.items()))
    assert told[0] == (
        "aligned against vanilla at the clean image: raises gradient_cosine with 2 of 3 other models; no clear "
        "change in gradient_cosine with 1 of 3 other models."
    )


def test_every_model_is_told_on_its_own() -> None:
    told = sentences(difference("loss", 1.0, 2.0), difference("loss", -2.0, -1.0, model="third"))
    assert [sentence.split(" against ")[0] for sentence in told[:2]] == ["aligned", "third"]
    assert "raises loss" in told[0]
    assert "lowers loss" in told[1]


def test_nothing_is_claimed_of_few_images_or_of_how_well_a_measure_was_computed() -> None:
    assert sentences() == (f"No losses of two models were compared on {FEWEST} images or more.",)
    few = difference("loss", 1.0, 2.0, n=FEWEST - 1)
    residual = difference("curvature_residual", 1.0, 2.0)
    assert sentences(few, residual) == sentences()
    last = sentences(few, residual, difference("kl", 1.0, 2.0, other="x"))[-1]
    assert "1 interval of paired differences was looked at" in last


def test_without_a_clean_or_last_point_all_points_are_told() -> None:
    first, second = sentences(difference("loss", 1.0, 2.0, point="random"))
    assert first.startswith("aligned against vanilla at the random point: raises loss (+1.5")
    assert "1 leaves out 0" in second
