"""A progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Plain lines come this often, and at the end.
SECONDS_BETWEEN_LINES = 10.0

# Called with how many more units are done, and what to say beside them.
Advance = Callable[[int, str], None]


@contextmanager
def progress(label: str, total: int, unit: str, *, shown: bool = True) -> Iterator[Advance]:
    """Show how far a job of `total` units is, on standard error, so that standard output holds results alone."""
    console = Console(stderr=True, quiet=not shown)
    if not console.is_terminal:
        with _lines(console, label, total, unit) as advance:
            yield advance
        return
    # Labels and notes may hold names with brackets or braces, which are no markup or format here.
    texts = (TextColumn("{task.description}", markup=False), TextColumn("{task.fields[note]}", markup=False))
    columns = (texts[0], BarColumn(), MofNCompleteColumn(), texts[1])
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(label, total=total, note="")
        yield lambda done, note: bar.update(task, advance=done, note=note)


@contextmanager
def _lines(console: Console, label: str, total: int, unit: str) -> Iterator[Advance]:
    done, said, began = 0, time.monotonic(), time.monotonic()
    latest = ""

    def line() -> None:
        seconds = time.monotonic() - began
        text = f"{label}: {done}/{total} {unit}, {seconds:.0f} s {latest}".rstrip()
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    def advance(more: int, note: str) -> None:
        nonlocal done, said, latest
        done, latest = done + more, note
        if time.monotonic() - said >= SECONDS_BETWEEN_LINES and done < total:
            said = time.monotonic()
            line()

    yield advance
    line()
