"""The transfer matrix as data: cells, paired comparisons, and how they are written, read and shown."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from io import StringIO
from typing import TYPE_CHECKING, Any, Self, TypeVar

from alignfast.checks import check_choice, check_count
from alignfast.evaluation.statistics import Paired, wilson
from alignfast.files import read_json, write_json, write_text

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

RecordT = TypeVar("RecordT", "Cell", "Comparison")

# The columns of a matrix as a table of cells.
RECORD = (
    *("source", "attack", "target", "rate", "low", "high", "n", "clean_accuracy", "white_box"),
    *("eps", "norm", "defence"),
    *("baseline", "difference", "difference_low", "difference_high", "p_value"),
)

# Bounds that pass through decimal text may come back a rounding error outside the rate they enclose.
_SLACK = 1e-9


class Rate(float):
    """A rate in [0, 1], or NaN of no images, that carries its 95 % interval `low` to `high` and its count `n`."""

    low: float
    high: float
    n: int

    def __new__(cls, value: float, low: float, high: float, n: int) -> Self:
        rate = super().__new__(cls, value)
        rate.low, rate.high, rate.n = low, high, n
        return rate

    def __getnewargs__(self) -> tuple[float, float, float, int]:  # type: ignore[override]
        return float(self), self.low, self.high, self.n

    def __repr__(self) -> str:
        return f"Rate({float(self)!r}, low={self.low!r}, high={self.high!r}, n={self.n})"

    # Printing and CSV writing go through str and should give the number.
    def __str__(self) -> str:
        return float.__repr__(self)


@dataclass(frozen=True)
class Cell:
    """How often adversarial images made on `source` with `attack` are misclassified by `target`.

    Attributes:
        rate: errors / n, in [0, 1]; NaN where n is 0.
        low, high: 95 % Wilson interval of the rate; 0 and 1 where n is 0.
        n: images counted.
        clean_accuracy: accuracy of the target on the clean images, counted or not, in [0, 1]; NaN if not measured.
        white_box: error rate of the source itself on the adversarial images, likewise; NaN if not measured.

    Raises:
        ValueError: an empty name, a negative count, or a number outside [0, 1].
    """

    source: str
    attack: str
    target: str
    rate: float
    low: float
    high: float
    n: int
    clean_accuracy: float = math.nan
    white_box: float = math.nan

    def __post_init__(self) -> None:
        _check_names(self, ("source", "attack", "target"))
        check_count("n", self.n, low=0)
        for name in ("rate", "low", "high", "clean_accuracy", "white_box"):
            _check_span(name, getattr(self, name), 0.0, 1.0)
        _check_interval("rate", self.rate, self.low, self.high, self.n)

    @classmethod
    def counted(
        cls,
        source: str,
        attack: str,
        target: str,
        *,
        errors: int,
        n: int,
        clean_accuracy: float = math.nan,
        white_box: float = math.nan,
    ) -> Self:
        """The cell of `errors` misclassified images among `n`."""
        low, high = wilson(errors, n)
        rate = errors / n if n else math.nan
        return cls(source, attack, target, rate, low, high, n, clean_accuracy, white_box)

    @property
    def error(self) -> Rate:
        """The rate, with its interval and count."""
        return Rate(self.rate, self.low, self.high, self.n)

    @property
    def errors(self) -> int:
        """Misclassified images."""
        return round(self.rate * self.n) if self.n else 0


@dataclass(frozen=True)
class Comparison:
    """Two sources against one target, on the same images.

    Attributes:
        n: images that count for both sources; under the qualified protocol fewer than those of either cell.
        difference: error rate from `source` minus that from `baseline`, in [-1, 1]; NaN where n is 0.
        low, high: 95 % interval of the difference (Newcombe's method 10).
        p_value: exact two-sided McNemar test of no difference.
        only_baseline, only_source: images that fooled the target from one of the two only.

    Raises:
        ValueError: an empty name, a negative count, or a number outside its range.
    """

    baseline: str
    source: str
    attack: str
    target: str
    n: int
    difference: float
    low: float
    high: float
    p_value: float
    only_baseline: int
    only_source: int

    def __post_init__(self) -> None:
        _check_names(self, ("baseline", "source", "attack", "target"))
        for name in ("n", "only_baseline", "only_source"):
            check_count(name, getattr(self, name), low=0)
        for name in ("difference", "low", "high"):
            _check_span(name, getattr(self, name), -1.0, 1.0)
        _check_span("p_value", self.p_value, 0.0, 1.0)
        _check_interval("difference", self.difference, self.low, self.high, self.n)
        if self.only_baseline + self.only_source > self.n:
            raise ValueError(
                f"only_baseline, only_source: got {self.only_baseline} and {self.only_source}; allowed is a sum of at "
                f"most n = {self.n}"
            )

    @classmethod
    def of(cls, baseline: str, source: str, attack: str, target: str, result: Paired) -> Self:
        """The comparison whose first set of flags was the baseline's and whose second was the source's."""
        return cls(
            baseline,
            source,
            attack,
            target,
            n=result.n,
            difference=result.difference,
            low=result.low,
            high=result.high,
            p_value=result.p_value,
            only_baseline=result.only_first,
            only_source=result.only_second,
        )


@dataclass(frozen=True)
class TransferMatrix:
    """Error rates of targets on adversarial images of other models.

    Attributes:
        cells: one a combination of source, attack and target; combinations may be missing, none is repeated.
        comparisons: paired differences between two sources.
        config: what the matrix was measured with; numbers, text, None, and lists and mappings of those.
        versions: package name to version.

    Raises:
        ValueError: a repeated cell or comparison.
    """

    cells: tuple[Cell, ...]
    comparisons: tuple[Comparison, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_unique("cells", ((c.source, c.attack, c.target) for c in self.cells))
        _check_unique("comparisons", ((c.baseline, c.source, c.attack, c.target) for c in self.comparisons))

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources in order of first appearance."""
        return tuple(dict.fromkeys(cell.source for cell in self.cells))

    @property
    def attacks(self) -> tuple[str, ...]:
        """Names of the attacks in order of first appearance."""
        return tuple(dict.fromkeys(cell.attack for cell in self.cells))

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the targets in order of first appearance."""
        return tuple(dict.fromkeys(cell.target for cell in self.cells))

    @property
    def baselines(self) -> tuple[str, ...]:
        """Names of the baselines of the comparisons in order of first appearance."""
        return tuple(dict.fromkeys(comparison.baseline for comparison in self.comparisons))

    def find(self, source: str, attack: str, target: str) -> Cell | None:
        """The cell of one combination; None where it was not measured."""
        return self._index.get((source, attack, target))

    def cell(self, source: str, attack: str, target: str) -> Cell:
        """The cell of one combination.

        Raises:
            ValueError: an unknown name, or a combination that was not measured.
        """
        check_choice("source", source, self.sources)
        check_choice("attack", attack, self.attacks)
        check_choice("target", target, self.targets)
        cell = self.find(source, attack, target)
        if cell is None:
            raise ValueError(f"source, attack, target: {source!r}, {attack!r}, {target!r} was not measured")
        return cell

    def error(self, source: str, attack: str, target: str) -> Rate:
        """Error rate of `target`, in [0, 1]: a float with `.low` and `.high` of its 95 % interval and `.n` images.

        Raises:
            ValueError: an unknown name, or a combination that was not measured.
        """
        return self.cell(source, attack, target).error

    def comparisons_of(self, source: str, attack: str, target: str) -> tuple[Comparison, ...]:
        """The comparisons in which `source` is set against a baseline."""
        return tuple(c for c in self.comparisons if (c.source, c.attack, c.target) == (source, attack, target))

    def to_dict(self) -> dict[str, Any]:
        """What `save` writes; NaN becomes None, so that it is valid JSON.

        Raises:
            ValueError: a value in the config that JSON cannot hold.
        """
        return {
            "cells": [_jsonable("cells", asdict(cell)) for cell in self.cells],
            "comparisons": [_jsonable("comparisons", asdict(comparison)) for comparison in self.comparisons],
            "config": _jsonable("config", self.config),
            "versions": _jsonable("versions", self.versions),
        }

    @classmethod
    def from_dict(cls, value: object) -> Self:
        """The matrix that `to_dict` described; "comparisons", "config" and "versions" may be absent.

        Raises:
            ValueError: a missing key, a wrong type, or a number outside its range; the message says where.
        """
        document = _mapping("matrix", value)
        if "cells" not in document:
            raise ValueError('matrix: got no "cells"; allowed is what TransferMatrix.save wrote')
        return cls(
            tuple(_record(Cell, f"cells[{i}]", row) for i, row in enumerate(_list("cells", document["cells"]))),
            tuple(
                _record(Comparison, f"comparisons[{i}]", row)
                for i, row in enumerate(_list("comparisons", document.get("comparisons", [])))
            ),
            dict(_mapping("config", document.get("config", {}))),
            {name: str(version) for name, version in _mapping("versions", document.get("versions", {})).items()},
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the matrix as JSON; an existing file is replaced whole or not at all."""
        write_json(path, self.to_dict())

    def to_records(self) -> list[dict[str, Any]]:
        """A flat dict for each cell, as `pandas.DataFrame` takes them.

        Its names are in `RECORD`: those of `Cell`; `eps`, `norm` and `defence` where the configuration has them; and
        `baseline`, `difference` with `difference_low` to `difference_high`, and `p_value` of the cell's comparison, the
        first where there are several. What is not known is NaN for a number and None for text.
        """
        return [dict(zip(RECORD, self._record(cell), strict=True)) for cell in self.cells]

    def save_csv(self, path: str | os.PathLike[str]) -> None:
        """Write `to_records` as CSV with a header, whole or not at all; what is not known is left empty."""
        text = StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(RECORD)
        writer.writerows(map(_cell_text, record.values()) for record in self.to_records())
        write_text(path, text.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises:
            ValueError: the file cannot be read, is not JSON, or is not a transfer matrix.
        """
        document = read_json("matrix", path)
        try:
            return cls.from_dict(document)
        except ValueError as error:
            raise ValueError(f"matrix: {path} is not a transfer matrix: {error}") from error

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the heat map of all cells; the suffix says whether PNG, SVG or PDF.

        Raises:
            ValueError: another suffix, or a matrix without cells.
        """
        # matplotlib takes a second to import, which a matrix that is never drawn should not wait for.
        from alignfast.evaluation.plots import heat_map, save_figure

        save_figure(heat_map(self), path)

    def table(self) -> Table:
        """A table for the terminal: a row each source and attack, a column each target.

        A cell gives the error rate with its 95 % interval and, where the source was compared with a baseline on the
        same images, the difference in percentage points with its interval and p-value.
        """
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, caption=Text(self._caption()), caption_justify="left", show_lines=False)
        table.add_column("source", overflow="fold")
        table.add_column("attack", overflow="fold")
        for target in self.targets:
            table.add_column(Text(f"{target}\nclean {self._clean(target)}"), overflow="fold")
        table.add_column(Text("white box"), overflow="fold")
        for attack in self.attacks:
            for source in self.sources:
                if row := self._row(source, attack):
                    table.add_row(*row)
            table.add_section()
        return table

    def text(self) -> str:
        """`table` as plain text, as wide as it needs, for logs and pipes."""
        from rich.console import Console

        table = self.table()
        # A renderer that is told of no terminal assumes 80 columns and would fold the numbers.
        measure = Console(width=100_000).measure(table).maximum
        console = Console(width=measure, file=StringIO(), force_terminal=False, color_system=None)
        with console.capture() as capture:
            console.print(table)
        return "\n".join(line.rstrip() for line in capture.get().splitlines()).strip("\n") + "\n"

    @cached_property
    def _index(self) -> dict[tuple[str, str, str], Cell]:
        return {(cell.source, cell.attack, cell.target): cell for cell in self.cells}

    def _record(self, cell: Cell) -> list[Any]:
        against: list[Any] = [None, math.nan, math.nan, math.nan, math.nan]
        for c in self.comparisons_of(cell.source, cell.attack, cell.target)[:1]:
            against = [c.baseline, c.difference, c.low, c.high, c.p_value]
        eps = self._known("eps", cell.attack)
        known = [math.nan if eps is None else eps, self._known("norm", cell.attack)]
        return [*asdict(cell).values(), *known, self._known("defences", cell.target), *against]

    def _known(self, key: str, name: str) -> Any:
        """What the configuration says of an attack or a target; None if nothing."""
        values = self.config.get(key)
        return values.get(name) if isinstance(values, Mapping) else None

    def _row(self, source: str, attack: str) -> list[Text]:
        # Text objects, because rich would read "[57.1, 65.2]" and brackets in names as its markup.
        from rich.text import Text

        cells = {cell.target: cell for cell in self.cells if (cell.source, cell.attack) == (source, attack)}
        if not cells:
            return []
        row = [Text(source), Text(attack)]
        row += [Text(self._entry(cells[target])) if target in cells else Text("-") for target in self.targets]
        return [*row, Text(span_text(cell.white_box for cell in cells.values()))]

    def _entry(self, cell: Cell) -> str:
        lines = [rate_text(cell.rate, cell.low, cell.high)]
        several = len(self.baselines) > 1
        for comparison in self.comparisons_of(cell.source, cell.attack, cell.target):
            against = f" vs {comparison.baseline}" if several else ""
            difference = difference_text(comparison.difference, comparison.low, comparison.high)
            p_value = f" {p_text(comparison.p_value)}" if comparison.n else ""
            lines.append(f"{difference}{p_value}{against}")
        return "\n".join(lines)

    def _clean(self, target: str) -> str:
        return span_text(cell.clean_accuracy for cell in self.cells if cell.target == target)

    def _caption(self) -> str:
        counts = sorted({cell.n for cell in self.cells})
        images = "no images" if not counts else f"{counts[0]} images"
        if len(counts) > 1:
            images = f"{counts[0]} to {counts[-1]} images"
        caption = f"Error rate of the target, with its 95 % interval; {images} a cell."
        if self.comparisons:
            against = self.baselines[0] if len(self.baselines) == 1 else "the baseline"
            caption += f"\nSecond line: percentage points above {against} on the same images, McNemar test."
        return caption


def percent_text(value: float, digits: int = 1) -> str:
    """A fraction as a percentage, "n/a" for NaN."""
    return "n/a" if math.isnan(value) else f"{100 * value:.{digits}f} %"


def rate_text(rate: float, low: float, high: float) -> str:
    """A rate and its interval, as in "61.2 % [57.1, 65.2]"."""
    return "n/a" if math.isnan(rate) else f"{100 * rate:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def difference_text(difference: float, low: float, high: float) -> str:
    """A difference of rates in percentage points and its interval, as in "+5.2 [+2.1, +8.3]"."""
    if math.isnan(difference):
        return "n/a"
    return f"{_signed(difference)} [{_signed(low)}, {_signed(high)}]"


def p_text(p_value: float, symbol: str = "p") -> str:
    """A p-value, as in "p = 0.0031" and "p < 0.0001"."""
    if math.isnan(p_value):
        return f"{symbol} n/a"
    if p_value < 0.0001:
        return f"{symbol} < 0.0001"
    return f"{symbol} = {p_value:.4f}" if p_value < 0.1 else f"{symbol} = {p_value:.2f}"


def span_text(values: Iterable[float]) -> str:
    """The one percentage that all `values` share, or the lowest and highest."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "n/a"
    low, high = percent_text(min(known)), percent_text(max(known))
    return low if low == high else f"{low.removesuffix(' %')} to {high}"


def _signed(fraction: float) -> str:
    text = f"{100 * fraction:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def _check_names(record: object, names: Sequence[str]) -> None:
    for name in names:
        value = getattr(record, name)
        if not isinstance(value, str) or not value:
            raise ValueError(f"{name}: got {value!r}; allowed is text that is not empty")


def _check_span(name: str, value: object, low: float, high: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (math.isnan(value) or low <= value <= high):  # type: ignore[operator, arg-type]
        raise ValueError(f"{name}: got {value!r}; allowed is NaN (null) or a number in [{low:g}, {high:g}]")


def _check_interval(name: str, value: float, low: float, high: float, n: int) -> None:
    if math.isnan(value) != (n == 0):
        raise ValueError(f"{name}: got {value!r} for n = {n}; allowed is NaN (null) where n is 0 and only there")
    # Comparisons with NaN are false, so a missing value or bound passes.
    if value < low - _SLACK or value > high + _SLACK:
        raise ValueError(f"{name}: got {value!r} outside its interval [{low!r}, {high!r}]")


def _check_unique(name: str, keys: Iterable[tuple[str, ...]]) -> None:
    seen: set[tuple[str, ...]] = set()
    for key in keys:
        if key in seen:
            raise ValueError(f"{name}: {', '.join(key)} is given twice; allowed is once")
        seen.add(key)


def _cell_text(value: object) -> object:
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else value


def _jsonable(name: str, value: object) -> Any:
    """`value` in JSON's own types, with None for numbers JSON has no name for."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _jsonable(f"{name}.{key}", entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(f"{name}[{index}]", entry) for index, entry in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise ValueError(
        f"{name}: got {type(value).__name__}; allowed are numbers, text, paths, None, and lists and mappings of those"
    )


def _mapping(name: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}: got {type(value).__name__}; allowed is a mapping")
    return value


def _list(name: str, value: object) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{name}: got {type(value).__name__}; allowed is a list")
    return value


# Fields that may be NaN, and so null; a null elsewhere is a fault of the file.
_NULLABLE = frozenset({"rate", "clean_accuracy", "white_box", "difference"})


def _record(kind: type[RecordT], where: str, value: object) -> RecordT:
    row = _mapping(where, value)
    names = [entry.name for entry in fields(kind)]
    missing = [name for name in names if name not in row]
    if missing:
        raise ValueError(f"{where}: lacks {', '.join(missing)}")
    values: dict[str, Any] = {
        name: math.nan if row[name] is None and name in _NULLABLE else row[name] for name in names
    }
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from error
