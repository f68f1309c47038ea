"""Several attacks as one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from alignfast.attacks.engine import Attack
from alignfast.attacks.estimators import Plain
from alignfast.attacks.objectives import CrossEntropy
from alignfast.attacks.steps import SignStep

# Of these components an attack has one; the usual one gives way to any other.
USUAL: dict[str, type] = {"estimator": Plain, "step": SignStep, "objective": CrossEntropy}
# Components of which an attack may have several, one after another.
SEVERAL = ("transforms", "shaping")


def combine(attacks: Mapping[str, Attack]) -> Attack:
    """One attack with the components of all, by name, on the source of the last.

    Transforms and shapings follow each other in the order given, equal ones once. Of sign steps, the largest momentum
    counts, and Nesterov's look-ahead if one of them has it. Random starts are taken over from any.

    Raises:
        ValueError: two that ask for different estimators, step rules or objectives, or for different numbers.
    """
    *_, last = attacks.values()
    merged: dict[str, Any] = {}
    for item in fields(Attack):
        if item.init and item.name != "source":
            values = {name: getattr(attack, item.name) for name, attack in attacks.items()}
            merged[item.name] = _merged(item.name, values)
    return replace(last, **merged)


def _merged(role: str, values: Mapping[str, Any]) -> Any:
    if role == "random_start":
        return any(values.values())
    if role in SEVERAL:
        parts = [part for several in values.values() for part in several]
        return [part for place, part in enumerate(parts) if part not in parts[:place]]
    if role == "step" and all(type(step) is SignStep for step in values.values()):
        steps = values.values()
        return SignStep(max(step.momentum for step in steps), any(step.nesterov for step in steps))
    usual = USUAL.get(role)
    telling = {name: value for name, value in values.items() if usual is None or type(value) is not usual}
    kept = telling or dict(values)
    first_name, first = next(iter(kept.items()))
    for name, value in kept.items():
        if value != first:
            raise ValueError(
                f"attack: {first_name} has {role} {first!r} and {name} has {value!r}; allowed is one {role} in a "
                "combination"
            )
    return first
