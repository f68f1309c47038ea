"""Loads the native op library, whose ops are `torch.ops.alignfast.<op>`, and chooses what serves them on CUDA devices.

ALIGNFAST_BACKEND names one of `CUDA_BACKENDS` to force it; otherwise the first that is to be had serves.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from alignfast._C import cpu_isa

PATH = Path(__file__).resolve().parent / "libalignfast_ops.so"
CUDA_PATH = PATH.with_name("libalignfast_cuda.so")
FORCED = "ALIGNFAST_BACKEND"


@dataclass(frozen=True)
class Choice:
    """name: the backend that serves. passed_over: why those before it do not, by name."""

    name: str
    passed_over: Mapping[str, str]


def load() -> None:
    """Raises ImportError where the library is missing or does not load, or ALIGNFAST_CPU_ISA names no usable set."""
    try:
        cpu_isa()
        torch.ops.load_library(PATH)
    except (OSError, ValueError) as error:
        raise ImportError(f"the native op library did not load: {error}") from error


def use_cuda() -> None:
    """The library of CUDA C++ kernels serves from now on; ImportError with the reason where it can not."""
    if not CUDA_PATH.exists():
        raise ImportError("not built, as there was no nvcc that could be used")
    if torch.version.hip is not None:
        raise ImportError(f"made for CUDA, and this torch is for HIP {torch.version.hip}")
    try:
        torch.ops.load_library(CUDA_PATH)
    except OSError as error:
        raise ImportError(f"does not load: {error}") from error


def use_triton() -> None:
    """The Triton kernels serve from now on, each imported at its first call; ImportError where Triton is missing."""
    if find_spec("triton") is None:
        raise ImportError("Triton is not installed")
    from alignfast.kernels.register import register

    register("cuda")


def use_reference() -> None:
    """Nothing is registered: the public functions call the reference on devices without kernels."""


# In order of preference.
CUDA_BACKENDS: dict[str, Callable[[], None]] = {"cuda": use_cuda, "triton": use_triton, "reference": use_reference}


def choose(forced: str | None) -> Choice:
    """The first backend that can be used, or the one that is asked for.

    Raises:
        ImportError: that one is not known, or can not be used here.
    """
    if forced is not None and forced not in CUDA_BACKENDS:
        raise ImportError(f"{FORCED}: got {forced!r}; allowed is one of {', '.join(CUDA_BACKENDS)}")
    passed_over: dict[str, str] = {}
    for name, use in CUDA_BACKENDS.items():
        if forced not in (None, name):
            continue
        try:
            use()
        except ImportError as error:
            if forced is not None:
                raise ImportError(f"{FORCED}: got {name!r}, which can not be used here: {error}") from error
            passed_over[name] = str(error)
        else:
            return Choice(name, passed_over)
    raise AssertionError("the reference can always be used")


load()
CUDA_BACKEND = choose(os.environ.get(FORCED))
# Devices with kernels of their own; elsewhere the reference serves.
NATIVE_DEVICES = frozenset({"cpu"} if CUDA_BACKEND.name == "reference" else {"cpu", "cuda"})
# And those of the ops that are for the CPU alone, as others have libraries for what these do.
CPU_DEVICES = frozenset({"cpu"})
