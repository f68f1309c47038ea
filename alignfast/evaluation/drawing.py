"""What all pictures share: one look for each model, and names that are shown as they are.

Figures are built through matplotlib's objects, never through pyplot, so that drawing changes no global state and needs
no display.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

ItemT = TypeVar("ItemT")

# Grey for the baseline, then Okabe and Ito's colours, which stay apart for the colour-blind; hatches, markers and
# dashes tell them apart in black and white, and go on where the colours repeat.
_BASELINE_COLOUR = "#8c8c8c"
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")
_HATCHES = ("", "//", "\\\\", "xx", "..", "++", "oo", "--")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (5, 5)))

# Inches that a letter and a line of 9 point text take, rounded up, and the width of a printed page.
LETTER, LINE, PAGE_WIDTH = 0.078, 0.165, 9.0
LABEL_WIDTH = 22


@dataclass(frozen=True)
class Style:
    """How one model looks in every picture."""

    colour: str
    hatch: str
    marker: str
    dash: Any

    @property
    def bar(self) -> dict[str, Any]:
        """For patches."""
        return {"facecolor": self.colour, "hatch": self.hatch, "edgecolor": "white", "linewidth": 0.5}

    @property
    def dot(self) -> dict[str, Any]:
        """For markers, whose dark edge keeps bright colours visible on white."""
        return {"color": self.colour, "marker": self.marker, "markeredgecolor": "#333333", "markeredgewidth": 0.7}


Styles: TypeAlias = Mapping[str, Style]


def styles_of(names: Iterable[str], baselines: Iterable[str]) -> dict[str, Style]:
    """A style for each name, baselines first; grey is for the baseline where there is one alone."""
    baselines = list(dict.fromkeys(baselines))
    styles: dict[str, Style] = {}
    others = 0
    for index, name in enumerate(dict.fromkeys([*baselines, *names])):
        plain = [name] == baselines
        colour = _BASELINE_COLOUR if plain else _COLOURS[others % len(_COLOURS)]
        others += not plain
        hatch, marker, dash = (looks[index % len(looks)] for looks in (_HATCHES, _MARKERS, _DASHES))
        styles[name] = Style(colour, str(hatch), str(marker), dash)
    return styles


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches that lays itself out."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def legend_height(names: Iterable[str]) -> float:
    """Inches that `add_legend` may take."""
    return 0.45 + LINE * sum(len(wrapped(name).splitlines()) for name in names)


def add_legend(figure: Figure, handles: Mapping[str, Artist], title: str) -> None:
    """A legend above all panels with a handle for each name."""
    labels = [wrapped(name) for name in handles]
    columns = max(1, min(len(labels), int(figure.get_size_inches()[0] / (0.09 * longest(labels) + 0.7))))
    # matplotlib leaves out labels that begin with an underscore, so the names are set afterwards.
    legend = figure.legend(
        list(handles.values()),
        ["model"] * len(labels),
        loc="outside upper center",
        ncols=columns,
        fontsize=9,
        frameon=False,
        title=title,
        title_fontsize=9,
    )
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(label)
    literal(legend.get_texts())


def in_groups(items: Sequence[ItemT], size: int) -> Iterator[Sequence[ItemT]]:
    """`items` in groups of at most `size`, of about equal length."""
    if items:
        size = math.ceil(len(items) / math.ceil(len(items) / size))
        for start in range(0, len(items), size):
            yield items[start : start + size]


def longest(labels: Sequence[str]) -> int:
    """Letters of the longest line."""
    return max(len(line) for label in labels for line in label.splitlines())


def literal(texts: Iterable[Text]) -> None:
    """Show names as they are: a dollar sign would otherwise begin a formula."""
    for text in texts:
        text.set_parse_math(False)


def wrapped(name: str, width: int = LABEL_WIDTH, lines: int = 4) -> str:
    """`name` on at most `lines` lines; what is left of a longer one is its beginning and its end."""
    if len(name) > width * lines:
        name = f"{name[: width * lines // 2]}…{name[-(width * lines // 2 - 1) :]}"
    rows = [""]
    for piece in re.findall(rf"\S{{0,{width - 1}}}[\s_.,:/-]|\S{{1,{width}}}", name):
        if len((rows[-1] + piece).rstrip()) > width:
            rows.append("")
        rows[-1] += piece
    return "\n".join(row.strip() for row in rows) or name
