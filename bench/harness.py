"""Checks a case, then times its sides in alternation in this process, so that whatever slows one slows all."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .registry import Case
from .work import Expression, Run, Work

Clock = Callable[[], float]
Call = Callable[[], object]

# What is timed at once lasts at least this long, so that reading the clock and starting threads do not count.
BLOCK_SECONDS = 0.005
LEAST_ROUNDS = 5
MOST_ROUNDS = 1000
# Elements whose errors are found together; float64 copies of a whole batch would be larger than the batch.
CHECKED_AT_ONCE = 2**22
# Where threads were kept from running for more than this share of the time, other processes were measured too.
MOST_WAITING = 0.05
SCHEDULED = Path("/proc/self/task")


@dataclass(frozen=True)
class Spread:
    """A median, the quartiles around it, and the least value, which a busy machine disturbs least."""

    median: float
    low: float
    high: float
    least: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, low, high, min(values))


@dataclass(frozen=True)
class Round:
    """Seconds a call of every side, and the share of the round for which a thread was ready but had no core.

    That share is None where the system does not tell.
    """

    seconds: Mapping[str, float]
    waited: float | None

    @property
    def quiet(self) -> bool:
        return self.waited is None or self.waited <= MOST_WAITING


@dataclass(frozen=True)
class Result:
    """What one case came to: a fault, or the rounds that were measured.

    Sides are "ours", "eager", perhaps "compiled", and "copy", which moves as many bytes as the op has to.
    """

    case: Case
    moved: int
    fault: str | None = None
    measured: Sequence[Round] = ()

    @cached_property
    def disturbed(self) -> bool:
        """So few rounds were quiet that the times are those of other processes as well."""
        return sum(one.quiet for one in self.measured) < min(LEAST_ROUNDS, len(self.measured))

    @cached_property
    def rounds(self) -> dict[str, list[float]]:
        """By side, the seconds a call in the quiet rounds, or in all if disturbed."""
        kept = [one.seconds for one in self.measured if one.quiet or self.disturbed]
        return {side: [seconds[side] for seconds in kept] for side in (kept[0] if kept else ())}

    @property
    def seconds(self) -> dict[str, Spread]:
        return {side: Spread.of(values) for side, values in self.rounds.items()}

    @property
    def ratios(self) -> dict[str, Spread]:
        """By side, its median over that of ours, and the quartiles of the ratios within a round.

        That of "copy" is the op's share of the bandwidth a copy reaches. It may be above 1, as a copy writes half of
        what it moves, and a line of the cache that is written is mostly read first.
        """
        ours = self.rounds.get("ours", ())
        ratios = {}
        for side, values in self.rounds.items():
            if side != "ours":
                within = Spread.of([a / b for a, b in zip(values, ours, strict=True)])
                ratios[side] = replace(within, median=statistics.median(values) / statistics.median(ours))
        return ratios

    @property
    def gigabytes_per_second(self) -> float | None:
        return self.moved / self.seconds["ours"].median / 1e9 if self.rounds else None

    @property
    def missed(self) -> list[str]:
        """The sides against which the target was not reached."""
        ratios = self.ratios
        return [side for side, least in self.case.targets.items() if side in ratios and ratios[side].median < least]

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.case.name,
            "op": self.case.op,
            "variant": self.case.variant,
            "dtype": self.case.dtype,
            "shape": list(self.case.shape),
            "bytes": self.moved,
            "wrong": self.fault,
            "rounds": {"measured": len(self.measured), "quiet": sum(one.quiet for one in self.measured)},
            "seconds": {side: vars(spread) for side, spread in self.seconds.items()},
            "ratios": {side: vars(spread) for side, spread in self.ratios.items()},
            "gigabytes_per_second": self.gigabytes_per_second,
            "targets": dict(self.case.targets),
            "missed": self.missed,
            "disturbed": self.disturbed,
        }


def measure(
    case: Case,
    *,
    device: torch.device | str = "cpu",
    seconds: float = 2.0,
    compiled: bool = True,
) -> Result:
    """Check every side of a case and, if all are right, time them for about so many seconds."""
    device = torch.device(device)
    work = case.work(device)
    # An op that raises is as wrong as one that returns nonsense, and the other cases are still to be measured.
    try:
        sides = make_sides(work, compiled=compiled)
        fault = find_fault(work, sides)
    except Exception as error:
        fault = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if fault is not None:
        return Result(case, work.moved, fault)
    calls: dict[str, Call] = {**sides, "copy": copy_of(work.moved, device)}
    return Result(case, work.moved, measured=alternate(calls, seconds=seconds, clock=clock_of(device)))


def make_sides(work: Work, *, compiled: bool) -> dict[str, Run]:
    sides = {"ours": work.ours, "eager": work.bind(work.expression)}
    if compiled and work.compiles:
        sides["compiled"] = work.bind(_compile(work.expression))
    return sides


def find_fault(work: Work, sides: Mapping[str, Run]) -> str | None:
    """Calls every side once; which of them is wrong and by how much, or None."""
    expected = work.expected()
    for side, run in sides.items():
        tolerance = work.tolerance if side == "ours" else work.slack
        results = run()
        shapes = [[list(tensor.shape) for tensor in tensors] for tensors in (results, expected)]
        if shapes[0] != shapes[1]:
            return f"{side}: results have shapes {shapes[0]}, expected {shapes[1]}"
        if tolerance is None:
            continue
        for index, (result, wanted) in enumerate(zip(results, expected, strict=True)):
            found = error(result, wanted)
            # Written so that NaN is a fault too.
            if not found <= tolerance:
                return f"{side}: result {index} is off by {found:.2g}, allowed is {tolerance:.2g}"
    return None


def error(result: Tensor, wanted: Tensor) -> float:
    """The largest |result - wanted| / (|wanted| + root mean square of wanted); NaN where a result is."""
    if wanted.numel() == 0:
        return 0.0
    scale = float(torch.linalg.vector_norm(wanted, dtype=torch.float64)) / math.sqrt(wanted.numel())
    tiny = torch.finfo(torch.float32).tiny
    worst = 0.0
    for got, want in zip(_pieces(result), _pieces(wanted), strict=True):
        want = want.double()
        found = float(((got.double() - want).abs() / (want.abs() + scale + tiny)).max())
        if math.isnan(found):
            return found
        worst = max(worst, found)
    return worst


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    rows = tensor.reshape(1) if tensor.ndim == 0 else tensor
    pieces: tuple[Tensor, ...] = rows.split(max(1, CHECKED_AT_ONCE * len(rows) // rows.numel()))
    return pieces


def alternate(
    calls: Mapping[str, Call],
    *,
    seconds: float,
    clock: Clock,
    least: int = LEAST_ROUNDS,
    most: int = MOST_ROUNDS,
) -> list[Round]:
    """Rounds in which every side is timed once; sides take turns at being first.

    Ends after the round in which the time is spent, but not before `least` rounds.
    """
    sides = list(calls)
    rounds: list[Round] = []
    with _no_collection():
        began = clock()
        # The first of these calls is the warm-up.
        fastest = {side: min(_block(call, 1, clock) for _ in range(3)) for side, call in calls.items()}
        while len(rounds) < least or (clock() - began < seconds and len(rounds) < most):
            first = len(rounds) % len(sides)
            order = sides[first:] + sides[:first]
            rounds.append(_round({side: calls[side] for side in order}, fastest, clock))
            fastest = {side: min(fastest[side], rounds[-1].seconds[side]) for side in sides}
    return rounds


def _round(calls: Mapping[str, Call], fastest: Mapping[str, float], clock: Clock) -> Round:
    waited, began = waiting(), clock()
    seconds = {side: _block(call, _calls_in_block(fastest[side]), clock) for side, call in calls.items()}
    ended, still_waited = clock(), waiting()
    if waited is None or still_waited is None:
        return Round(seconds, None)
    return Round(seconds, (still_waited - waited) / ((ended - began) * torch.get_num_threads()))


def _calls_in_block(seconds: float) -> int:
    return max(1, math.ceil(BLOCK_SECONDS / seconds)) if seconds > 0 else 1


def _block(call: Call, count: int, clock: Clock) -> float:
    """Seconds a call. A call that is too short to fill the cache by itself finds there what the one before left."""
    if count > 1:
        call()
    began = clock()
    for _ in range(count):
        call()
    return (clock() - began) / count


def copy_of(moved: int, device: torch.device) -> Call:
    """A copy that reads and writes `moved` bytes in all."""
    source = torch.ones(max(1, moved // 8), device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def waiting() -> float | None:
    """Seconds for which the threads of this process were ready to run but had no core, or None where it is not told."""
    total = None
    for path in SCHEDULED.glob("*/schedstat"):
        # A thread may end while they are read.
        with suppress(OSError):
            total = (total or 0) + int(path.read_text(encoding="ascii").split()[1])
    return None if total is None else total / 1e9


def clock_of(device: torch.device) -> Clock:
    """Seconds, read once the device has done all that it was given."""
    if device.type == "cpu":
        return time.perf_counter

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def _compile(expression: Expression) -> Expression:
    # What was compiled before for other shapes would count toward a limit beyond which nothing is compiled.
    torch.compiler.reset()
    compiled: Expression = torch.compile(expression, fullgraph=True, dynamic=False)
    return compiled


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
