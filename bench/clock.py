"""Seconds on a device."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

Clock = Callable[[], float]


def clock_of(device: torch.device) -> Clock:
    """Seconds, read once the device has done all that it was given."""
    if device.type == "cpu":
        return time.perf_counter

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock
