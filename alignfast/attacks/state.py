"""What the steps of an attack read and write."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class State:
    """Where an attack stands, in tensors that every step changes in place.

    images, adv: [N, C, H, W]. labels, indices: int64 [N]. number: int64 [], of the step that comes next.
    momentum: what the step rule accumulates, if anything. memory: what the estimator keeps, by name.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    adv: Tensor
    number: Tensor
    momentum: Tensor | None
    memory: dict[str, Tensor]

    def clone(self) -> State:
        return State(
            images=self.images.clone(),
            labels=self.labels.clone(),
            indices=self.indices.clone(),
            adv=self.adv.clone(),
            number=self.number.clone(),
            momentum=None if self.momentum is None else self.momentum.clone(),
            memory={name: tensor.clone() for name, tensor in self.memory.items()},
        )

    def copy_(self, other: State) -> None:
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(theirs)

    def tensors(self) -> list[Tensor]:
        momentum = [] if self.momentum is None else [self.momentum]
        return [self.images, self.labels, self.indices, self.adv, self.number, *momentum, *self.memory.values()]
