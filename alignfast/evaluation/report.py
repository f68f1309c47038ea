"""One self-contained HTML page about a transfer matrix, the geometry of losses, or both."""

from __future__ import annotations

import base64
import json
import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from io import BytesIO
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from alignfast.evaluation.drawing import Styles, in_groups, styles_of
from alignfast.evaluation.findings import (
    FEWEST,
    LEVEL,
    count_text,
    geometry_sentences,
    summary_sentences,
)
from alignfast.evaluation.matrix_result import TransferMatrix
from alignfast.evaluation.plots import bars, heat_map, panel_columns, write_figure
from alignfast.evaluation.tables import Entry, Table, cells_table, comparisons_table, geometry_tables, number
from alignfast.files import write_text
from alignfast.geometry.measures import MEASURES, PAIR_MEASURES
from alignfast.geometry.pictures import baselines_of, draw, models_of, others_of, points_of
from alignfast.geometry.result import GeometryResult

TITLE = "Transfer of adversarial examples"

# How each measure is read.
READING: dict[str, str] = {
    "loss": "Larger: the model is less sure of the true label. It is 0 where the label has all the probability and has "
    "no upper bound.",
    "gradient_l1": "The rise of the loss for one unit of L-inf change, to first order. Larger: small changes of pixels "
    "move the loss faster.",
    "gradient_l2": "The rise of the loss for one unit of L2 change, to first order. Larger: a steeper loss.",
    "curvature": "Larger: the loss bends upward more sharply along its most curved direction, so a gradient holds over "
    "a shorter distance. Near 0: straight there. Negative: no direction bends upward.",
    "curvature_residual": "How well the curvature was computed, and no property of the loss. Small is good; images "
    "with a large value have a curvature that is not to be trusted.",
    "lipschitz": "Larger: the gradient turns or grows faster with distance. It is measured at finitely many points, so "
    "it bounds the true constant from below.",
    "rise_worst": "Larger: some point within the radius has a much higher loss. The ascent need not find the highest, "
    "so it is a lower bound. Smaller means a flatter surrounding.",
    "rise_mean": "Larger: the loss rises on average around the point, also without an attack. Near 0: flat, or as much "
    "down as up.",
    "nonlinearity": "0: the loss is a straight line along the gradient’s sign. 1: it misses the straight line by as "
    "much as the line predicts. Larger: one step says less about the next.",
    "gradient_cosine": "1: both gradients point the same way. 0: they are orthogonal, as random directions in many "
    "dimensions nearly are. Larger: steps on one model raise the loss of the other as well.",
    "kl": "0: equal predictions. Larger: the model’s prediction is farther from the other’s.",
    "agreement": "A mean of 0.8 says that both predict the same class for 80 % of the images.",
    "fooled": "The mean is the error rate of the other model. At the clean image it is its ordinary error; after the "
    "attack, larger means more transfer.",
}

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


def write_report(
    matrix: TransferMatrix | None,
    path: str | os.PathLike[str],
    *,
    geometry: GeometryResult | None = None,
    title: str = TITLE,
    extra: Sequence[Section] = (),
    beside: Sequence[str] = (),
) -> None:
    """Write one HTML page with the findings, figures, all numbers, settings and versions.

    The page refers to nothing outside itself. An existing file is replaced whole or not at all.

    Args:
        matrix: measured transfer; at least one cell. None leaves it out.
        path: the file to write.
        geometry: the measured geometry of losses; at least one estimate. None leaves it out.
        title: heading of the page.
        extra: sections to put between the measurements and the settings.
        beside: names of files with the same numbers, for the page to tell.

    Raises:
        ValueError: neither of the two, a matrix without cells, or a geometry without estimates.
    """
    write_text(path, render_report(matrix, geometry, title=title, extra=extra, beside=beside))


def render_report(
    matrix: TransferMatrix | None,
    geometry: GeometryResult | None = None,
    *,
    title: str = TITLE,
    extra: Sequence[Section] = (),
    beside: Sequence[str] = (),
) -> str:
    """The page that `write_report` writes.

    Raises:
        ValueError: neither of the two, a matrix without cells, or a geometry without estimates.
    """
    check_content(matrix, geometry)
    source = files("alignfast.evaluation").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["breakable"] = _breakable
    environment.filters["tight"] = lambda text: text.replace(" %", "\N{NO-BREAK SPACE}%")
    styles = report_styles(matrix, geometry)
    page = environment.from_string(source).render(
        title=title,
        transfer=None if matrix is None else _transfer_part(matrix, styles),
        geometry=None if geometry is None else _geometry_part(geometry, styles),
        level=f"{100 * LEVEL:g} %",
        fewest=FEWEST,
        beside=beside,
        settings=_by_part("Settings", matrix, geometry, "config"),
        versions=_by_part("Versions", matrix, geometry, "versions"),
        sections=[_section(section) for section in extra],
    )
    return page if page.endswith("\n") else page + "\n"


