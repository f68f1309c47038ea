"""What measurements say in words; a change is claimed only where an interval or a test supports it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from alignfast.evaluation.matrix_result import Comparison, TransferMatrix, span_text
from alignfast.evaluation.statistics import holm
from alignfast.geometry.measures import DIAGNOSTICS
from alignfast.geometry.points import last_step

if TYPE_CHECKING:
    from alignfast.geometry.result import Difference, GeometryResult

LEVEL = 0.05
# Intervals of fewer images than this are too short to be believed.
FEWEST = 10

Verdict = Literal["raises", "lowers", "no clear change"]
Change = Literal["higher", "lower", "no clear change", "too few images"]


@dataclass(frozen=True)
class Summary:
    """What the comparisons of one source with one baseline say together.

    Attributes:
        difference: mean of the differences, as a fraction.
        low, high: means of the ends of their 95 % intervals. The images are shared, so the differences depend on one
            another in an unknown way; the standard error of their mean is at most the mean of their standard errors,
            so this interval covers at least as often as its parts do.
        verdict: from that interval; with a single comparison, from its test as well.
        raised, lowered: comparisons with a difference, by Holm's correction over all comparisons of the matrix.
        comparisons: how many there are.
        attacks, targets: over how many of each.
        family: comparisons that the correction covers.
    """

    baseline: str
    source: str
    difference: float
    low: float
    high: float
    verdict: Verdict
    raised: int
    lowered: int
    comparisons: int
    attacks: int
    targets: int
    family: int


def summarise(matrix: TransferMatrix) -> tuple[Summary, ...]:
    """A summary for each pair of baseline and source, in order of first appearance; empty comparisons are left out."""
    adjusted = adjusted_p_values(matrix)
    pairs = dict.fromkeys((comparison.baseline, comparison.source) for comparison in adjusted)
    return tuple(_summary(baseline, source, adjusted) for baseline, source in pairs)


def summary_sentences(matrix: TransferMatrix) -> tuple[str, ...]:
    """The findings in words; they claim a change only where `summarise` finds one."""
    summaries = summarise(matrix)
    if not summaries:
        return (_range_sentence(matrix), "No two sources were compared on the same images.")
    return tuple(sentence for summary in summaries for sentence in _sentences(summary))


def change(difference: Difference) -> Change:
    """What the interval of a paired difference says; nothing if it holds 0 or rests on fewer than `FEWEST` images."""
    if difference.n < FEWEST or math.isnan(difference.difference):
        return "too few images"
    if difference.low > 0:
        return "higher"
    return "lower" if difference.high < 0 else "no clear change"


def geometry_sentences(geometry: GeometryResult) -> tuple[str, ...]:
    """The findings in words, at the clean point and at the end of the attack, and how many intervals were looked at."""
    judged = [d for d in geometry.differences if d.measure not in DIAGNOSTICS and change(d) != "too few images"]
    if not judged:
        return (f"No losses of two models were compared on {FEWEST} images or more.",)
    pairs = dict.fromkeys((difference.baseline, difference.model) for difference in judged)
    points = _told(dict.fromkeys(difference.point for difference in judged))
    sentences = [
        _point_sentence(baseline, model, point, group)
        for baseline, model in pairs
        for point in points
        if (group := [d for d in judged if (d.baseline, d.model, d.point) == (baseline, model, point)])
    ]
    return (*sentences, _intervals_sentence(judged))


def number_text(value: float, digits: int = 4) -> str:
    """So many significant digits, a true minus, "n/a" for NaN."""
    return "n/a" if math.isnan(value) else f"{value:.{digits}g}".replace("-", "−")


def signed_text(value: float, digits: int = 4) -> str:
    """The same of a difference, with its sign."""
    return f"+{number_text(value, digits)}" if value > 0 else number_text(value, digits)


def _told(points: Mapping[str, None]) -> list[str]:
    """The clean point and the last step of the attack, or all points where there is neither."""
    last = last_step(points)
    return [point for point in points if point in ("clean", last)] or list(points)


def _point_sentence(baseline: str, model: str, point: str, group: list[Difference]) -> str:
    clauses = {word: list(_clauses(group, word)) for word in ("lower", "higher", "no clear change")}
    verbs = {"lower": "lowers", "higher": "raises", "no clear change": "no clear change in"}
    told = "; ".join(f"{verbs[word]} {', '.join(parts)}" for word, parts in clauses.items() if parts)
    where = {"clean": "at the clean image", "random": "at the random point"}.get(point, f"after {point} of the attack")
    return f"{model} against {baseline} {where}: {told}."


def _clauses(group: list[Difference], word: str) -> Iterator[str]:
    """What to say about each measure of `group` with this change; measures of pairs are counted over other models."""
    for measure in dict.fromkeys(difference.measure for difference in group):
        of_measure = [difference for difference in group if difference.measure == measure]
        found = [difference for difference in of_measure if change(difference) == word]
        if not found:
            continue
        if len(of_measure) > 1:
            yield f"{measure} with {len(found)} of {len(of_measure)} other models"
            continue
        (only,) = found
        name = measure if only.other is None else f"{measure} with {only.other}"
        difference, low, high = (signed_text(value, 3) for value in (only.difference, only.low, only.high))
        told = [] if word == "no clear change" else [f"{difference} [{low}, {high}]"]
        told += [_share_text(only)] if only.fell_low > 0.5 or only.fell_high < 0.5 else []
        yield f"{name} ({'; '.join(told)})" if told else name


def _share_text(difference: Difference) -> str:
    """On how many images the value fell or rose, which a few large values cannot decide."""
    fell = difference.fell > 0.5
    share, low, high = difference.fell, difference.fell_low, difference.fell_high
    if not fell:
        share, low, high = 1 - share, 1 - high, 1 - low
    return f"{'lower' if fell else 'higher'} on {100 * share:.0f} % of images [{100 * low:.0f}, {100 * high:.0f}]"


def _intervals_sentence(judged: list[Difference]) -> str:
    clear = sum(change(difference) != "no clear change" for difference in judged)
    looked = f"{count_text(len(judged), 'interval')} of paired differences {'was' if len(judged) == 1 else 'were'}"
    return (
        f"In brackets are 95 % intervals. {looked} looked at, each on its own and not corrected for their number: "
        f"{clear} {'leaves' if clear == 1 else 'leave'} out 0, where about {LEVEL * len(judged):.2g} would if no two "
        "models differed."
    )


def count_text(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def adjusted_p_values(matrix: TransferMatrix) -> dict[Comparison, float]:
    """Comparisons of at least one image, with their p-values after Holm's correction over all of them."""
    measured = [comparison for comparison in matrix.comparisons if comparison.n > 0]
    return dict(zip(measured, holm([comparison.p_value for comparison in measured]), strict=True))


