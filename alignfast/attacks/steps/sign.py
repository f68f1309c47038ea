"""What a step rule is, and those that `sign_step` carries out."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from alignfast.attacks.component import Component, Memory, Position, Start
from alignfast.checks import check_count, check_number
from alignfast.draws import Draws
from alignfast.ops import sign_step

__all__ = ["CornerStart", "GlobalMomentum", "L2Step", "SignStep", "StepRule", "SummedStep"]


class StepRule(Component):
    """How the images move. norm: of the ball that they stay in."""

    norm: ClassVar[Literal["linf", "l2"]] = "linf"

    def look_ahead(self, adv: Tensor, memory: Memory, alpha: float) -> Tensor:
        """The point at which the gradient is wanted."""
        return adv

    def offset(self, images: Tensor, eps: float, draws: Draws) -> Tensor:
        """[N, C, H, W]: from the images to a random point of the ball."""
        return draws.uniform(shape=tuple(images.shape[1:]), low=-eps, high=eps)[0]

    @abstractmethod
    def update(self, position: Position, grad: Tensor, memory: Memory) -> None:
        """Move `position.adv` and `memory` in place, within eps of `position.images` and in [0, 1]."""


@dataclass(frozen=True)
class SignStep(StepRule):
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

    def memory(self, start: Start) -> Memory:
        return {"momentum": torch.zeros_like(start.images)} if self.momentum else {}

    def look_ahead(self, adv: Tensor, memory: Memory, alpha: float) -> Tensor:
        return adv + (self.momentum * alpha) * memory["momentum"] if self.nesterov and memory else adv

    def update(self, position: Position, grad: Tensor, memory: Memory) -> None:
        sign_step(
            position.adv,
            position.images,
            grad,
            memory.get("momentum"),
            alpha=position.alpha,
            eps=position.eps,
            decay=self.momentum,
            norm=self.norm,
        )


@dataclass(frozen=True)
class CornerStart(SignStep):
    """A sign step whose random start is r times random signs (R+FGSM, Tramer et al., ICLR 2018).

    r is `radius`, or eps where that is less. momentum, nesterov: as in `SignStep`.

    Raises:
        ValueError: a negative momentum or radius.
    """

    radius: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("radius", self.radius, low=0.0)

    def offset(self, images: Tensor, eps: float, draws: Draws) -> Tensor:
        """To a corner of the cube of half-side r."""
        radius = min(self.radius, eps)
        signs: Tensor = draws.uniform(shape=tuple(images.shape[1:]), low=-1.0, high=1.0)[0].sign()
        return radius * signs


@dataclass(frozen=True)
class GlobalMomentum(SignStep):
    """GI (Wang et al., arXiv 2211.11236): the momentum begins as it is after `steps` steps of size s alpha.

    The images themselves begin anew after these, where the authors' code takes the first gradient after them still at
    the end of that search. s: `factor`. momentum, nesterov: as in `SignStep`.

    Raises:
        ValueError: a negative momentum or factor, or no step.
    """

    steps: int = 5
    factor: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("steps", self.steps)
        check_number("factor", self.factor, low=0.0)

    def memory(self, start: Start) -> Memory:
        if not self.momentum:
            return {}
        # A step of 1 leaves the ball or the range whatever its radius, as any longer one does.
        return start.rehearse(SignStep(self.momentum, self.nesterov), self.steps, min(self.factor * start.alpha, 1.0))


@dataclass(frozen=True)
class L2Step(SignStep):
    """alpha m / ||m||_2, projected on the L2 ball (Madry et al., ICLR 2018; Dong et al., CVPR 2018, section 3.3).

    eps and alpha are L2 distances, in units of [0, 1] images. momentum, nesterov: as in `SignStep`.

    Raises:
        ValueError: a negative momentum.
    """

    norm: ClassVar[Literal["linf", "l2"]] = "l2"

    def offset(self, images: Tensor, eps: float, draws: Draws) -> Tensor:
        """In a direction that is uniform, at a distance that is uniform in [0, eps), as torchattacks draws it."""
        direction = draws.normal(0, tuple(images.shape[1:]))[0]
        length = torch.linalg.vector_norm(direction, dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)
        offset: Tensor = direction / length * (eps * draws.uniform(2)[0][:, None, None, None])
        return offset


@dataclass(frozen=True)
class SummedStep(SignStep):
    """alpha sign(m), projected on the L-inf ball, m the sum of all gradients so far as they are.

    Each counts momentum^age times. With momentum 1 it is ANDA's step (Fang et al., CVPR 2024); with any, that of the
    code of Zhao et al. (NeurIPS 2021) for targeted attacks. Without look-ahead, since m has the scale of gradients.

    Raises:
        ValueError: a negative momentum, or nesterov.
    """

    momentum: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov:
            raise ValueError("nesterov: got True; allowed with SummedStep is False")

    def update(self, position: Position, grad: Tensor, memory: Memory) -> None:
        total = memory["momentum"].mul_(self.momentum).add_(grad) if memory else grad
        sign_step(position.adv, position.images, total, alpha=position.alpha, eps=position.eps)
