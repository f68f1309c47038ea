"""`alignfast bench`: tables on standard output, and a file for whoever compares runs."""

from __future__ import annotations

import json as jsonlib
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from alignfast.checks import check_choice, check_count, check_device, check_known, check_number
from alignfast.files import write_json
from alignfast.progress import progress
from alignfast.versions import package_versions

from .harness import Result, expectations, measure
from .machine import ALLOCATOR, machine, smi
from .registry import DEVICES, DTYPES, GROUPS, OPS, Case, select
from .runs import torchattacks
from .tables import expected_table, results_table

SECONDS, QUICK_SECONDS = 2.0, 0.3
PLAIN_WIDTH = 200


@dataclass(frozen=True)
class Settings:
    device: str
    threads: int
    seconds: float
    compile: bool


def bench_command(
    group: Annotated[list[str] | None, typer.Option(help=f"{', '.join(GROUPS)}; repeat for several.")] = None,
    op: Annotated[list[str] | None, typer.Option(help=f"Ops alone: {', '.join(OPS)}; repeat for several.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help=f"{', '.join(DTYPES)}; repeat for several.")] = None,
    match: Annotated[str, typer.Option(help="Only cases whose name subject/variant/dtype/shape holds this.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="The smallest shapes, for a short time.")] = False,
    seconds: Annotated[float | None, typer.Option(help=f"For each case; {SECONDS:g}, or {QUICK_SECONDS:g}.")] = None,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Ops: also torch.compile.")] = True,
    threads: Annotated[int | None, typer.Option(help="Of torch; its own choice by default.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    json: Annotated[Path | None, typer.Option(help="A new file for everything that was measured.")] = None,
    compare: Annotated[Path | None, typer.Option(help="A file of an earlier run, for the column 'vs before'.")] = None,
    gate: Annotated[bool, typer.Option("--gate", help="A target that was missed is a failure.")] = False,
    listing: Annotated[bool, typer.Option("--list", help="Print the names of the cases and stop.")] = False,
    expect: Annotated[
        bool, typer.Option("--expect", help="Print what an A100 and an H100 need at the least and stop; needs no GPU.")
    ] = False,
) -> int:
    """Measure ops, attacks and alignment against what people use without them, and against the hardware.

    Columns "vs" are the time of the other over ours: above 1 ours is faster. Columns "of" are shares of a limit:
    copying as many bytes, bare passes of the models, the data sheet's peak. Times and ratios are medians with half the
    distance of the quartiles. Rounds in which other processes kept a thread waiting for more than a twentieth of
    the time are left out, and targets are not judged where too few are left. What gives a wrong result has no speed.
    """
    check_known("group", "group", group or (), GROUPS)
    check_known("op", "op", op or (), OPS)
    check_known("dtype", "dtype", dtype or (), DTYPES)
    kind = "cuda" if expect else check_choice("device", device.partition(":")[0], DEVICES)
    cases = select(group or (), op or (), dtype or (), match, device=kind, smallest=quick)
    if not cases:
        raise ValueError(f"match: got {match!r}; allowed is a part of some chosen case's name, which --list prints")
    if listing:
        print(*(case.name for case in cases), sep="\n")
        return 0
    if seconds is not None:
        check_number("seconds", seconds, low=0.0)
    if threads is not None:
        torch.set_num_threads(check_count("threads", threads, high=os.cpu_count()))
    if json is not None:
        _check_new(json)
    before = {} if compare is None else read_seconds(compare)
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    if expect:
        return _expect(cases, json, console)
    place = check_device(device)
    budget = seconds if seconds is not None else QUICK_SECONDS if quick else SECONDS
    settings = Settings(str(place), torch.get_num_threads(), budget, compiled)
    facts = machine(place)
    for note in notes(facts, settings, cases):
        console.print(note, highlight=False, soft_wrap=True)
    results = _measure_all(cases, settings, before, console)
    if json is not None:
        after = smi(place) if place.type == "cuda" else None
        write_json(json, report(results, settings, facts) | {"smi_after": after})
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
        "versions": package_versions() | {"torchattacks": getattr(torchattacks(), "__version__", "absent")},
        "cases": [result.to_dict() for result in results],
    }


def read_seconds(path: Path) -> dict[str, float]:
    """What ours took in an earlier run, by the name of the case."""
    try:
        cases = jsonlib.loads(path.read_text(encoding="utf-8"))["cases"]
        return {case["name"]: float(case["seconds"]["ours"]["median"]) for case in cases if case["seconds"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"compare: cannot use {path} ({reason}); allowed is a file that --json wrote") from error


def notes(facts: dict[str, Any], settings: Settings, cases: Sequence[Case]) -> list[str]:
    """What was run where, and what makes its numbers worse than they could be."""
    threads = f"{settings.threads} thread{'s' if settings.threads > 1 else ''}"
    gpu = facts["gpu"]
    if gpu is None:
        where = f"{facts['processor']}, {threads}, kernels for {facts['kernels']}"
    else:
        driver = "unknown" if gpu["smi"] is None else gpu["smi"]["driver_version"]
        where = f"{gpu['name']}, driver {driver}, backend of the ops: {facts['chosen']}"
    lines = [f"{where}, torch {torch.__version__}, on {settings.device}"]
    if gpu is None and not all(facts["allocator"].values()):
        lines.append(
            f"Note: {' and '.join(ALLOCATOR)} are not both set (`make bench` sets them); large tensors may be faulted "
            "in anew at every call, most of all for the chains of eager PyTorch."
        )
    if any(case.group == "attacks" for case in cases) and torchattacks() is None:
        lines.append(
            "Note: torchattacks is not installed (pip install --no-deps torchattacks==3.5.1); attacks are "
            "neither checked against it nor compared with it."
        )
    return lines


def _expect(cases: Sequence[Case], json: Path | None, console: Console) -> int:
    for _, group in groupby(cases, lambda case: case.subject):
        console.print(expected_table(list(group)))
    if json is not None:
        costs = {case.name: case.subject_on("meta").cost for case in cases}
        write_json(json, {"expected": {name: asdict(cost) | expectations(cost) for name, cost in costs.items()}})
    return 0


def _measure_all(cases: Sequence[Case], settings: Settings, before: dict[str, float], console: Console) -> list[Result]:
    results: list[Result] = []
    for name, group in groupby(cases, lambda case: case.subject):
        of_subject = list(group)
        with progress(name, len(of_subject), "cases") as advance:
            for case in of_subject:
                results.append(
                    measure(case, device=settings.device, seconds=settings.seconds, compiled=settings.compile)
                )
                advance(1, case.name)
        console.print(results_table(results[-len(of_subject) :], before))
    return results


def _check_new(path: Path) -> None:
    """Before hours of measuring, not after them."""
    if path.exists():
        raise ValueError(f"json: {path} exists; give a new file")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"json: cannot write to {path.parent}; give a file in a writable folder")
