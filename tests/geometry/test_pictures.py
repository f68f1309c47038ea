from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from matplotlib.text import Text

from alignfast.evaluation.drawing import styles_of
from alignfast.evaluation.matrix_result import Cell, TransferMatrix
from alignfast.evaluation.plots import bars, write_figure
from alignfast.evaluation.statistics import bootstrap
from alignfast.geometry.pictures import (
    cosine_and_transfer,
    curvature,
    differences,
    draw,
    estimates,
    examples,
    last_point,
    pair_differences,
    pair_estimates,
    profiles,
    surfaces,
)
from alignfast.geometry.result import GeometryResult, Profile, Row, Surface
from alignfast.geometry.summary import estimates as means
from tests.geometry.results import EPS, build

PICTURES = (
    cosine_and_transfer,
    curvature,
    differences,
    estimates,
    examples,
    pair_differences,
    pair_estimates,
    profiles,
    surfaces,
)
NOTHING = GeometryResult((), np.zeros(0, np.int64), (), ())


def drawn(figure: Figure | None) -> Figure:
    assert figure is not None
    return figure


def saved(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    write_figure(figure, buffer, kind)
    return buffer.getvalue()


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for box in figure.legends for text in box.get_texts()]


def panels(figure: Figure) -> dict[str, object]:
    return {axes.get_title(): axes for axes in figure.axes if axes.get_title()}


def hollow(marker: str) -> bool:
    return bool(to_rgba(marker) == to_rgba("white"))


def test_estimates_have_a_panel_each_measure_and_a_marker_each_point_and_model() -> None:
    result = build()
    figure = drawn(estimates(result))
    assert list(panels(figure)) == list(dict.fromkeys(e.measure for e in result.estimates if e.other is None))
    assert legend(figure) == ["vanilla", "aligned"]
    for axes in figure.axes:
        wanted = sorted(e.mean for e in result.estimates if e.measure == axes.get_title())
        markers = [line for line in axes.lines if len(line.get_xdata()) == 1]
        assert sorted(float(line.get_xdata()[0]) for line in markers) == pytest.approx(wanted)
        bars = [line for line in axes.lines if len(line.get_xdata()) == 2]
        ends = sorted((e.low, e.high) for e in result.estimates if e.measure == axes.get_title())
        assert sorted(tuple(line.get_xdata()) for line in bars) == ends
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["clean", "random", "step 10", "step 20"]


def test_pairs_have_a_line_each_other_model_and_point() -> None:
    figure = drawn(pair_estimates(build(points=("clean", "step 3"))))
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["vgg · clean", "vgg · step 3", "vit · clean", "vit · step 3"]
    assert list(panels(figure)) == ["gradient_cosine", "kl", "agreement", "fooled"]
    only = drawn(pair_estimates(build(points=("clean", "step 3")), others=["vit"]))
    assert [label.get_text() for label in only.axes[0].get_yticklabels()] == ["vit · clean", "vit · step 3"]


def test_differences_are_filled_where_their_interval_leaves_out_zero() -> None:
    result = build()
    figure = drawn(differences(result))
    assert legend(figure) == ["aligned"]
    clear = 0
    for axes in figure.axes:
        found = {d.difference: d for d in result.differences if d.measure == axes.get_title()}
        (zero,) = (line for line in axes.lines if list(line.get_xdata()) == [0.0, 0.0])
        assert list(zero.get_ydata()) == [0, 1]
        markers = [line for line in axes.lines if len(line.get_xdata()) == 1]
        assert len(markers) == len(found)
        for line in markers:
            difference = found[float(line.get_xdata()[0])]
            holds_zero = difference.low <= 0 <= difference.high
            assert hollow(line.get_markerfacecolor()) == holds_zero
            clear += not holds_zero
    assert 0 < clear < len([d for d in result.differences if d.other is None])


