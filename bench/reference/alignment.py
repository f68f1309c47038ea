"""The alignment of averyma/model-alignment (July 2024), restated: the recipe, and what its loop does in every step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Recipe:
    """The released checkpoints' numbers; the loss is lambda_kd * divergence + lambda_cls * cross-entropy."""

    temperature: float = 4.0
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 1e-4
    nesterov: bool = True
    lambda_kd: float = 1.0
    lambda_cls: float = 0.0


def align(
    source: nn.Module,
    witness: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    recipe: Recipe,
    precision: AbstractContextManager[object] | None = None,
) -> list[float]:
    """One pass over `batches` that trains `source`, in place, toward `witness`; the loss of every step.

    source, witness: map images to logits. batches: of images [N, C, H, W] and int64 labels [N].
    precision: entered for the passes and the loss of each step, such as an autocast; None for float32, in which the
        released code runs.
    """
    optimizer = torch.optim.SGD(
        source.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=recipe.nesterov
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    source.train()
    witness.eval()
    for parameter in witness.parameters():
        parameter.requires_grad_(False)
    losses = []
    for images, labels in batches:
        with precision or nullcontext():
            logits, taught = source(images), witness(images)
            divergence = distillation(logits, taught, recipe.temperature)
            classification = F.cross_entropy(logits, labels)
            loss = recipe.lambda_kd * divergence + recipe.lambda_cls * classification
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        # Read one by one in every step, for the printed line and the histories.
        _ = accuracies(logits, labels), classification.item(), divergence.item()
        losses.append(loss.item())
    return losses


def distillation(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """KL(softmax(taught / T) || softmax(logits / T)) * T^2, mean over the batch; of [N, C] each, in float32."""
    # bfloat16 throughout would be slower and off by a quarter of a typical gradient.
    logits, taught = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (logits, taught))
    log_q = F.log_softmax(logits / temperature, dim=1)
    p = F.softmax(taught / temperature, dim=1)
    return F.kl_div(log_q, p, reduction="batchmean") * temperature**2


@torch.no_grad()
def accuracies(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """The shares of images whose label is among one and among five guesses."""
    guesses = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return float(guesses[:, 0].float().mean()), float(guesses.any(1).float().mean())
