"""Loads the native op library, whose ops are `torch.ops.alignfast.<op>`."""

from __future__ import annotations

from pathlib import Path

import torch

from alignfast._C import cpu_isa

PATH = Path(__file__).resolve().parent / "libalignfast_ops.so"
# Devices with kernels of their own; elsewhere the reference serves.
NATIVE_DEVICES = frozenset({"cpu"})


def load() -> None:
    """Raises ImportError where the library is missing or does not load, or ALIGNFAST_CPU_ISA names no usable set."""
    try:
        cpu_isa()
        torch.ops.load_library(PATH)
    except (OSError, ValueError) as error:
        raise ImportError(f"the native op library did not load: {error}") from error


load()