def test_histograms_count_every_image_on_the_same_bins() -> None:
    result = build(n=50)
    figure = drawn(curvature(result))
    assert [axes.get_title() for axes in figure.axes] == ["clean", "random", "step 20"]
    edges = set()
    for axes in figure.axes:
        outlines = [patch for patch in axes.patches if not patch.get_fill()]
        assert len(outlines) == 2
        for outline in outlines:
            x, y = outline.get_xy().T
            heights = y[1:-1:2]
            assert heights.sum() == 50
            edges.add(tuple(np.unique(x)))
    assert len(edges) == 1


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        (np.linspace(1.0, 2.0, 40), "linear"),
        (np.geomspace(1e-3, 1e3, 40), "log"),
        (np.concatenate([np.geomspace(1e-3, 1e3, 40), [-5.0]]), "symlog"),
        (np.zeros(5), "linear"),
    ],
)
def test_the_scale_follows_the_range(values: np.ndarray, scale: str) -> None:
    rows = (Row("a", None, "clean", "curvature", values),)
    figure = drawn(curvature(GeometryResult(rows, np.arange(len(values)), means(rows, 10, 0), ())))
    (axes,) = figure.axes
    assert axes.get_xscale() == scale
    (outline,) = (patch for patch in axes.patches if not patch.get_fill())
    assert outline.get_xy()[1:-1:2, 1].sum() == len(values)


def test_profiles_show_means_and_the_bootstrap_interval_of_the_mean() -> None:
    result = build()
    assert result.profile is not None
    (axes,) = drawn(profiles(result)).axes
    lines = [line for line in axes.lines if len(line.get_xdata()) == 11]
    for line, loss in zip(lines, result.profile.loss.values(), strict=True):
        assert line.get_ydata() == pytest.approx(loss.mean(0))
        assert line.get_xdata() == pytest.approx(np.linspace(-1.0, 1.0, 11))
    loss = result.profile.loss["vanilla"]
    vertices = axes.collections[0].get_paths()[0].vertices
    at_end = vertices[vertices[:, 0] > 0.999, 1]
    assert (at_end.min(), at_end.max()) == pytest.approx(bootstrap(loss[:, -1], 200, 0))
    assert "eps (4/255)" in axes.get_xlabel()


@pytest.mark.parametrize(
    ("config", "unit", "end"),
    [({"eps": EPS}, "eps (4/255)", 1.0), ({"eps": 0.15}, "eps (0.15)", EPS / 0.15), ({}, "1/255", 4.0)],
)
def test_distances_are_told_in_eps_where_it_is_known(config: dict[str, float], unit: str, end: float) -> None:
    (axes,) = drawn(profiles(replace(build(n=10), config=config))).axes
    assert axes.get_xlabel().endswith(f"in {unit}")
    line = max(axes.lines, key=lambda line: len(line.get_xdata()))
    assert line.get_xdata()[-1] == pytest.approx(end)


def test_images_whose_loss_is_not_finite_are_left_out_of_profiles() -> None:
    result = build()
    assert result.profile is not None
    loss = result.profile.loss["vanilla"].copy()
    loss[0, 3] = np.nan
    (axes,) = drawn(profiles(replace(result, profile=Profile(result.profile.t, {"vanilla": loss})))).axes
    (line,) = (line for line in axes.lines if len(line.get_xdata()) == 11)
    assert line.get_ydata() == pytest.approx(loss[1:].mean(0))


def test_surfaces_of_an_image_share_axes_levels_and_colours() -> None:
    result = build(("vanilla", "aligned", "third"))
    figure = drawn(surfaces(result))
    assert len(figure.subfigs) == 2
    for row, surface in zip(figure.subfigs, result.surfaces, strict=True):
        maps = [axes for axes in row.axes if axes.get_title()]
        assert [axes.get_title() for axes in maps] == ["vanilla", "aligned", "third"]
        filled = [next(c for c in axes.collections if isinstance(c, ContourSet) and c.filled) for axes in maps]
        assert len({tuple(contours.levels) for contours in filled}) == 1
        assert len({contours.get_clim() for contours in filled}) == 1
        assert filled[0].levels[0] <= min(loss.min() for loss in surface.loss.values())
        assert filled[0].levels[-1] >= max(loss.max() for loss in surface.loss.values())
        for axes in maps:
            points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines]
            assert points == [(0.0, 0.0), (pytest.approx(1.0), 0.0)]
            assert axes.get_xlim() == pytest.approx((-1.5, 1.5))


