"""What is printed, on a terminal or as Markdown, from results in the form in which files hold them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.table import Table

from .harness import expectations
from .registry import Case
from .roofline import GPUS
from .subject import Cost

Results = Sequence[Mapping[str, Any]]
Grid = tuple[list[str], list[list[str]]]

# By side: the time of a limit over ours is our share of it, the time of a rival how often we go into it.
COLUMNS = {
    "eager": "vs eager",
    "compiled": "vs compiled",
    "copy": "of copy",
    "no graph": "vs no graph",
    "torchattacks": "vs torchattacks",
    "torchattack": "vs torchattack",
    "foolbox": "vs foolbox",
    "as loaded": "vs as loaded",
    "plain": "vs plain loop",
    "authors": "vs authors' loop",
    "torchvision": "vs torchvision",
    "PIL": "vs PIL",
    "model": "of model",
}
# Of the columns of a table, those that hold words.
WORDS = ("variant", "dtype", "shape", "target")


def results_grid(results: Results, before: Mapping[str, float]) -> Grid:
    """Headings and rows of one subject's results, beside the seconds that ours took before, by the name of the case."""
    moves, on_gpu = bool(results[0]["bytes"]), bool(results[0]["expected"])
    sides = [side for side in COLUMNS if any(side in result["ratios"] for result in results)]
    numbers = ["ms", "GB/s" if moves else "TFLOP/s", *(COLUMNS[side] for side in sides)]
    if any(result["of_gemm"] for result in results):
        numbers.append("of GEMM")
    if before:
        numbers.append("vs before")
    if on_gpu:
        numbers += [*(f"{gpu.name} ms" for gpu in GPUS), "of peak"]
    rows = []
    for result in results:
        cells = _cells(result, sides, before) if result["seconds"] else {}
        rows.append([*_head(result), *(cells.get(name, "") for name in numbers), judgement(result)])
    return ["variant", "dtype", "shape", "MB moved" if moves else "TFLOP", *numbers, "target"], rows


def memory_grid(results: Results) -> Grid:
    """Headings and rows of one subject's peaks, as `peak_memory.Peaks` gives them."""
    sides = list(dict.fromkeys(side for result in results for side in result["peak_bytes"]))
    heads = ["variant", "dtype", "shape", *(f"{side} MB" for side in sides), "of torchattacks", "target"]
    rows = []
    for result in results:
        peaks, share = result["peak_bytes"], result["of_torchattacks"]
        cells = [f"{peaks[side] / 1e6:.0f}" if side in peaks else "" for side in sides]
        told = _memory_judgement(result)
        rows.append([*_names(result), *cells, "" if share is None else f"{share:.2f}", told])
    return heads, rows


def results_table(results: Results, before: Mapping[str, float]) -> Table:
    return _table(results[0]["subject"], results_grid(results, before))


def memory_table(results: Results) -> Table:
    return _table(f"{results[0]['subject']}: peak memory of a call", memory_grid(results))


def expected_table(cases: Sequence[Case]) -> Table:
    """The least milliseconds of one subject's cases, by GPU and limit."""
    costs = [case.subject_on("meta").cost for case in cases]
    limits = [(gpu, limit) for gpu in GPUS for limit in gpu.limits(costs[0])]
    heads = ["variant", "dtype", "shape", _amount_name(costs[0]), *(f"{gpu.name} {limit} ms" for gpu, limit in limits)]
    rows = []
    for case, cost in zip(cases, costs, strict=True):
        times = expectations(cost)
        cells = [f"{times[gpu.name][limit] * 1e3:.4g}" for gpu, limit in limits]
        rows.append([case.variant, case.dtype, case.size, _amount(cost), *cells])
    return _table(cases[0].subject, (heads, rows))


def markdown(report: Mapping[str, Any], before: Mapping[str, float]) -> str:
    """All of a report's tables, each under its subject, after a line that says what they were measured on."""
    machine, settings = report["machine"], report["settings"]
    where = machine["gpu"]["name"] if machine["gpu"] else f"{machine['processor']}, {settings['threads']} threads"
    parts = [f"{where}, torch {report['versions']['torch']}. {limits_line(report['limits'])}"]
    for subject, results in by_subject(report["cases"]):
        parts += [f"### {subject}", _markdown_table(results_grid(results, before))]
    for subject, peaks in by_subject(report["memory"]):
        parts += [f"### {subject}: peak memory of a call", _markdown_table(memory_grid(peaks))]
    return "\n\n".join(parts) + "\n"


