"""Attacks that take steps of their own before each step, and integrated gradients of the logit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alignfast.attacks import (
    Attack,
    CommonWeakness,
    Component,
    DirectionTuning,
    Estimator,
    L2Step,
    PredictionCorrection,
    SignStep,
    create,
)
from tests.attacks import samples
from tests.attacks.properties import (
    assert_all_on_the_gpu,
    assert_independent,
    assert_leaves_all_as_it_was,
    assert_nothing_waits,
    assert_replays,
)
from tests.attacks.test_presets import (
    ALPHA,
    BASE,
    DECAY,
    EPS,
    INDICES,
    LABELS,
    STEPS,
    Gradient,
    clip,
    gradient_of,
    network,
    photos,
    unit,
)


def pcifgsm(images: Tensor, grad: Gradient, predictions: int = 3) -> Tensor:
    adv, m = images, torch.zeros_like(images)
    for _ in range(STEPS):
        predicted, g = adv, grad(adv)
        p = unit(g)
        for _ in range(predictions):
            predicted = torch.maximum(torch.minimum(predicted + EPS * g.sign(), adv + EPS), adv - EPS).clamp(0, 1)
            g = grad(predicted)
            p = DECAY * p + unit(g) / predictions
        m = DECAY * m + unit(p)
        adv = clip(adv + ALPHA * m.sign(), images)
    return adv


def dta(images: Tensor, grad: Gradient, count: int = 3, u: float = 0.6) -> Tensor:
    adv, m = images, torch.zeros_like(images)
    for _ in range(STEPS):
        x, velocities = adv, [m]
        for _ in range(count):
            velocities.append(u * velocities[-1] + unit(grad(x + ALPHA * DECAY * velocities[-1])))
            x = clip(x + ALPHA / count * velocities[-1].sign(), images)
        m = DECAY * m + torch.stack(velocities[1:]).mean(0)
        adv = clip(adv + ALPHA * m.sign(), images)
    return adv


EQUATIONS: dict[str, tuple[Callable[[Tensor, Gradient], Tensor], dict[str, Any]]] = {
    "PCIFGSM": (pcifgsm, {"decay": DECAY, "K": 3}),
    "DTA": (dta, {"decay": DECAY, "K": 3, "u": 0.6}),
}


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("name", EQUATIONS)
def test_the_papers_equations(name: str, targeted: bool) -> None:
    equation, parameters = EQUATIONS[name]
    model, images = network(), photos()
    expected = equation(images, gradient_of(model, targeted))
    adv = create(name, model, targeted=targeted, **BASE, **parameters)(images, LABELS, indices=INDICES)
    torch.testing.assert_close(adv, expected, rtol=0, atol=1e-9)
    plain = create("mifgsm", model, targeted=targeted, decay=DECAY, **BASE)(images, LABELS, indices=INDICES)
    assert ((plain - expected).abs() > 1e-3).double().mean() > 0.002


@pytest.mark.parametrize("targeted", [False, True])
def test_integrated_gradients_of_the_logit(targeted: bool) -> None:
    model, images = network(), photos()
    adv = images
    for _ in range(STEPS):
        total = torch.zeros_like(images)
        for i in (1, 2, 3, 4):
            leaf = (adv * i / 4).requires_grad_()
            logit = model.logits(leaf)[range(3), LABELS]
            total += torch.autograd.grad((logit if targeted else -logit).sum(), leaf)[0]
        adv = clip(adv + ALPHA * (adv * total).sign(), images)
    attack = create("taig", model, targeted=targeted, s_factor=4, **BASE)
    torch.testing.assert_close(attack(images, LABELS, indices=INDICES), adv, rtol=0, atol=1e-9)
    assert attack.step == SignStep()
    for other, few in (("mig", {"s_factor": 4, "decay": 0.0}), ("bim", {})):
        found = create(other, model, targeted=targeted, **few, **BASE)(images, LABELS, indices=INDICES)
        assert ((found - adv).abs() > 1e-3).double().mean() > 0.002


def test_what_holds_for_every_attack_holds_for_taig(monkeypatch: pytest.MonkeyPatch) -> None:
    def on(model: nn.Module, **options: Any) -> Attack:
        return samples.build("taig", model, **options)

    module = samples.Network()
    assert_independent(partial(on, samples.Halving()))
    assert_leaves_all_as_it_was(partial(on, module), module)
    assert_replays(partial(on, samples.Halving()), monkeypatch)
    assert_nothing_waits(on, samples.Network())
    assert_all_on_the_gpu(on, samples.Network, monkeypatch)


@pytest.mark.parametrize("estimator", [PredictionCorrection(), DirectionTuning(), CommonWeakness()])
def test_steps_of_their_own_are_in_the_norm_of_the_attack(estimator: Estimator) -> None:
    message = r"step: got L2Step\(.*\); allowed with \w+\(.*\), which takes steps of its own, are rules in the linf"
    with pytest.raises(ValueError, match=message):
        Attack(samples.Halving(), 0.5, 0.1, 2, estimator=estimator, step=L2Step())


def test_momentum_is_not_taken_twice() -> None:
    for name in ("dta+mifgsm", "dim+dta", "dta+nifgsm"):
        attack = create(name, samples.Halving(), decay=0.7)
        assert attack.step == SignStep()
        assert attack.estimator == DirectionTuning(decay=0.7)


@pytest.mark.parametrize("name", ["pcifgsm", "dta", "taig"])
def test_as_many_passes_as_are_said(name: str) -> None:
    model = samples.Halving()
    attack = samples.build(name, model)
    attack(samples.photos(2), samples.labels_of(2))
    assert sum(model.batches) == 2 * attack.steps * attack.passes


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PredictionCorrection(0), "predictions: got 0; allowed is a whole number, 1 to 255"),
        (lambda: PredictionCorrection(255 + 1), "predictions: got 256"),
        (lambda: PredictionCorrection(decay=-1.0), "decay: got -1.0"),
        (lambda: DirectionTuning(0), "steps: got 0; allowed is a whole number, 1 to 256"),
        (lambda: DirectionTuning(decay=-1.0), "decay: got -1.0"),
        (lambda: DirectionTuning(inner_decay=-1.0), "inner_decay: got -1.0"),
    ],
)
def test_components_check_their_numbers(build: Callable[[], Component], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
