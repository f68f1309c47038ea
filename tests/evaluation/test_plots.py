from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from alignfast.evaluation.matrix_result import Cell, Comparison, TransferMatrix
from alignfast.evaluation.plots import bars, heat_map, save_figure
from alignfast.evaluation.statistics import paired


def build(sources: list[str], attacks: list[str], targets: list[str], n: int = 50) -> TransferMatrix:
    random = np.random.default_rng(0)
    cells, comparisons = [], []
    for attack in attacks:
        for target in targets:
            fooled = {source: random.random(n) < random.random() for source in sources}
            for source, flags in fooled.items():
                cells.append(Cell.counted(source, attack, target, errors=int(flags.sum()), n=n))
                if source != sources[0]:
                    result = paired(fooled[sources[0]], flags)
                    comparisons.append(Comparison.of(sources[0], source, attack, target, result))
    return TransferMatrix(tuple(cells), tuple(comparisons))


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def tick_labels(figure: Figure, axis: str) -> list[str]:
    return [label.get_text() for label in getattr(figure.axes[0], f"get_{axis}ticklabels")()]


def test_heat_map_shows_every_rate_and_interval() -> None:
    matrix = build(["vanilla", "aligned"], ["pgd", "mi"], ["vgg", "vit", "dense"])
    figure = heat_map(matrix)
    assert len(figure.axes) == 2
    shown = texts(figure)
    assert len(shown) == 2 * len(matrix.cells)
    for cell in matrix.cells:
        assert f"{100 * cell.rate:.1f}" in shown
        assert f"{100 * cell.low:.1f}–{100 * cell.high:.1f}" in shown
    assert tick_labels(figure, "x") == ["vgg", "vit", "dense"]
    assert tick_labels(figure, "y") == ["pgd · vanilla", "pgd · aligned", "mi · vanilla", "mi · aligned"]
    assert figure.axes[0].images[0].get_clim() == (0.0, 100.0)


def test_heat_map_marks_what_is_missing() -> None:
    cells = (Cell.counted("a", "mi", "x", errors=0, n=0), Cell.counted("b", "mi", "y", errors=1, n=4))
    shown = texts(heat_map(TransferMatrix(cells)))
    assert shown.count("n/a") == 1
    assert shown.count("–") == 2
    assert "25.0" in shown


def test_text_stands_out_from_its_cell() -> None:
    cells = tuple(Cell.counted("a", "mi", f"t{k}", errors=k, n=10) for k in (0, 10))
    dark, light = heat_map(TransferMatrix(cells)).axes[0].texts[::2]
    assert (dark.get_color(), light.get_color()) == ("white", "black")


def test_bars_have_a_panel_each_attack_and_a_bar_each_cell() -> None:
    matrix = build(["vanilla", "aligned", "third"], ["pgd", "mi"], ["vgg", "vit"])
    figure = bars(matrix)
    assert [axes.get_title() for axes in figure.axes] == ["pgd", "mi"]
    for axes in figure.axes:
        heights = sorted(patch.get_height() for patch in axes.patches)
        rates = sorted(100 * cell.rate for cell in matrix.cells if cell.attack == axes.get_title())
        assert heights == pytest.approx(rates)
        assert len(axes.collections) == len(rates)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["vanilla", "aligned", "third"]


def test_error_bars_span_the_interval() -> None:
    cell = Cell.counted("a", "mi", "x", errors=3, n=20)
    (axes,) = bars(TransferMatrix((cell,))).axes
    (segment,) = axes.collections[0].get_segments()
    assert sorted(segment[:, 1]) == pytest.approx([100 * cell.low, 100 * cell.high])


def test_baselines_come_first_in_grey() -> None:
    matrix = build(["vanilla", "aligned"], ["mi"], ["vgg"])
    turned = TransferMatrix(tuple(reversed(matrix.cells)), matrix.comparisons)
    first, second = bars(turned).axes[0].patches
    assert first.get_height() == pytest.approx(100 * matrix.error("vanilla", "mi", "vgg"))
    assert first.get_x() < second.get_x()
    red, green, blue, _ = first.get_facecolor()
    assert red == green == blue


def test_bars_mark_cells_of_no_images() -> None:
    cells = (Cell.counted("a", "mi", "x", errors=0, n=0), Cell.counted("a", "mi", "y", errors=1, n=4))
    figure = bars(TransferMatrix(cells))
    assert texts(figure) == ["n/a"]
    assert len(figure.axes[0].patches) == 1


@pytest.mark.parametrize("draw", [heat_map, bars])
def test_attacks_can_be_chosen(draw) -> None:  # type: ignore[no-untyped-def]
    matrix = build(["vanilla"], ["pgd", "mi", "di"], ["vgg"])
    assert draw(matrix, ["mi"]).get_size_inches()[1] <= draw(matrix).get_size_inches()[1]
    with pytest.raises(ValueError, match="attacks: got 'dii'"):
        draw(matrix, ["dii"])
    with pytest.raises(ValueError, match="attacks: got none"):
        draw(matrix, [])
    with pytest.raises(ValueError, match="matrix: got no cells"):
        draw(TransferMatrix(()))


def test_many_cells_make_a_larger_figure() -> None:
    matrix = build(["vanilla", "aligned"], [f"attack{i}" for i in range(12)], [f"target{i}" for i in range(10)], 20)
    assert len(texts(heat_map(matrix))) == 2 * 240
    figure = bars(matrix)
    assert len(figure.axes) == 12
    width, height = figure.get_size_inches()
    assert width <= 12
    assert height > 20


@pytest.mark.parametrize("draw", [heat_map, bars])
def test_nothing_overlaps_with_long_names(draw) -> None:  # type: ignore[no-untyped-def]
    long = "timm:vit_base_patch16_224.augreg2_in21k_ft_in1k"
    matrix = build([f"vanilla {long}", f"_aligned $x_{{1$ {long * 3}"], [long, "mi"], [f"{long}_{i}" for i in range(3)])
    figure = draw(matrix)
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    bounds = figure.axes[0].get_window_extent(renderer)
    assert bounds.width > 150
    assert bounds.height > 150
    labels = [label for label in figure.axes[0].get_yticklabels() if label.get_text()]
    boxes = sorted((label.get_window_extent(renderer) for label in labels), key=lambda box: box.y0)
    assert all(lower.y1 <= upper.y0 + 1 for lower, upper in pairwise(boxes))


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.SVG", b"<?xml"), ("a.pdf", b"%PDF")])
def test_saved_figures_are_whole_and_repeatable(name: str, start: bytes, tmp_path: Path) -> None:
    matrix = build(["vanilla"], ["mi"], ["vgg"])
    save_figure(heat_map(matrix), tmp_path / name)
    first = (tmp_path / name).read_bytes()
    save_figure(heat_map(matrix), tmp_path / name)
    assert first.startswith(start)
    assert (tmp_path / name).read_bytes() == first
    assert len(list(tmp_path.iterdir())) == 1


def test_other_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path: got 'a\.bmp'; allowed is a name that ends in \.png, \.svg, \.pdf"):
        save_figure(heat_map(build(["a"], ["mi"], ["x"])), tmp_path / "a.bmp")
    assert list(tmp_path.iterdir()) == []


def test_drawing_leaves_pyplot_alone() -> None:
    loaded = "matplotlib.pyplot" in sys.modules
    bars(build(["a"], ["mi"], ["x"]))
    assert ("matplotlib.pyplot" in sys.modules) == loaded
