"""Objectives: what an attack drives up, per image."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cross_entropy

from alignfast.attacks.component import Component, Memory
from alignfast.attacks.observe import Seen, check_layers
from alignfast.models import Classifier

__all__ = ["CrossEntropy", "Objective", "Probability"]


class Objective(Component):
    """What to increase. layers: names of modules whose output it looks at, as in `named_modules` of the model."""

    @property
    def layers(self) -> tuple[str, ...]:
        return ()

    @abstractmethod
    def gain(self, seen: Seen, labels: Tensor, memory: Memory) -> Tensor:
        """[B], from what was seen of B rows and their int64 labels [B] (the target classes if targeted).

        What is in `memory` for each image goes to its rows by `seen.rows`.
        """

    def check(self, source: Classifier, images: Tensor) -> None:
        check_layers(source, self.layers)


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """Cross-entropy of the label (Goodfellow et al., ICLR 2015), or less that of the target class if targeted."""

    targeted: bool = False

    def gain(self, seen: Seen, labels: Tensor, memory: Memory) -> Tensor:
        loss = cross_entropy(seen.logits, labels, reduction="none")
        return -loss if self.targeted else loss


@dataclass(frozen=True)
class Probability(Objective):
    """-p of the label, or p of the target class if targeted, with p the softmax (MIG, Ma et al., ICCV 2023)."""

    targeted: bool = False

    def gain(self, seen: Seen, labels: Tensor, memory: Memory) -> Tensor:
        probability = seen.logits.softmax(1).gather(1, labels[:, None])[:, 0]
        return probability if self.targeted else -probability
