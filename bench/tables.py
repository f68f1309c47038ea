"""What is printed: a table a subject."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from .harness import Result, Spread, expectations
from .registry import Case
from .roofline import GPUS
from .subject import Cost

# By side: the time of a limit over ours is our share of it, the time of a rival how often we go into it.
COLUMNS = {
    "eager": "vs eager",
    "compiled": "vs compiled",
    "copy": "of copy",
    "no graph": "vs no graph",
    "torchattacks": "vs torchattacks",
    "plain": "vs plain loop",
    "authors": "vs authors' loop",
    "model": "of model",
}


def results_table(results: Sequence[Result], before: Mapping[str, float]) -> Table:
    """The results of one subject, beside the seconds that ours took before, by the name of the case."""
    cost = results[0].cost
    on_gpu = results[0].gpu is not None
    sides = [side for side in COLUMNS if any(side in result.rounds for result in results)]
    numbers = ["ms", "GB/s" if cost.moved else "TFLOP/s", *(COLUMNS[side] for side in sides)]
    if before:
        numbers.append("vs before")
    if on_gpu:
        numbers += [*(f"{gpu.name} ms" for gpu in GPUS), "of peak"]
    shown = _table(results[0].case, cost, numbers)
    shown.add_column("target")
    for result in results:
        cells = _cells(result, sides, before) if result.fault is None else ["" for _ in numbers]
        shown.add_row(*_head(result.case, result.cost), *cells, _judgement(result))
    return shown


def expected_table(cases: Sequence[Case]) -> Table:
    """The least milliseconds of one subject's cases, by GPU and limit."""
    costs = [case.subject_on("meta").cost for case in cases]
    limits = [(gpu, limit) for gpu in GPUS for limit in gpu.limits(costs[0])]
    shown = _table(cases[0], costs[0], [f"{gpu.name} {limit} ms" for gpu, limit in limits])
    for case, cost in zip(cases, costs, strict=True):
        times = expectations(cost)
        shown.add_row(*_head(case, cost), *(f"{times[gpu.name][limit] * 1e3:.4g}" for gpu, limit in limits))
    return shown


def _table(case: Case, cost: Cost, numbers: Sequence[str]) -> Table:
    shown = Table(title=case.subject, title_justify="left")
    for name in ("variant", "dtype", "shape"):
        shown.add_column(name)
    for name in ("MB moved" if cost.moved else "TFLOP", *numbers):
        shown.add_column(name, justify="right")
    return shown


def _head(case: Case, cost: Cost) -> list[str]:
    amount = f"{cost.moved / 1e6:.1f}" if cost.moved else f"{cost.flops / 1e12:.3g}"
    return [case.variant, case.dtype, case.size, amount]


def _cells(result: Result, sides: Sequence[str], before: Mapping[str, float]) -> list[str]:
    ours, ratios = result.seconds["ours"], result.ratios
    rate = result.gigabytes_per_second or result.teraflops_per_second or 0.0
    cells = [_spread(ours, 1e3), f"{rate:.4g}{' (L2)' if result.cached else ''}"]
    cells += [_spread(ratios[side]) if side in ratios else "" for side in sides]
    if before:
        earlier = before.get(result.case.name)
        cells.append("" if earlier is None else f"{earlier / ours.median:.3g}")
    if result.gpu is not None:
        expected = expectations(result.cost)
        cells += [f"{expected[gpu.name][result.limit] * 1e3:.4g}" for gpu in GPUS]
        cells.append("" if result.of_peak is None else f"{result.of_peak:.2f} ({result.limit})")
    return cells


def _judgement(result: Result) -> str:
    if result.fault is not None:
        return f"WRONG: {result.fault}"
    if result.disturbed:
        quiet = sum(one.quiet for one in result.measured)
        return f"DISTURBED: {quiet} of {len(result.measured)} rounds quiet"
    if result.missed:
        return f"missed: {', '.join(f'{side} {result.case.targets[side]:g}' for side in result.missed)}"
    return "met" if result.case.targets else ""


def _spread(spread: Spread, unit: float = 1.0) -> str:
    """The median, and half of the way between the quartiles in percent of it."""
    return f"{spread.median * unit:.4g} ±{(spread.high - spread.low) / 2 / spread.median:.0%}"
