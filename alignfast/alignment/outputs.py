"""Losses between predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from alignfast.checks import check_choice, check_number
from alignfast.ops import kl_div_with_logits
from alignfast.ops.kl_div_with_logits import Combine, Direction, _check
from alignfast.reference.kl_div_with_logits import LOWEST_LOGIT

__all__ = ["OUTPUTS", "OUTPUT_LOSSES", "Output", "OutputLoss", "output_loss"]

Output = Literal["kl", "mse", "l1"]
OUTPUTS: tuple[Output, ...] = ("kl", "mse", "l1")


@dataclass(frozen=True)
class OutputLoss:
    """One loss of predictions among several, see `output_loss`.

    Args:
        kind: "kl", "mse" or "l1". direction: of "kl" only.
        temperature: T, greater than 0; None for that of the alignment.
        weight: of this loss beside the others, at least 0.

    Raises:
        ValueError: an argument outside what is allowed.
    """

    kind: Output = "kl"
    direction: Direction = "forward"
    temperature: float | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, OUTPUTS)
        check_choice("direction", self.direction, get_args(Direction))
        if self.temperature is not None:
            check_number("temperature", self.temperature, low=0.0, open_low=True)
        check_number("weight", self.weight, low=0.0)

    @property
    def name(self) -> str:
        """As in `OUTPUT_LOSSES`."""
        return self.direction if self.kind == "kl" and self.direction != "forward" else self.kind


OUTPUT_LOSSES: dict[str, OutputLoss] = {
    loss.name: loss
    for loss in (
        OutputLoss("kl"),
        OutputLoss("kl", "reverse"),
        OutputLoss("kl", "symmetric"),
        OutputLoss("kl", "jsd"),
        OutputLoss("mse"),
        OutputLoss("l1"),
    )
}


def output_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    kind: Output = "kl",
    temperature: float = 4.0,
    direction: Direction = "forward",
    combine: Combine = "mean",
) -> Tensor:
    """How far q = softmax(student / T) is from p = softmax(teacher / T), mean over the batch (Ma et al., ECCV 2024).

    "kl" is `kl_div_with_logits`, the paper's loss, with its factor T^2. "mse" is sum_c (q_c - p_c)^2 and "l1" the total
    variation, sum_c |q_c - p_c| / 2, which lies in [0, 1]; neither has a factor of T, as in the authors' code. That
    code takes both of the logits themselves, without softmax and temperature, and the mean over classes instead of the
    sum, so its numbers are on another scale: those of logits, divided by C (and for "l1" not halved). Its symmetric
    divergence is KL(p || q) + KL(q || p) at T = 1: twice "kl" with direction "symmetric".

    Gradient flows to the student only. Logits below -1e5, -inf (masked classes) included, count as -1e5.

    Args:
        student: [N, C] logits, any floating dtype; computed in float32, or in float64 if given so.
        teacher: [N, C] logits, or [W, N, C] of W witnesses.
        temperature: T, greater than 0. direction: of "kl" only.
        combine: over witnesses, per sample: "mean", "max" or "min".

    Returns:
        A scalar, 0 for an empty batch; float32, or float64 for float64 logits.

    Raises:
        ValueError: shapes, dtypes or devices that do not match, or an argument outside what is allowed.
    """
    check_choice("kind", kind, OUTPUTS)
    if kind == "kl":
        return kl_div_with_logits(student, teacher, temperature, direction, "batchmean", combine)
    _check(student, teacher, temperature, direction, "batchmean", combine)
    apart = _probabilities(student, temperature) - _probabilities(teacher.detach(), temperature)
    losses = apart.square().sum(-1) if kind == "mse" else apart.abs().sum(-1) / 2
    if teacher.ndim == 3:
        losses = _combined(losses, combine)
    return losses.sum() / max(len(losses), 1)


def _probabilities(logits: Tensor, temperature: float) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return (wide.clamp(min=LOWEST_LOGIT) / temperature).softmax(-1)


def _combined(losses: Tensor, combine: Combine) -> Tensor:
    """[N], from [W, N]"""
    if combine == "mean":
        return losses.mean(0)
    return losses.amax(0) if combine == "max" else losses.amin(0)
