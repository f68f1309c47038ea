"""The choice of what serves the ops on CUDA devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alignfast import native

CHOSEN = "from alignfast.native import CUDA_BACKEND, NATIVE_DEVICES; print(CUDA_BACKEND.name, 'cuda' in NATIVE_DEVICES)"
REGISTERED = "import alignfast.native, torch; print(torch._C._dispatch_dump('alignfast::smooth'))"


def run(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | variables
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)


def unusable() -> None:
    raise ImportError("not here")


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Backends that register nothing: the first cannot be used."""
    made = {"cuda": unusable, "triton": lambda: None, "reference": lambda: None}
    monkeypatch.setattr(native, "CUDA_BACKENDS", made)
    return made


def test_the_first_that_can_be_used_serves(backends: dict[str, object]) -> None:
    assert native.choose(None) == native.Choice("triton", {"cuda": "not here"})
    backends["triton"] = unusable
    assert native.choose(None) == native.Choice("reference", {"cuda": "not here", "triton": "not here"})
    backends["cuda"] = lambda: None
    assert native.choose(None) == native.Choice("cuda", {})


def test_one_can_be_forced(backends: dict[str, object]) -> None:
    assert native.choose("reference") == native.Choice("reference", {})
    with pytest.raises(ImportError, match=r"^ALIGNFAST_BACKEND: got 'cuda', which can not be used here: not here"):
        native.choose("cuda")
    with pytest.raises(ImportError, match=r"^ALIGNFAST_BACKEND: got 'gpu'; allowed is one of cuda, triton, reference"):
        native.choose("gpu")


def test_a_missing_or_broken_library_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "CUDA_PATH", tmp_path / "lib.so")
    with pytest.raises(ImportError, match="not built, as there was no nvcc"):
        native.use_cuda()
    (tmp_path / "lib.so").write_bytes(b"no library")
    with pytest.raises(ImportError, match=r"does not load: .*lib\.so"):
        native.use_cuda()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(ImportError, match=r"this torch is for HIP 6\.4"):
        native.use_cuda()


def test_without_triton_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="Triton is not installed"):
        native.use_triton()


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_a_forced_backend_serves(name: str) -> None:
    assert run(CHOSEN, ALIGNFAST_BACKEND=name).stdout.split() == [name, str(name != "reference")]
    registered = run(REGISTERED, ALIGNFAST_BACKEND=name).stdout
    assert ("CUDA: registered at" in registered) == (name == "triton")
    assert "csrc/cuda" not in registered


@pytest.mark.skipif(not native.CUDA_PATH.exists(), reason="there is no nvcc here")
def test_the_cuda_library_loads_and_serves_where_it_was_built() -> None:
    for variables in ({}, {"ALIGNFAST_BACKEND": "cuda"}):
        assert run(CHOSEN, **variables).stdout.split() == ["cuda", "True"]
        assert "csrc/cuda/smooth.cu" in run(REGISTERED, **variables).stdout


def test_an_unknown_backend_is_one_clear_error() -> None:
    failed = run(CHOSEN, ALIGNFAST_BACKEND="opencl")
    assert failed.returncode != 0
    assert failed.stderr.strip().endswith(
        "ImportError: ALIGNFAST_BACKEND: got 'opencl'; allowed is one of cuda, triton, reference"
    )
