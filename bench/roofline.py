"""How long the hardware needs at the least: bytes over bandwidth for an op, operations over the peak for a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from .subject import Cost


@dataclass(frozen=True)
class Gpu:
    """Bytes a second of the memory, operations a second by arithmetic, and bytes of the L2 cache; None if unknown."""

    name: str
    bandwidth: float | None
    peaks: Mapping[str, float] = field(default_factory=dict)
    cache: int | None = None

    def limits(self, cost: Cost) -> dict[str, float]:
        """Seconds by limit: "memory" for what moves bytes, else "fp32", "tf32" and "bf16", as far as known."""
        if cost.moved:
            return {} if self.bandwidth is None else {"memory": cost.moved / self.bandwidth}
        return {name: cost.flops / peak for name, peak in self.peaks.items()}

    def caches(self, cost: Cost) -> bool:
        """The bytes fit into the L2 cache, so that calls one after another may beat the memory."""
        return self.cache is not None and 0 < cost.moved <= self.cache


# Dense rates, from NVIDIA's "A100 Tensor Core GPU" datasheet (80GB SXM) and "H100 Tensor Core GPU Architecture"
# whitepaper (SXM5).
A100_PEAKS = {"fp32": 19.5e12, "tf32": 156e12, "bf16": 312e12}
H100_PEAKS = {"fp32": 66.9e12, "tf32": 494.7e12, "bf16": 989.4e12}
A100 = Gpu("A100", 2039e9, A100_PEAKS, 40 * 2**20)
H100 = Gpu("H100", 3352e9, H100_PEAKS, 50 * 2**20)
GPUS = (A100, H100)
# By a part of what torch calls the device. An H100 for PCI Express has other rates, and a name without HBM3.
PEAKS_BY_NAME = {"A100": A100_PEAKS, "H100 80GB HBM3": H100_PEAKS, "H200": H100_PEAKS}


def gpu_of(device: torch.device) -> Gpu | None:
    """What is known of this device, from what it tells of its memory and, by its name, from data sheets."""
    if device.type != "cuda":
        return None
    told = torch.cuda.get_device_properties(device)
    peaks = next((peaks for name, peaks in PEAKS_BY_NAME.items() if name in told.name), {})
    # kHz and bits; two transfers a clock. Releases of torch before these fields tell nothing.
    kilohertz, bits = getattr(told, "memory_clock_rate", 0), getattr(told, "memory_bus_width", 0)
    bandwidth = 2e3 * kilohertz * bits / 8 or None
    return Gpu(told.name, bandwidth, peaks, getattr(told, "L2_cache_size", None))


def limit_of(cost: Cost, dtype: str, gpu: Gpu | None) -> str:
    """Which limit holds for this cost in this dtype on a GPU, under the settings of torch, or on a CPU."""
    if cost.moved:
        return "memory"
    if dtype != "fp32" or gpu is None:
        return dtype
    return "tf32" if torch.backends.cudnn.allow_tf32 else "fp32"
