"""Objectives: what an attack drives up, per image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.nn.functional import cross_entropy


class Objective(Protocol):
    def gain(self, logits: Tensor, labels: Tensor) -> Tensor:
        """[B]: what to increase, from logits [B, C] and int64 labels [B] (the target classes if targeted)."""
        ...


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy of the label (Goodfellow et al., ICLR 2015), or less that of the target class if targeted."""

    targeted: bool = False

    def gain(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss = cross_entropy(logits, labels, reduction="none")
        return -loss if self.targeted else loss
