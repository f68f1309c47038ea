"""Attacks that differ in their estimator, step rule or shaping against their equations, written out a second time.

Neighbours are draws of slot 30; what an estimator draws in pass p of a step has copies that count from 65536 p.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import scipy.fft
import torch
from torch import Tensor

from alignfast.attacks import (
    AdaptiveTanhStep,
    Attack,
    Component,
    CornerStart,
    DecayingStep,
    EnhancedMomentum,
    Expectation,
    FrequencyMask,
    GlobalMomentum,
    GradientRelevance,
    IntegratedGradients,
    L2Step,
    Memory,
    NormPenalty,
    PatchwiseStep,
    PenalizedNorm,
    Position,
    Probability,
    RandomWalk,
    RescaledStep,
    Scales,
    SignStep,
    Smoothing,
    StaircaseStep,
    StepRule,
    VarianceTuning,
    WorstCase,
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
    SIDE,
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


def gifgsm(images: Tensor, grad: Gradient) -> Tensor:
    adv, m = images, torch.zeros_like(images)
    for _ in range(3):
        m = DECAY * m + unit(grad(adv))
        adv = clip(adv + 4 * ALPHA * m.sign(), images)
    adv = images
    for _ in range(STEPS):
        m = DECAY * m + unit(grad(adv))
        adv = clip(adv + ALPHA * m.sign(), images)
    return adv


def staircase(g: Tensor, stairs: int) -> Tensor:
    """Element by element, of each channel on its own."""
    result = torch.zeros_like(g)
    for n, c in np.ndindex(*g.shape[:2]):
        signs, size = g[n, c].sign().tolist(), g[n, c].abs().numpy()
        edges = [np.quantile(size, (j + 1) / stairs, method="lower") for j in range(stairs)]
        for y, x in np.ndindex(*size.shape):
            j = next(j for j in range(stairs) if size[y, x] <= edges[j])
            result[n, c, y, x] = signs[y][x] * (2 * j + 1) / stairs
    return result


def ifgssm(images: Tensor, grad: Gradient) -> Tensor:
    adv = images
    for _ in range(STEPS):
        adv = clip(adv + ALPHA * staircase(grad(adv), 5), images)
    return adv


# Binary fractions, so that what cancels does so exactly.
EXACT = {"eps": 1 / 16, "alpha": 1 / 64, "steps": STEPS, "amplification": 6.0}


def patchwise(gradient: Gradient, images: Tensor, reach: int, factor: float, decay: float, feedback: bool) -> Tensor:
    eps, stride, side = 1 / 16, 6 / 64, SIDE
    adv, a, m = images, torch.zeros_like(images), torch.zeros_like(images)
    for _ in range(STEPS):
        g = gradient(adv)
        m = decay * m + unit(g)
        a = a + stride * m.sign()
        cut = (a.abs() - eps).clamp(min=0) * a.sign()
        wide, spread = torch.nn.functional.pad(cut, [reach] * 4), torch.zeros_like(cut)
        for y in range(2 * reach + 1):
            for x in range(2 * reach + 1):
                if (y, x) != (reach, reach):
                    spread += wide[..., y : y + side, x : x + side]
        projected = factor * stride * spread.sign()
        a = a + projected if feedback else a
        adv = adv + stride * m.sign() + projected
        adv = torch.maximum(torch.minimum(adv, images + eps), images - eps).clamp(0, 1)
    return adv


def pifgsmpp(images: Tensor, grad: Gradient) -> Tensor:
    line = torch.tensor([math.exp(-0.5 * x * x) for x in (-3.0, -1.5, 0.0, 1.5, 3.0)], dtype=torch.float64)
    kernel = (torch.outer(line, line) / line.sum() ** 2)[None, None]

    def smoothed(x: Tensor) -> Tensor:
        g = grad(x)
        return torch.nn.functional.conv2d(g.flatten(0, 1)[:, None], kernel, padding=2).reshape(g.shape)

    return patchwise(smoothed, images, 1, 0.5, 0.0, feedback=False)


def aifgtm(images: Tensor, grad: Gradient) -> Tensor:
    adv, m, v = images, torch.zeros_like(images), torch.zeros_like(images)
    weights = [(1 - 0.8 ** (t + 1)) / math.sqrt(1 - 0.95 ** (t + 1)) for t in range(STEPS)]
    for t in range(STEPS):
        g = grad(adv)
        m, v = m + 1.4 * g, v + 1.7 * g**2
        adv = clip(adv + EPS / sum(weights) * weights[t] * (1.2 * m / v**0.5).tanh(), images)
    return adv


def lfifgsm(x: Tensor, step: int, grad: Gradient) -> Tensor:
    g = grad(x).numpy()
    spectrum = scipy.fft.dctn(g, axes=(2, 3), norm="ortho")
    # 0.4 of 12 frequencies, rounded up.
    spectrum[:, :, 5:], spectrum[:, :, :, 5:] = 0, 0
    return torch.from_numpy(scipy.fft.idctn(spectrum, axes=(2, 3), norm="ortho"))


def iefgsm(x: Tensor, step: int, grad: Gradient) -> Tensor:
    present = unit(grad(x))
    return (present + unit(grad(x + ALPHA * present))) / 2


def gnp(x: Tensor, step: int, grad: Gradient) -> Tensor:
    here = grad(x)
    length = here.square().sum((1, 2, 3), keepdim=True).sqrt()
    return 1.7 * here - 0.7 * grad(x + 0.5 * here / length)


def rap(x: Tensor, step: int, grad: Gradient) -> Tensor:
    worst = x
    if step >= 2:
        worst = (x + noise(0.2, step, 8 * 30)[0]).clamp(0, 1)
        for _ in range(3):
            worst = worst - 0.06 * grad(worst).sign()
            worst = torch.maximum(torch.minimum(worst, x + 0.2), x - 0.2).clamp(0, 1)
    return grad(worst)


def rescaled(m: Tensor, factor: float) -> Tensor:
    result = []
    for one in m:
        logs = [math.log2(abs(value)) for value in one.flatten().tolist()]
        mean, std = np.mean(logs), np.std(logs)
        weights = [factor / (1 + math.exp(-(value - mean) / std)) for value in logs]
        result.append(one.sign() * torch.tensor(weights, dtype=m.dtype).reshape(one.shape))
    return torch.stack(result)


def smifgrm(images: Tensor, grad: Gradient) -> Tensor:
    adv, m = images, torch.zeros_like(images)
    for step in range(STEPS):
        at, total = adv, torch.zeros_like(adv)
        for stride in noise(1.2 * EPS, step, 8 * 30, 3):
            total += grad(at)
            at = at + stride
        m = DECAY * m + unit(total / 3)
        adv = clip(adv + ALPHA * rescaled(m, 1.8), images)
    return adv


def ahead(images: Tensor, grad: Gradient) -> Tensor:
    """VNI-FGSM with the neighbours of the look-ahead point."""
    adv, m, v = images, torch.zeros_like(images), torch.zeros_like(images)
    for step in range(STEPS):
        x = adv + ALPHA * DECAY * m
        g = grad(x)
        tuned, v = g + v, sum(grad(x + r) for r in noise(1.2 * EPS, step, 8 * 30, 3, passed=1)) / 3 - g
        m = DECAY * m + unit(tuned)
        adv = clip(adv + ALPHA * m.sign(), images)
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
    "GIFGSM": (gifgsm, BASE | {"decay": DECAY, "pre_epoch": 3, "s": 4.0}),
    "IFGSSM": (ifgssm, BASE | {"stairs": 5}),
    "PIFGSM": (lambda x, g: patchwise(g, x, 2, 1.0, DECAY, feedback=True), EXACT | {"decay": DECAY, "kern_size": 5}),
    "PIFGSMPP": (pifgsmpp, EXACT | {"project_factor": 0.5}),
    "AIFGTM": (
        aifgtm,
        {"eps": EPS, "alpha": EPS / STEPS, "steps": STEPS}
        | {"beta_1": 0.8, "beta_2": 0.95, "mu_1": 1.4, "mu_2": 1.7, "lam": 1.2},
    ),
    "LFIFGSM": (momentum(lfifgsm), BASE | {"decay": DECAY, "kept": 0.4}),
    "IEFGSM": (momentum(iefgsm), BASE | {"decay": DECAY}),
    "GNP": (momentum(gnp), BASE | {"decay": DECAY, "r": 0.5, "beta": 0.7}),
    "RAP": (
        momentum(rap),
        BASE | {"decay": DECAY, "transpoint": 2, "epsilon_n": 0.2, "alpha_n": 0.06, "adv_steps": 3},
    ),
    "SMIFGRM": (smifgrm, BASE | {"decay": DECAY, "num_neighbor": 3, "beta": 1.2, "rescale_factor": 1.8}),
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


def test_variance_around_the_look_ahead_point() -> None:
    model, images = network(), photos()
    expected = ahead(images, gradient_of(model, False))
    attack = create("vnifgsm", model, seed=SEED, decay=DECAY, N=3, beta=1.2, **BASE)
    adv = replace(attack, estimator=VarianceTuning(3, 1.2, ahead=True))(images, LABELS, indices=INDICES)
    torch.testing.assert_close(adv, expected, rtol=0, atol=1e-9)
    assert not torch.allclose(adv, attack(images, LABELS, indices=INDICES))


def test_elements_without_gradient_do_not_count_in_rescaling() -> None:
    images = torch.full((2, 1, 1, 4), 0.5)
    grad = torch.tensor([[1.0, 0.0, -4.0, 16.0], [0.0, -3.0, 3.0, 0.0]]).reshape(2, 1, 1, 4)
    adv = images.clone()
    RescaledStep().update(Position(images, adv, adv, torch.tensor(0), 5, 0.4, 0.1, False), grad, {})
    low, high = (2 / (1 + math.exp(-level)) for level in (-math.sqrt(1.5), math.sqrt(1.5)))
    expected = [0.5 + 0.1 * low, 0.5, 0.4, 0.5 + 0.1 * high, 0.5, 0.4, 0.6, 0.5]
    assert adv.flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("targeted", [False, True])
def test_integrated_gradients_of_the_probability(targeted: bool) -> None:
    model, images = network(), photos()
    adv, m = images, torch.zeros_like(images)
    for _ in range(STEPS):
        total = torch.zeros_like(images)
        for i in (1, 2, 3, 4):
            leaf = (adv * i / 4).requires_grad_()
            p = torch.exp(model.logits(leaf))
            p = (p / p.sum(1, keepdim=True))[range(3), LABELS]
            total += torch.autograd.grad((p if targeted else -p).sum(), leaf)[0]
        m = DECAY * m + unit(adv * total / 4)
        adv = clip(adv + ALPHA * m.sign(), images)
    attack = create("mig", model, targeted=targeted, decay=DECAY, s_factor=4, **BASE)
    torch.testing.assert_close(attack(images, LABELS, indices=INDICES), adv, rtol=0, atol=1e-9)
    other = create("mifgsm", model, targeted=targeted, decay=DECAY, **BASE)(images, LABELS, indices=INDICES)
    assert ((other - adv).abs() > 1e-3).double().mean() > 0.002


def test_integrated_gradients_of_a_quadratic_add_up() -> None:
    """J = x A x / 2 + b x has J(x) - J(0) as the sum of what is attributed, by the rectangle rule up to 1 / S."""
    weight = torch.randn((4, 4), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    bias = torch.tensor([0.3, -0.2, 0.5, 0.1], dtype=torch.float64)

    class Quadratic(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            x = images.flatten(1)
            z = ((x @ weight) * x).sum(1) / 2 + x @ bias
            # Of these two, softmax gives p of the second class between 0 and 1; near 1/2 it is z / 4 but for z^3.
            return torch.stack([torch.zeros_like(z), 1e-3 * z], 1)

    kept: list[Tensor] = []

    class Keeping(IntegratedGradients):
        def estimate(self, gradient: Any, position: Position, memory: Memory) -> Tensor:
            kept.append(super().estimate(gradient, position, memory))
            return kept[-1]

    images = torch.tensor([[0.2, 0.9, 0.4, 0.7]], dtype=torch.float64).reshape(1, 1, 2, 2)
    attack = Attack(Quadratic(), 0.1, 0.1, 1, estimator=Keeping(1000), objective=Probability(targeted=True))
    attack(images, torch.tensor([1]))
    before, after = (Quadratic()(x).softmax(1)[0, 1] for x in (torch.zeros_like(images), images))
    assert float(kept[0].sum()) == pytest.approx(float(after - before), rel=2e-3)


@pytest.mark.parametrize(
    ("name", "other", "parameters"),
    [
        ("PGN", "MIFGSM", {}),
        ("GRA", "PGN", {}),
        ("GRA", "GRA", {"eta": 1.0}),
        ("EMIFGSM", "MIFGSM", {}),
        ("RFGSM", "BIM", {}),
        ("UPGD", "BIM", {}),
        ("GIFGSM", "MIFGSM", {}),
        ("IFGSSM", "BIM", {}),
        ("SMIFGRM", "MIFGSM", {}),
        ("IEFGSM", "MIFGSM", {}),
        ("GNP", "MIFGSM", {}),
        ("RAP", "RAP", {"transpoint": STEPS}),
        ("RAP", "RAP", {"transpoint": 0}),
        ("LFIFGSM", "MIFGSM", {}),
        ("PIFGSM", "PIFGSM", {"decay": 0.0}),
        ("PIFGSM", "PIFGSM", {"kern_size": 3}),
        ("PIFGSMPP", "PIFGSMPP", {"project_factor": 1.0}),
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
    "aifgtm": {"beta_1": 0.9, "beta_2": 0.99, "mu_1": 1.5, "mu_2": 1.9, "lam": 1.3},
    "emifgsm": {"decay": 1.0, "num_sample": 11, "radius": 7.0},
    "eotpgd": {"eot_iter": 2, "random_start": True},
    "ffgsm": {"eps": 8 / 255, "alpha": 10 / 255},
    "gnp": {"decay": 1.0, "r": 0.01, "beta": 0.8},
    "iefgsm": {"decay": 1.0},
    "rap": {"decay": 1.0, "transpoint": None, "epsilon_n": 16 / 255, "alpha_n": 2 / 255, "adv_steps": 8},
    "mig": {"decay": 1.0, "s_factor": 20},
    "smifgrm": {"decay": 1.0, "num_neighbor": 12, "beta": 1.5, "rescale_factor": 2.0},
    "gifgsm": {"decay": 1.0, "pre_epoch": 5, "s": 10.0},
    "gra": {"decay": 1.0, "num_neighbor": 20, "beta": 3.5, "eta": 0.94},
    "lfifgsm": {"decay": 0.0, "kept": 0.25},
    "pgdl2": {"eps": 1.0, "alpha": 0.2, "random_start": True},
    "pgn": {"decay": 1.0, "num_neighbor": 20, "beta": 3.0, "gamma": 0.5},
    "ifgssm": {"decay": 0.0, "stairs": 64},
    "pifgsm": {"decay": 0.0, "amplification": 10.0, "kern_size": 3, "project_factor": 1.0},
    "pifgsmpp": {"decay": 0.0, "amplification": 10.0, "project_factor": 0.8},
    "rfgsm": {"alpha": 2 / 255},
    "upgd": {"decay": 1.0, "eot_iter": 1, "random_start": False},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_the_papers(name: str) -> None:
    given = parameters_of(name)
    assert {key: given[key] for key in DEFAULTS[name]} == pytest.approx(DEFAULTS[name])


@pytest.mark.parametrize("name", ["aifgtm", "ops", "pifgsm", "pifgsmpp"])
def test_alpha_is_eps_over_steps_unless_given(name: str) -> None:
    for numbers, alpha in (({}, 0.8 / 255), ({"eps": 0.3, "steps": 4}, 0.075), ({"eps": 0.3, "alpha": 0.2}, 0.2)):
        assert create(name, network(), **numbers).alpha == pytest.approx(alpha)
    with pytest.raises(ValueError, match="steps: got 0"):
        create(name, network(), steps=0)


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
        (lambda: GlobalMomentum(steps=0), "steps: got 0"),
        (lambda: GlobalMomentum(factor=-1.0), "factor: got -1.0"),
        (lambda: StaircaseStep(stairs=0), "stairs: got 0"),
        (lambda: PatchwiseStep(amplification=0.0), "amplification: got 0.0; allowed is a number greater than 0"),
        (lambda: PatchwiseStep(factor=-0.1), "factor: got -0.1"),
        (lambda: PatchwiseStep(size=4), "size: got 4; allowed is an odd whole number"),
        (lambda: PatchwiseStep(size=1), "size: got 1; allowed is a whole number, at least 3"),
        (lambda: PatchwiseStep(-1.0), "momentum: got -1.0"),
        (lambda: AdaptiveTanhStep(beta_1=1.0), r"beta_1: got 1; allowed is a number in \[0, 1\)"),
        (lambda: AdaptiveTanhStep(beta_2=-0.1), "beta_2: got -0.1"),
        (lambda: AdaptiveTanhStep(mu_1=0.0), "mu_1: got 0.0"),
        (lambda: AdaptiveTanhStep(mu_2=0.0), "mu_2: got 0.0"),
        (lambda: AdaptiveTanhStep(lam=0.0), "lam: got 0.0"),
        (lambda: FrequencyMask(0.0), r"kept: got 0.0; allowed is a number in \(0, 1\]"),
        (lambda: FrequencyMask(1.5), "kept: got 1.5"),
        (lambda: NormPenalty(r=0.0), "r: got 0.0; allowed is a number greater than 0"),
        (lambda: NormPenalty(beta=-0.1), "beta: got -0.1"),
        (lambda: WorstCase(steps=0), "steps: got 0; allowed is a whole number, 1 to 255"),
        (lambda: WorstCase(steps=256), "steps: got 256"),
        (lambda: WorstCase(radius=-0.1), "radius: got -0.1"),
        (lambda: WorstCase(alpha=-0.1), "alpha: got -0.1"),
        (lambda: WorstCase(late_start=-1), "late_start: got -1"),
        (lambda: IntegratedGradients(0), "samples: got 0"),
        (lambda: RandomWalk(0), "samples: got 0"),
        (lambda: RandomWalk(beta=-1.0), "beta: got -1.0"),
        (lambda: RescaledStep(factor=0.0), "factor: got 0.0; allowed is a number greater than 0"),
        (lambda: CornerStart(-1.0), "momentum: got -1.0"),
        (lambda: CornerStart(radius=-1.0), "radius: got -1.0"),
    ],
)
def test_components_check_their_numbers(build: Callable[[], Component], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


SAMPLING = ["emifgsm", "eotpgd", "gra", "mig", "pgn", "rap", "smifgrm"]


@pytest.mark.parametrize("max_batch", [1, 4, 7])
@pytest.mark.parametrize("name", SAMPLING)
def test_max_batch_changes_memory_only(name: str, max_batch: int) -> None:
    whole, chunked = Halving(), Halving()
    images, labels = samples.photos(2), samples.labels_of(2)
    # Two scales of each sample, so that views and samples go in chunks.
    attack = replace(build(name, whole, seed=4), transforms=[Scales(2)])
    expected = attack(images, labels)
    assert torch.equal(replace(attack, source=chunked, max_batch=max_batch)(images, labels), expected)
    assert max(chunked.batches) <= max(max_batch, 2)
    assert sum(chunked.batches) == sum(whole.batches) == 2 * attack.steps * attack.passes


def test_a_late_start_before_which_it_is_the_plain_attack() -> None:
    model, images, labels = Halving(), samples.photos(2), samples.labels_of(2)
    late = build("rap", model, transpoint=4)(images, labels)
    assert torch.equal(late, build("mifgsm", model)(images, labels))
    assert create("rap", model, steps=41).estimator.late_start == 10


@pytest.mark.parametrize("name", [*(name.lower() for name in EQUATIONS), "mig"])
def test_as_many_passes_as_are_said(name: str) -> None:
    model = Halving()
    attack = build(name, model, steps=2) if name != "ffgsm" else build(name, model)
    attack(samples.photos(2), samples.labels_of(2))
    before = attack.step.steps if isinstance(attack.step, GlobalMomentum) else 0
    assert sum(model.batches) == 2 * (before + attack.steps) * attack.passes


def test_a_tie_around_an_element_spreads_nothing() -> None:
    """In float32, where 0.3 - 0.1 - 0.2 is not 0 as it is summed."""
    rule, images = PatchwiseStep(amplification=1.0), torch.full((1, 1, 3, 3), 0.5)
    adv, memory = images.clone(), {"noise": torch.zeros(1, 1, 3, 3)}
    memory["noise"][0, 0] = torch.tensor([[0.3, 0.0, 0.0], [-0.1, 0.0, 0.0], [0.0, 0.0, -0.2]])
    position = Position(images, adv, adv, torch.tensor(0), 5, 0.0, 0.1, False)
    rule.update(position, torch.zeros_like(images), memory)
    assert memory["noise"][0, 0, 1, 1] == 0
    assert memory["noise"][0, 0, 0, 1] == pytest.approx(0.1)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 6), (5, 2), (8, 7)])
@pytest.mark.parametrize("kept", [0.01, 0.3, 0.5, 1.0])
def test_a_frequency_mask_of_any_size(height: int, width: int, kept: float) -> None:
    grad = torch.randn((2, 3, height, width), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    spectrum = scipy.fft.dctn(grad.numpy(), axes=(2, 3), norm="ortho")
    spectrum[:, :, math.ceil(kept * height) :], spectrum[:, :, :, math.ceil(kept * width) :] = 0, 0
    expected = torch.from_numpy(scipy.fft.idctn(spectrum, axes=(2, 3), norm="ortho"))
    shaped = FrequencyMask(kept).shape(grad)
    torch.testing.assert_close(shaped, expected, rtol=0, atol=1e-13)
    assert torch.equal(FrequencyMask(kept).shape(grad[1:]), shaped[1:])
    assert FrequencyMask(kept).shape(grad.float()).dtype == torch.float32


def test_a_frequency_mask_and_smoothing_follow_each_other() -> None:
    attack = create("lfifgsm+tifgsm+mifgsm", Halving(), kept=0.5, len_kernel=3)
    assert attack.shaping == [FrequencyMask(0.5), Smoothing("gaussian", 3, 3.0)]
    assert attack.step == SignStep(1.0)


@pytest.mark.parametrize("name", ["difgsm+gifgsm", "gifgsm+difgsm"])
def test_the_global_momentum_is_of_the_whole_combination(name: str) -> None:
    """Its steps show the model what the attack's do, under draws of another key."""
    model, images = network(), photos()
    grad, m = gradient_of(model, False), torch.zeros_like(images)
    for steps, seed, alpha in ((2, SEED ^ 2**63, 3 * ALPHA), (STEPS, SEED, ALPHA)):
        adv = images
        for step in range(steps):
            diverse = partial(diversity, step=step, rate=0.7, p=0.6, seed=seed)
            m = DECAY * m + unit(through(diverse, grad, adv))
            adv = clip(adv + alpha * m.sign(), images)
    parameters = BASE | {"decay": DECAY, "resize_rate": 0.7, "diversity_prob": 0.6, "pre_epoch": 2, "s": 3.0}
    torch.testing.assert_close(create(name, model, seed=SEED, **parameters)(images, LABELS, indices=INDICES), adv)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("nifgsm+gra", DecayingStep(1.0, nesterov=True)),
        ("mifgsm+pgdl2", L2Step(1.0)),
        ("pgdl2+bim", L2Step()),
        ("bim+rfgsm", CornerStart(radius=2 / 255)),
        ("gifgsm+nifgsm", GlobalMomentum(1.0, nesterov=True)),
        ("sinifgsm+pifgsm", PatchwiseStep(1.0, nesterov=True)),
        ("ifgssm+mifgsm", StaircaseStep(1.0)),
        ("difgsm+aifgtm", AdaptiveTanhStep()),
    ],
)
def test_step_rules_take_over_the_momentum_of_others(name: str, step: StepRule) -> None:
    attack = create(name, Halving(), eps=0.1, alpha=2 / 255)
    assert attack.step == step
    adv = attack(samples.photos(2), samples.labels_of(2))
    assert not adv.isnan().any()
    assert not torch.equal(adv, samples.photos(2))


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        (
            "mifgsm+aifgtm",
            {"alpha": 0.01},
            r"attack: mifgsm has momentum, which the step AdaptiveTanhStep\(.*\) of aifgtm does not take; "
            r"allowed with it are attacks without momentum \(decay=0\)",
        ),
        ("aifgtm+sinifgsm", {"alpha": 0.01}, "attack: sinifgsm has momentum"),
        ("gifgsm+gra", {}, r"attack: gifgsm has step GlobalMomentum\(.*and gra has DecayingStep\(.*one step"),
        ("pgn+gra", {}, "attack: pgn has estimator PenalizedNorm.*and gra has GradientRelevance.*one estimator"),
        ("difgsm+pifgsm", {}, "attack: difgsm has alpha 0.0078.* and pifgsm has 0.0031.*; allowed is one alpha"),
    ],
)
def test_what_does_not_combine_is_refused(name: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(name, Halving(), **parameters)
