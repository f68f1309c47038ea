"""What is built, and what a wheel and an sdist hold."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from elftools.elf.elffile import ELFFile

from alignfast import _C

ROOT = Path(__file__).resolve().parent.parent
PARTS = ["alignfast", "bench", "csrc", "kernels", "tests"]
KNOWN_SETS = {
    *("sse2", "sse4_2", "avx", "avx2", "fma", "f16c"),
    *("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "neon"),
}


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def declared() -> dict[str, str]:
    project: dict[str, str] = pyproject()["project"]
    return project


def test_build_info_is_real() -> None:
    info = _C.build_info()
    assert info["version"] == declared()["version"]
    assert info["compiler"] in {"GNU", "Clang", "AppleClang", "IntelLLVM"}
    assert str(info["compiler_version"])[0].isdigit()
    assert isinstance(info["cxx_standard"], int)
    assert info["cxx_standard"] >= 202002
    assert info["build_type"] in {"Release", "RelWithDebInfo", "Debug", "MinSizeRel"}
    assert info["architecture"] == os.uname().machine
    assert info["cuda_compiler"] is None or str(info["cuda_compiler"])[0].isdigit()


def test_instruction_sets_are_known_names() -> None:
    found = _C.instruction_sets()
    assert found
    assert len(found) == len(set(found))
    assert set(found) <= KNOWN_SETS


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the flags of x86-64 are compared")
def test_instruction_sets_are_those_of_the_kernel() -> None:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        pytest.skip("no /proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines()
    flags = set(next(line for line in lines if line.startswith("flags")).split(":")[1].split())
    assert set(_C.instruction_sets()) <= flags
    assert {"sse2", "avx", "avx2", "fma", "avx512f"} & flags <= set(_C.instruction_sets())


def test_thread_count_is_within_the_machine() -> None:
    assert 1 <= _C.thread_count() <= (os.cpu_count() or 1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs sched_setaffinity")
def test_thread_count_follows_the_affinity() -> None:
    program = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from alignfast import _C
print(_C.thread_count())
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "1"


def test_kernels_are_part_of_the_package() -> None:
    assert importlib.import_module("alignfast.kernels").__name__ == "alignfast.kernels"


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist built from a copy, so that the tree's own build folder takes no part."""
    tree = tmp_path_factory.mktemp("tree") / "alignfast"
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for part in PARTS:
        shutil.copytree(ROOT / part, tree / part, ignore=ignore)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, tree)
    out = tmp_path_factory.mktemp("sdist")
    run_python("-m", "build", "--sdist", "--no-isolation", "--outdir", str(out), str(tree))
    return next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    # Without the CUDA library, which takes minutes to compile and is packed by the same rule as the other, and with
    # kernels that are compiled in no time, whose speed does not matter here.
    run_python(
        *("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(sdist)),
        CMAKE_ARGS="-DALIGNFAST_CUDA=OFF -DALIGNFAST_KERNEL_OPTIMISATION=-O0",
    )
    return next(out.glob("*.whl"))


def run_python(*arguments: str, **variables: str) -> None:
    command, environment = [sys.executable, *arguments], os.environ | variables
    run = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_sdist_holds_the_sources(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for part in PARTS:
        suffixes = {".py", ".pyi", ".cpp", ".h", ".cu", ".cuh"}
        sources = {path for path in (ROOT / part).rglob("*") if path.suffix in suffixes}
        assert {str(path.relative_to(ROOT)) for path in sources} <= names
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()} <= names
    assert {"CMakeLists.txt", "LICENSE", "Makefile", "pyproject.toml", "setup.py", "alignfast/py.typed"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_wheel_holds_the_package_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        record = archive.read(f"alignfast-{declared()['version']}.dist-info/RECORD").decode()
    names = [line.split(",")[0] for line in record.splitlines()]
    assert {name.split("/")[0] for name in names} == {"alignfast", f"alignfast-{declared()['version']}.dist-info"}
    assert {"alignfast/kernels/__init__.py", "alignfast/bench/run.py", "alignfast/bench/reference/alignment.py"} <= set(
        names
    )
    assert {"alignfast/_C.pyi", "alignfast/py.typed"} <= set(names)
    (module,) = (name for name in names if name.startswith("alignfast/_C.") and name.endswith(".so"))
    assert {name for name in names if name.endswith(".so")} == {module, "alignfast/libalignfast_ops.so"}
    assert not [name for name in names if name.endswith((".cpp", ".h", ".cu", ".cuh", ".o"))]


def test_wheel_is_of_this_python_and_platform(wheel: Path) -> None:
    python, abi, platform = wheel.stem.split("-")[2:]
    version = "cp{}{}".format(*sys.version_info[:2])
    assert (python, abi) == (version, version)
    assert platform == f"linux_{os.uname().machine}"


def test_torch_is_needed_to_build_and_to_run() -> None:
    """Its headers, in the release that the library is compiled for, or a later one."""
    (target,) = re.findall(
        r"TORCH_TARGET_VERSION=0x(\w{2})(\w{2})", (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    )
    oldest = ".".join(str(int(part, 16)) for part in target)
    assert f"torch>={oldest}" in pyproject()["build-system"]["requires"]
    assert f"torch>={oldest}" in declared()["dependencies"]


def test_libraries_of_the_wheel_hold_symbols_and_no_path(wheel: Path, tmp_path: Path) -> None:
    """A path to libraries would be one of the machine that built it; the tests of the kernels read the symbols."""
    with zipfile.ZipFile(wheel) as archive:
        libraries = [archive.extract(name, tmp_path) for name in archive.namelist() if name.endswith(".so")]
    assert len(libraries) == 2
    for library in libraries:
        with Path(library).open("rb") as file:
            elf = ELFFile(file)
            tags = {tag.entry.d_tag for tag in elf.get_section_by_name(".dynamic").iter_tags()}
            assert "DT_NEEDED" in tags
            assert not tags & {"DT_RPATH", "DT_RUNPATH"}
            assert elf.get_section_by_name(".symtab") is not None


def test_wheel_is_complete(wheel: Path, tmp_path: Path) -> None:
    """Its module and its ops load and work in a folder that holds nothing but the wheel's files."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    # The package itself needs more than the module under test, hence a bare stand-in for its __init__.
    (tmp_path / "alignfast" / "__init__.py").write_text("", encoding="utf-8")
    program = """
import torch, alignfast._C as c, alignfast.kernels as k, alignfast.native as n, alignfast.ops as o
zero = torch.zeros(1, dtype=torch.int64)
draw = o.philox_uniform(zero, zero, (1,), seed=0).item()
print(c.__file__, k.__file__, n.PATH, c.build_info()["version"], int(draw * 2**24) == 0x6627E8D5 >> 8)
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    *paths, version, right = run.stdout.split()
    assert len(paths) == 3
    assert all(Path(path).is_relative_to(tmp_path) for path in paths)
    assert version == declared()["version"]
    assert right == "True"
