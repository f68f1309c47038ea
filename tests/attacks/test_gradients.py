"""Attacks that differ in their estimator, step rule or shaping against their equations, written out a second time.

Neighbours are draws of slot 30; what an estimator draws in pass p of a step has copies that count from 65536 p.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from alignfast.attacks import (
    Component,
    CornerStart,
    DecayingStep,
    EnhancedMomentum,
    Expectation,
    GradientRelevance,
    PenalizedNorm,
    create,
)
from alignfast.attacks.presets import parameters_of
from alignfast.ops import philox_uniform
from tests.attacks import samples
from tests.attacks.samples import Halving, build
from tests.attacks.test_presets import (
    ALPHA,
    BASE,
    DECAY,
    EPS,
    INDICES,
    LABELS,
    SEED,
    STEPS,
    Gradient,
    clip,
    diversity,
    gradient_of,
    network,
    noise,
    photos,
    through,
    unit,
)

# From images and a gradient to adversarial images.
Equation = Callable[[Tensor, Gradient], Tensor]
# The gradient to follow, from where it is asked for, the number of the step, and the gradient of one point.
Estimate = Callable[[Tensor, int, Gradient], Tensor]


def momentum(estimate: Estimate, start: Tensor | None = None, decay: float = DECAY) -> Equation:
    """MI-FGSM's steps along an estimate."""

    def attack(images: Tensor, grad: Gradient) -> Tensor:
        adv, m = images if start is None else (images + start).clamp(0, 1), torch.zeros_like(images)
        for step in range(STEPS):
            m = decay * m + unit(estimate(adv, step, grad))
            adv = clip(adv + ALPHA * m.sign(), images)
        return adv

    return attack


def pgn(x: Tensor, step: int, grad: Gradient) -> Tensor:
    total = torch.zeros_like(x)
    for r in noise(1.4 * EPS, step, 8 * 30, 3):
        first = grad(x + r)
        total += 0.7 * first + 0.3 * grad(x + r - ALPHA * unit(first))
    return total / 3


def relevance(x: Tensor, step: int, grad: Gradient) -> Tensor:
    here = grad(x)
    # The first pass of the step was for the point itself.
    around = sum(grad(x + r) for r in noise(1.4 * EPS, step, 8 * 30, 3, passed=1)) / 3
    result = []
    for g, h in zip(here, around, strict=True):
        s = float(g.flatten() @ h.flatten()) / float(g.norm() * h.norm())
        result.append(s * g + (1 - s) * h)
    return torch.stack(result)


def gra(images: Tensor, grad: Gradient, eta: float = 0.6) -> Tensor:
    adv, m, indicator = images, torch.zeros_like(images), torch.full_like(images, 1 / eta)
    for step in range(STEPS):
        last, m = m, DECAY * m + unit(relevance(adv, step, grad))
        equal = (last.sign() == m.sign()).double()
        indicator = indicator * (equal + eta * (1 - equal))
        adv = clip(adv + ALPHA * indicator * m.sign(), images)
    return adv


def emifgsm(images: Tensor, grad: Gradient) -> Tensor:
    adv, m, last = images, torch.zeros_like(images), torch.zeros_like(images)
    for _ in range(STEPS):
        g = sum(grad(adv + c * ALPHA * last) for c in (-6.0, -3.0, 0.0, 3.0, 6.0)) / 5
        m, last = DECAY * m + unit(g), unit(g)
        adv = clip(adv + ALPHA * m.sign(), images)
    return adv


def rfgsm(images: Tensor, grad: Gradient) -> Tensor:
    return momentum(lambda x, step, grad: grad(x), ALPHA * noise(1.0, 0, 0)[0].sign(), 0.0)(images, grad)


def ffgsm(images: Tensor, grad: Gradient) -> Tensor:
    start = (images + noise(EPS, 0, 0)[0]).clamp(0, 1)
    return clip(start + 1.5 * EPS * grad(start).sign(), images)


def pgdl2(images: Tensor, grad: Gradient, eps: float = 1.1, alpha: float = 0.3) -> Tensor:
    def draw(number: int, shape: tuple[int, ...]) -> Tensor:
        return philox_uniform(INDICES, torch.tensor([0]), shape, seed=SEED, step=0, purpose=number)[0]

    # Box and Muller, in float32 as the draws are.
    shape = tuple(images.shape[1:])
    normal = (-2 * (1 - draw(0, shape)).log()).sqrt() * (2 * torch.pi * draw(1, shape)).cos()
    adv = torch.stack(
        [
            (x + (eps * float(r) * n / n.norm()).double()).clamp(0, 1)
            for x, n, r in zip(images, normal, draw(2, ()), strict=True)
        ]
    )
    for _ in range(STEPS):
        moved = []
        for x, one, g in zip(images, adv, grad(adv), strict=True):
            delta = one + alpha * g / g.norm() - x
            moved.append((x + delta * min(1.0, eps / float(delta.norm()))).clamp(0, 1))
        adv = torch.stack(moved)
    return adv


