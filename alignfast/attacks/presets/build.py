"""What every preset shares: defaults, options, and the attack that comes of them."""

from __future__ import annotations

from typing import Any, Protocol, TypedDict

from torch import nn

from alignfast.attacks.engine import Attack
from alignfast.attacks.objectives import CrossEntropy, Objective
from alignfast.checks import check_count, check_number

# Units of [0, 1] images.
EPS = 8 / 255
ALPHA = 2 / 255
STEPS = 10


class Options(TypedDict, total=False):
    """seed: of all draws. targeted: labels are the classes to reach. max_batch, memory, cuda_graph: see `Attack`."""

    seed: int
    targeted: bool
    max_batch: int | None
    memory: int | None
    cuda_graph: bool


# Of the options, by name.
DEFAULTS: Options = {"seed": 0, "targeted": False, "max_batch": None, "memory": None, "cuda_graph": True}


def even(eps: float, alpha: float | None, steps: int) -> float:
    """alpha, or else eps / steps, with which all steps together reach eps."""
    if alpha is not None:
        return alpha
    return check_number("eps", eps, low=0.0) / check_count("steps", steps)


class MakesObjective(Protocol):
    def __call__(self, *, targeted: bool) -> Objective: ...


def build(
    source: nn.Module,
    eps: float,
    alpha: float,
    steps: int,
    *,
    seed: int = 0,
    targeted: bool = False,
    objective: MakesObjective = CrossEntropy,
    **components: Any,
) -> Attack:
    return Attack(source, eps, alpha, steps, seed, objective=objective(targeted=targeted), **components)
