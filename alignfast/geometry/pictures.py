"""Pictures of the geometry of losses. Each is None where nothing was measured that it could show."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from alignfast.evaluation.drawing import (
    LINE,
    PAGE_WIDTH,
    Style,
    Styles,
    add_legend,
    in_groups,
    legend_height,
    literal,
    new_figure,
    styles_of,
    wrapped,
)
from alignfast.evaluation.findings import change
from alignfast.evaluation.statistics import bootstrap
from alignfast.geometry.measures import MEASURES, PAIR_MEASURES
from alignfast.geometry.points import last_step
from alignfast.geometry.result import Difference, Estimate, Example, Floats, GeometryResult, Pixels, Surface

EntryT = TypeVar("EntryT", Estimate, Difference)

# What fits side by side, and on a printed page.
_MAPS_A_LINE, _SURFACES, _EXAMPLES, _MARKS = 4, 3, 3, 48
# Ratio of the largest to the middle number from which a linear axis hides most of them.
_WIDE = 30.0
_BINS = 24
# Letters of a line at the left and above a small panel.
_LABEL, _TITLE = 26, 17
_GREY = "#dddddd"


@dataclass(frozen=True)
class Drawing:
    """A picture and what it is called.

    Attributes:
        name: stem of its file.
        caption: what is drawn and how to read it.
    """

    name: str
    figure: Figure
    caption: str


def draw(result: GeometryResult, styles: Styles | None = None) -> Iterator[Drawing]:
    """Every picture for which something was measured; parts of one subject that do not fit on a page are numbered.

    Args:
        styles: of at least the models of the result, which are drawn in this order; those of `models_of` if None.
    """
    styles = styles or styles_of(models_of(result), baselines_of(result))
    marks_an_other = max(1, len(points_of(result)) * len(models_of(result)))
    others = list(in_groups(others_of(result), max(1, _MARKS // marks_an_other)))
    subjects: dict[str, tuple[list[Figure | None], str]] = {
        "differences": (
            [differences(result, styles), *(pair_differences(result, styles, part) for part in others)],
            "Mean difference from the baseline over the same images, with its 95 % interval. Markers are filled where "
            "the interval excludes 0.",
        ),
        "estimates": (
            [estimates(result, styles), *(pair_estimates(result, styles, part) for part in others)],
            "Mean over the images of each measure, by point and model, with its 95 % interval.",
        ),
        "transfer": (
            [cosine_and_transfer(result, styles)],
            "How often the attack on a model fools another, against the mean cosine between the gradients of the two "
            "at the clean image; a thin line joins the models with the same other. Bars are 95 % intervals.",
        ),
        "curvature": (
            [curvature(result, styles)],
            "How many images have which curvature, models laid over one another on the same bins. The markers above "
            "show medians.",
        ),
        "profiles": (
            [profiles(result, styles)],
            "Mean loss along the sign of each model’s own gradient. The band is the bootstrap 95 % interval of the "
            "mean over images, not the spread of the images.",
        ),
        "surfaces": (
            [surfaces(result, styles, part) for part in in_groups(result.surfaces, _SURFACES)],
            "Loss of each model in one plane through an image: the direction of an attack to the right, a random "
            "direction of equal length upward. The panels of an image share axes, colours and levels; the circle is "
            "the clean image, the star the end of the attack.",
        ),
        "examples": (
            [examples(result, styles, part) for part in in_groups(result.examples, _EXAMPLES)],
            "The images, what the attack on each model made of them, and below each what it changed, magnified about "
            "mid-grey by the factor at the left.",
        ),
    }
    for name, (figures, caption) in subjects.items():
        drawn = [figure for figure in figures if figure is not None]
        for number, figure in enumerate(drawn, 1):
            yield Drawing(f"{name}-{number}" if len(drawn) > 1 else name, figure, caption)


def baselines_of(result: GeometryResult) -> tuple[str, ...]:
    """Names of the baselines in order of first appearance."""
    return tuple(dict.fromkeys(difference.baseline for difference in result.differences))


def models_of(result: GeometryResult) -> tuple[str, ...]:
    """Names of the models whose losses were looked at, in order of first appearance."""
    named = [estimate.model for estimate in result.estimates]
    pictured: list[Mapping[str, Any]] = [surface.loss for surface in result.surfaces]
    pictured += [example.adversarial for example in result.examples]
    pictured += [] if result.profile is None else [result.profile.loss]
    return tuple(dict.fromkeys([*named, *(name for models in pictured for name in models)]))


def others_of(result: GeometryResult) -> tuple[str, ...]:
    """Names of the models with which others were compared, in order of first appearance."""
    return tuple(dict.fromkeys(estimate.other for estimate in result.estimates if estimate.other is not None))


def points_of(result: GeometryResult) -> tuple[str, ...]:
    """Names of the points in order of first appearance."""
    return tuple(dict.fromkeys(estimate.point for estimate in result.estimates))


def last_point(result: GeometryResult) -> str | None:
    """The point at the end of the attack; None where no attack was looked at."""
    return last_step(points_of(result))


def estimates(result: GeometryResult, styles: Styles | None = None) -> Figure | None:
    """Means of the measures of one model with their 95 % intervals: a panel each measure, a line each point."""
    marks = [_Mark.of(entry) for entry in result.estimates if entry.other is None]
    return _dots(marks, MEASURES, _styles(result, styles), "model, with 95 % interval")


def pair_estimates(
    result: GeometryResult, styles: Styles | None = None, others: Sequence[str] | None = None
) -> Figure | None:
    """The same of the measures of two models, a line each point and other model; of all others if None."""
    marks = [_Mark.of(entry) for entry in _with(result.estimates, others_of(result) if others is None else others)]
    return _dots(marks, PAIR_MEASURES, _styles(result, styles), "model, with 95 % interval", columns=4)


def differences(result: GeometryResult, styles: Styles | None = None) -> Figure | None:
    """Paired differences from the baseline with their 95 % intervals around a line at zero; a panel each measure."""
    marks = [_Mark.of_difference(entry) for entry in result.differences if entry.other is None]
    return _dots(marks, MEASURES, _styles(result, styles), _against(result), zero=True)


def pair_differences(
    result: GeometryResult, styles: Styles | None = None, others: Sequence[str] | None = None
) -> Figure | None:
    """The same of the measures of two models, a line each point and other model; of all others if None."""
    chosen = others_of(result) if others is None else others
    marks = [_Mark.of_difference(entry) for entry in _with(result.differences, chosen)]
    return _dots(marks, PAIR_MEASURES, _styles(result, styles), _against(result), columns=4, zero=True)


def curvature(result: GeometryResult, styles: Styles | None = None) -> Figure | None:
    """Histograms over the images at the clean, the random and the last point, models over one another."""
    styles = _styles(result, styles)
    chosen = ("clean", "random", last_point(result))
    found: dict[str, dict[str, Floats]] = {}
    for row in result.rows:
        values = row.values[np.isfinite(row.values)]
        if row.measure == "curvature" and row.point in chosen and values.size:
            found.setdefault(row.point, {})[row.model] = values
    if not found:
        return None
    names = _shown(styles, (name for group in found.values() for name in group))
    every = np.concatenate([values for group in found.values() for values in group.values()])
    figure = new_figure(PAGE_WIDTH * len(found) / 3 if len(found) > 1 else 4.5, 2.6 + legend_height(names))
    panels = figure.subplots(1, len(found), sharex=True, sharey=True, squeeze=False).ravel()
    for panel, (point, group) in zip(panels, found.items(), strict=True):
        bins = _axis(panel, every, "x")
        for name in names:
            if name in group:
                _histogram(panel, group[name], bins, styles[name])
        _plain(panel, point)
        panel.set_xlabel("curvature", fontsize=9)
    # Room for the medians above the highest bar.
    panels[0].set_ylim(0.0, 1.12 * panels[0].get_ylim()[1])
    panels[0].set_ylabel("images", fontsize=9)
    handles = {name: _swatch(styles[name]) for name in names}
    add_legend(figure, handles, "model; markers are medians")
    return figure


def profiles(result: GeometryResult, styles: Styles | None = None) -> Figure | None:
    """Mean loss along each model's own gradient sign, with the bootstrap 95 % interval of that mean over images."""
    styles = _styles(result, styles)
    if result.profile is None:
        return None
    known = {name: loss[np.isfinite(loss).all(1)] for name, loss in result.profile.loss.items()}
    names = _shown(styles, (name for name, loss in known.items() if len(loss)))
    if not names:
        return None
    figure = new_figure(6.0, 3.3 + legend_height(names))
    axes = figure.add_subplot()
    scale, unit = _unit(result)
    t = result.profile.t / scale
    axes.axvline(0.0, color="#999999", linewidth=0.8)
    for name in names:
        low, high = _band(known[name], result.config)
        style = styles[name]
        axes.fill_between(t, low, high, color=style.colour, alpha=0.22, linewidth=0)
        every = max(1, len(t) // 8)
        axes.plot(
            t, known[name].mean(0), linestyle=style.dash, linewidth=1.8, markersize=5, markevery=every, **style.dot
        )
    _plain(axes, "")
    axes.margins(x=0.01)
    axes.set_xlabel(f"distance along the gradient’s sign, in {unit}", fontsize=9)
    axes.set_ylabel("mean loss", fontsize=9)
    handles = {name: Line2D([], [], linestyle=styles[name].dash, **styles[name].dot) for name in names}
    add_legend(figure, handles, "model, with bootstrap 95 % interval of the mean")
    return figure


def cosine_and_transfer(result: GeometryResult, styles: Styles | None = None) -> Figure | None:
    """Share of images that fool another model at the last point, against the gradients' cosine at the clean point."""
    styles = _styles(result, styles)
    pairs = _cosines_and_rates(result)
    if not pairs:
        return None
    names = _shown(styles, (model for model, _ in pairs))
    figure = new_figure(7.4, 4.0 + legend_height(names))
    axes = figure.add_subplot()
    for other in dict.fromkeys(other for _, other in pairs):
        points = [pairs[name, other] for name in names if (name, other) in pairs]
        line = [(cosine.mean, 100 * rate.mean) for cosine, rate in points]
        axes.plot(*zip(*line, strict=True), color="#aaaaaa", linewidth=0.8, zorder=1)
    for (model, _), (cosine, rate) in pairs.items():
        x, y = _reach(cosine), _reach(rate)
        axes.errorbar(
            x[0], 100 * y[0], xerr=x[1], yerr=100 * y[1], markersize=7, ecolor="#555555", elinewidth=0.8,
            linestyle="", **styles[model].dot,
        )  # fmt: skip
    _plain(axes, "")
    axes.grid(axis="x", color=_GREY, linewidth=0.6)
    axes.set_ylim(-3.0, 103.0)
    _name_others(axes, {other: pair for (model, other), pair in _last_of_each(pairs, names).items()})
    axes.set_xlabel("gradient_cosine at the clean point", fontsize=9)
    axes.set_ylabel(f"fooled at {last_point(result)} (%)", fontsize=9)
    handles = {name: Line2D([], [], linestyle="", markersize=7, **styles[name].dot) for name in names}
    add_legend(figure, handles, "attacked model, with 95 % intervals; the other model at the right")
    return figure


def surfaces(
    result: GeometryResult, styles: Styles | None = None, chosen: Sequence[Surface] | None = None
) -> Figure | None:
    """Contours of the loss around each image, a panel each model with the same axes, colours and levels."""
    shown = [entry for entry in (result.surfaces if chosen is None else chosen) if _drawable(entry)]
    if not shown:
        return None
    styles = _styles(result, styles)
    names = _shown(styles, (name for surface in shown for name in surface.loss))
    columns = min(len(names), _MAPS_A_LINE)
    lines = math.ceil(len(names) / columns)
    titles = LINE * max(len(wrapped(name).splitlines()) for name in names)
    side = min(2.6, (PAGE_WIDTH - 2.0) / columns)
    height = 0.75 + lines * (side + 0.3 + titles)
    figure = new_figure(max(4.5, side * columns + 2.0), len(shown) * height)
    rows = figure.subfigures(len(shown), 1, squeeze=False).ravel()
    for row, surface in zip(rows, shown, strict=True):
        _surface(row, surface, names, (lines, columns), result)
    return figure


def examples(
    result: GeometryResult, styles: Styles | None = None, chosen: Sequence[Example] | None = None
) -> Figure | None:
    """Clean images, and for each model the perturbations, magnified by one factor for all, and the results."""
    shown = result.examples if chosen is None else chosen
    if not shown:
        return None
    names = _shown(_styles(result, styles), (name for example in shown for name in example.adversarial))
    factor = _magnification(shown)
    columns = 1 + len(names)
    side = min(1.6, PAGE_WIDTH / columns)
    titles = LINE * max(len(wrapped(name, _TITLE).splitlines()) for name in ["", *names])
    figure = new_figure(max(2.0, side * columns), titles + (2 * side + 0.4) * len(shown))
    panels = figure.subplots(2 * len(shown), columns, squeeze=False)
    for panel, title in zip(panels[0], ["clean", *(f"attack on {name}" for name in names)], strict=True):
        panel.set_title(wrapped(title, _TITLE), fontsize=8).set_parse_math(False)
    for upper, lower, example in zip(panels[::2], panels[1::2], shown, strict=True):
        adversarial = [example.adversarial.get(name) for name in names]
        for panel, pixels in zip(upper, [example.clean, *adversarial], strict=True):
            _image(panel, pixels)
        upper[0].set_xlabel(f"image {example.index}, label {example.label}", fontsize=8)
        for panel, pixels in zip(lower[1:], adversarial, strict=True):
            _image(panel, None if pixels is None else _change(example.clean, pixels, factor))
        lower[0].axis("off")
        lower[0].text(1.0, 0.5, f"change\n× {factor:g}", ha="right", va="center", fontsize=8)
    return figure


_CLEAN: dict[str, Any] = {
    "marker": "o", "markersize": 6, "markerfacecolor": "white", "markeredgecolor": "black", "markeredgewidth": 1.0,
}  # fmt: skip
_END: dict[str, Any] = {**_CLEAN, "marker": "*", "markersize": 12}


@dataclass(frozen=True)
class _Mark:
    """A number with its interval, in the panel of its measure, on the line of its point, in the look of its model."""

    measure: str
    line: str
    model: str
    value: float
    low: float
    high: float
    filled: bool

    @classmethod
    def of(cls, entry: Estimate) -> _Mark:
        line = _line(entry.point, entry.other)
        return cls(entry.measure, line, entry.model, entry.mean, entry.low, entry.high, True)

    @classmethod
    def of_difference(cls, entry: Difference) -> _Mark:
        line, filled = _line(entry.point, entry.other), change(entry) in ("higher", "lower")
        return cls(entry.measure, line, entry.model, entry.difference, entry.low, entry.high, filled)


def _with(entries: Iterable[EntryT], others: Sequence[str]) -> list[EntryT]:
    """Those that were measured with one of `others`, in their order."""
    chosen = [entry for entry in entries if entry.other in others]
    return sorted(chosen, key=lambda entry: others.index(entry.other or ""))


def _line(point: str, other: str | None) -> str:
    return point if other is None else f"{other} · {point}"


def _dots(
    marks: Sequence[_Mark],
    measures: Iterable[str],
    styles: Styles,
    title: str,
    *,
    columns: int = 3,
    zero: bool = False,
) -> Figure | None:
    """A panel each measure, a line each point, a marker each model."""
    marks = [mark for mark in marks if math.isfinite(mark.value)]
    panels_of = {measure: [mark for mark in marks if mark.measure == measure] for measure in measures}
    panels_of = {measure: group for measure, group in panels_of.items() if group}
    if not panels_of:
        return None
    lines = list(dict.fromkeys(mark.line for mark in marks))
    names = _shown(styles, (mark.model for mark in marks))
    labels = [wrapped(line, _LABEL) for line in lines]
    columns = min(columns, len(panels_of))
    height = max(0.14 * len(names) + 0.12, 0.06 + LINE * max(len(label.splitlines()) for label in labels))
    count = math.ceil(len(panels_of) / columns)
    width = PAGE_WIDTH if columns > 1 else 5.0
    figure = new_figure(width, legend_height(names) + count * (0.75 + height * len(lines)))
    panels = figure.subplots(count, columns, sharey=True, squeeze=False).ravel()
    for panel, (measure, group) in zip(panels, panels_of.items(), strict=False):
        _interval_panel(panel, group, lines, names, styles)
        _plain(panel, measure)
        if panel.get_xscale() == "linear":
            panel.locator_params(axis="x", nbins=4)
        panel.grid(axis="x", color=_GREY, linewidth=0.6)
        panel.grid(visible=False, axis="y")
        if zero:
            panel.axvline(0.0, color="black", linewidth=1.0, zorder=1)
    for unused in panels[len(panels_of) :]:
        unused.remove()
    panels[0].set_yticks(range(len(lines)), labels)
    panels[0].set_ylim(len(lines) - 0.5, -0.5)
    for panel in panels[::columns]:
        literal(panel.get_yticklabels())
    add_legend(figure, {name: Line2D([], [], linestyle="", markersize=6, **styles[name].dot) for name in names}, title)
    return figure


def _interval_panel(
    axes: Axes, marks: Sequence[_Mark], lines: Sequence[str], names: Sequence[str], styles: Styles
) -> None:
    values = np.array([[mark.low, mark.value, mark.high] for mark in marks])
    _axis(axes, values[np.isfinite(values)], "x")
    step = 0.8 / len(names)
    for index in range(0, len(lines), 2):
        axes.axhspan(index - 0.5, index + 0.5, color="#f4f5f7", zorder=0)
    for mark in marks:
        y = lines.index(mark.line) + (names.index(mark.model) - (len(names) - 1) / 2) * step
        axes.plot([mark.low, mark.high], [y, y], color=styles[mark.model].colour, linewidth=1.4, zorder=2)
        hollow = {"markerfacecolor": "white", "markeredgecolor": styles[mark.model].colour, "markeredgewidth": 1.3}
        look = styles[mark.model].dot | ({} if mark.filled else hollow)
        axes.plot(mark.value, y, markersize=5.5, linestyle="", zorder=3, **look)


def _axis(axes: Axes, values: Floats, axis: str) -> Floats:
    """Set a scale on which most of `values` can be told apart; returns the edges of bins, even on that scale."""
    sizes = np.abs(values[values != 0])
    low, high = float(values.min()), float(values.max())
    if low == high:
        low, high = low - 0.5, high + 0.5
    setter = getattr(axes, f"set_{axis}scale")
    if sizes.size == 0 or high - low < _WIDE * float(np.median(sizes)):
        return np.linspace(low, high, _BINS + 1)
    if low > 0:
        setter("log")
        return np.geomspace(low, high, _BINS + 1)
    # A power of ten, so that zero and the ends of the linear part are ticks and no two of these overlap.
    setter("symlog", linthresh=10.0 ** math.ceil(math.log10(float(np.median(sizes)))))
    transform = getattr(axes, f"{axis}axis").get_transform()
    first, last = transform.transform(np.array([low, high]))
    edges: Floats = transform.inverted().transform(np.linspace(float(first), float(last), _BINS + 1))
    # The way there and back rounds, and the outermost values must lie within.
    edges[0], edges[-1] = low, high
    return edges


def _histogram(axes: Axes, values: Floats, bins: Floats, style: Style) -> None:
    axes.hist(values, bins.tolist(), histtype="stepfilled", color=style.colour, alpha=0.25)
    axes.hist(values, bins.tolist(), histtype="step", edgecolor=style.colour, linestyle=style.dash, linewidth=1.6)
    axes.plot(
        [np.median(values)], [0.97], transform=axes.get_xaxis_transform(), markersize=6, linestyle="", **style.dot
    )


def _swatch(style: Style) -> Line2D:
    return Line2D([], [], linestyle=style.dash, linewidth=1.6, markersize=6, **style.dot)


def _band(loss: Floats, config: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    resamples, seed = int(config.get("resamples", 2000)), int(config.get("seed", 0))
    # The same seed draws the same images at every distance.
    bounds = [bootstrap(column, resamples, seed) for column in loss.T]
    return [low for low, _ in bounds], [high for _, high in bounds]


Pair = tuple[Estimate, Estimate]


def _cosines_and_rates(result: GeometryResult) -> dict[tuple[str, str], Pair]:
    """By model and other: the cosine at the clean point, and the rate at the end of the attack."""
    known = {
        (entry.measure, entry.point, entry.model, entry.other): entry
        for entry in result.estimates
        if math.isfinite(entry.mean)
    }
    last = last_point(result)
    pairs: dict[tuple[str, str], Pair] = {}
    for measure, point, model, other in known:
        cosine = known.get(("gradient_cosine", "clean", model, other))
        if measure == "fooled" and point == last and other is not None and cosine is not None:
            pairs[model, other] = cosine, known[measure, point, model, other]
    return pairs


def _last_of_each(pairs: Mapping[tuple[str, str], Pair], names: Sequence[str]) -> dict[tuple[str, str], Pair]:
    """The pair of the last model, in the order of `names`, with each other."""
    last = {other: name for name in names for model, other in pairs if model == name}
    return {(name, other): pairs[name, other] for other, name in last.items()}


def _reach(entry: Estimate) -> tuple[float, Floats]:
    """The mean, and how far its interval goes down and up, [2, 1]."""
    reach = np.array([[entry.mean - entry.low], [entry.high - entry.mean]])
    return entry.mean, np.nan_to_num(reach).clip(0.0)


def _name_others(axes: Axes, pairs: Mapping[str, Pair]) -> None:
    """Names at the right, spread so that none covers another, each joined to its point."""
    placed = sorted(pairs.items(), key=lambda item: item[1][1].mean)
    labels = [wrapped(other) for other, _ in placed]
    heights = _spread([100 * rate.mean for _, (_, rate) in placed], [5.5 * len(label.splitlines()) for label in labels])
    for label, height, (_, (cosine, rate)) in zip(labels, heights, placed, strict=True):
        note = axes.annotate(
            label, (cosine.mean, 100 * rate.mean), xytext=(1.04, height), textcoords=axes.get_yaxis_transform(),
            fontsize=8, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.7, "shrinkB": 5},
        )  # fmt: skip
        literal([note])


def _spread(wanted: Sequence[float], sizes: Sequence[float]) -> list[float]:
    """Middles, rising as `wanted` does, of labels of these sizes that do not overlap; in [0, 100] if they fit."""
    middles: list[float] = []
    floor = 0.0
    for middle, size in zip(wanted, sizes, strict=True):
        middles.append(max(middle, floor + size / 2))
        floor = middles[-1] + size / 2
    ceiling = max(100.0, sum(sizes))
    for index in reversed(range(len(middles))):
        middles[index] = min(middles[index], ceiling - sizes[index] / 2)
        ceiling = middles[index] - sizes[index] / 2
    return middles


def _drawable(surface: Surface) -> bool:
    enough = len(surface.x) > 1 and len(surface.y) > 1
    return enough and any(np.isfinite(loss).any() for loss in surface.loss.values())


def _surface(row: Any, surface: Surface, names: Sequence[str], shape: tuple[int, int], result: GeometryResult) -> None:
    scale, unit = _unit(result)
    end = _end_of_attack(surface, result.config)
    known = np.concatenate([loss[np.isfinite(loss)] for loss in surface.loss.values()])
    levels = MaxNLocator(12, min_n_ticks=6).tick_values(float(known.min()), float(known.max()))
    panels = row.subplots(*shape, sharex=True, sharey=True, squeeze=False)
    for panel, name in zip(panels.ravel(), names, strict=False):
        loss = np.ma.masked_invalid(surface.loss.get(name, np.full((len(surface.y), len(surface.x)), np.nan)))
        panel.set_title(wrapped(name), fontsize=9).set_parse_math(False)
        panel.set_aspect("equal")
        panel.tick_params(labelsize=8)
        if loss.count():
            image = panel.contourf(surface.x / scale, surface.y / scale, loss, levels=levels, cmap="cividis")
            panel.contour(surface.x / scale, surface.y / scale, loss, levels=levels, colors="black", linewidths=0.35)
        panel.plot(0.0, 0.0, **_CLEAN)
        if end is not None:
            panel.plot(end / scale, 0.0, **_END)
    for unused in panels.ravel()[len(names) :]:
        unused.remove()
    bar = row.colorbar(image, ax=panels, shrink=0.85, pad=0.02)
    bar.ax.tick_params(labelsize=8)
    bar.set_label("loss", fontsize=9)
    row.suptitle(f"image {surface.index}: ○ clean{'' if end is None else ', ☆ end of the attack'}", fontsize=10)
    literal([row.supxlabel(wrapped(f"along the attack on {surface.along}, in {unit}", 80), fontsize=9)])
    row.supylabel(f"random direction, in {unit}", fontsize=9)


def _end_of_attack(surface: Surface, config: Mapping[str, Any]) -> float | None:
    """How far along x the attack came, in units of [0, 1] images; None where the settings do not tell."""
    if (span := _positive(config, "span")) is not None:
        return float(surface.x.max()) / span
    return _positive(config, "eps")


def _unit(result: GeometryResult) -> tuple[float, str]:
    """What distances are divided by, and its name."""
    eps = _positive(result.config, "eps")
    if eps is None:
        return 1 / 255, "1/255"
    levels = 255 * eps
    return eps, f"eps ({levels:.0f}/255)" if abs(levels - round(levels)) < 1e-6 else f"eps ({eps:.4g})"


def _positive(config: Mapping[str, Any], name: str) -> float | None:
    value = config.get(name)
    return float(value) if isinstance(value, (int, float)) and value > 0 else None


def _magnification(shown: Sequence[Example]) -> float:
    """By how much the largest change must be multiplied to span half the range."""
    largest = max(
        (int(np.abs(adversarial.astype(int) - example.clean).max()) for example in shown
         for adversarial in example.adversarial.values()), default=0,
    )  # fmt: skip
    return float(f"{127.0 / max(1, largest):.2g}")


def _change(clean: Pixels, adversarial: Pixels, factor: float) -> Pixels:
    """Mid-grey where nothing changed."""
    moved = 128 + factor * (adversarial.astype(float) - clean)
    pixels: Pixels = moved.clip(0, 255).astype(np.uint8)
    return pixels


def _image(panel: Axes, pixels: Pixels | None) -> None:
    if pixels is None:
        panel.axis("off")
        return
    panel.set(xticks=[], yticks=[])
    panel.spines[:].set_color("#999999")
    panel.imshow(pixels.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")


def _plain(axes: Axes, title: str) -> None:
    axes.tick_params(labelsize=8, length=0)
    axes.grid(axis="y", color=_GREY, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(wrapped(title, 40), fontsize=10).set_parse_math(False)


def _against(result: GeometryResult) -> str:
    return f"model minus {' or '.join(wrapped(name) for name in baselines_of(result))}, with 95 % interval"


def _styles(result: GeometryResult, styles: Styles | None) -> Styles:
    return styles or styles_of(models_of(result), baselines_of(result))


def _shown(styles: Styles, names: Iterable[str]) -> list[str]:
    """Those of `names` that there are, in the order of the styles."""
    wanted = set(names)
    return [name for name in styles if name in wanted]
