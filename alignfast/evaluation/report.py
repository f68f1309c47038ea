"""One self-contained HTML page about a transfer matrix."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from io import BytesIO
from typing import Any, Literal

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from alignfast.evaluation.matrix_result import (
    Cell,
    Comparison,
    TransferMatrix,
    difference_text,
    p_text,
    percent_text,
    span_text,
)
from alignfast.evaluation.plots import bars, heat_map, panel_columns, write_figure
from alignfast.evaluation.statistics import holm
from alignfast.files import write_text

LEVEL = 0.05

Verdict = Literal["raises", "lowers", "no clear change"]

_PNG_START = b"\x89PNG\r\n\x1a\n"
# Pictures of small data sets would be specks at their own size.
_SMALL_PICTURE = 160
# What fits on a printed page and can still be read.
_MAP_ROWS, _BAR_LINES = 24, 4


@dataclass(frozen=True)
class Picture:
    """An image for a section.

    Attributes:
        png: the bytes of a PNG file.
        caption: plain text under it, which is also its alternative text.

    Raises:
        ValueError: the bytes are not a PNG file.
    """

    png: bytes
    caption: str = ""

    def __post_init__(self) -> None:
        if not self.png.startswith(_PNG_START) or len(self.png) < 24:
            raise ValueError(f"png: got {len(self.png)} bytes of another kind; allowed are the bytes of a PNG file")

    @property
    def small(self) -> bool:
        """Whether the picture is narrower than readers can make out."""
        (width,) = struct.unpack(">I", self.png[16:20])
        return bool(width < _SMALL_PICTURE)

    @property
    def uri(self) -> str:
        """The picture as a data URI."""
        return _data_uri(self.png, "image/png")


@dataclass(frozen=True)
class Section:
    """A part of the report that the caller adds; every part of it is plain text and is escaped.

    Attributes:
        title: its heading.
        text: paragraphs, separated by blank lines.
        facts: names and values, shown as a table of two columns; nested mappings get dotted names.
        header, rows: a table; `header` may be empty.
        pictures: shown side by side where they fit.

    Raises:
        ValueError: a row whose length is not that of the header.
    """

    title: str
    text: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    header: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = ()
    pictures: Sequence[Picture] = ()

    def __post_init__(self) -> None:
        for index, row in enumerate(self.rows):
            if self.header and len(row) != len(self.header):
                raise ValueError(f"rows[{index}]: got {len(row)} values; allowed are {len(self.header)}, as in header")


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
    adjusted = _adjusted(matrix)
    pairs = dict.fromkeys((comparison.baseline, comparison.source) for comparison in adjusted)
    return tuple(_summary(baseline, source, adjusted) for baseline, source in pairs)


def summary_sentences(matrix: TransferMatrix) -> tuple[str, ...]:
    """The findings in words; they claim a change only where `summarise` finds one."""
    summaries = summarise(matrix)
    if not summaries:
        return (_range_sentence(matrix), "No two sources were compared on the same images.")
    return tuple(sentence for summary in summaries for sentence in _sentences(summary))


def write_report(
    matrix: TransferMatrix,
    path: str | os.PathLike[str],
    *,
    title: str = "Transfer of adversarial examples",
    extra: Sequence[Section] = (),
) -> None:
    """Write one HTML page with the findings, figures, all numbers, settings and versions.

    The page refers to nothing outside itself. An existing file is replaced whole or not at all.

    Args:
        matrix: the measurements; at least one cell.
        path: the file to write.
        title: heading of the page.
        extra: sections to put between the measurements and the settings.

    Raises:
        ValueError: a matrix without cells.
    """
    write_text(path, render_report(matrix, title=title, extra=extra))


def render_report(matrix: TransferMatrix, *, title: str, extra: Sequence[Section] = ()) -> str:
    """The page that `write_report` writes.

    Raises:
        ValueError: a matrix without cells.
    """
    if not matrix.cells:
        raise ValueError("matrix: got no cells; allowed is a matrix with at least one")
    source = files("alignfast.evaluation").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["breakable"] = _breakable
    page = environment.from_string(source).render(
        title=title,
        sentences=[sentence.replace(" %", "\N{NO-BREAK SPACE}%") for sentence in summary_sentences(matrix)],
        heat_maps=[_svg_uri(heat_map(matrix, part)) for part in _parts(matrix, _MAP_ROWS // len(matrix.sources))],
        bar_charts=[_svg_uri(bars(matrix, part)) for part in _parts(matrix, _BAR_LINES * panel_columns(matrix))],
        shape=_shape_text(matrix),
        cells=[_cell_row(cell) for cell in _by_attack(matrix)],
        comparisons=list(_comparison_rows(matrix)),
        protocol=_protocol(matrix.config),
        level=f"{100 * LEVEL:g} %",
        settings=list(_facts(matrix.config)),
        versions=list(_facts(matrix.versions)),
        sections=[_section(section) for section in extra],
    )
    return page if page.endswith("\n") else page + "\n"


def _parts(matrix: TransferMatrix, size: int) -> list[tuple[str, ...]]:
    """The attacks in groups of at most `size`, of about equal length."""
    attacks = matrix.attacks
    groups = math.ceil(len(attacks) / max(1, size))
    size = math.ceil(len(attacks) / groups)
    return [attacks[start : start + size] for start in range(0, len(attacks), size)]


def _breakable(name: str) -> Markup:
    """`name`, escaped, with places where a line may end: model names are long and hold no spaces."""
    pieces = re.split(r"(?<=[_.:/-])", name)
    return Markup("<wbr>").join(piece for piece in pieces if piece)


def _adjusted(matrix: TransferMatrix) -> dict[Comparison, float]:
    """Comparisons of at least one image, with their p-values after Holm's correction over all of them."""
    measured = [comparison for comparison in matrix.comparisons if comparison.n > 0]
    return dict(zip(measured, holm([comparison.p_value for comparison in measured]), strict=True))


