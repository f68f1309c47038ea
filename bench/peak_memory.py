"""Peak memory of a side's first call, each in a process of its own, so that no other side's memory is counted."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import torch

from .registry import MODELS, Case
from .subject import Call, EndToEnd

PROCESS = Path("/proc/self")
# What the kernel takes for: the peak starts anew from what is resident now.
RESET_PEAK = "5"


@dataclass(frozen=True)
class Peaks:
    """By side, the bytes that a call takes beyond what its models and images take."""

    case: Case
    peaks: dict[str, int]
    fault: str | None = None

    @property
    def of_torchattacks(self) -> float | None:
        theirs = self.peaks.get("torchattacks")
        return self.peaks["ours"] / theirs if theirs else None

    @property
    def missed(self) -> bool:
        share = self.of_torchattacks
        return share is not None and self.case.memory is not None and share > self.case.memory

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.case.to_dict(),
            "wrong": self.fault,
            "peak_bytes": self.peaks,
            "of_torchattacks": self.of_torchattacks,
            "target": self.case.memory,
            "missed": self.missed,
        }


def with_memory(cases: Sequence[Case]) -> list[Case]:
    """Those whose peak says something: passes of whole models."""
    return [case for case in cases if case.group in MODELS]


def measure_memory(case: Case, device: torch.device | str, threads: int) -> Peaks:
    """What raises is a fault, as the other cases are still to be measured."""
    peaks: dict[str, int] = {}
    try:
        for side in _sides(case, str(device)):
            peaks[side] = _alone(case, str(device), threads, side)
    except Exception as error:
        return Peaks(case, {}, f"{type(error).__name__}: {' '.join(str(error).split())}")
    return Peaks(case, peaks)


def peak_of(case: Case, device: str, threads: int, side: str) -> int:
    torch.set_num_threads(threads)
    return growth(_sides(case, device)[side], torch.device(device))


def growth(call: Call, device: torch.device) -> int:
    """Bytes by which a call exceeds, at its peak, what was taken before: of allocations on CUDA, else of memory that
    is resident, which takes in what the allocator keeps.

    Raises:
        OSError: a system that does not tell.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    _give_back()
    before = _told("VmRSS")
    (PROCESS / "clear_refs").write_text(RESET_PEAK, encoding="ascii")
    call()
    return max(0, _told("VmHWM") - before)


def _sides(case: Case, device: str) -> dict[str, Call]:
    return cast(EndToEnd, case.subject_on(device)).sides()


def _alone(*arguments: object) -> int:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        peak: int = process.submit(cast(Any, peak_of), *arguments).result()
        return peak


def _give_back() -> None:
    """What is not needed any more must not serve the call unseen."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _told(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", (PROCESS / "status").read_text(encoding="ascii"), re.MULTILINE)
    if found is None:
        raise OSError(f"{PROCESS}/status tells no {name}")
    return int(found[1]) * 1024