def test_a_surface_shows_the_loss_at_its_place() -> None:
    axis = np.array([-EPS, 0.0, EPS])
    loss = np.zeros((3, 3))
    loss[2, 1] = 8.0  # y is highest, x in the middle.
    result = replace(build(images=0), surfaces=(Surface(0, "vanilla", axis, axis, {"vanilla": loss}),))
    (maps,) = (axes for row in drawn(surfaces(result)).subfigs for axes in row.axes if axes.get_title())
    filled = next(c for c in maps.collections if isinstance(c, ContourSet) and c.filled)
    top = [path.vertices for path in filled.get_paths() if len(path.vertices)][-1]
    assert abs(top[:, 0].mean()) < 0.2
    assert top[:, 1].max() == pytest.approx(1.0)


def test_the_scatter_sets_transfer_against_the_cosine() -> None:
    result = build()
    (axes,) = drawn(cosine_and_transfer(result)).axes
    for model in ("vanilla", "aligned"):
        for other in ("vgg", "vit"):
            cosine = result.estimate(model, "gradient_cosine", "clean", other)
            rate = result.estimate(model, "fooled", "step 20", other)
            points = [(line.get_xdata(), line.get_ydata()) for line in axes.lines if len(line.get_xdata()) == 1]
            assert any(x[0] == cosine.mean and y[0] == pytest.approx(100 * rate.mean) for x, y in points)
    horizontal, vertical = (
        [tuple(segment.ravel()) for c in axes.collections for segment in c.get_segments()][k] for k in (0, 1)
    )
    cosine, rate = (
        result.estimate("vanilla", "gradient_cosine", "clean", "vgg"),
        result.estimate("vanilla", "fooled", "step 20", "vgg"),
    )
    assert (horizontal[0], horizontal[2]) == pytest.approx((cosine.low, cosine.high))
    assert (vertical[1], vertical[3]) == pytest.approx((100 * rate.low, 100 * rate.high))
    assert {text.get_text() for text in axes.texts} == {"vgg", "vit"}


def test_names_at_the_scatter_do_not_cover_one_another() -> None:
    figure = drawn(cosine_and_transfer(build(others=[f"timm:resnet{k}.a1_in1k_and_more" for k in range(9)], n=20)))
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    # Without the lines to their points.
    boxes = sorted((Text.get_window_extent(text, renderer) for text in figure.axes[0].texts), key=lambda box: box.y0)
    assert all(lower.y1 <= upper.y0 + 1 for lower, upper in pairwise(boxes))


@pytest.mark.parametrize("channels", [1, 3])
def test_examples_magnify_changes_by_one_named_factor(channels: int) -> None:
    result = build(channels=channels)
    figure = drawn(examples(result))
    grid = np.array(figure.axes).reshape(4, 3)
    assert [axes.get_title() for axes in grid[0]] == ["clean", "attack on vanilla", "attack on aligned"]
    assert [text.get_text() for text in grid[1, 0].texts] == ["change\n× 32"]
    example = result.examples[1]
    clean, adversarial, change = (grid[place].images[0].get_array() for place in ((2, 0), (2, 1), (3, 1)))
    assert np.array_equal(clean, example.clean.squeeze())
    assert np.array_equal(adversarial, example.adversarial["vanilla"].squeeze())
    moved = example.adversarial["vanilla"].astype(int) - example.clean
    assert np.array_equal(change, (128 + 32 * moved).clip(0, 255).squeeze())
    assert grid[2, 0].get_xlabel() == "image 3, label 1"