def _verdict(comparison: Comparison, p_value: float) -> Verdict:
    if p_value >= LEVEL:
        return "no clear change"
    return "raises" if comparison.difference > 0 else "lowers"


def _summary(baseline: str, source: str, adjusted: Mapping[Comparison, float]) -> Summary:
    group = [comparison for comparison in adjusted if (comparison.baseline, comparison.source) == (baseline, source)]
    verdicts = [_verdict(comparison, adjusted[comparison]) for comparison in group]
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
    over = f"{_count(summary.attacks, 'attack')} and {_count(summary.targets, 'target')}"
    yield (
        f"{opening}: {against} on average, 95 % interval {interval}, over {summary.comparisons} comparisons ({over})."
    )
    unclear = summary.comparisons - summary.raised - summary.lowered
    yield (
        f"One by one, {summary.raised} of the {summary.comparisons} show a higher error rate, {summary.lowered} a "
        f"lower one and {unclear} no clear change (exact McNemar test, Holm's correction over "
        f"{_count(summary.family, 'comparison')}, {100 * LEVEL:g} % level)."
    )


def _range_sentence(matrix: TransferMatrix) -> str:
    rates = span_text(cell.rate for cell in matrix.cells)
    return f"The error rate of the targets is {rates} over {_count(len(matrix.cells), 'combination')}."


def _shape_text(matrix: TransferMatrix) -> str:
    counts = sorted({cell.n for cell in matrix.cells})
    images = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return (
        f"{_count(len(matrix.sources), 'source')}, {_count(len(matrix.attacks), 'attack')}, "
        f"{_count(len(matrix.targets), 'target')}; {images} images a combination."
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _points(fraction: float) -> str:
    """Percentage points with a sign, a true minus among them."""
    text = f"{100 * fraction:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def _by_attack(matrix: TransferMatrix) -> list[Cell]:
    """The cells so that the sources, which are what a reader compares, stand under one another."""
    combinations = ((s, a, t) for a in matrix.attacks for t in matrix.targets for s in matrix.sources)
    return [cell for combination in combinations if (cell := matrix.find(*combination)) is not None]


def _cell_row(cell: Cell) -> dict[str, Any]:
    missing = math.isnan(cell.rate)
    return {
        "attack": cell.attack,
        "target": cell.target,
        "source": cell.source,
        "rate": percent_text(cell.rate),
        "interval": "n/a" if missing else f"[{100 * cell.low:.1f}, {100 * cell.high:.1f}]",
        "n": cell.n,
        "clean_accuracy": percent_text(cell.clean_accuracy),
        "white_box": percent_text(cell.white_box),
    }


def _comparison_rows(matrix: TransferMatrix) -> Iterator[dict[str, Any]]:
    adjusted = _adjusted(matrix)
    words = {"raises": "higher", "lowers": "lower", "no clear change": "no clear change"}
    for comparison in matrix.comparisons:
        p_value = adjusted.get(comparison)
        difference = difference_text(comparison.difference, comparison.low, comparison.high)
        yield {
            "attack": comparison.attack,
            "target": comparison.target,
            "source": comparison.source,
            "baseline": comparison.baseline,
            "n": comparison.n,
            "difference": difference.replace("-", "−"),
            "only_baseline": comparison.only_baseline,
            "only_source": comparison.only_source,
            "p_value": "n/a" if p_value is None else _bare_p(comparison.p_value),
            "adjusted": "n/a" if p_value is None else _bare_p(p_value),
            "verdict": "no images" if p_value is None else words[_verdict(comparison, p_value)],
        }


def _bare_p(p_value: float) -> str:
    return p_text(p_value, "").strip().removeprefix("= ")


def _protocol(config: Mapping[str, Any]) -> str:
    """Which images were counted, as far as the settings say."""
    protocol = config.get("protocol")
    if protocol in ("all", "qualified"):
        return str(protocol)
    qualified = config.get("qualified")
    return ("qualified" if qualified else "all") if isinstance(qualified, bool) else ""


def _facts(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _facts(value, f"{name}.")
        else:
            yield name, _value_text(value)


def _value_text(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float) and not isinstance(value, bool):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)) and all(isinstance(entry, (str, int, float)) for entry in value):
        return ", ".join(_value_text(entry) for entry in value)
    return json.dumps(value, default=str, ensure_ascii=False)


def _section(section: Section) -> dict[str, Any]:
    return {
        "title": section.title,
        "paragraphs": [part for part in re.split(r"\n\s*\n", section.text.strip()) if part],
        "facts": list(_facts(section.facts)),
        "header": list(section.header),
        "rows": [[_value_text(value) for value in row] for row in section.rows],
        "pictures": section.pictures,
    }


def _svg_uri(figure: Figure) -> str:
    buffer = BytesIO()
    write_figure(figure, buffer, "svg")
    return _data_uri(buffer.getvalue(), "image/svg+xml")


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
