"""What the steps of an attack read and write."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from alignfast.attacks.component import Memory


@dataclass(frozen=True)
class State:
    """Where an attack stands, in tensors that every step changes in place.

    images, adv: [N, C, H, W]. labels, indices: int64 [N]. number: int64 [], of the step that comes next.
    step, estimator, objective: what these components keep.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    adv: Tensor
    number: Tensor
    step: Memory
    estimator: Memory
    objective: Memory

    def clone(self) -> State:
        return State(
            images=self.images.clone(),
            labels=self.labels.clone(),
            indices=self.indices.clone(),
            adv=self.adv.clone(),
            number=self.number.clone(),
            step=_cloned(self.step),
            estimator=_cloned(self.estimator),
            objective=_cloned(self.objective),
        )

    def copy_(self, other: State) -> None:
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(theirs)

    def tensors(self) -> list[Tensor]:
        kept = [*self.step.values(), *self.estimator.values(), *self.objective.values()]
        return [self.images, self.labels, self.indices, self.adv, self.number, *kept]


def _cloned(memory: Memory) -> Memory:
    return {name: tensor.clone() for name, tensor in memory.items()}
