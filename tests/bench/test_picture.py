"""The picture of ratios: a mark for every side of every case."""

from __future__ import annotations

from typing import Any

import pytest
from matplotlib.container import ErrorbarContainer

from alignfast.bench.picture import _style, ratio_plot
from alignfast.bench.tables import COLUMNS


def told(name: str, **medians: float) -> dict[str, Any]:
    ratios = {
        side.replace("_", " "): {"median": median, "low": median / 2, "high": median * 2, "least": 0.1}
        for side, median in medians.items()
    }
    return {"name": name, "ratios": ratios}


def test_every_ratio_is_marked_with_its_quartiles() -> None:
    figure = ratio_plot([told("a", torchattacks=2.0, model=0.9), told("wrong"), told("b", torchattacks=3.0)])
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    first, second = (part for part in axes.containers if isinstance(part, ErrorbarContainer))
    assert (first.get_label(), second.get_label()) == ("vs torchattacks", "of model")
    assert first.lines[0].get_xdata().tolist() == [2.0, 3.0]
    assert second.lines[0].get_xdata().tolist() == [0.9]
    (bars,) = first.lines[2]
    assert [segment[:, 0].tolist() for segment in bars.get_segments()] == [[1.0, 4.0], [1.5, 6.0]]
    rows = first.lines[0].get_ydata().tolist()
    assert [round(row) for row in rows] == [0, 1]
    assert rows[0] != second.lines[0].get_ydata().tolist()[0]
    figure.canvas.draw()


def test_a_median_outside_the_quartiles_has_no_bar_of_negative_length() -> None:
    case = told("a", torchattacks=2.0)
    case["ratios"]["torchattacks"] |= {"low": 2.1, "high": 2.5}
    ratio_plot([case]).canvas.draw()


def test_no_two_sides_look_the_same() -> None:
    assert len({_style(side) for side in COLUMNS}) == len(COLUMNS)


def test_nothing_to_show_is_refused() -> None:
    with pytest.raises(ValueError, match="plot: got no case"):
        ratio_plot([told("wrong")])