def verdict_of(comparison: Comparison, p_value: float) -> Verdict:
    if p_value >= LEVEL:
        return "no clear change"
    return "raises" if comparison.difference > 0 else "lowers"


def _summary(baseline: str, source: str, adjusted: Mapping[Comparison, float]) -> Summary:
    group = [comparison for comparison in adjusted if (comparison.baseline, comparison.source) == (baseline, source)]
    verdicts = [verdict_of(comparison, adjusted[comparison]) for comparison in group]
    low, high = _mean(c.low for c in group), _mean(c.high for c in group)
    overall: Verdict = "raises" if low > 0 else "lowers" if high < 0 else "no clear change"
    return Summary(
        baseline,
        source,
        difference=_mean(c.difference for c in group),
        low=low,
        high=high,
        # The interval and the exact test of a single comparison can disagree; then nothing is claimed.
        verdict=overall if len(group) > 1 or verdicts[0] == overall else "no clear change",
        raised=verdicts.count("raises"),
        lowered=verdicts.count("lowers"),
        comparisons=len(group),
        attacks=len({c.attack for c in group}),
        targets=len({c.target for c in group}),
        family=len(adjusted),
    )


def _mean(values: Iterator[float]) -> float:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers)


def _sentences(summary: Summary) -> Iterator[str]:
    interval = f"{_points(summary.low)} to {_points(summary.high)}"
    against = f"{_points(summary.difference)} percentage points against {summary.baseline}"
    opening = {
        "raises": f"{summary.source} raises the error rate of the targets",
        "lowers": f"{summary.source} lowers the error rate of the targets",
        "no clear change": f"{summary.source} makes no clear change to the error rate of the targets",
    }[summary.verdict]
    if summary.comparisons == 1:
        yield f"{opening}: {against}, 95 % interval {interval}."
        return
    over = f"{count_text(summary.attacks, 'attack')} and {count_text(summary.targets, 'target')}"
    yield (
        f"{opening}: {against} on average, 95 % interval {interval}, over {summary.comparisons} comparisons ({over})."
    )
    unclear = summary.comparisons - summary.raised - summary.lowered
    yield (
        f"One by one, {summary.raised} of the {summary.comparisons} show a higher error rate, {summary.lowered} a "
        f"lower one and {unclear} no clear change (exact McNemar test, Holm's correction over "
        f"{count_text(summary.family, 'comparison')}, {100 * LEVEL:g} % level)."
    )


def _range_sentence(matrix: TransferMatrix) -> str:
    rates = span_text(cell.rate for cell in matrix.cells)
    return f"The error rate of the targets is {rates} over {count_text(len(matrix.cells), 'combination')}."


def _points(fraction: float) -> str:
    """Percentage points with a sign, a true minus among them."""
    text = f"{100 * fraction:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")
