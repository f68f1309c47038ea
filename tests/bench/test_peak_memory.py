"""Peaks of calls, in this process and in one of their own."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from alignfast.bench import passes, peak_memory
from alignfast.bench.peak_memory import Peaks, growth, measure_memory, with_memory
from alignfast.bench.registry import Case, select

CPU = torch.device("cpu")
MB = 2**20


def small(network: str = "test_resnet") -> Case:
    case = select(["preparation"], dtypes=["fp32"])[0]
    return replace(case, shape=(2, 3, 32, 32), build=partial(passes.preparation, network=network))


def filled(count: int) -> torch.Tensor:
    return torch.ones(count, dtype=torch.uint8)


def test_growth_is_what_a_call_takes_at_its_peak() -> None:
    """Beside what is there already, and though all of it is freed in the end."""
    held = filled(64 * MB)

    def call() -> None:
        first = filled(32 * MB)
        del first
        filled(96 * MB)

    assert 96 * MB - 4 * MB < growth(call, CPU) < 96 * MB + 40 * MB
    assert growth(lambda: None, CPU) < 4 * MB
    del held


def test_memory_that_was_freed_before_is_counted() -> None:
    filled(48 * MB)
    assert growth(lambda: filled(48 * MB), CPU) > 44 * MB


def test_every_side_has_a_process_of_its_own() -> None:
    peaks = measure_memory(small(), CPU, 1)
    assert peaks.fault is None
    assert list(peaks.peaks) == ["ours", "as loaded"]
    assert all(0 <= peak < 200 * MB for peak in peaks.peaks.values())


def test_what_raises_is_a_fault() -> None:
    peaks = measure_memory(small("no_such_network"), CPU, 1)
    assert peaks.peaks == {}
    assert peaks.fault is not None
    assert peaks.fault.startswith("ValueError: model: timm:no_such_network is not known")
    assert peaks.of_torchattacks is None
    assert not peaks.missed


@pytest.mark.parametrize(("ours", "missed"), [(60, False), (61, True)])
def test_the_target_is_a_share_of_torchattacks(ours: int, missed: bool) -> None:
    case = select(["attacks"], match="mifgsm/resnet50 2")[0]
    peaks = Peaks(case, {"ours": ours, "torchattacks": 100})
    assert peaks.of_torchattacks == ours / 100
    assert peaks.missed is missed
    assert not replace(peaks, case=replace(case, memory=None)).missed
    assert not Peaks(case, {"ours": 1000}).missed


def test_passes_of_models_have_a_peak() -> None:
    assert {case.group for case in with_memory(select())} == {"preparation", "attacks", "alignment"}


def test_on_cuda_allocations_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, most = 10, 0

    def call() -> None:
        nonlocal most
        most = taken + 7

    stand_ins = {
        "synchronize": lambda device: None,
        "reset_peak_memory_stats": lambda device: None,
        "memory_allocated": lambda device: taken,
        "max_memory_allocated": lambda device: most,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    assert growth(call, torch.device("cuda")) == 7


def test_a_system_that_tells_nothing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak_memory, "PROCESS", tmp_path)
    with pytest.raises(OSError, match="status"):
        growth(lambda: None, CPU)
    (tmp_path / "status").write_text("Name: x\n")
    with pytest.raises(OSError, match="tells no VmRSS"):
        growth(lambda: None, CPU)
