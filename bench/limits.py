"""What this hardware does at its best, measured in the same run: products of matrices, and copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from alignfast.models.preparation import in_hardware

from .clock import clock_of
from .networks import tf32

# Rows and columns of the matrices, and bytes that are copied: large enough for full speed, and for no cache.
SIDE = {"cpu": 2048, "cuda": 8192}
COPIED = {"cpu": 2**28, "cuda": 2**30}
ROUNDS = 15


@dataclass(frozen=True)
class Limits:
    """Operations a second of a matrix product by arithmetic, and bytes a second that a copy reads and writes.

    gemm: "fp32", on CUDA also "tf32", and "bf16" where the hardware has it.
    """

    gemm: Mapping[str, float]
    copy: float


def measure_limits(device: torch.device, *, side: int | None = None, copied: int | None = None) -> Limits:
    """The fastest of a few rounds; `side` and `copied` are for tests."""
    side, copied = side or SIDE[device.type], copied or COPIED[device.type]
    with tf32(False):
        gemm = {"fp32": _gemm(torch.float32, side, device)}
    if device.type == "cuda":
        with tf32(True):
            gemm["tf32"] = _gemm(torch.float32, side, device)
    if has_bf16(device):
        gemm["bf16"] = _gemm(torch.bfloat16, side, device)
    source = torch.ones(copied // 4, device=device)
    target = torch.empty_like(source)
    return Limits(gemm, 2 * source.nbytes / _least(lambda: target.copy_(source), device))


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes bfloat16 in hardware; elsewhere it is emulated, hundreds of times slower."""
    return device.type in SIDE and in_hardware(torch.bfloat16, device)


def _gemm(dtype: torch.dtype, side: int, device: torch.device) -> float:
    a, b, out = (torch.ones((side, side), dtype=dtype, device=device) for _ in range(3))
    return 2 * side**3 / _least(lambda: torch.mm(a, b, out=out), device)


def _least(call: Callable[[], object], device: torch.device) -> float:
    clock, times = clock_of(device), []
    call()
    for _ in range(ROUNDS):
        began = clock()
        call()
        times.append(clock() - began)
    return min(times)