def check_content(matrix: TransferMatrix | None, geometry: GeometryResult | None) -> None:
    """There is something to report; else ValueError."""
    if matrix is None and geometry is None:
        raise ValueError("matrix, geometry: got neither; allowed is one of them or both")
    if matrix is not None and not matrix.cells:
        raise ValueError("matrix: got no cells; allowed is a matrix with at least one")
    if geometry is not None and not geometry.estimates:
        raise ValueError("geometry: got no estimates; allowed is a result with at least one")


def report_styles(matrix: TransferMatrix | None, geometry: GeometryResult | None) -> Styles:
    """One look for each source and each model of the geometry, in all pictures of a report."""
    names = [*(matrix.sources if matrix else ()), *(models_of(geometry) if geometry else ())]
    return styles_of(names, [*(matrix.baselines if matrix else ()), *(baselines_of(geometry) if geometry else ())])


def _transfer_part(matrix: TransferMatrix, styles: Styles) -> dict[str, Any]:
    return {
        "sentences": summary_sentences(matrix),
        "shape": _shape_text(matrix),
        "heat_maps": [
            _svg_uri(heat_map(matrix, part))
            for part in in_groups(matrix.attacks, max(1, _MAP_ROWS // len(matrix.sources)))
        ],
        "bar_charts": [
            _svg_uri(bars(matrix, part, styles))
            for part in in_groups(matrix.attacks, _BAR_LINES * panel_columns(matrix))
        ],
        "cells": cells_table(matrix),
        "comparisons": comparisons_table(matrix) if matrix.comparisons else None,
        "protocol": _protocol(matrix.config),
    }


def _geometry_part(geometry: GeometryResult, styles: Styles) -> dict[str, Any]:
    measured = {entry.measure for entry in geometry.estimates}
    return {
        "sentences": geometry_sentences(geometry),
        "shape": _geometry_shape(geometry),
        "drawings": [(_svg_uri(drawing.figure), drawing.caption) for drawing in draw(geometry, styles)],
        "tables": list(geometry_tables(geometry)),
        "measures": [
            (name, text, READING[name]) for name, text in {**MEASURES, **PAIR_MEASURES}.items() if name in measured
        ],
    }


def _by_part(
    heading: str, matrix: TransferMatrix | None, geometry: GeometryResult | None, name: str
) -> list[tuple[str, list[tuple[str, str]]]]:
    """Headings and facts of one attribute of both, which share a table where they are equal."""
    parts = {"transfer": matrix, "geometry": geometry}
    facts = {part: list(_facts(getattr(value, name))) for part, value in parts.items() if value is not None}
    facts = {part: rows for part, rows in facts.items() if rows}
    if len({tuple(rows) for rows in facts.values()}) == 1:
        return [(heading, next(iter(facts.values())))]
    return [(f"{heading} of the {part}", rows) for part, rows in facts.items()]


def _breakable(name: str) -> Markup:
    """`name`, escaped, with places where a line may end: model names are long and hold no spaces."""
    pieces = re.split(r"(?<=[_.:/-])", name)
    return Markup("<wbr>").join(piece for piece in pieces if piece)


def _shape_text(matrix: TransferMatrix) -> str:
    counts = sorted({cell.n for cell in matrix.cells})
    images = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return (
        f"{count_text(len(matrix.sources), 'source')}, {count_text(len(matrix.attacks), 'attack')}, "
        f"{count_text(len(matrix.targets), 'target')}; {images} images a combination."
    )


def _geometry_shape(geometry: GeometryResult) -> str:
    points = points_of(geometry)
    others = f", {count_text(len(others_of(geometry)), 'other model')}" if others_of(geometry) else ""
    return (
        f"{count_text(len(models_of(geometry)), 'model')}{others}, {count_text(len(points), 'point')} of each image "
        f"({', '.join(points)}); {count_text(len(geometry.indices), 'image')}."
    )


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
        "table": _section_table(section) if section.rows else None,
        "pictures": section.pictures,
    }


def _section_table(section: Section) -> Table:
    rows = [[_entry(value) for value in row] for row in section.rows]
    return Table(section.title, [(name, "plain") for name in section.header], rows)


def _entry(value: object) -> Entry:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return number(value, _value_text(value))
    return Entry(_value_text(value))


def _svg_uri(figure: Figure) -> str:
    buffer = BytesIO()
    write_figure(figure, buffer, "svg")
    return _data_uri(buffer.getvalue(), "image/svg+xml")


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
