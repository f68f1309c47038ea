"""Step rules: how the images move along the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from alignfast.checks import check_number
from alignfast.ops import sign_step


class StepRule(Protocol):
    def memory(self, images: Tensor) -> Tensor | None:
        """What the rule accumulates, before the first step; None if nothing."""
        ...

    def look_ahead(self, adv: Tensor, memory: Tensor | None, alpha: float) -> Tensor:
        """The point at which the gradient is wanted."""
        ...

    def update(
        self, adv: Tensor, images: Tensor, grad: Tensor, memory: Tensor | None, alpha: float, eps: float
    ) -> None:
        """Move `adv` and `memory` in place, within eps of `images` and in [0, 1]."""
        ...


@dataclass(frozen=True)
class SignStep:
    """alpha sign(m), projected on the L-inf ball.

    momentum: decay of the accumulated gradient (MI-FGSM, Dong et al., CVPR 2018, eq. 6); 0 is BIM's step (Kurakin et
    al., ICLR 2017 workshop). nesterov: the gradient is taken at adv + alpha momentum m (NI-FGSM, Lin et al., ICLR
    2020, eq. 6).

    Raises:
        ValueError: a negative momentum.
    """

    momentum: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        check_number("momentum", self.momentum, low=0.0)

    def memory(self, images: Tensor) -> Tensor | None:
        return torch.zeros_like(images) if self.momentum else None

    def look_ahead(self, adv: Tensor, memory: Tensor | None, alpha: float) -> Tensor:
        return adv + (self.momentum * alpha) * memory if self.nesterov and memory is not None else adv

    def update(
        self, adv: Tensor, images: Tensor, grad: Tensor, memory: Tensor | None, alpha: float, eps: float
    ) -> None:
        sign_step(adv, images, grad, memory, alpha=alpha, eps=eps, decay=self.momentum)
