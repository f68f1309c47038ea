"""What the build makes of nvcc: there, of no use, or unwanted."""

import subprocess
import sys
from pathlib import Path

import cmake
import ninja
import pybind11
import pytest
import torch

from alignfast._C import build_info
from alignfast.native import CUDA_PATH

ROOT = Path(__file__).resolve().parents[2]


def configured(build: Path, *settings: str) -> str:
    """The build file of ninja, with the CUDA sources if they are to be compiled."""
    command = [Path(cmake.CMAKE_BIN_DIR) / "cmake", "-S", ROOT, "-B", build, "-G", "Ninja"]
    command += [f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}", f"-DPython_EXECUTABLE={sys.executable}"]
    command += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DALIGNFAST_TORCH={Path(torch.__file__).parent}"]
    run = subprocess.run([*command, *settings], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return (build / "build.ninja").read_text(encoding="utf-8")


@pytest.mark.parametrize("setting", ["-DALIGNFAST_NVCC=/bin/false", "-DALIGNFAST_CUDA=OFF"])
def test_without_a_usable_nvcc_the_rest_is_built(setting: str, tmp_path: Path) -> None:
    rules = configured(tmp_path, setting)
    assert "csrc/cpu/sign_step.cpp" in rules
    assert "csrc/cuda/" not in rules
    assert "alignfast_cuda" in rules


@pytest.mark.skipif(not CUDA_PATH.exists(), reason="there is no nvcc here")
def test_every_source_is_compiled_for_every_architecture(tmp_path: Path) -> None:
    """Found by folder, so that a new op edits no build file."""
    rules = configured(tmp_path)
    for source in (ROOT / "csrc" / "cuda").glob("*.cu"):
        assert f"csrc/cuda/{source.name}" in rules
    assert "code=[sm_80]" in rules
    assert "code=[compute_90,sm_90]" in rules
    assert build_info()["cuda_architectures"].split() == ["sm_80", "sm_90", "compute_90"]
