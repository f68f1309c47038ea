"""Step rules in which each element moves as far as it is told."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alignfast.attacks.component import Memory, Position, Start
from alignfast.attacks.per_image import over_mean
from alignfast.attacks.steps.sign import SignStep
from alignfast.checks import check_number

__all__ = ["DecayingStep"]


@dataclass(frozen=True)
class DecayingStep(SignStep):
    """GRA's decay indicator (Zhu et al., ICCV 2023, section 3.3): alpha M sign(m), elementwise.

    M begins as 1 / eta and is multiplied by eta wherever the sign of m, the momentum or else the gradient, is another
    than at the step before; at the first step it is 1 throughout. eta: in (0, 1].

    Raises:
        ValueError: a negative momentum, or an eta outside (0, 1].
    """

    eta: float = 0.94

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("eta", self.eta, low=0.0, high=1.0, open_low=True)

    def memory(self, start: Start) -> Memory:
        images = start.images
        indicator, sign = torch.full_like(images, 1 / self.eta), torch.zeros_like(images)
        return super().memory(start) | {"indicator": indicator, "sign": sign}

    def update(self, position: Position, grad: Tensor, memory: Memory) -> None:
        sign, indicator = followed(grad, self.momentum, memory).sign(), memory["indicator"]
        indicator.copy_(torch.where(sign == memory["sign"], indicator, self.eta * indicator))
        memory["sign"].copy_(sign)
        move(position, position.alpha * indicator * sign)


def followed(grad: Tensor, decay: float, memory: Memory) -> Tensor:
    """The momentum after this gradient (Dong et al., CVPR 2018, eq. 6), in place of the old one, if there is any."""
    momentum = memory.get("momentum")
    return grad if momentum is None else momentum.mul_(decay).add_(over_mean(grad))


def move(position: Position, way: Tensor) -> None:
    """`position.adv` by `way`, [N, C, H, W], within eps of the images and in [0, 1]; in place."""
    delta = (position.adv + way - position.images).clamp_(-position.eps, position.eps)
    torch.clamp(position.images + delta, 0, 1, out=position.adv)
