"""The settings of an alignment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from alignfast.alignment.embeddings import EmbeddingLoss
from alignfast.alignment.outputs import OUTPUTS, Output, OutputLoss
from alignfast.checks import check_choice, check_count, check_number
from alignfast.ops.kl_div_with_logits import Combine, Direction

PRECISIONS = ("fp32", "bf16", "fp16")
BATCH_NORMS = ("move", "freeze", "recalibrate", "synchronise")
OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True)
class AlignConfig:
    """How to align; the defaults are the paper's recipe for a ResNet-50 (Ma et al., ECCV 2024).

    The loss is lambda_kd * loss of the predictions + sum of weight * loss over `outputs` and `embeddings` + lambda_cls
    * cross_entropy(source, labels) + lambda_self * KL(source as it was || source).

    Args:
        temperature: T of the loss of predictions, greater than 0.
        loss: of predictions: "kl", or "mse" or "l1" between probabilities, see `output_loss`.
        direction: of the divergence, see `kl_div_with_logits`. combine: over several witnesses, per sample.
        outputs: further losses of predictions, see `OUTPUT_LOSSES`.
        embeddings: losses between penultimate features, see `EMBEDDINGS`; of several witnesses, their mean.
        source_layer, witness_layer: names of the layers that give these features; None for what the last linear
            layer is given.
        lambda_kd, lambda_cls, lambda_self: weights of the terms, at least 0; a term of weight 0 is not computed.
            lambda_self holds the predictions, and so clean accuracy, without labels.
        optimizer: "sgd", or "adamw" (betas 0.9 and 0.999), whose momentum and nesterov are not used.
        lr, momentum, weight_decay, nesterov: of the optimizer.
        schedule: "cosine", along which the rate falls to 0, stepped every iteration, or "constant".
        warmup: steps in which the rate first rises linearly.
        epochs: passes over the loader. steps: stop after so many iterations instead, over as many passes as it takes.
        accumulate: batches whose gradients go into a step, weighted by their images.
        clip_norm: bound of the gradient's L2 norm; None for no clipping.
        ema: decay of an average of the weights, which is then the result; None for the weights themselves.
        precision: "fp32", or "bf16" or "fp16" for autocast (weights and update stay float32), fp16 with a loss scale.
        channels_last: weights and activations in that layout, for which this package has training kernels on CPUs.
        compile: the source's pass by torch.compile.
        batch_norm: "move" normalises by the batch and moves the running statistics, as in training; "freeze"
            normalises by the running statistics and leaves them; "recalibrate" is "move", with the statistics taken
            anew over `RECALIBRATION` batches at the end; "synchronise" is "move" over the images of all GPUs, whose
            layers are of type SyncBatchNorm from then on. The affine weights are trained in all.
        check_every: steps between two measurements on held-out images, where there are some.
        patience: stop after so many of them without a higher gradient cosine, and take the weights with the highest;
            None for no early stop.
        seed: of everything random in the source, such as dropout; the loader has its own.

    Raises:
        ValueError: a number or name outside what is allowed.
    """

    temperature: float = 4.0
    loss: Output = "kl"
    direction: Direction = "forward"
    combine: Combine = "mean"
    outputs: tuple[OutputLoss, ...] = ()
    embeddings: tuple[EmbeddingLoss, ...] = ()
    source_layer: str | None = None
    witness_layer: str | None = None
    lambda_kd: float = 1.0
    lambda_cls: float = 0.0
    lambda_self: float = 0.0
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 1e-4
    nesterov: bool = True
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: int = 0
    epochs: int = 1
    steps: int | None = None
    accumulate: int = 1
    clip_norm: float | None = None
    ema: float | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False
    compile: bool = False
    batch_norm: Literal["move", "freeze", "recalibrate", "synchronise"] = "move"
    check_every: int = 100
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, low=0.0, open_low=True)
        check_choice("loss", self.loss, OUTPUTS)
        check_choice("direction", self.direction, get_args(Direction))
        check_choice("combine", self.combine, get_args(Combine))
        for name in ("lambda_kd", "lambda_cls", "lambda_self", "momentum", "weight_decay"):
            check_number(name, getattr(self, name), low=0.0)
        check_number("lr", self.lr, low=0.0, open_low=True)
        for name in ("epochs", "accumulate", "check_every"):
            check_count(name, getattr(self, name))
        check_count("warmup", self.warmup, low=0)
        check_count("seed", self.seed, low=0, high=2**63 - 1)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("batch_norm", self.batch_norm, BATCH_NORMS)
        for name in ("steps", "patience"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        if self.clip_norm is not None:
            check_number("clip_norm", self.clip_norm, low=0.0, open_low=True)
        if self.ema is not None:
            check_number("ema", self.ema, low=0.0, high=1.0)
        for output in self.outputs:
            if not isinstance(output, OutputLoss):
                raise ValueError(f"outputs: got {output!r}; allowed are losses such as OUTPUT_LOSSES['jsd']")
        for embedding in self.embeddings:
            if not isinstance(embedding, EmbeddingLoss):
                raise ValueError(f"embeddings: got {embedding!r}; allowed are losses such as EMBEDDINGS['rkd']")
        if not (self.needs_witnesses or self.lambda_cls or self.lambda_self):
            raise ValueError("lambda_kd, lambda_cls, lambda_self: got 0 for all; allowed is at least one above 0")
        if self.optimizer == "sgd" and self.nesterov and self.momentum == 0:
            raise ValueError("nesterov: got True with momentum 0; allowed with a momentum above 0 only")

    @property
    def needs_witnesses(self) -> bool:
        beside = [loss.weight for loss in self.outputs] + [loss.weight for loss in self.embeddings]
        return self.lambda_kd > 0 or any(weight > 0 for weight in beside)
