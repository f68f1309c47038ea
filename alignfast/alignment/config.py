"""The settings of an alignment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from alignfast.checks import check_choice, check_count, check_number
from alignfast.ops.kl_div_with_logits import Combine, Direction

PRECISIONS = ("fp32", "bf16")
BATCH_NORMS = ("move", "freeze")
OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True)
class AlignConfig:
    """How to align; the defaults are the paper's recipe for a ResNet-50 (Ma et al., ECCV 2024).

    The loss is lambda_kd * kl_div_with_logits(source, witness) + lambda_cls * cross_entropy(source, labels).

    Args:
        temperature: T of the divergence, greater than 0.
        direction: of the divergence, see `kl_div_with_logits`. combine: over several witnesses, per sample.
        lambda_kd, lambda_cls: weights of the two terms; labels are not read while lambda_cls is 0.
        optimizer: "sgd", or "adamw" (betas 0.9 and 0.999), whose momentum and nesterov are not used.
        lr, momentum, weight_decay, nesterov: of the optimizer.
        schedule: "cosine", along which the rate falls to 0, stepped every iteration, or "constant".
        epochs: passes over the loader. steps: stop after so many iterations instead, over as many passes as it takes.
        clip_norm: bound of the gradient's L2 norm; None for no clipping.
        precision: "fp32", or "bf16" for autocast (weights and update stay float32).
        batch_norm: "move" normalises by the batch and moves the running statistics, as in training; "freeze"
            normalises by the running statistics and leaves them. The affine weights are trained in both.
        seed: of everything random in the source, such as dropout; the loader has its own.

    Raises:
        ValueError: a number or name outside what is allowed.
    """

    temperature: float = 4.0
    direction: Direction = "forward"
    combine: Combine = "mean"
    lambda_kd: float = 1.0
    lambda_cls: float = 0.0
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 1e-4
    nesterov: bool = True
    schedule: Literal["cosine", "constant"] = "cosine"
    epochs: int = 1
    steps: int | None = None
    clip_norm: float | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    batch_norm: Literal["move", "freeze"] = "move"
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, low=0.0, open_low=True)
        check_choice("direction", self.direction, ("forward", "reverse", "symmetric", "jsd"))
        check_choice("combine", self.combine, ("mean", "max", "min"))
        for name in ("lambda_kd", "lambda_cls", "momentum", "weight_decay"):
            check_number(name, getattr(self, name), low=0.0)
        check_number("lr", self.lr, low=0.0, open_low=True)
        check_count("epochs", self.epochs)
        check_count("seed", self.seed, low=0, high=2**63 - 1)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("batch_norm", self.batch_norm, BATCH_NORMS)
        if self.steps is not None:
            check_count("steps", self.steps)
        if self.clip_norm is not None:
            check_number("clip_norm", self.clip_norm, low=0.0, open_low=True)
        if self.lambda_kd == 0 and self.lambda_cls == 0:
            raise ValueError("lambda_kd, lambda_cls: got 0 for both; allowed is at least one above 0")
        if self.optimizer == "sgd" and self.nesterov and self.momentum == 0:
            raise ValueError("nesterov: got True with momentum 0; allowed with a momentum above 0 only")
