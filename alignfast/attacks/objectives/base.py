"""What objectives have in common."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from alignfast.attacks.component import Component, Memory, Start
from alignfast.attacks.observe import Seen, check_layers
from alignfast.attacks.views import Views
from alignfast.draws import SOURCE_SLOT
from alignfast.models import Classifier

__all__ = ["Objective"]


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


@torch.no_grad()
def clean_logits(start: Start) -> Tensor:
    """[N, classes]: what the source says of the images as they are; of an ensemble, all its members together."""
    return start.source.logits_of(Views(start.images).render, start.draws.at(SOURCE_SLOT))


def refuse_targeted(name: str, targeted: bool) -> None:
    if targeted:
        raise ValueError(f"targeted: got True; allowed is False for {name}, which leads to no class")


def refuse_untargeted(name: str, targeted: bool) -> None:
    if not targeted:
        raise ValueError(f"targeted: got False; allowed is True for {name}, which needs a class to reach")


def check_classes(name: str, classes: int | None, least: int) -> None:
    """At least so many classes, where their number is known; else ValueError."""
    if classes is not None and classes < least:
        raise ValueError(f"source: got {classes} classes; allowed are at least {least} for {name}")
