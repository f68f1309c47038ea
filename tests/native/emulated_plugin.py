"""A plugin of pytest: the ops of tensors on the CPU are the CUDA kernels, run by the emulation.

    python -m pytest -p tests.native.emulated_plugin -m "not slow and not cpu_only" tests/ops

ALIGNFAST_EMULATED names the library, if it is not to be the one that tests.native.emulated builds.
"""

import os

import pytest
import torch

import alignfast.native  # noqa: F401  (The last library to register a kernel of an op has it.)
from tests.native import emulated


def serving(op: str) -> str:
    """Where the kernel that serves an op on the CPU is registered."""
    lines = torch._C._dispatch_dump(f"alignfast::{op}").splitlines()
    return next(line for line in lines if line.startswith("CPU: "))


def pytest_configure(config: pytest.Config) -> None:
    torch.ops.load_library(os.environ.get("ALIGNFAST_EMULATED") or emulated.op_library())
    for source in emulated.sources():
        if "csrc/cuda" not in serving(source.stem):
            raise pytest.UsageError(f"{source.stem}: got {serving(source.stem)}; allowed is a kernel of csrc/cuda")
    # What kernels leave unwritten is NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
