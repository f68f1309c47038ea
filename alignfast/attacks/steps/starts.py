"""Step rules that differ in where they start."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from alignfast.attacks.steps.sign import SignStep
from alignfast.checks import check_number
from alignfast.draws import Draws

__all__ = ["NormalStart"]


@dataclass(frozen=True)
class NormalStart(SignStep):
    """A sign step whose random start is normal noise (Zhang et al., ICML 2019, algorithm 1), clipped to the ball.

    So the code of AdaEA (Chen et al., ICCV 2023) starts, too.

    spread: its standard deviation, in units of [0, 1] images; at least 0.

    Raises:
        ValueError: a negative momentum or spread.
    """

    spread: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("spread", self.spread, low=0.0)

    def offset(self, images: Tensor, eps: float, draws: Draws) -> Tensor:
        return (self.spread * draws.normal(0, tuple(images.shape[1:]))[0]).clamp(-eps, eps)