def test_the_last_point_is_that_of_the_most_steps() -> None:
    assert last_point(build(points=("clean", "step 20", "step 5", "step 100"))) == "step 100"
    assert last_point(build(points=("clean", "random"))) is None


def test_a_model_looks_the_same_in_every_picture() -> None:
    names = ["vanilla", "aligned", "third"]
    styles = styles_of(names, ["vanilla"])
    matrix = TransferMatrix(tuple(Cell.counted(name, "mi", "vgg", errors=1, n=4) for name in names))
    patches = bars(matrix, styles=styles).axes[0].patches
    assert [to_rgba(styles[name].colour) for name in names] == [patch.get_facecolor() for patch in patches]
    result = build(["third", "aligned"])
    for picture in (estimates, profiles, curvature, cosine_and_transfer):
        figure = drawn(picture(result, styles))
        assert legend(figure) == ["aligned", "third"]
        handles = figure.legends[0].legend_handles
        assert [handle.get_color() for handle in handles] == [styles[name].colour for name in ("aligned", "third")]
        assert [handle.get_marker() for handle in handles] == [styles[name].marker for name in ("aligned", "third")]


@pytest.mark.parametrize("picture", PICTURES)
def test_nothing_measured_gives_no_picture(picture: Callable[[GeometryResult], Figure | None]) -> None:
    assert picture(NOTHING) is None
    result = build()
    empty = [Row(row.model, row.other, row.point, row.measure, np.full(60, np.nan)) for row in result.rows]
    gone = GeometryResult(
        tuple(empty),
        result.indices,
        means(empty, 10, 0),
        (),
        tuple(replace(s, loss={name: np.full((21, 21), np.nan) for name in s.loss}) for s in result.surfaces),
        Profile(np.linspace(-1, 1, 3), {"vanilla": np.full((60, 3), np.nan)}),
    )
    assert picture(gone) is None


def test_what_is_missing_is_left_out_of_the_drawings() -> None:
    names = [drawing.name for drawing in draw(build())]
    assert names == [
        "differences-1", "differences-2", "estimates-1", "estimates-2", "transfer", "curvature", "profiles", "surfaces",
        "examples",
    ]  # fmt: skip
    bare = replace(build(["vanilla"], others=(), images=0), profile=None)
    assert [drawing.name for drawing in draw(bare)] == ["estimates", "curvature"]
    assert list(draw(NOTHING)) == []


def test_many_surfaces_and_examples_are_drawn_in_parts() -> None:
    names = [drawing.name for drawing in draw(build(images=7, n=12))]
    assert [name for name in names if name.startswith(("surfaces", "examples"))] == [
        "surfaces-1", "surfaces-2", "surfaces-3", "examples-1", "examples-2", "examples-3",
    ]  # fmt: skip


def test_names_are_literal_and_long_ones_are_wrapped() -> None:
    hostile = "_$x_{1$ timm:vit_base_patch16_224.augreg2_in21k_ft_in1k"
    result = build(["vanilla", hostile], others=(hostile, "$y^{$"), points=("clean", "step 2"), n=15, images=1)
    for drawing in draw(result):
        assert saved(drawing.figure, "png").startswith(b"\x89PNG")
        for box in drawing.figure.legends:
            names = [text.get_text() for text in box.get_texts()]
            assert "_$x_{1$\ntimm:vit_base_patch16_\n224.augreg2_in21k_ft_\nin1k" in names


def test_drawing_leaves_pyplot_alone() -> None:
    loaded = "matplotlib.pyplot" in sys.modules
    list(draw(build(n=12)))
    assert ("matplotlib.pyplot" in sys.modules) == loaded


def test_pictures_repeat_their_bytes() -> None:
    first, second = (saved(drawn(surfaces(build(images=1, n=10))), "svg") for _ in range(2))
    assert first == second
