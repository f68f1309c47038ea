"""Rates of this hardware, on small matrices."""

from __future__ import annotations

import pytest
import torch

from alignfast.bench import limits
from alignfast.bench.limits import has_bf16, measure_limits

CPU = torch.device("cpu")


class Clock:
    """A call takes as long as its operand is large."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.5
        return self.now


def test_rates_are_operations_and_bytes_over_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "clock_of", lambda device: Clock())
    monkeypatch.setattr(limits, "has_bf16", lambda device: True)
    found = measure_limits(CPU, side=8, copied=4000)
    assert found.gemm == {"fp32": 2 * 8**3 / 0.5, "bf16": 2 * 8**3 / 0.5}
    # Read and written.
    assert found.copy == 2 * 4000 / 0.5


def test_without_bf16_there_is_no_rate_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "has_bf16", lambda device: False)
    assert list(measure_limits(CPU, side=8, copied=4000).gemm) == ["fp32"]


def test_the_fastest_round_counts_and_the_warm_up_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now, durations = 0.0, iter([1.0, *[9.0] * 4, 2.0, *[9.0] * (limits.ROUNDS - 5)])

    def call() -> None:
        nonlocal now
        now += next(durations)

    monkeypatch.setattr(limits, "clock_of", lambda device: lambda: now)
    assert limits._least(call, CPU) == 2.0


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_gpus_have_bf16_from_ampere_on(
    capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_bf16(torch.device("cuda")) is expected


def test_processors_have_bf16_where_onednn_has_kernels_for_it() -> None:
    assert has_bf16(CPU) == torch.ops.mkldnn._is_mkldnn_bf16_supported()
