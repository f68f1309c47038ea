"""What is known of a GPU, from what torch and nvidia-smi would tell."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import pytest
import torch

from alignfast.bench import machine, roofline
from alignfast.bench.roofline import A100, H100, Gpu, gpu_of, limit_of
from alignfast.bench.subject import Cost

CUDA = torch.device("cuda")


def properties(name: str, **changes: object) -> SimpleNamespace:
    told = {
        "name": name,
        "memory_clock_rate": 1_593_000,
        "memory_bus_width": 5120,
        "L2_cache_size": 40 * 2**20,
        "major": 8,
        "minor": 0,
        "multi_processor_count": 108,
        "total_memory": 80 * 2**30,
        "uuid": "1234",
    }
    return SimpleNamespace(**told | changes)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    told = properties("NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: told)
    return monkeypatch


def test_bandwidth_comes_from_the_memory_clock(device: pytest.MonkeyPatch) -> None:
    gpu = gpu_of(CUDA)
    assert gpu is not None
    assert gpu.bandwidth == pytest.approx(A100.bandwidth, rel=1e-3)
    assert gpu.peaks == A100.peaks
    assert gpu.cache == 40 * 2**20


@pytest.mark.parametrize(
    ("name", "peaks"),
    [
        ("NVIDIA H100 80GB HBM3", H100.peaks),
        ("NVIDIA H200", H100.peaks),
        ("NVIDIA A100-PCIE-40GB", A100.peaks),
        ("NVIDIA H100 PCIe", {}),
        ("NVIDIA L4", {}),
    ],
)
def test_peaks_come_with_the_name(device: pytest.MonkeyPatch, name: str, peaks: dict[str, float]) -> None:
    device.setattr(torch.cuda, "get_device_properties", lambda device: properties(name))
    gpu = gpu_of(CUDA)
    assert gpu is not None
    assert gpu.peaks == peaks


def test_what_is_not_told_is_unknown(device: pytest.MonkeyPatch) -> None:
    device.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="a GPU"))
    assert gpu_of(CUDA) == Gpu("a GPU", None)
    assert Gpu("a GPU", None).limits(Cost(moved=1)) == {}
    assert not Gpu("a GPU", None).caches(Cost(moved=1))
    assert gpu_of(torch.device("cpu")) is None


def test_limits() -> None:
    assert A100.limits(Cost(moved=2_039_000_000)) == {"memory": pytest.approx(1e-3)}
    assert H100.limits(Cost(flops=989_400_000_000))["bf16"] == pytest.approx(1e-3)


def test_which_limit_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Cost(flops=1)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert [limit_of(run, "fp32", A100), limit_of(run, "bf16", A100)] == ["tf32", "bf16"]
    assert limit_of(Cost(moved=1), "bf16", A100) == limit_of(Cost(moved=1), "fp32", None) == "memory"
    # On a CPU the settings for GPUs say nothing.
    assert limit_of(run, "fp32", None) == "fp32"
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert limit_of(run, "fp32", A100) == "fp32"


def test_facts_of_a_gpu(device: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def answer(command: list[str], **settings: object) -> SimpleNamespace:
        asked.append(command)
        return SimpleNamespace(stdout="580.82, 1410, 1410, 1593, 61.3, 400.0, 33\n")

    device.setattr(machine.shutil, "which", lambda program: f"/usr/bin/{program}")
    device.setattr(subprocess, "run", answer)
    facts = machine.gpu_facts(CUDA)
    assert facts["smi"]["driver_version"] == "580.82"
    assert facts["smi"]["temperature.gpu"] == "33"
    assert "--id=GPU-1234" in asked[0]
    assert facts["capability"] == [8, 0]
    assert facts["bytes_per_second"] == pytest.approx(2039e9, rel=1e-3)
    assert set(facts["tf32"]) == {"cudnn", "matmul"}


def test_without_nvidia_smi_its_facts_are_missing(device: pytest.MonkeyPatch) -> None:
    def fails(command: list[str], **settings: object) -> None:
        raise subprocess.CalledProcessError(6, command)

    device.setattr(machine.shutil, "which", lambda program: None)
    assert machine.smi(CUDA) is None
    device.setattr(machine.shutil, "which", lambda program: program)
    device.setattr(subprocess, "run", fails)
    assert machine.smi(CUDA) is None


def test_tables_are_of_known_gpus() -> None:
    assert [gpu.name for gpu in roofline.GPUS] == ["A100", "H100"]
    for gpu in roofline.GPUS:
        assert gpu.peaks["fp32"] < gpu.peaks["tf32"] < gpu.peaks["bf16"]
