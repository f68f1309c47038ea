"""A progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

# Plain lines come this often, and at the end.
SECONDS_BETWEEN_LINES = 10.0

# Of a terminal's lines, those that rows of a board leave; and rows shown before the one that runs.
ROOM_FOR_OTHERS, ROWS_BEFORE = 4, 3

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
    with _bars(console) as bars:
        task = bars.add_task(label, total=total, note="")
        yield lambda done, note: bars.update(task, advance=done, note=note)


@contextmanager
def board(label: str, rows: Sequence[tuple[str, int]], unit: str, *, shown: bool = True) -> Iterator[list[Advance]]:
    """`progress` of a job that has parts, (label, total) by row: one `Advance` for each.

    On a terminal each row says whether it waits, runs or is done; of many rows, those around the one that runs are
    shown. Elsewhere the lines are those of the whole job, with the row that runs.
    """
    console = Console(stderr=True, quiet=not shown)
    total = sum(count for _, count in rows)
    if not console.is_terminal:
        with _lines(console, label, total, unit) as advance:
            yield [partial(_named, advance, name) for name, _ in rows]
        return
    with _bars(console) as bars:
        whole = bars.add_task(label, total=total, note="")
        tasks = [bars.add_task(name, total=count, note="waiting") for name, count in rows]
        window = _Window(bars, whole, tasks, max(1, console.height - ROOM_FOR_OTHERS))
        window.show(0)
        yield [partial(window.advance, row) for row in range(len(rows))]


def _named(advance: Advance, name: str, done: int, note: str) -> None:
    advance(done, f"{name} {note}".rstrip())


def _bars(console: Console) -> Progress:
    # Labels and notes may hold names with brackets or braces, which are no markup or format here.
    texts = (TextColumn("{task.description}", markup=False), TextColumn("{task.fields[note]}", markup=False))
    return Progress(texts[0], BarColumn(), MofNCompleteColumn(), texts[1], TimeRemainingColumn(), console=console)


class _Window:
    """Bars of the whole and of its rows, of which no more are shown than there is room for."""

    def __init__(self, bars: Progress, whole: TaskID, rows: Sequence[TaskID], room: int) -> None:
        self._bars, self._whole, self._rows, self._room = bars, whole, rows, room
        self._first = -1

    def advance(self, row: int, done: int, note: str) -> None:
        self._bars.update(self._whole, advance=done)
        task = self._rows[row]
        self._bars.update(task, advance=done, note=note)
        if self._bars.tasks[task].finished:
            self._bars.update(task, note="done")
        self.show(row)

    def show(self, row: int) -> None:
        first = min(max(0, row - ROWS_BEFORE), max(0, len(self._rows) - self._room))
        if first == self._first:
            return
        self._first = first
        for place, task in enumerate(self._rows):
            self._bars.update(task, visible=first <= place < first + self._room)


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
