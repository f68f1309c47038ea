"""The report of `alignfast doctor`, and that its self-tests can fail."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from alignfast import doctor, ops
from alignfast.native import CUDA_BACKEND, CUDA_PATH, Choice

OPS = [
    "kl_div_with_logits",
    "diversify",
    "sign_step",
    "smooth",
    "depthwise_conv2d",
    "inverted_residual",
    "winograd_conv2d",
    "basic_block",
    "attention",
    "batch_norm",
    "philox_uniform",
]


def test_report_has_the_documented_shape() -> None:
    report = doctor.report()
    assert set(report) == {"backends", "chosen", "memory", "self_test"}
    assert set(report["chosen"]) == {"cpu", "cuda"}
    assert set(report["memory"]) == {"allocator", "kept", "huge_pages", "reason"}
    backends = report["backends"]
    assert {"loaded", "isa", "kernels", "threads"} <= set(backends["cpu"])
    assert {"built", "loads", "archs", "device"} <= set(backends["cuda"])
    assert {"importable", "version", "device"} <= set(backends["triton"])
    assert json.loads(json.dumps(report)) == report


def test_report_tells_what_is_here() -> None:
    backends = doctor.report()["backends"]
    native = importlib.import_module("alignfast._C")
    assert backends["cpu"]["loaded"] is True
    assert backends["cpu"]["build"] == native.build_info()
    assert backends["cpu"]["kernels"] == native.usable_cpu_isas()
    assert (backends["cuda"]["device"] is not None) == torch.cuda.is_available()


def test_what_serves_is_named_with_its_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    isa = importlib.import_module("alignfast._C").cpu_isa()
    assert doctor.report()["chosen"] == {"cpu": f"native ({isa})", "cuda": CUDA_BACKEND.name}
    monkeypatch.setattr(doctor, "NATIVE_DEVICES", frozenset())
    assert doctor.chosen("cpu") == "reference"


def test_a_forced_instruction_set_is_what_serves() -> None:
    program = "from alignfast import doctor; print(doctor.chosen('cpu'))"
    environment = os.environ | {"ALIGNFAST_CPU_ISA": "baseline"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "native (baseline)"


def test_cuda_library_is_reported_as_it_is() -> None:
    cuda = doctor.cuda_backend()
    assert cuda["built"] == CUDA_PATH.exists()
    assert cuda["loads"] == (cuda["reason"] is None)
    assert bool(cuda["archs"]) == cuda["built"]


@pytest.mark.skipif(not CUDA_PATH.exists(), reason="there is no nvcc here")
def test_cuda_library_is_tried_without_taking_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CUDA_BACKEND", Choice("reference", {}))
    assert doctor.cuda_backend()["loads"] is True
    monkeypatch.setenv("ALIGNFAST_CPU_ISA", "mmx")
    assert "mmx" in doctor.cuda_backend()["reason"]


def test_self_test_on_a_device_that_fails_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(device: str) -> None:
        if device != "cpu":
            raise RuntimeError("no kernel image")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor, "SELF_TESTS", {"smooth": check})
    assert doctor.self_test() == {"smooth": "on cuda: RuntimeError: no kernel image"}


def test_native_module_that_does_not_load_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "alignfast._C", None)
    cpu = doctor.cpu_backend()
    assert cpu["loaded"] is False
    assert cpu["isa"] == cpu["kernels"] == []
    assert "alignfast._C" in cpu["reason"]


def test_missing_triton_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    triton = doctor.triton_backend()
    assert triton["importable"] is False
    assert triton["version"] is None
    assert "triton" in triton["reason"]


def test_every_op_passes() -> None:
    assert doctor.self_test() == dict.fromkeys(OPS, "ok")


@pytest.mark.parametrize("op", OPS)
def test_op_that_raises_is_reported_by_reason(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(ops, op, broken)
    outcomes = doctor.self_test()
    assert outcomes[op] == "RuntimeError: no kernel image"
    assert [name for name, outcome in outcomes.items() if outcome != "ok"] == [op]


def off_by_a_permille(op: str) -> Any:
    correct = getattr(ops, op)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        result = correct(*args, **kwargs)
        if result is None:
            args[0].mul_(1.001)
            return None
        return tuple(one * 1.001 for one in result) if isinstance(result, tuple) else result * 1.001

    return wrong


@pytest.mark.parametrize("op", OPS)
def test_slightly_wrong_result_is_reported(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, op, off_by_a_permille(op))
    outcomes = doctor.self_test()
    assert "is off by" in outcomes[op]
    assert [name for name, outcome in outcomes.items() if outcome != "ok"] == [op]


def test_nan_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "smooth", lambda grad, kernel: torch.full_like(grad, float("nan")))
    assert "is off by nan" in doctor.self_test()["smooth"]


@pytest.mark.parametrize(
    ("counter", "key", "output"),
    [
        ((0, 0, 0, 0), (0, 0), doctor.PHILOX_ZEROS),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_plain_philox_gives_the_published_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], output: tuple[int, int, int, int]
) -> None:
    assert doctor.philox4x32_10(counter, key) == output
