"""The tables of the report: every number of a transfer matrix and of a geometry, as text and as what it sorts by."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal, TypeVar

from alignfast.evaluation.findings import (
    adjusted_p_values,
    change,
    number_text,
    signed_text,
    verdict_of,
)
from alignfast.evaluation.matrix_result import TransferMatrix, difference_text, p_text, percent_text, rate_text
from alignfast.geometry.measures import MEASURES, PAIR_MEASURES
from alignfast.geometry.result import Difference, Estimate, GeometryResult

# Names may be broken, numbers stand at the right, words and plain text at the left.
Kind = Literal["name", "number", "word", "plain"]

RecordT = TypeVar("RecordT", Difference, Estimate)
_KEYS: tuple[Callable[[Any], Any], ...] = (attrgetter("measure"), attrgetter("other"), attrgetter("point"))


@dataclass(frozen=True)
class Entry:
    """Text, and the number that it is sorted by: empty for a missing number, None for text."""

    text: str
    key: str | None = None


@dataclass(frozen=True)
class Table:
    """A heading for each column with its kind, and rows of as many entries."""

    label: str
    header: Sequence[tuple[str, Kind]]
    rows: Sequence[Sequence[Entry]]


def cells_table(matrix: TransferMatrix) -> Table:
    """A row each cell; sources, which are what a reader compares, stand under one another."""
    combinations = ((s, a, t) for a in matrix.attacks for t in matrix.targets for s in matrix.sources)
    cells = [cell for combination in combinations if (cell := matrix.find(*combination)) is not None]
    header = [*_names("attack", "target", "source"), *_numbers("error rate", "95\N{NO-BREAK SPACE}% interval", "n")]
    rows = [
        [
            Entry(cell.attack),
            Entry(cell.target),
            Entry(cell.source),
            number(cell.rate, percent_text(cell.rate)),
            number(
                cell.low if cell.n else math.nan,
                f"[{100 * cell.low:.1f}, {100 * cell.high:.1f}]" if cell.n else "n/a",
            ),
            number(cell.n, str(cell.n)),
            number(cell.clean_accuracy, percent_text(cell.clean_accuracy)),
            number(cell.white_box, percent_text(cell.white_box)),
        ]
        for cell in cells
    ]
    return Table("All combinations", [*header, *_numbers("clean accuracy", "white-box error")], rows)


def comparisons_table(matrix: TransferMatrix) -> Table:
    """A row each comparison, with its p-value before and after Holm's correction and what follows from it."""
    adjusted = adjusted_p_values(matrix)
    words = {"raises": "higher", "lowers": "lower", "no clear change": "no clear change"}
    header: list[tuple[str, Kind]] = [
        *_names("attack", "target", "compared"),
        *_numbers("difference (points), 95\N{NO-BREAK SPACE}% interval", "n", "only source fools"),
        *_numbers("only baseline fools", "p", "p (Holm)"),
        ("error rate is", "word"),
    ]
    rows = []
    for comparison in matrix.comparisons:
        corrected = adjusted.get(comparison)
        p_values = (math.nan, math.nan) if corrected is None else (comparison.p_value, corrected)
        text = difference_text(comparison.difference, comparison.low, comparison.high).replace("-", "−")
        rows.append(
            [
                Entry(comparison.attack),
                Entry(comparison.target),
                Entry(f"{comparison.source} vs {comparison.baseline}"),
                number(comparison.difference, text),
                *(
                    number(count, str(count))
                    for count in (comparison.n, comparison.only_source, comparison.only_baseline)
                ),
                *(number(value, p_text(value, "").strip().removeprefix("= ")) for value in p_values),
                Entry("no images" if corrected is None else words[verdict_of(comparison, corrected)]),
            ]
        )
    return Table("Comparisons", header, rows)


def geometry_tables(geometry: GeometryResult) -> Iterator[Table]:
    """Differences and estimates, of one model and of two, as far as there are any."""
    kinds = (("of one model", MEASURES), ("of a model and another", PAIR_MEASURES))
    for what, measures in kinds:
        found = [entry for measure in measures for entry in geometry.differences if entry.measure == measure]
        if found:
            yield _differences_table(f"Paired differences {what}", found)
    for what, measures in kinds:
        estimates = [entry for measure in measures for entry in geometry.estimates if entry.measure == measure]
        if estimates:
            yield _estimates_table(f"Estimates {what}", estimates)


def number(value: float, text: str) -> Entry:
    """A number and how it is shown."""
    return Entry(text, "" if math.isnan(value) else repr(float(value)))


def _differences_table(label: str, entries: Sequence[Difference]) -> Table:
    paired = any(entry.other is not None for entry in entries)
    header: list[tuple[str, Kind]] = [
        *_names("measure", "point", "compared", *(["other model"] if paired else [])),
        *_numbers("difference", "95\N{NO-BREAK SPACE}% interval", "lower on, of images", "n"),
        ("is", "word"),
    ]
    rows = [
        [
            Entry(entry.measure),
            Entry(entry.point),
            Entry(f"{entry.model} vs {entry.baseline}"),
            *([Entry(entry.other or "")] if paired else []),
            number(entry.difference, signed_text(entry.difference)),
            number(entry.low, _interval_text(signed_text(entry.low), signed_text(entry.high))),
            number(entry.fell, rate_text(entry.fell, entry.fell_low, entry.fell_high)),
            number(entry.n, str(entry.n)),
            Entry(change(entry)),
        ]
        for entry in _in_order(entries)
    ]
    return Table(label, header, rows)


def _estimates_table(label: str, entries: Sequence[Estimate]) -> Table:
    paired = any(entry.other is not None for entry in entries)
    header = [
        *_names("measure", "point", "model", *(["other model"] if paired else [])),
        *_numbers("mean", "95\N{NO-BREAK SPACE}% interval", "median", "n"),
    ]
    rows = [
        [
            Entry(entry.measure),
            Entry(entry.point),
            Entry(entry.model),
            *([Entry(entry.other or "")] if paired else []),
            number(entry.mean, number_text(entry.mean)),
            number(entry.low, _interval_text(number_text(entry.low), number_text(entry.high))),
            number(entry.median, number_text(entry.median)),
            number(entry.n, str(entry.n)),
        ]
        for entry in _in_order(entries)
    ]
    return Table(label, header, rows)


def _in_order(entries: Sequence[RecordT]) -> list[RecordT]:
    """By measure, other model and point, so that models stand under one another."""
    places = [{name: place for place, name in enumerate(dict.fromkeys(map(key, entries)))} for key in _KEYS]
    return sorted(entries, key=lambda entry: [place[key(entry)] for place, key in zip(places, _KEYS, strict=True)])


def _interval_text(low: str, high: str) -> str:
    return "n/a" if low == "n/a" else f"[{low}, {high}]"


def _names(*titles: str) -> list[tuple[str, Kind]]:
    return [(title, "name") for title in titles]


def _numbers(*titles: str) -> list[tuple[str, Kind]]:
    return [(title, "number") for title in titles]
