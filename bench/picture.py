"""A picture of the ratios of a run, built without pyplot, so that drawing changes no global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from .tables import COLUMNS

# Okabe and Ito's colours, which stay apart for the colour-blind, and markers for black and white; rivals that share a
# colour are never beside the same case. Limits are black and grey.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
_MARKERS = ("o", "s", "D", "^", "v", "<")
_LIMITS = {"copy": ("#777777", "P"), "model": ("#000000", "X")}
_ROW, _WIDTH = 0.3, 11.0


def ratio_plot(cases: Sequence[Mapping[str, Any]]) -> Figure:
    """A row each case, a mark each side at its time over ours, with a bar from quartile to quartile.

    Raises:
        ValueError: no case has a ratio.
    """
    rated = [case for case in cases if case["ratios"]]
    if not rated:
        raise ValueError("plot: got no case with another side beside ours; allowed is a run with at least one")
    sides = [side for side in COLUMNS if any(side in case["ratios"] for case in rated)]
    figure = Figure(figsize=(_WIDTH, 1.6 + _ROW * len(rated)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, side in enumerate(sides):
        colour, marker = _style(side)
        rows = [(row, case["ratios"][side]) for row, case in enumerate(rated) if side in case["ratios"]]
        medians = [ratio["median"] for _, ratio in rows]
        # The ratio of the medians may lie outside the quartiles of the ratios.
        below = [max(0.0, ratio["median"] - ratio["low"]) for _, ratio in rows]
        above = [max(0.0, ratio["high"] - ratio["median"]) for _, ratio in rows]
        axes.errorbar(
            medians,
            [row + _shift(index, len(sides)) for row, _ in rows],
            xerr=[below, above],
            fmt=marker,
            color=colour,
            markersize=5,
            elinewidth=1.2,
            capsize=2,
            label=COLUMNS[side],
        )
    axes.axvline(1.0, color="#555555", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(rated)), [case["name"] for case in rated], fontsize=8)
    axes.set_ylim(len(rated) - 0.5, -0.5)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel(
        "time of the other over ours, median and quartiles (vs: above 1 ours is faster; of: 1 is the limit)"
    )
    figure.legend(loc="outside upper center", ncols=min(len(sides), 5), frameon=False, fontsize=9)
    return figure


def _style(side: str) -> tuple[str, str]:
    """Colour and marker, the same in every figure."""
    if side in _LIMITS:
        return _LIMITS[side]
    rivals = [name for name in COLUMNS if name not in _LIMITS]
    turns, place = divmod(rivals.index(side), len(_COLOURS))
    return _COLOURS[place], _MARKERS[(place + turns) % len(_MARKERS)]


def _shift(index: int, count: int) -> float:
    """Sides of a case a little above one another, so that none hides another."""
    return 0.5 * (index - (count - 1) / 2) / count
