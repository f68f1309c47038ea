"""Pictures of a transfer matrix: a heat map of all cells, and bars against the baseline; figures as files."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from alignfast.checks import check_choice
from alignfast.evaluation.drawing import (
    LETTER,
    LINE,
    PAGE_WIDTH,
    Styles,
    add_legend,
    legend_height,
    literal,
    longest,
    new_figure,
    styles_of,
    wrapped,
)
from alignfast.evaluation.matrix_result import Cell, TransferMatrix
from alignfast.files import replacing

FORMATS = (".png", ".svg", ".pdf")

_SLANT = 40
# Agg draws at most 2**16 pixels a side.
_MOST_PIXELS = 60_000


def heat_map(matrix: TransferMatrix, attacks: Sequence[str] | None = None) -> Figure:
    """Error rate of every cell, with its 95 % interval: a row each attack and source, a column each target.

    Colours span 0 to 100 % whatever the data, so that two figures can be compared. Combinations that were not measured
    stay white with a dash; cells of no images say "n/a".

    Args:
        matrix: the measurements.
        attacks: the attacks to show; all if None.

    Raises:
        ValueError: a matrix without cells, or an unknown attack.
    """
    attacks = _chosen(matrix, attacks)
    measured = {(cell.attack, cell.source) for cell in matrix.cells}
    rows = [(attack, source) for attack in attacks for source in matrix.sources if (attack, source) in measured]
    labels = [wrapped(f"{attack} · {source}", 34) for attack, source in rows]
    cells = [[matrix.find(source, attack, target) for target in matrix.targets] for attack, source in rows]
    row_height = max(0.46, 0.06 + LINE * max(len(label.splitlines()) for label in labels))
    width = 1.2 + LETTER * longest(labels) + 0.95 * len(matrix.targets)
    figure = new_figure(max(4.5, width), 0.9 + row_height * len(rows) + _label_height(matrix.targets))
    axes = figure.add_subplot()
    colours = colormaps["cividis"].with_extremes(bad="white")
    image = axes.imshow(_percentages(cells), cmap=colours, vmin=0.0, vmax=100.0, aspect="auto")
    for row, entries in enumerate(cells):
        for column, cell in enumerate(entries):
            _annotate(axes, row, column, cell, colours)
    _label_targets(axes, matrix.targets)
    axes.set_xlabel("target", fontsize=9)
    _label_rows(axes, rows, labels)
    figure.suptitle("Error rate of the target (%), with 95 % interval", fontsize=10)
    _colour_bar(figure, axes, image)
    return figure


def bars(matrix: TransferMatrix, attacks: Sequence[str] | None = None, styles: Styles | None = None) -> Figure:
    """Error rate by target, a panel each attack and a bar each source, with 95 % intervals; baselines come first.

    Args:
        matrix: the measurements.
        attacks: the attacks to show; all if None.
        styles: of at least the sources, which are drawn in this order; those of `styles_of` if None.

    Raises:
        ValueError: a matrix without cells, or an unknown attack.
    """
    attacks = _chosen(matrix, attacks)
    styles = styles or styles_of(matrix.sources, matrix.baselines)
    sources = [name for name in styles if name in matrix.sources]
    width = _panel_width(matrix)
    columns = min(len(attacks), panel_columns(matrix))
    lines = math.ceil(len(attacks) / columns)
    titles = [wrapped(attack, 40) for attack in attacks]
    height = 1.9 + _label_height(matrix.targets) + LINE * max(len(title.splitlines()) for title in titles)
    figure = new_figure(width * columns, legend_height(sources) + height * lines)
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
    for panel, attack in zip(panels, attacks, strict=False):
        _panel(panel, matrix, attack, sources, styles)
    for unused in panels[len(attacks) :]:
        unused.remove()
    for panel in panels[::columns]:
        panel.set_ylabel("error rate (%)", fontsize=9)
    add_legend(figure, {source: Patch(**styles[source].bar) for source in sources}, "source, with 95 % interval")
    return figure


def panel_columns(matrix: TransferMatrix) -> int:
    """How many panels `bars` puts side by side where there are enough attacks."""
    return max(1, int(PAGE_WIDTH // _panel_width(matrix)))


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write `figure` whole or not at all; the same figure gives the same bytes.

    Raises:
        ValueError: a suffix other than .png, .svg and .pdf.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"path: got {path.name!r}; allowed is a name that ends in {', '.join(FORMATS)}")
    with replacing(path) as temporary:
        write_figure(figure, temporary, suffix.removeprefix("."))


def write_figure(figure: Figure, target: Any, format: str) -> None:
    """Write `figure` to a path or a binary file as "png", "svg" or "pdf", without dates or random names."""
    undated: dict[str, dict[str, Any]] = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
    dpi = min(150.0, _MOST_PIXELS / max(figure.get_size_inches()))
    with rc_context({"svg.hashsalt": "alignfast"}):
        figure.savefig(target, format=format, dpi=dpi, metadata=undated[format], bbox_inches="tight", facecolor="white")


def _chosen(matrix: TransferMatrix, attacks: Sequence[str] | None) -> Sequence[str]:
    if not matrix.cells:
        raise ValueError("matrix: got no cells; allowed is a matrix with at least one")
    chosen = matrix.attacks if attacks is None else attacks
    if not chosen:
        raise ValueError("attacks: got none; allowed is at least one, or None for all")
    for attack in chosen:
        check_choice("attacks", attack, matrix.attacks)
    return chosen


def _panel_width(matrix: TransferMatrix) -> float:
    return max(3.4, 1.3 + len(matrix.targets) * max(0.55, 0.26 * len(matrix.sources) + 0.2))


def _slanted(labels: Sequence[str]) -> bool:
    return longest(labels) > 11


def _label_height(targets: Sequence[str]) -> float:
    """Inches under the axes that the names of the targets take."""
    labels = [wrapped(target) for target in targets]
    lines = LINE * max(len(label.splitlines()) for label in labels)
    slant = math.radians(_SLANT)
    return lines * math.cos(slant) + LETTER * longest(labels) * math.sin(slant) if _slanted(labels) else lines


def _percentages(cells: Sequence[Sequence[Cell | None]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([[math.nan if cell is None else 100.0 * cell.rate for cell in row] for row in cells])


def _annotate(axes: Axes, row: int, column: int, cell: Cell | None, colours: Colormap) -> None:
    if cell is None or math.isnan(cell.rate):
        text = "–" if cell is None else "n/a"
        axes.text(column, row, text, ha="center", va="center", fontsize=9, color="#555555")
        return
    ink = _ink(colours(cell.rate))
    axes.text(column, row - 0.14, f"{100 * cell.rate:.1f}", ha="center", va="center", fontsize=10, color=ink)
    interval = f"{100 * cell.low:.1f}–{100 * cell.high:.1f}"
    axes.text(column, row + 0.24, interval, ha="center", va="center", fontsize=7, color=ink)


def _ink(colour: Sequence[float]) -> str:
    """Black or white, whichever has the greater contrast on `colour` by WCAG 2.2's relative luminance."""
    channels = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    luminance = 0.2126 * channels[0] + 0.7152 * channels[1] + 0.0722 * channels[2]
    return "black" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "white"


