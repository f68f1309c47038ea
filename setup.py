"""Builds the native module with CMake and Ninja; everything else is declared in pyproject.toml."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OP_LIBRARY = "libalignfast_ops"
CUDA_LIBRARY = "libalignfast_cuda"


class CMakeBuild(build_ext):
    def finalize_options(self) -> None:
        super().finalize_options()
        # The module is copied into the source tree even where the one there is newer: it may be of other settings.
        self.force = True

    def get_ext_filename(self, fullname: str) -> str:
        # The libraries of ops are loaded by torch and not by Python, so they have no ABI in their names.
        filename = Path(super().get_ext_filename(fullname))
        name = fullname.rpartition(".")[2]
        return str(filename.with_name(f"{name}.so") if name in (OP_LIBRARY, CUDA_LIBRARY) else filename)

    def build_extension(self, ext: Extension) -> None:
        # Imported here, so that asking for metadata or an sdist needs none of them.
        import cmake
        import ninja
        import pybind11

        cmake_program = Path(cmake.CMAKE_BIN_DIR) / "cmake"
        configure = [
            f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DALIGNFAST_TORCH={torch_folder()}",
            f"-DALIGNFAST_VERSION={self.distribution.get_version()}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        build = build_folder(configure)
        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        subprocess.check_call([cmake_program, "-S", ROOT, "-B", build, "-G", "Ninja", *configure])
        target = ext.name.rpartition(".")[2].removeprefix("lib")
        subprocess.check_call([cmake_program, "--build", build, "--target", target, *parallel_flags(self.parallel)])
        subprocess.check_call([cmake_program, "--install", build, "--prefix", package, "--component", target])
        if self.editable_mode and ext.optional and not Path(self.get_ext_fullpath(ext.name)).exists():
            # One that was built with other settings would be loaded from the source tree.
            (ROOT / self.get_ext_filename(ext.name)).unlink(missing_ok=True)


def torch_folder() -> str:
    """The installed torch, found without importing it, which would take seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("torch: not installed; it is needed to build, with --no-build-isolation")
    return str(Path(spec.origin).parent)


def build_folder(configure: list[str]) -> Path:
    """Where to build: the same folder for the same settings, so that only what changed is compiled again.

    Settings have folders of their own because CMake's cache would keep one that is no longer given.
    """
    key = hashlib.sha256("\n".join([sys.version, *configure]).encode()).hexdigest()[:12]
    return ROOT / "build" / f"cmake-{key}"


def parallel_flags(jobs: int | bool | None) -> list[str]:
    return ["--parallel", str(jobs)] if jobs and jobs is not True else []


setup(
    packages=[
        *find_packages(include=["alignfast", "alignfast.*"]),
        "alignfast.kernels",
        *(f"alignfast.kernels.{name}" for name in find_packages("kernels")),
        "alignfast.bench",
        *(f"alignfast.bench.{name}" for name in find_packages("bench")),
    ],
    package_dir={"alignfast.kernels": "kernels", "alignfast.bench": "bench"},
    package_data={"alignfast": ["py.typed", "*.pyi", "evaluation/*.j2"]},
    ext_modules=[
        Extension("alignfast._C", sources=[]),
        Extension(f"alignfast.{OP_LIBRARY}", sources=[]),
        # Optional, as nothing is built where there is no nvcc; an error of nvcc is an error all the same.
        Extension(f"alignfast.{CUDA_LIBRARY}", sources=[], optional=True),
    ],
    cmdclass={"build_ext": CMakeBuild},
)
