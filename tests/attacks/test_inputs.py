"""Attacks that change what the model is shown, against their papers' equations written out a second time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from alignfast.attacks import create
from alignfast.ops import philox_uniform
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
    photos,
    through,
    unit,
)

# Shows an image, [C, H, W], as copy number `copy` of image number `n` in step `step`.
Show = Callable[[Tensor, int, int, int], Tensor]


def drawn(n: int, copy: int, step: int, number: int, shape: Sequence[int] = (), slot: int = 1) -> Tensor:
    """Draw `number` of the transform in place `slot`, for copy `copy` of image n; float64 of the given shape."""
    index, purpose = INDICES[n : n + 1], 8 * slot + number
    table = philox_uniform(index, torch.tensor([copy]), tuple(shape), seed=SEED, step=step, purpose=purpose)
    return table[0, 0].double()


def normal(n: int, copy: int, step: int, number: int, shape: Sequence[int]) -> Tensor:
    """Box and Muller's, of two uniform draws; rounded as float32 would be, hence not exact."""
    first, second = (drawn(n, copy, step, number + i, shape) for i in range(2))
    return (-2 * (1 - first).log()).sqrt() * (2 * math.pi * second).cos()


def over_copies(show: Show, copies: int) -> Callable[[Tensor, Gradient], Tensor]:
    """Momentum over the mean gradient of so many copies, each shown in its own way."""

    def attack(images: Tensor, grad: Gradient) -> Tensor:
        adv, m = images, torch.zeros_like(images)
        for step in range(STEPS):
            total = torch.zeros_like(images)
            for copy in range(copies):

                def shown(x: Tensor, k: int = copy, at: int = step) -> Tensor:
                    return torch.stack([show(image, n, k, at) for n, image in enumerate(x)])

                total = total + through(shown, grad, adv) / copies
            m = DECAY * m + unit(total)
            adv = clip(adv + ALPHA * m.sign(), images)
        return adv

    return attack


def dim(images: Tensor, grad: Gradient) -> Tensor:
    adv, m = images, torch.zeros_like(images)
    for step in range(STEPS):
        m = DECAY * m + unit(through(lambda x, at=step: diversity(x, at, 1.3, 0.6), grad, adv))
        adv = clip(adv + ALPHA * m.sign(), images)
    return adv


def tim(images: Tensor, grad: Gradient) -> Tensor:
    line = torch.tensor([math.exp(-x * x / 2) for x in (-2.0, -1.0, 0.0, 1.0, 2.0)], dtype=torch.float64)
    kernel = (torch.outer(line, line) / line.sum() ** 2)[None, None]
    adv, m = images, torch.zeros_like(images)
    for _ in range(STEPS):
        g = grad(adv)
        smoothed = conv2d(g.flatten(0, 1)[:, None], kernel, padding=2).reshape(g.shape)
        m = DECAY * m + unit(smoothed)
        adv = clip(adv + ALPHA * m.sign(), images)
    return adv


MOMENTUM = BASE | {"decay": DECAY}
EQUATIONS: dict[str, tuple[Callable[[Tensor, Gradient], Tensor], dict[str, Any]]] = {
    "DIM": (dim, {"resize_rate": 1.3, "diversity_prob": 0.6}),
    "TIM": (tim, {"len_kernel": 5, "nsig": 2.0}),
    "SIM": (over_copies(lambda image, n, copy, step: image / 2**copy, 3), {"m": 3}),
}


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("name", EQUATIONS)
def test_the_papers_equations(name: str, targeted: bool) -> None:
    equation, parameters = EQUATIONS[name]
    model, images = network(), photos()
    expected = equation(images, gradient_of(model, targeted))
    attack = create(name, model, seed=SEED, targeted=targeted, **MOMENTUM | parameters)
    assert (expected - images).abs().amax((1, 2, 3)).min() > 0.9 * EPS
    torch.testing.assert_close(attack(images, LABELS, indices=INDICES), expected, rtol=0, atol=1e-9)


DEFAULTS: dict[str, str] = {
    "dim": "[InputDiversity(rate=1.1, p=0.5, copies=1)]",
    "tim": "[]",
    "sim": "[Scales(copies=5)]",
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults(name: str) -> None:
    parameters = create(name, network()).parameters()
    assert parameters["transforms"].replace("()", "[]") == DEFAULTS[name]
    assert parameters["step"] == "SignStep(momentum=1.0, nesterov=False)"
    smoothing = "[Smoothing(kernel='gaussian', size=15, sigma=3.0)]" if name == "tim" else "()"
    assert parameters["shaping"] == smoothing
