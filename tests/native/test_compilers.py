"""The library builds with other compilers and for other processors, and its kernels give the same bits there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.native import objects
from tests.native.test_isa import EVERY_OP, PATIENT, differences, results
from tests.native.test_symbols import PERSONALITY, is_foreign, undefined

ROOT = Path(__file__).resolve().parents[2]
DRIVER = ROOT / "tests" / "native" / "kernels_main.cpp"
ISAS = ["baseline", "avx2", "avx512"] if os.uname().machine == "x86_64" else ["baseline"]
FLAGS = ["-std=c++20", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
CROSS = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", "-DALIGNFAST_MODULE=OFF"]


def check_run(*command, **options):
    run = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def need(program):
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not on this machine")
    return found


def built_by(compiler, *settings):
    """The CMake folder of a build of the whole by that compiler, with warnings as errors.

    Under build/, so that only what changed since the last run is compiled.
    """
    import cmake
    import ninja
    import pybind11

    program = Path(cmake.CMAKE_BIN_DIR) / "cmake"
    folder = ROOT / "build" / f"tests-{Path(compiler).name}"
    check_run(
        *(program, "-S", ROOT, "-B", folder, "-G", "Ninja", *settings, f"-DCMAKE_CXX_COMPILER={compiler}"),
        f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DALIGNFAST_TORCH={Path(torch.__file__).parent}",
        *("-DCMAKE_BUILD_TYPE=Release", "-DALIGNFAST_WERROR=ON"),
    )
    check_run(program, "--build", folder)
    return folder


@pytest.fixture(scope="module")
def clang():
    return built_by(need("clang++"))


@pytest.fixture(scope="module")
def aarch64():
    return built_by(need("aarch64-linux-gnu-g++"), *CROSS)


def compiler_of(build_folder):
    lines = (build_folder / "CMakeCache.txt").read_text(encoding="utf-8").splitlines()
    return next(line.partition("=")[2] for line in lines if line.startswith("CMAKE_CXX_COMPILER:"))


def kernel_objects(build_folder, isa="baseline"):
    found = sorted(build_folder.glob(f"CMakeFiles/kernels_{isa}.dir/csrc/cpu/*_kernel.cpp.o"))
    assert found
    return found


def driver(build_folder, isa, out, *flags):
    """The program that runs the kernels of one instruction set on fixed inputs."""
    command = [compiler_of(build_folder), *FLAGS, *flags, f"-DAF_ISA={isa}"]
    check_run(*command, DRIVER, *kernel_objects(build_folder, isa), "-o", out)
    return out


@pytest.fixture(scope="module")
def wanted(build_folder, tmp_path_factory):
    """What the baseline kernels of the library in use give."""
    text = check_run(driver(build_folder, "baseline", tmp_path_factory.mktemp("driver") / "baseline"))
    assert len(set(text.splitlines())) > 10
    return text


def usable(isa):
    from alignfast import _C

    return pytest.mark.skipif(isa not in _C.usable_cpu_isas(), reason=f"this processor has no {isa}")


EVERY_ISA = pytest.mark.parametrize("isa", [pytest.param(isa, marks=usable(isa)) for isa in ISAS])


def test_the_driver_runs_every_kernel(build_folder, tmp_path):
    """A kernel that is new has to be run in kernels_main.cpp as well."""
    built = tmp_path / "driver.o"
    check_run(compiler_of(build_folder), *FLAGS, "-DAF_ISA=baseline", "-c", DRIVER, "-o", built)
    called = {symbol.name for symbol in objects.symbols(built) if symbol["st_shndx"] == "SHN_UNDEF"}
    for path in kernel_objects(build_folder):
        assert global_functions(path) <= called, path.name


@EVERY_ISA
def test_kernels_give_the_same_bits_on_every_instruction_set(isa, build_folder, wanted, tmp_path):
    assert check_run(driver(build_folder, isa, tmp_path / "driver")) == wanted


@EVERY_ISA
def test_clang_kernels_give_the_same_bits(isa, clang, wanted, tmp_path):
    assert check_run(driver(clang, isa, tmp_path / "driver")) == wanted


def test_ops_give_the_same_bits_when_built_by_clang(clang, tmp_path):
    """With the package copied and clang's binaries in it."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "alignfast", tmp_path / "alignfast", ignore=ignore)
    shutil.copytree(ROOT / "tests" / "native", tmp_path / "tests" / "native", ignore=ignore)
    for name in ("__init__.py", "cases.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests")
    for path in clang.glob("*.so"):
        shutil.copy(path, tmp_path / "alignfast")
    found = check_run(sys.executable, tmp_path / EVERY_OP, cwd=tmp_path, env=os.environ | PATIENT)
    assert differences(json.loads(found), results()) == []


def test_clang_keeps_kernels_apart(clang):
    for isa in ISAS:
        for path in kernel_objects(clang, isa):
            shared = [s for s in objects.symbols(path) if s["st_info"]["bind"] not in ("STB_LOCAL", "STB_GLOBAL")]
            assert {s.name for s in shared} <= {PERSONALITY}, path


def test_the_library_builds_for_aarch64(aarch64):
    library = aarch64 / "libalignfast_ops.so"
    with library.open("rb") as file:
        assert objects.ELFFile(file)["e_machine"] == "EM_AARCH64"
    kernels = {name for path in kernel_objects(aarch64) for name in global_functions(path)}
    assert kernels <= {symbol.name for symbol in objects.defined_functions(library)}
    assert not [entry for entry in undefined(library) if is_foreign(*entry)]


def global_functions(path):
    return {s.name for s in objects.defined_functions(path) if s["st_info"]["bind"] == "STB_GLOBAL"}


def test_aarch64_kernels_give_the_bits_of_this_processor(aarch64, wanted, tmp_path):
    emulator = need("qemu-aarch64")
    assert check_run(emulator, driver(aarch64, "baseline", tmp_path / "driver", "-static")) == wanted
