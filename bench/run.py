"""Measures the ops: a table on standard output, and a file for whoever compares runs."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from alignfast._C import cpu_isa
from alignfast.checks import check_count, check_device, check_known, check_number
from alignfast.doctor import cpu_backend, cuda_backend, triton_backend
from alignfast.files import write_json
from alignfast.progress import progress
from alignfast.versions import package_versions

from .harness import Result, Spread, measure
from .registry import DTYPES, OPS, Case, select

ALLOCATOR = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
SECONDS, QUICK_SECONDS = 2.0, 0.3
PLAIN_WIDTH = 160
INTERRUPTED = 130

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
# typer keeps its parser's exceptions to itself; every usage error has this base.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]


@dataclass(frozen=True)
class Settings:
    device: str
    threads: int
    seconds: float
    compile: bool


def run(arguments: Sequence[str]) -> int:
    """0; 1 where an op is wrong, or with --gate missed a target; 2 after one line on bad input; 130 if interrupted."""
    try:
        result = app(args=list(arguments), standalone_mode=False)
    except UsageError as error:
        return _fail(error.format_message() if hasattr(error, "format_message") else str(error), 2)
    except ValueError as error:
        return _fail(str(error), 2)
    except OSError as error:
        return _fail(str(error), 1)
    # The parser turns an interrupt into this code, and says nothing.
    if result == INTERRUPTED:
        return _fail("interrupted", INTERRUPTED)
    return result if isinstance(result, int) else 0


@app.command()
def main(
    op: Annotated[list[str] | None, typer.Option(help=f"{', '.join(OPS)}; repeat for several.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help=f"{', '.join(DTYPES)}; repeat for several.")] = None,
    match: Annotated[str, typer.Option(help="Only cases whose name op/variant/dtype/shape holds this.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="The smallest shapes, for a short time.")] = False,
    seconds: Annotated[float | None, typer.Option(help=f"For each case; {SECONDS:g}, or {QUICK_SECONDS:g}.")] = None,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Also torch.compile.")] = True,
    threads: Annotated[int | None, typer.Option(help="Of torch; its own choice by default.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    json: Annotated[Path | None, typer.Option(help="A new file for everything that was measured.")] = None,
    gate: Annotated[bool, typer.Option("--gate", help="A target that was missed is a failure.")] = False,
    listing: Annotated[bool, typer.Option("--list", help="Print the names of the cases and stop.")] = False,
) -> int:
    """Every op against the expression people write without it, eager and compiled, and against copying its bytes.

    Ratios are times of the other over times of the op: above 1 the op is faster; that of "copy" is the share of the
    memory's bandwidth. Times and ratios are medians with half the distance of the quartiles. Rounds in
    which other processes kept a thread waiting for more than a twentieth of the time are left out, and targets are not
    judged where too few are left. An op whose result is wrong has no speed.
    """
    check_known("op", "op", op or (), OPS)
    check_known("dtype", "dtype", dtype or (), DTYPES)
    cases = select(op or (), dtype or (), match, smallest=quick)
    if not cases:
        raise ValueError(f"match: got {match!r}; allowed is a part of some case's name, which --list prints")
    if listing:
        print(*(case.name for case in cases), sep="\n")
        return 0
    if seconds is not None:
        check_number("seconds", seconds, low=0.0)
    if threads is not None:
        torch.set_num_threads(check_count("threads", threads, high=os.cpu_count()))
    if json is not None:
        _check_new(json)
    budget = seconds if seconds is not None else QUICK_SECONDS if quick else SECONDS
    settings = Settings(str(check_device(device)), torch.get_num_threads(), budget, compiled)
    facts = machine()
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    for note in notes(facts, settings):
        console.print(note, highlight=False, soft_wrap=True)
    results = _measure_all(cases, settings, console)
    if json is not None:
        write_json(json, report(results, settings, facts))
    return verdict(results, gate=gate)


def verdict(results: Iterable[Result], *, gate: bool) -> int:
    """1 where a result was wrong, and with `gate` where a target was missed or could not be judged; else 0."""
    return int(any(result.fault is not None or (gate and not _passed(result)) for result in results))


def _passed(result: Result) -> bool:
    return not result.case.targets or not (result.missed or result.disturbed)


def report(results: Sequence[Result], settings: Settings, facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "settings": asdict(settings),
        "machine": facts,
        "versions": package_versions(),
        "cases": [result.to_dict() for result in results],
    }


def machine() -> dict[str, Any]:
    return {
        "processor": _processor(),
        "architecture": platform.machine(),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "kernels": cpu_isa(),
        "allocator": {name: os.environ.get(name) for name in ALLOCATOR},
        "backends": {"cpu": cpu_backend(), "cuda": cuda_backend(), "triton": triton_backend()},
    }


def notes(facts: dict[str, Any], settings: Settings) -> list[str]:
    """What was run where, and what makes its numbers worse than they could be."""
    threads = f"{settings.threads} thread{'s' if settings.threads > 1 else ''}"
    lines = [
        f"{facts['processor']}, {threads}, kernels for {facts['kernels']}, torch {torch.__version__}, "
        f"on {settings.device}"
    ]
    if settings.device == "cpu" and not all(facts["allocator"].values()):
        lines.append(
            f"Note: {' and '.join(ALLOCATOR)} are not both set (`make bench` sets them); large tensors may be faulted "
            "in anew at every call, most of all for the chains of eager PyTorch."
        )
    return lines


def table(results: Sequence[Result]) -> Table:
    """The results of one op."""
    shown = Table(title=results[0].case.op, title_justify="left")
    for name in ("variant", "dtype", "shape"):
        shown.add_column(name)
    sides = [side for side in ("eager", "compiled", "copy") if any(side in result.rounds for result in results)]
    numbers = ("MB moved", "ms", "GB/s", *(f"vs {side}" if side != "copy" else "of copy" for side in sides))
    for name in numbers:
        shown.add_column(name, justify="right")
    shown.add_column("target")
    for result in results:
        shown.add_row(*_row(result, sides))
    return shown


def _row(result: Result, sides: Sequence[str]) -> list[str]:
    case = result.case
    cells = [case.variant, case.dtype, case.size, f"{result.moved / 1e6:.1f}"]
    if result.fault is not None:
        return [*cells, *("" for _ in range(2 + len(sides))), f"WRONG: {result.fault}"]
    ratios = result.ratios
    cells += [_spread(result.seconds["ours"], 1e3), f"{result.gigabytes_per_second:.3g}"]
    cells += [_spread(ratios[side]) if side in ratios else "" for side in sides]
    return [*cells, _judgement(result)]


def _judgement(result: Result) -> str:
    if result.disturbed:
        quiet = sum(one.quiet for one in result.measured)
        return f"DISTURBED: {quiet} of {len(result.measured)} rounds quiet"
    if result.missed:
        return f"missed: {', '.join(f'{side} {result.case.targets[side]:g}' for side in result.missed)}"
    return "met" if result.case.targets else ""


def _spread(spread: Spread, unit: float = 1.0) -> str:
    """The median, and half of the way between the quartiles in percent of it."""
    return f"{spread.median * unit:.3g} ±{(spread.high - spread.low) / 2 / spread.median:.0%}"


def _measure_all(cases: Sequence[Case], settings: Settings, console: Console) -> list[Result]:
    results: list[Result] = []
    for name, group in groupby(cases, lambda case: case.op):
        of_op = list(group)
        with progress(name, len(of_op), "cases") as advance:
            for case in of_op:
                results.append(
                    measure(case, device=settings.device, seconds=settings.seconds, compiled=settings.compile)
                )
                advance(1, case.name)
        console.print(table(results[-len(of_op) :]))
    return results


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _check_new(path: Path) -> None:
    """Before hours of measuring, not after them."""
    if path.exists():
        raise ValueError(f"json: {path} exists; give a new file")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"json: cannot write to {path.parent}; give a file in a writable folder")


def _fail(message: str, code: int) -> int:
    print(f"bench: {' '.join(message.split())}", file=sys.stderr)
    return code
