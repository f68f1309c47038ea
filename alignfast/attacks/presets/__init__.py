"""The field's attacks by name: components put together, with their papers' or torchattacks' arguments and defaults."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from alignfast.attacks.engine import Attack
from alignfast.attacks.presets import ensembles, gradients, inputs, objectives, surrogates
from alignfast.attacks.presets.build import DEFAULTS
from alignfast.attacks.presets.combine import combine
from alignfast.attacks.presets.ensembles import *
from alignfast.attacks.presets.gradients import *
from alignfast.attacks.presets.inputs import *
from alignfast.attacks.presets.objectives import *
from alignfast.attacks.presets.surrogates import *
from alignfast.checks import check_choice, check_known

__all__ = ["PRESETS", "combine", "create", "names_of", "parameters_of"]
__all__ += ensembles.__all__
__all__ += gradients.__all__
__all__ += inputs.__all__
__all__ += objectives.__all__
__all__ += surrogates.__all__

# By name in lower case.
PRESETS: dict[str, Callable[..., Attack]] = {
    name.lower(): getattr(module, name)
    for module in (gradients, inputs, objectives, surrogates, ensembles)
    for name in module.__all__
}


def create(name: str, source: nn.Module, **parameters: Any) -> Attack:
    """The preset `name` (any case) with `parameters`, or several combined, as in "dim+tim+sim+vmifgsm".

    Of several, each is given those of the parameters that it takes.

    Raises:
        ValueError: an unknown attack or parameter (with what is allowed), a value outside its range, or attacks that
            do not combine.
    """
    names = names_of(name)
    check_known(name, "parameter", parameters, parameters_of(name))
    attacks: list[Attack] = []
    for one in names:
        taken = {key: value for key, value in parameters.items() if key in parameters_of(one)}
        # Each works on the source as the one before left it, so that changes to the source add up.
        attacks.append(PRESETS[one](attacks[-1].source if attacks else source, **taken))
    return combine(dict(zip(names, attacks, strict=True))) if len(attacks) > 1 else attacks[0]


def names_of(name: str, argument: str = "attack") -> list[str]:
    """The presets in `name`; ValueError about `argument` for one that there is not."""
    return [check_choice(argument, part.strip(), PRESETS) for part in name.lower().split("+")]


def parameters_of(name: str) -> dict[str, Any]:
    """The parameters that a preset, or any of several, takes besides its source, with their defaults.

    What has no default of its own is listed with None. Of several presets, the first's default counts.
    """
    listed: dict[str, Any] = {}
    for part in names_of(name):
        given = inspect.signature(PRESETS[part]).parameters.values()
        own = {p.name: p.default for p in given if p.name != "source" and p.kind is not p.VAR_KEYWORD}
        listed = {**own, **listed}
    return listed | dict(DEFAULTS)
