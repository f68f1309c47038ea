"""What the components of an attack have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from alignfast.draws import Draws
from alignfast.models import Classifier

# What a component keeps between the steps of one call, by name, to be changed in place.
Memory = dict[str, Tensor]


@dataclass(frozen=True)
class Start:
    """What is known before the first step.

    images: [N, C, H, W]. labels, indices: int64 [N]. adv: where the first step begins. rehearse(rule, steps, alpha):
    runs the attack with this step rule for so many steps of that size, from a start of its own that is drawn as the
    attack's is, and gives what the rule keeps after them. draws: of one copy; those of this copy number and the next
    65,535 are the component's own. guide(objective, momentum): the images after the attack with this objective
    instead of its own, and with this momentum if its step rule takes any; None outside an attack.
    """

    source: Classifier
    images: Tensor
    labels: Tensor
    indices: Tensor
    adv: Tensor
    eps: float
    alpha: float
    rehearse: Callable[..., Memory]
    draws: Draws
    guide: Callable[..., Tensor] | None = None


@dataclass(frozen=True)
class Position:
    """Where an attack stands when a step begins.

    adv: [N, C, H, W], the images so far. point: the same, or ahead of it where the step rule looks ahead. number:
    int64 [], of this step out of `steps`. last: no step follows this one.
    """

    images: Tensor
    adv: Tensor
    point: Tensor
    number: Tensor
    steps: int
    eps: float
    alpha: float
    last: bool


class Component:
    """A part of an attack. Subclasses are frozen dataclasses that hold numbers; what changes lies in a `Memory`."""

    def check(self, source: Classifier, images: Tensor) -> None:
        """Refuse with a ValueError what this component cannot work with, before any model runs."""

    def memory(self, start: Start) -> Memory:
        """What the component keeps, as it is before the first step; empty if nothing."""
        return {}