def _label_targets(axes: Axes, targets: Sequence[str]) -> None:
    labels = [wrapped(target) for target in targets]
    slanted = _slanted(labels)
    axes.set_xticks(range(len(targets)))
    ticks = axes.set_xticklabels(
        labels,
        fontsize=9,
        rotation=_SLANT if slanted else 0,
        ha="right" if slanted else "center",
        rotation_mode="anchor",
    )
    literal(ticks)
    axes.tick_params(length=0)


def _label_rows(axes: Axes, rows: Sequence[tuple[str, str]], labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(rows)))
    literal(axes.set_yticklabels(labels, fontsize=9))
    axes.set_ylabel("attack · source", fontsize=9)
    for index in range(1, len(rows)):
        if rows[index][0] != rows[index - 1][0]:
            axes.axhline(index - 0.5, color="white", linewidth=3)
    axes.spines[:].set_visible(False)


def _colour_bar(figure: Figure, axes: Axes, image: Any) -> None:
    height = figure.get_size_inches()[1]
    # On a tall map a bar along its whole side would say no more than a short one.
    bar = figure.colorbar(image, ax=axes, shrink=min(1.0, 4.0 / height), anchor=(0.0, 1.0), pad=0.02)
    bar.set_ticks([0, 25, 50, 75, 100])
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)


def _panel(axes: Axes, matrix: TransferMatrix, attack: str, sources: Sequence[str], styles: Styles) -> None:
    width = 0.8 / len(sources)
    for index, source in enumerate(sources):
        shift = (index - (len(sources) - 1) / 2) * width
        for column, target in enumerate(matrix.targets):
            cell = matrix.find(source, attack, target)
            if cell is not None:
                _bar(axes, column + shift, width, cell, styles[source].bar)
    _label_targets(axes, matrix.targets)
    # A single group would otherwise fill the panel with one block.
    margin = 1.0 if len(matrix.targets) == 1 else 0.6
    axes.set_xlim(-margin, len(matrix.targets) - 1 + margin)
    axes.set_ylim(0.0, 105.0)
    axes.set_yticks(range(0, 101, 25))
    axes.tick_params(axis="y", labelsize=8, length=0, labelleft=True)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(wrapped(attack, 40), fontsize=10).set_parse_math(False)


def _bar(axes: Axes, position: float, width: float, cell: Cell, style: dict[str, Any]) -> None:
    if math.isnan(cell.rate):
        axes.text(position, 1.5, "n/a", ha="center", va="bottom", fontsize=7, rotation=90, color="#555555")
        return
    rate = 100.0 * cell.rate
    reach = [[max(0.0, rate - 100.0 * cell.low)], [max(0.0, 100.0 * cell.high - rate)]]
    axes.bar(position, rate, width, **style)
    axes.errorbar(position, rate, yerr=reach, fmt="none", ecolor="black", elinewidth=0.9, capsize=1.8)