EQUATIONS: dict[str, tuple[Equation, dict[str, Any]]] = {
    "PGN": (momentum(pgn), BASE | {"decay": DECAY, "num_neighbor": 3, "beta": 1.4, "gamma": 0.3}),
    "GRA": (gra, BASE | {"decay": DECAY, "num_neighbor": 3, "beta": 1.4, "eta": 0.6}),
    "EMIFGSM": (emifgsm, BASE | {"decay": DECAY, "num_sample": 5, "radius": 6.0}),
    "RFGSM": (rfgsm, BASE),
    "FFGSM": (ffgsm, {"eps": EPS, "alpha": 1.5 * EPS}),
    "PGDL2": (pgdl2, {"eps": 1.1, "alpha": 0.3, "steps": STEPS}),
    # The model draws nothing, so that every draw is the same.
    "EOTPGD": (momentum(lambda x, step, grad: grad(x), noise(EPS, 0, 0)[0], 0.0), BASE | {"eot_iter": 3}),
    "UPGD": (momentum(lambda x, step, grad: grad(x)), BASE | {"decay": DECAY}),
}


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("name", EQUATIONS)
def test_the_papers_equations(name: str, targeted: bool) -> None:
    equation, parameters = EQUATIONS[name]
    model, images = network(), photos()
    expected = equation(images, gradient_of(model, targeted))
    attack = create(name, model, seed=SEED, targeted=targeted, **parameters)
    adv = attack(images, LABELS, indices=INDICES)
    assert (expected - images).abs().amax((1, 2, 3)).min() > 0.5 * EPS
    # Draws are float32 and rounded once in the product with a radius.
    torch.testing.assert_close(adv, expected, rtol=0, atol=1e-6 if name == "PGDL2" else 1e-9)


@pytest.mark.parametrize(
    ("name", "other", "parameters"),
    [
        ("PGN", "MIFGSM", {}),
        ("GRA", "PGN", {}),
        ("GRA", "GRA", {"eta": 1.0}),
        ("EMIFGSM", "MIFGSM", {}),
        ("RFGSM", "BIM", {}),
        ("UPGD", "BIM", {}),
    ],
)
def test_the_equations_tell_attacks_apart(name: str, other: str, parameters: dict[str, Any]) -> None:
    """Otherwise the test above could not see one preset built as another."""
    model, images = network(), photos()
    first = EQUATIONS[name][0](images, gradient_of(model, False))
    theirs = EQUATIONS.get(other, (None, BASE | {"decay": DECAY} if other == "MIFGSM" else BASE))[1] | parameters
    second = create(other, model, seed=SEED, **theirs)(images, LABELS, indices=INDICES)
    assert ((first - second).abs() > 1e-3).double().mean() > 0.002


@pytest.mark.parametrize("name", ["EOTPGD", "UPGD"])
def test_every_draw_of_an_expectation_is_another(name: str) -> None:
    """Of input diversity, whose views of the second draw have copies of their own."""
    model, images = network(), photos()

    def diverse(x: Tensor, step: int, grad: Gradient) -> Tensor:
        return sum(through(lambda y, copy=copy: diversity(y, step, 0.7, 0.6, copy), grad, x) for copy in range(2)) / 2

    start = noise(EPS, 0, 0)[0] if name == "EOTPGD" else None
    decay = 0.0 if name == "EOTPGD" else DECAY
    expected = momentum(diverse, start, decay)(images, gradient_of(model, False))
    parameters = BASE | {"decay": decay, "eot_iter": 2, "resize_rate": 0.7, "diversity_prob": 0.6}
    adv = create(f"{name}+difgsm", model, seed=SEED, **parameters)(images, LABELS, indices=INDICES)
    torch.testing.assert_close(adv, expected, rtol=0, atol=1e-9)


DEFAULTS = {
    "emifgsm": {"decay": 1.0, "num_sample": 11, "radius": 7.0},
    "eotpgd": {"eot_iter": 2, "random_start": True},
    "ffgsm": {"eps": 8 / 255, "alpha": 10 / 255},
    "gra": {"decay": 1.0, "num_neighbor": 20, "beta": 3.5, "eta": 0.94},
    "pgdl2": {"eps": 1.0, "alpha": 0.2, "random_start": True},
    "pgn": {"decay": 1.0, "num_neighbor": 20, "beta": 3.0, "gamma": 0.5},
    "rfgsm": {"alpha": 2 / 255},
    "upgd": {"decay": 1.0, "eot_iter": 1, "random_start": False},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_the_papers(name: str) -> None:
    given = parameters_of(name)
    assert {key: given[key] for key in DEFAULTS[name]} == DEFAULTS[name]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Expectation(0), "samples: got 0"),
        (lambda: PenalizedNorm(0), "neighbors: got 0"),
        (lambda: PenalizedNorm(beta=-1.0), "beta: got -1.0"),
        (lambda: PenalizedNorm(delta=1.1), r"delta: got 1.1; allowed is a number in \[0, 1\]"),
        (lambda: GradientRelevance(0), "neighbors: got 0"),
        (lambda: GradientRelevance(beta=-0.1), "beta: got -0.1"),
        (lambda: EnhancedMomentum(1), "samples: got 1; allowed is a whole number, at least 2"),
        (lambda: EnhancedMomentum(radius=-7), "radius: got -7"),
        (lambda: DecayingStep(-1.0), "momentum: got -1.0"),
        (lambda: DecayingStep(eta=0.0), r"eta: got 0.0; allowed is a number in \(0, 1\]"),
        (lambda: CornerStart(-1.0), "momentum: got -1.0"),
        (lambda: CornerStart(radius=-1.0), "radius: got -1.0"),
    ],
)
def test_components_check_their_numbers(build: Callable[[], Component], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("name", [name.lower() for name in EQUATIONS])
def test_as_many_passes_as_are_said(name: str) -> None:
    model = Halving()
    attack = build(name, model, steps=2) if name != "ffgsm" else build(name, model)
    attack(samples.photos(2), samples.labels_of(2))
    assert sum(model.batches) == 2 * attack.steps * attack.passes
