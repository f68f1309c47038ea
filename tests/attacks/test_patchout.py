"""PatchOut against its objective, image by image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from alignfast.attacks import Attack, PatchOut, SignStep
from alignfast.ops import philox_uniform
from tests.attacks.test_presets import ALPHA, EPS, INDICES, LABELS, SEED, SIDE, STEPS, clip, network, photos, unit

PATCH, KEPT, WEIGHT = 3, 6, 0.7
ROWS = SIDE // PATCH


def mask(step: int) -> Tensor:
    """An estimator's own draws have slot 30; the patches with the smallest draws are kept."""
    drawn = philox_uniform(INDICES, torch.tensor([0]), (ROWS * ROWS,), seed=SEED, step=step, purpose=8 * 30)[0]
    result = torch.zeros(len(INDICES), 1, SIDE, SIDE, dtype=torch.float64)
    for image, values in enumerate(drawn.tolist()):
        for place in sorted(range(ROWS * ROWS), key=values.__getitem__)[:KEPT]:
            row, column = divmod(place, ROWS)
            result[image, :, PATCH * row : PATCH * row + PATCH, PATCH * column : PATCH * column + PATCH] = 1
    return result


def objective(model: Any, images: Tensor, delta: Tensor, shown: Tensor) -> Tensor:
    logits = model.logits(images + shown * delta)
    loss = (torch.logsumexp(logits, 1) - logits[range(len(images)), LABELS]).sum()
    norms = [one.square().sum().sqrt() for one in delta if one.detach().any()]
    return loss + WEIGHT * sum(norms)


def test_steps() -> None:
    model, images = network(), photos()
    adv, momentum = images, torch.zeros_like(images)
    for step in range(STEPS):
        delta = (adv - images).requires_grad_()
        (grad,) = torch.autograd.grad(objective(model, images, delta, mask(step)), delta)
        momentum = momentum + unit(grad)
        adv = clip(adv + ALPHA * momentum.sign(), images)
    attack = Attack(model, EPS, ALPHA, STEPS, SEED, estimator=PatchOut(PATCH, KEPT, WEIGHT), step=SignStep(1.0))
    torch.testing.assert_close(attack(images, LABELS, indices=INDICES), adv, rtol=0, atol=1e-12)
    assert not torch.equal(mask(0)[0], mask(0)[1])


def test_all_patches_without_a_weight_are_the_plain_gradient() -> None:
    model, images = network(), photos()
    plain = Attack(model, EPS, ALPHA, STEPS)(images, LABELS)
    whole = Attack(model, EPS, ALPHA, STEPS, estimator=PatchOut(SIDE, 1, 0.0))(images, LABELS)
    torch.testing.assert_close(whole, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"patch": 0}, "patch: got 0"),
        ({"patches": 1.5}, "patches: got 1.5"),
        ({"weight": -1.0}, "weight: got -1.0"),
        ({"patch": 5}, "patch: got 5; allowed is a divisor of height and width, 12 and 12"),
        ({"patch": 4, "patches": 10}, "patches: got 10; allowed is a whole number, 1 to 9"),
    ],
)
def test_numbers_are_checked(numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attack(network(), EPS, ALPHA, 1, estimator=PatchOut(**{"patch": PATCH, "patches": KEPT, **numbers}))(
            photos(), LABELS
        )
