"""Several attacks as one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from alignfast.attacks.engine import Attack
from alignfast.attacks.estimators import Plain
from alignfast.attacks.objectives import CrossEntropy
from alignfast.attacks.steps import SignStep, StepRule

# Of these components an attack has one; the usual one gives way to any other.
USUAL: dict[str, type] = {"estimator": Plain, "step": SignStep, "objective": CrossEntropy}
# Components of which an attack may have several, one after another.
SEVERAL = ("transforms", "shaping")


def combine(attacks: Mapping[str, Attack]) -> Attack:
    """One attack with the components of all, by name, on the source of the last.

    Transforms and shapings follow each other in the order given, equal ones once. Of step rules with momentum, the
    largest momentum counts, and Nesterov's look-ahead if one of them has it; but neither beside an estimator that has
    a momentum of its own (DTA). Random starts are taken over from any.

    Raises:
        ValueError: two that ask for different estimators, step rules or objectives, or for different numbers; momentum
            with a step rule that takes none.
    """
    *_, last = attacks.values()
    merged: dict[str, Any] = {}
    for item in fields(Attack):
        if item.init and item.name != "source":
            values = {name: getattr(attack, item.name) for name, attack in attacks.items()}
            merged[item.name] = _merged(item.name, values)
    if merged["estimator"].has_momentum and isinstance(merged["step"], SignStep):
        merged["step"] = replace(merged["step"], momentum=0.0, nesterov=False)
    return replace(last, **merged)


def _merged(role: str, values: Mapping[str, Any]) -> Any:
    if role == "random_start":
        return any(values.values())
    if role in SEVERAL:
        parts = [part for several in values.values() for part in several]
        return [part for place, part in enumerate(parts) if part not in parts[:place]]
    if role == "step":
        values = _with_momentum(values)
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


def _with_momentum(steps: Mapping[str, StepRule]) -> dict[str, StepRule]:
    """The same rules, those that take momentum with the momentum that all of them are to have."""
    taking = {name: step for name, step in steps.items() if isinstance(step, SignStep)}
    momentum = max((step.momentum for step in taking.values()), default=0.0)
    nesterov = any(step.nesterov for step in taking.values())
    for name, step in steps.items():
        if momentum and name not in taking:
            other = next(key for key, value in taking.items() if value.momentum)
            raise ValueError(
                f"attack: {other} has momentum, which the step {step!r} of {name} does not take; allowed with it are "
                "attacks without momentum (decay=0)"
            )
    return dict(steps) | {name: replace(step, momentum=momentum, nesterov=nesterov) for name, step in taking.items()}
