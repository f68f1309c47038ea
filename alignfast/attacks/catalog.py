"""What each preset is made of, and what a step of it costs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from itertools import product

import timm
import torch
from torch import nn

from alignfast.attacks.component import Component
from alignfast.attacks.engine import Attack
from alignfast.attacks.estimators import Plain
from alignfast.attacks.objectives import CrossEntropy
from alignfast.attacks.presets import PRESETS
from alignfast.models import Classifier, Ensemble
from alignfast.surrogates.collection import Collection
from alignfast.surrogates.surrogate import Surgery, Surrogate

# What an attack has where nothing else is said.
USUAL: tuple[Component, ...] = (Plain(), CrossEntropy(), CrossEntropy(targeted=True))
# The parentheses of a docstring that hold a year.
PAPER = re.compile(r"\(([^()]*\b(?:19|20)\d\d\b[^()]*)\)", re.DOTALL)


@dataclass(frozen=True)
class Entry:
    """copies: views of a point that go into its gradient. passes: forward and backward passes a step and image, the
    most where steps differ. Both with the preset's defaults."""

    name: str
    paper: str
    components: tuple[str, ...]
    copies: int
    passes: int


def catalog() -> list[Entry]:
    """Every preset, in the order of its name."""
    return [_entry(name) for name in sorted(PRESETS)]


def _entry(name: str) -> Entry:
    preset = PRESETS[name]
    attack = _built(preset)
    surgeries: tuple[Surgery, ...] = attack.source.surgeries if isinstance(attack.source, Surrogate) else ()
    start = ["random start"] if attack.random_start else []
    parts = [text_of(part) for part in attack.components if part not in USUAL]
    components = (*map(text_of, surgeries), *start, *parts)
    return Entry(name, paper_of(preset), components, attack.copies, attack.passes)


def paper_of(preset: Callable[..., Attack]) -> str:
    """The paper that the preset's docstring cites."""
    found = PAPER.search(inspect.getdoc(preset) or "")
    return "" if found is None else " ".join(found.group(1).split())


def text_of(component: Component | Surgery) -> str:
    """Its name and those of its numbers that are not the usual ones."""
    telling = [
        f"{item.name}={getattr(component, item.name)!r}"
        for item in fields(component)  # type: ignore[arg-type]
        if getattr(component, item.name) != item.default
    ]
    return f"{type(component).__name__}({', '.join(telling)})"


def _built(preset: Callable[..., Attack]) -> Attack:
    """The preset on the first of a few sources that it takes, which hold no numbers; targeted if it is so only."""
    errors = []
    for source, targeted in product(_sources(), (False, True)):
        try:
            return preset(source, targeted=targeted)
        except ValueError as error:
            errors.append(str(error))
    raise ValueError(f"{preset.__name__}: takes none of the sources that it could be shown on ({errors[0]})")


@cache
def _sources() -> list[nn.Module]:
    with torch.device("meta"):
        network, transformer = (
            Classifier(timm.create_model(name).eval(), input_size=(3, 224, 224), num_classes=1000)
            for name in ("resnet18", "vit_tiny_patch16_224")
        )
        sets = Collection(network, {name: tensor[None] for name, tensor in network.module.state_dict().items()})
    return [network, transformer, Ensemble([network, network]), sets]
