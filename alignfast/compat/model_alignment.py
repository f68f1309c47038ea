"""The authors' `model_alignment` and `DistillKL` (averyma/model-alignment, July 2024), so that their script needs only:

    from alignfast.compat.model_alignment import DistillKL, model_alignment

Arguments, numbers, printed lines and what is returned are theirs. What is different:
- With a scaler that is enabled and args.amp, both models compute under autocast (float16 on CUDA, bfloat16 on the
  CPU). There, everything runs in float32.
- The witness runs without a gradient, and the requires_grad of its parameters stays as it is; there, it is switched
  off for good.
- Losses and accuracies stay on the device and are read in blocks, or where a line is printed.
- It runs on the CPU; fewer than five classes serve; histories have one entry for every step made, also where
  args.debug is true and the loader has fewer than three batches.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from alignfast.ops import kl_div_with_logits

__all__ = ["DistillKL", "model_alignment"]

Histories = list[NDArray[np.float64]]

STEPS_BETWEEN_READINGS = 50
DEBUG_STEPS = 3


class DistillKL(nn.Module):
    """KL(softmax(y_t / T) || softmax(y_s / T)) * T^2, mean over the batch; gradient to y_s only.

    y_s, y_t: logits [N, C] of the source and of the witness.
    """

    def __init__(self, T: float) -> None:
        super().__init__()
        self.T = T

    def forward(self, y_s: Tensor, y_t: Tensor) -> Tensor:
        return kl_div_with_logits(y_s, y_t, self.T)


def model_alignment(
    train_loader: Any,
    source_model: nn.Module,
    witness_model: nn.Module,
    criterion_kd: nn.Module,
    criterion_cls: nn.Module,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: Any,
    scaler: Any,
    device: torch.device | str | int,
    args: Any,
    is_main_task: bool,
) -> tuple[Tensor, Tensor, float, Histories]:
    """One pass over `train_loader` that trains `source_model`, in place, toward `witness_model`.

    Args:
        train_loader: batches (images, labels) with a length, images float [N, C, H, W] as the models take them, that is
            already normalised; labels int64 [N].
        source_model, witness_model: on `device`; left in training and in evaluation mode, as there.
        criterion_kd: of source and witness logits. criterion_cls: of source logits and labels.
        lr_scheduler: stepped to (i + 1) / len(train_loader) after step i; or None.
        scaler: a torch.amp.GradScaler, or None for float32.
        args: with lambda_kd, lambda_cls, clip_grad_norm (None for none), debug (stop after three steps), print_freq
            and, with a scaler, amp.
        is_main_task: print a line every args.print_freq steps.

    Returns:
        Accuracies of the source on the training images among one and five guesses, in percent, as scalars on `device`;
        the mean loss over images; and for each step the loss, the classification loss and the alignment loss, float64.

    Raises:
        ValueError: a loader without batches.
    """
    total = len(train_loader)
    if total == 0:
        raise ValueError("train_loader: holds no batch; allowed is a loader with at least one image")
    place = torch.device(device)
    mixed = scaler is not None and scaler.is_enabled() and bool(getattr(args, "amp", True))
    source_model.train()
    witness_model.eval()
    record = _Record(total)
    for i, (images, target) in enumerate(train_loader):
        record.loaded()
        images, target = images.to(place, non_blocking=True), target.to(place, non_blocking=True)
        with torch.autocast(place.type, enabled=mixed):
            p_s = source_model(images)
            with torch.no_grad():
                p_w = witness_model(images)
        if mixed:
            p_s, p_w = p_s.float(), p_w.float()
        loss_align = criterion_kd(p_s, p_w)
        loss_cls = criterion_cls(p_s, target)
        loss = args.lambda_kd * loss_align + args.lambda_cls * loss_cls
        optimizer.zero_grad()
        _update(loss, source_model, optimizer, scaler, args.clip_grad_norm)
        if lr_scheduler is not None:
            lr_scheduler.step((i + 1) / total)
        record.add(loss, loss_cls, loss_align, p_s, target)
        if (i % args.print_freq == 0 and is_main_task) or args.debug:
            print(record.line())
        elif (i + 1) % STEPS_BETWEEN_READINGS == 0:
            record.read()
        if args.debug and i + 1 == DEBUG_STEPS:
            break
    return record.result(place)


def _update(
    loss: Tensor, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any, clip_grad_norm: float | None
) -> None:
    if scaler is None:
        loss.backward()
    else:
        scaler.scale(loss).backward()
    if clip_grad_norm is not None:
        if scaler is not None:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), clip_grad_norm)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()


@dataclass
class _Record:
    """What the steps gave: rows (loss, cls, align, right in one guess, right in five), in the order of the steps."""

    total: int
    pending: list[Tensor] = field(default_factory=list)
    rows: list[list[float]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    data_seconds: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    began: float = field(default_factory=time.time)

    def loaded(self) -> None:
        self.data_seconds.append(time.time() - self.began)

    def add(self, loss: Tensor, loss_cls: Tensor, loss_align: Tensor, logits: Tensor, target: Tensor) -> None:
        guesses = logits.detach().topk(min(5, logits.shape[1]), 1).indices
        right = guesses == target[:, None]
        values = (loss, loss_cls, loss_align, right[:, 0].sum(), right.sum())
        self.pending.append(torch.stack([value.detach().double() for value in values]))
        self.sizes.append(len(target))
        self.seconds.append(time.time() - self.began)
        self.began = time.time()

    def read(self) -> None:
        """Bring what is pending to the host, which waits for the device."""
        if self.pending:
            self.rows += torch.stack(self.pending).tolist()
            self.pending.clear()

    def line(self) -> str:
        """The newest values, and in parentheses the means so far."""
        self.read()
        loss, _, _, one, five = self.rows[-1]
        size, width = self.sizes[-1], len(str(self.total))
        top1, top5 = self.accuracies()
        return "\t".join(
            [
                f"Model Alignment[{len(self.rows):{width}d}/{self.total}]",
                f"Time {self.seconds[-1]:6.3f} ({np.mean(self.seconds):6.3f})",
                f"Data {self.data_seconds[-1]:6.3f} ({np.mean(self.data_seconds):6.3f})",
                f"Loss {loss:.4e} ({self.mean_loss():.4e})",
                f"Acc@1 {100 * one / size:6.2f} ({top1:6.2f})",
                f"Acc@5 {100 * five / size:6.2f} ({top5:6.2f})",
            ]
        )

    def mean_loss(self) -> float:
        return sum(row[0] * size for row, size in zip(self.rows, self.sizes, strict=True)) / sum(self.sizes)

    def accuracies(self) -> tuple[float, float]:
        """In percent, in one guess and in five."""
        one, five = (100 * sum(row[column] for row in self.rows) / sum(self.sizes) for column in (3, 4))
        return one, five

    def result(self, device: torch.device) -> tuple[Tensor, Tensor, float, Histories]:
        self.read()
        top1, top5 = (torch.tensor(value, device=device) for value in self.accuracies())
        return top1, top5, self.mean_loss(), [np.array([row[column] for row in self.rows]) for column in range(3)]
