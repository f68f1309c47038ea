"""Gradient shaping: what is done to the gradient before the step."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from alignfast.attacks.component import Component
from alignfast.attacks.dct import waves
from alignfast.checks import check_choice, check_count, check_number
from alignfast.ops import smooth

__all__ = ["FrequencyMask", "Shaping", "Smoothing"]


class Shaping(Component):
    """What is done to the gradient."""

    @abstractmethod
    def shape(self, grad: Tensor) -> Tensor:
        """[N, C, H, W] to the same."""


@dataclass(frozen=True)
class Smoothing(Shaping):
    """TI (Dong et al., CVPR 2019): W * g with a separable kernel that sums to 1.

    kernel: "gaussian" samples a normal density at `size` points from -sigma to sigma, as the authors' code and
    torchattacks do; "uniform"; or "linear", 1 - |i| / (h + 1) for i in -h..h with size = 2 h + 1 (TransferAttack's
    is nearly uniform).
    size: odd. sigma: greater than 0, for the Gaussian only.

    Raises:
        ValueError: an unknown kernel, an even size, or a sigma that is not positive.
    """

    kernel: Literal["gaussian", "uniform", "linear"] = "gaussian"
    size: int = 15
    sigma: float = 3.0

    def __post_init__(self) -> None:
        check_choice("kernel", self.kernel, ("gaussian", "uniform", "linear"))
        check_number("sigma", self.sigma, low=0.0, open_low=True)
        if check_count("size", self.size) % 2 == 0:
            raise ValueError(f"size: got {self.size}; allowed is an odd whole number")

    def weights(self, device: torch.device | None = None) -> Tensor:
        """float64 [size], summing to 1; the two-dimensional kernel is their outer product."""
        half = self.size // 2
        offset = torch.arange(-half, half + 1, dtype=torch.float64, device=device)
        weights = {
            "gaussian": torch.exp(-0.5 * (self.sigma * offset / max(half, 1)) ** 2),
            "uniform": torch.ones_like(offset),
            "linear": 1 - offset.abs() / (half + 1),
        }[self.kernel]
        return weights / weights.sum()

    def shape(self, grad: Tensor) -> Tensor:
        # Computed where the gradient is: a copy from the host would wait for the device at every step.
        return smooth(grad, self.weights(grad.device).to(grad.dtype))


@dataclass(frozen=True)
class FrequencyMask(Shaping):
    """The gradient's low frequencies alone (Guo et al., UAI 2019; Sharma et al., IJCAI 2019): D^T (M * (D g D^T)) D.

    D is the orthonormal DCT-II of a side and M keeps the `kept` share of the lowest frequencies of either side, rounded
    up. The sign and the clamp that follow bring in other frequencies.

    Raises:
        ValueError: a share outside (0, 1].
    """

    kept: float = 0.25

    def __post_init__(self) -> None:
        check_number("kept", self.kept, low=0.0, high=1.0, open_low=True)

    def shape(self, grad: Tensor) -> Tensor:
        rows, columns = (self._projection(side, grad) for side in grad.shape[-2:])
        # One product for each image and channel, so that it does not depend on how many there are.
        planes = grad.flatten(0, 1)
        shaped = rows.expand(len(planes), -1, -1) @ planes @ columns.expand(len(planes), -1, -1)
        return shaped.reshape(grad.shape)

    def _projection(self, side: int, grad: Tensor) -> Tensor:
        """[side, side]: onto the cosines of the lowest frequencies."""
        cosines = waves(side, grad.device)[: math.ceil(self.kept * side)]
        return (cosines.T @ cosines).to(grad.dtype)
