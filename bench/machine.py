"""What the cases are measured on."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from alignfast._C import cpu_isa
from alignfast.doctor import chosen, cpu_backend, cuda_backend, triton_backend
from alignfast.memory import memory_state

from .roofline import gpu_of

ALLOCATOR = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
# What nvidia-smi is asked for; clocks in MHz, power in W, temperature in degrees Celsius.
ASKED = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")
SMI_SECONDS = 20


def machine(device: torch.device) -> dict[str, Any]:
    return {
        "processor": _processor(),
        "architecture": platform.machine(),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "kernels": cpu_isa(),
        "allocator": {name: os.environ.get(name) for name in ALLOCATOR},
        "memory": asdict(memory_state()),
        "backends": {"cpu": cpu_backend(), "cuda": cuda_backend(), "triton": triton_backend()},
        "chosen": chosen(device.type),
        "gpu": gpu_facts(device) if device.type == "cuda" else None,
    }


def gpu_facts(device: torch.device) -> dict[str, Any]:
    told, known = torch.cuda.get_device_properties(device), gpu_of(device)
    assert known is not None
    return {
        "name": told.name,
        "capability": [told.major, told.minor],
        "multiprocessors": told.multi_processor_count,
        "memory_bytes": told.total_memory,
        "l2_bytes": known.cache,
        "bytes_per_second": known.bandwidth,
        "peaks": dict(known.peaks),
        "toolkit": torch.version.cuda or torch.version.hip,
        "tf32": {"cudnn": torch.backends.cudnn.allow_tf32, "matmul": torch.backends.cuda.matmul.allow_tf32},
        "smi": smi(device),
    }


def smi(device: torch.device) -> dict[str, str] | None:
    """Driver, clocks, power and temperature as nvidia-smi tells them now; None where it does not."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    # By its own number, as nvidia-smi counts devices that CUDA_VISIBLE_DEVICES hides.
    which = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = [program, which, f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(ASKED, (value.strip() for value in answer.split(",")), strict=False))


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
