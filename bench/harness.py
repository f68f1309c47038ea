"""Checks a case, then times its sides in alternation in this process, so that whatever slows one slows all."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from .clock import Clock, clock_of
from .limits import Limits
from .registry import Case
from .roofline import GPUS, Gpu, gpu_of, limit_of
from .subject import Call, Cost, Subject

# What is timed at once lasts at least this long, so that reading the clock and starting threads do not count.
BLOCK_SECONDS = 0.005
LEAST_ROUNDS = 5
MOST_ROUNDS = 1000
# A call that lasts this long is tried once before it is timed, a shorter one three times.
LONG_SECONDS = 2.0
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
    """What one case came to: a fault, or the rounds that were measured, on this GPU if on one; and what the hardware
    reached in the same run, where that was measured."""

    case: Case
    cost: Cost
    fault: str | None = None
    measured: Sequence[Round] = ()
    gpu: Gpu | None = None
    limits: Limits | None = None

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
        what it moves, and a line of the cache that is written is mostly read first. That of "model" is the share of
        the time that bare passes of the models take.
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
        return self._per_second(self.cost.moved, 1e9)

    @property
    def teraflops_per_second(self) -> float | None:
        return self._per_second(self.cost.flops, 1e12)

    def _per_second(self, amount: int, unit: float) -> float | None:
        return amount / self.seconds["ours"].median / unit if self.rounds and amount else None

    @property
    def limit(self) -> str:
        """ "memory", or the arithmetic that is used: float32 may be TF32 on a GPU."""
        return limit_of(self.cost, self.case.dtype, self.gpu)

    @property
    def of_peak(self) -> float | None:
        """The share of what the GPU's data sheet allows; None where that is not known."""
        least = self.gpu.limits(self.cost).get(self.limit) if self.gpu is not None else None
        return least / self.seconds["ours"].median if self.rounds and least is not None else None

    @property
    def of_gemm(self) -> float | None:
        """The share of the rate of matrix products; None for what is no pass of a model, or where it is not known."""
        rate = self.limits.gemm.get(self.limit) if self.limits is not None else None
        return self.teraflops_per_second * 1e12 / rate if self.teraflops_per_second and rate else None

    @property
    def cached(self) -> bool:
        return self.gpu is not None and self.gpu.caches(self.cost)

    @property
    def missed(self) -> list[str]:
        """The sides against which the target was not reached, and "gemm"."""
        reached = {side: ratio.median for side, ratio in self.ratios.items()}
        if self.of_gemm is not None:
            reached["gemm"] = self.of_gemm
        return [name for name, least in self.case.targets.items() if name in reached and reached[name] < least]

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.case.to_dict(),
            "bytes": self.cost.moved,
            "flops": self.cost.flops,
            "wrong": self.fault,
            "rounds": {"measured": len(self.measured), "quiet": sum(one.quiet for one in self.measured)},
            "seconds": {side: vars(spread) for side, spread in self.seconds.items()},
            "ratios": {side: vars(spread) for side, spread in self.ratios.items()},
            "gigabytes_per_second": self.gigabytes_per_second,
            "teraflops_per_second": self.teraflops_per_second,
            "expected": expectations(self.cost) if self.gpu is not None else {},
            "limit": self.limit,
            "of_peak": self.of_peak,
            "of_gemm": self.of_gemm,
            "fits_l2": self.cached,
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
    limits: Limits | None = None,
) -> Result:
    """Check every side of a case and, if all are right, time them for about so many seconds.

    limits: of the device, measured in the same run.
    """
    device = torch.device(device)
    subject, gpu = case.subject_on(device), gpu_of(device)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        fault, rounds = _measured(subject, device, seconds, compiled)
    return Result(case, subject.cost, fault, rounds, gpu, limits)


def _measured(
    subject: Subject, device: torch.device, seconds: float, compiled: bool
) -> tuple[str | None, Sequence[Round]]:
    calls: dict[str, Call] = {}
    # What raises is as wrong as what returns nonsense, and the other cases are still to be measured.
    try:
        calls, fault = subject.prepare(compiled=compiled)
    except Exception as error:
        fault = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return fault, () if fault is not None else alternate(calls, seconds=seconds, clock=clock_of(device))


def expectations(cost: Cost) -> dict[str, dict[str, float]]:
    """Seconds by GPU and limit, from their data sheets."""
    return {gpu.name: gpu.limits(cost) for gpu in GPUS}


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
        fastest = {side: _tried(call, clock) for side, call in calls.items()}
        while len(rounds) < least or (clock() - began < seconds and len(rounds) < most):
            first = len(rounds) % len(sides)
            order = sides[first:] + sides[:first]
            rounds.append(_round({side: calls[side] for side in order}, fastest, clock))
            fastest = {side: min(fastest[side], rounds[-1].seconds[side]) for side in sides}
    return rounds


def _tried(call: Call, clock: Clock) -> float:
    """Seconds of a call; the first is the warm-up."""
    first = _block(call, 1, clock)
    return first if first >= LONG_SECONDS else min(_block(call, 1, clock) for _ in range(2))


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


def waiting() -> float | None:
    """Seconds for which the threads of this process were ready to run but had no core, or None where it is not told."""
    total = None
    for path in SCHEDULED.glob("*/schedstat"):
        # A thread may end while they are read.
        with suppress(OSError):
            total = (total or 0) + int(path.read_text(encoding="ascii").split()[1])
    return None if total is None else total / 1e9


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
