"""The points of images at which losses are looked at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from alignfast.attacks import create
from alignfast.draws import Draws
from alignfast.models import Classifier

CLEAN, RANDOM, AFTER = "clean", "random", "step "
# The step of a study's own draws, which no attack reaches.
STEP = 2**31
# What is drawn, each under slots of its own.
BALL, DIRECTION, PLANE = 0, 1, 2
NOISE = 3


def after(steps: int) -> str:
    """The name of the point after so many steps of the attack."""
    return f"{AFTER}{steps}"


def last_step(points: Iterable[str]) -> str | None:
    """The point after the most steps of the attack; None where there is none."""
    steps = {int(point.removeprefix(AFTER)): point for point in points if point.startswith(AFTER)}
    return steps[max(steps)] if steps else None


def draws_of(indices: Tensor, seed: int, copies: int = 1) -> Draws:
    """Draws that belong to the images; `copies` of each."""
    return Draws(seed, STEP, indices, torch.arange(copies, device=indices.device))


def random_point(images: Tensor, indices: Tensor, eps: float, seed: int) -> Tensor:
    """Uniform in the L-inf ball of `eps` around [N, C, H, W], cut to [0, 1]; the same for an image in any batch."""
    shape = tuple(images.shape[1:])
    return (images + draws_of(indices, seed).at(BALL).uniform(0, shape, -eps, eps)[0].to(images.dtype)).clamp(0, 1)


def random_direction(images: Tensor, indices: Tensor, seed: int, slot: int = DIRECTION) -> Tensor:
    """Standard normal, of the shape of `images`."""
    return draws_of(indices, seed).at(slot).normal(0, tuple(images.shape[1:]))[0].to(images.dtype)


def along_attack(
    model: Classifier,
    attack: Mapping[str, Any],
    steps: Sequence[int],
    images: Tensor,
    labels: Tensor,
    indices: Tensor,
) -> dict[int, Tensor]:
    """[N, C, H, W] after each of these numbers of steps of an attack of so many."""
    parameters = {key: value for key, value in attack.items() if key not in ("name", "steps")}
    return {
        count: create(str(attack["name"]), model, steps=count, **parameters)(images, labels, indices=indices)
        for count in steps
    }