def by_subject(results: Iterable[Mapping[str, Any]]) -> list[tuple[str, Results]]:
    return [(subject, list(group)) for subject, group in groupby(results, lambda result: str(result["subject"]))]


def limits_line(limits: Mapping[str, Any] | None) -> str:
    if limits is None:
        return "Limits were not measured."
    rates = ", ".join(f"{name} {rate / 1e9:.4g}" for name, rate in limits["gemm"].items())
    return f"Products of matrices (GEMM) in GFLOP/s: {rates}; copies: {limits['copy'] / 1e9:.3g} GB/s."


def judgement(result: Mapping[str, Any]) -> str:
    targets, rounds = result["targets"], result["rounds"]
    if result["wrong"] is not None:
        return f"WRONG: {result['wrong']}"
    if result["disturbed"]:
        return f"DISTURBED: {rounds['quiet']} of {rounds['measured']} rounds quiet"
    if result["missed"]:
        return f"missed: {', '.join(f'{side} {targets[side]:g}' for side in result['missed'])}"
    return "met" if targets else ""


def _memory_judgement(result: Mapping[str, Any]) -> str:
    if result["wrong"] is not None:
        return f"WRONG: {result['wrong']}"
    if result["target"] is None or result["of_torchattacks"] is None:
        return ""
    return f"missed: {result['target']:g}" if result["missed"] else "met"


def _table(title: str, grid: Grid) -> Table:
    heads, rows = grid
    shown = Table(title=title, title_justify="left")
    for name in heads:
        shown.add_column(name, justify="left" if name in WORDS else "right")
    for row in rows:
        shown.add_row(*row)
    return shown


def _markdown_table(grid: Grid) -> str:
    heads, rows = grid
    marks = ["---" if name in WORDS else "---:" for name in heads]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in (heads, marks, *rows))


def _names(result: Mapping[str, Any]) -> list[str]:
    return [result["variant"], result["dtype"], "x".join(map(str, result["shape"]))]


def _head(result: Mapping[str, Any]) -> list[str]:
    return [*_names(result), _amount(Cost(result["bytes"], result["flops"]))]


def _amount_name(cost: Cost) -> str:
    return "MB moved" if cost.moved else "TFLOP"


def _amount(cost: Cost) -> str:
    return f"{cost.moved / 1e6:.1f}" if cost.moved else f"{cost.flops / 1e12:.3g}"


def _cells(result: Mapping[str, Any], sides: Sequence[str], before: Mapping[str, float]) -> dict[str, str]:
    """By heading; what is not known is left out."""
    ours, ratios, expected = result["seconds"]["ours"], result["ratios"], result["expected"]
    cells = {"ms": _spread(ours, 1e3)}
    for name, rate in (("GB/s", "gigabytes_per_second"), ("TFLOP/s", "teraflops_per_second")):
        if result[rate] is not None:
            cells[name] = f"{result[rate]:.4g}{' (L2)' if result['fits_l2'] else ''}"
    cells |= {COLUMNS[side]: _spread(ratios[side]) for side in sides if side in ratios}
    if result["of_gemm"] is not None:
        cells["of GEMM"] = f"{result['of_gemm']:.2f}"
    if result["name"] in before:
        cells["vs before"] = f"{before[result['name']] / ours['median']:.3g}"
    for gpu, limits in expected.items():
        cells[f"{gpu} ms"] = f"{limits[result['limit']] * 1e3:.4g}"
    if result["of_peak"] is not None:
        cells["of peak"] = f"{result['of_peak']:.2f} ({result['limit']})"
    return cells


def _spread(spread: Mapping[str, float], unit: float = 1.0) -> str:
    """The median, and half of the way between the quartiles in percent of it."""
    return f"{spread['median'] * unit:.4g} ±{(spread['high'] - spread['low']) / 2 / spread['median']:.0%}"
