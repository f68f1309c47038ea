"""`alignfast bench`: tables on standard output, and files for whoever compares runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from rich.console import Console
from rich.table import Table

from alignfast.checks import check_choice, check_count, check_device, check_known, check_number
from alignfast.evaluation.plots import FORMATS, save_figure
from alignfast.files import write_json, write_text
from alignfast.progress import progress
from alignfast.versions import package_versions

from .harness import Result, expectations, measure
from .history import check_new, dated, make_folder, newest, read_report, seconds_of
from .limits import Limits, measure_limits
from .machine import machine, smi
from .peak_memory import Peaks, measure_memory, with_memory
from .peers import PEERS, installed
from .picture import ratio_plot
from .registry import DEVICES, DTYPES, GROUPS, OPS, Case, select
from .tables import by_subject, expected_table, limits_line, markdown, memory_table, results_table

Measured = TypeVar("Measured", Result, Peaks)

SECONDS, QUICK_SECONDS = 2.0, 0.3
PLAIN_WIDTH = 200


@dataclass(frozen=True)
class Settings:
    device: str
    threads: int
    seconds: float
    compile: bool


@dataclass(frozen=True)
class Outputs:
    """Files to write in the end; None for none."""

    json: Path | None = None
    history: Path | None = None
    markdown: Path | None = None
    plot: Path | None = None

    def check(self) -> None:
        """Before anything is measured.

        Raises:
            ValueError: a file that exists or cannot be written, or a plot of an unknown format.
        """
        for name in ("json", "markdown", "plot"):
            path = getattr(self, name)
            if path is not None:
                check_new(name, path)
        if self.plot is not None and self.plot.suffix.lower() not in FORMATS:
            raise ValueError(f"plot: got {self.plot.name!r}; allowed is a name that ends in {', '.join(FORMATS)}")
        if self.history is not None:
            make_folder("history", self.history)

    def write(self, report: Mapping[str, Any], before: Mapping[str, float]) -> None:
        for path in (self.json, None if self.history is None else dated(self.history)):
            if path is not None:
                write_json(path, report)
        if self.markdown is not None:
            write_text(self.markdown, markdown(report, before))
        if self.plot is not None:
            save_figure(ratio_plot(report["cases"]), self.plot)


def bench_command(
    group: Annotated[list[str] | None, typer.Option(help=f"{', '.join(GROUPS)}; repeat for several.")] = None,
    op: Annotated[list[str] | None, typer.Option(help=f"Ops alone: {', '.join(OPS)}; repeat for several.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help=f"{', '.join(DTYPES)}; repeat for several.")] = None,
    match: Annotated[str, typer.Option(help="Only cases whose name subject/variant/dtype/shape holds this.")] = "",
    every: Annotated[
        bool, typer.Option("--all", help="Also cases that are left out to end within 20 minutes; so does --match.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="The smallest shapes, for a short time.")] = False,
    seconds: Annotated[float | None, typer.Option(help=f"For each case; {SECONDS:g}, or {QUICK_SECONDS:g}.")] = None,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Ops: also torch.compile.")] = True,
    threads: Annotated[int | None, typer.Option(help="Of torch; its own choice by default.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    memory: Annotated[
        bool, typer.Option("--memory", help="Peak memory of whole models' passes instead of times.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="A new file for everything that was measured.")] = None,
    history: Annotated[
        Path | None, typer.Option(help="A folder of dated runs: adds this one, and compares it with the one before.")
    ] = None,
    compare: Annotated[Path | None, typer.Option(help="A file of an earlier run, for the column 'vs before'.")] = None,
    read: Annotated[Path | None, typer.Option(help="A file of an earlier run, shown instead of measuring.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="A new file for the tables as Markdown.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help=f"A new file for a plot of the ratios: {', '.join(FORMATS)}.")
    ] = None,
    gate: Annotated[bool, typer.Option("--gate", help="A target that was missed is a failure.")] = False,
    listing: Annotated[bool, typer.Option("--list", help="Print the names of the cases and stop.")] = False,
    expect: Annotated[
        bool, typer.Option("--expect", help="Print what an A100 and an H100 need at the least and stop; needs no GPU.")
    ] = False,
) -> int:
    """Measure ops, models, attacks, alignment and files against what people use without them, and the hardware.

    Columns "vs" are the time of the other over ours: above 1 ours is faster. Columns "of" are shares of a limit:
    copying as many bytes, bare passes of the models, products of matrices, the data sheet's peak. Times and ratios are
    medians with half the distance of the quartiles. Rounds in which other processes kept a thread waiting for more
    than a twentieth of the time are left out, and targets are not judged where too few are left. What gives a wrong
    result has no speed.
    """
    check_known("group", "group", group or (), GROUPS)
    check_known("op", "op", op or (), OPS)
    check_known("dtype", "dtype", dtype or (), DTYPES)
    kind = "cuda" if expect else check_choice("device", device.partition(":")[0], DEVICES)
    extended = every or quick or bool(match) or kind == "cuda"
    cases = select(group or (), op or (), dtype or (), match, device=kind, smallest=quick, extended=extended)
    cases = with_memory(cases) if memory else cases
    if not cases:
        raise ValueError(f"match: got {match!r}; allowed is a part of some chosen case's name, which --list prints")
    if listing:
        print(*(case.name for case in cases), sep="\n")
        return 0
    if seconds is not None:
        check_number("seconds", seconds, low=0.0)
    if threads is not None:
        torch.set_num_threads(check_count("threads", threads, high=os.cpu_count()))
    if memory and plot is not None:
        raise ValueError("plot: got a file beside --memory, which times nothing; allowed is one of both")
    outputs = Outputs(json, history, markdown, plot)
    outputs.check()
    earlier = compare or (newest(history) if history is not None else None)
    before = {} if earlier is None else seconds_of(read_report(earlier, "compare"))
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    if expect:
        return _expect(cases, json, console)
    if read is not None:
        return _show(read_report(read, "read"), before, outputs, console)
    budget = seconds if seconds is not None else QUICK_SECONDS if quick else SECONDS
    settings = Settings(str(check_device(device)), torch.get_num_threads(), budget, compiled)
    told, code = _measure(cases, settings, before, console, memory=memory, gate=gate)
    outputs.write(told, before)
    return code


def _measure(
    cases: Sequence[Case],
    settings: Settings,
    before: Mapping[str, float],
    console: Console,
    *,
    memory: bool,
    gate: bool,
) -> tuple[dict[str, Any], int]:
    """What is told of the run, and the code that the command ends with."""
    place = torch.device(settings.device)
    facts, skipped = machine(place), lacking(cases, place)
    for note in notes(facts, settings, skipped):
        console.print(note, highlight=False, soft_wrap=True)
    present = [case for case in cases if case.name not in skipped]
    if memory:
        peak = partial(measure_memory, device=settings.device, threads=settings.threads)
        peaks = _each(present, peak, memory_table, console)
        return report(settings, facts, skipped, peaks=peaks), verdict(peaks, gate=gate)
    limits = measure_limits(place)
    console.print(limits_line(asdict(limits)), highlight=False, soft_wrap=True)
    time = partial(measure, device=settings.device, seconds=settings.seconds, compiled=settings.compile, limits=limits)
    results = _each(present, time, partial(results_table, before=before), console)
    after = smi(place) if place.type == "cuda" else None
    told = report(settings, facts, skipped, limits=limits, results=results) | {"smi_after": after}
    return told, verdict(results, gate=gate)


def verdict(results: Iterable[Result | Peaks], *, gate: bool) -> int:
    """1 where a result was wrong, and with `gate` where a target was missed or could not be judged; else 0."""
    return int(any(result.fault is not None or (gate and not _passed(result)) for result in results))


def _passed(result: Result | Peaks) -> bool:
    if isinstance(result, Peaks):
        return not result.missed
    return not result.case.targets or not (result.missed or result.disturbed)


def report(
    settings: Settings,
    facts: dict[str, Any],
    skipped: Mapping[str, str],
    *,
    limits: Limits | None = None,
    results: Sequence[Result] = (),
    peaks: Sequence[Peaks] = (),
) -> dict[str, Any]:
    return {
        "settings": asdict(settings),
        "machine": facts,
        "versions": package_versions() | {name: _version(name) for name in PEERS},
        "limits": None if limits is None else asdict(limits),
        "skipped": dict(skipped),
        "cases": [result.to_dict() for result in results],
        "memory": [one.to_dict() for one in peaks],
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def lacking(cases: Sequence[Case], device: torch.device) -> dict[str, str]:
    """Why, by the name of a case or of a peer, it is not measured here."""
    skipped = {case.name: reason for case in cases if (reason := case.lacks(device)) is not None}
    if any(case.group == "attacks" for case in cases):
        skipped |= {name: f"not installed ({peer.install})" for name, peer in PEERS.items() if installed(name) is None}
    return skipped


def notes(facts: dict[str, Any], settings: Settings, skipped: Mapping[str, str]) -> list[str]:
    """What was run where, what makes its numbers worse than they could be, and what is not measured."""
    threads = f"{settings.threads} thread{'s' if settings.threads > 1 else ''}"
    gpu = facts["gpu"]
    if gpu is None:
        where = f"{facts['processor']}, {threads}, kernels for {facts['kernels']}"
    else:
        driver = "unknown" if gpu["smi"] is None else gpu["smi"]["driver_version"]
        where = f"{gpu['name']}, driver {driver}, backend of the ops: {facts['chosen']}"
    lines = [f"{where}, torch {torch.__version__}, on {settings.device}"]
    if gpu is None and not facts["memory"]["kept"]:
        lines.append(
            f"Note: freed memory goes back to the kernel ({facts['memory']['reason']}); large tensors are faulted in "
            "anew at every call, most of all for the chains of eager PyTorch."
        )
    for reason in dict.fromkeys(skipped.values()):
        names = [name for name, why in skipped.items() if why == reason]
        lines.append(f"Skipped, {reason}: {', '.join(names)}.")
    return lines


def _show(told: Mapping[str, Any], before: Mapping[str, float], outputs: Outputs, console: Console) -> int:
    console.print(limits_line(told["limits"]), highlight=False, soft_wrap=True)
    for _, results in by_subject(told["cases"]):
        console.print(results_table(results, before))
    for _, peaks in by_subject(told["memory"]):
        console.print(memory_table(peaks))
    outputs.write(told, before)
    return 0


def _expect(cases: Sequence[Case], json: Path | None, console: Console) -> int:
    for _, group in groupby(cases, lambda case: case.subject):
        console.print(expected_table(list(group)))
    if json is not None:
        costs = {case.name: case.subject_on("meta").cost for case in cases}
        write_json(json, {"expected": {name: asdict(cost) | expectations(cost) for name, cost in costs.items()}})
    return 0


def _each(
    cases: Sequence[Case],
    measured: Callable[[Case], Measured],
    table: Callable[[Sequence[Mapping[str, Any]]], Table],
    console: Console,
) -> list[Measured]:
    """What is measured of the cases, with a table for each subject as soon as it is there."""
    results: list[Measured] = []
    for name, group in groupby(cases, lambda case: case.subject):
        of_subject = list(group)
        with progress(name, len(of_subject), "cases") as advance:
            for case in of_subject:
                results.append(measured(case))
                advance(1, case.name)
        console.print(table([result.to_dict() for result in results[-len(of_subject) :]]))
    return results
