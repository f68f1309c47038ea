"""Scaled skip connections against forward passes with a factor written into every block, row by row."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import relu

from alignfast.draws import SOURCE_SLOT, Draws
from alignfast.models import Classifier
from alignfast.models.classifier import Render
from alignfast.ops import philox_uniform
from alignfast.surrogates import GhostSkips, SkipGradient, surrogate
from tests.surrogates.nets import input_gradient, net, photos

RADIUS, SEED, STEP = 0.4, 77, 3
INDICES, COPIES = torch.tensor([905, 3]), torch.tensor([65536, 65539, 65542])


def cifar(m: Any, x: Tensor, factors: list[float]) -> Tensor:
    x = relu(m.conv1(x))
    for block, factor in zip([*m.layer1, *m.layer2], factors, strict=True):
        x = relu(block.bn2(block.conv2(relu(block.bn1(block.conv1(x))))) + factor * block.shortcut(x))
    return m.linear(x.mean((2, 3)))


def before(m: Any, x: Tensor, factors: list[float]) -> Tensor:
    x = m[0](x)
    for block, factor in zip(m[1:3], factors, strict=True):
        x = block.conv2(relu(block.bn2(block.conv1(relu(block.bn1(x)))))) + factor * block.shortcut(x)
    return m[4](x.flatten(1))


def resnet18(m: Any, x: Tensor, factors: list[float]) -> Tensor:
    x = m.maxpool(relu(m.bn1(m.conv1(x))))
    blocks = [*m.layer1, *m.layer2, *m.layer3, *m.layer4]
    for block, factor in zip(blocks, factors, strict=True):
        around = x if block.downsample is None else block.downsample(x)
        x = relu(block.bn2(block.conv2(relu(block.bn1(block.conv1(x))))) + factor * around)
    return m.fc(x.mean((2, 3)))


FORWARDS: dict[str, tuple[Callable[[Any, Tensor, list[float]], Tensor], int]] = {
    "cifar": (cifar, 4),
    "before": (before, 2),
    "timm resnet18": (resnet18, 8),
}


def attacked(source: Classifier, images: Tensor) -> Tensor:
    draws = Draws(SEED, STEP, INDICES, COPIES, SOURCE_SLOT)
    render: Render = partial(_rows, images)
    return source.logits_of(render, draws)


def _rows(images: Tensor, *args: Any, **options: Any) -> Tensor:
    return images


@pytest.mark.parametrize("name", FORWARDS)
def test_logits_and_gradients(name: str) -> None:
    model, images = net(name), photos(name, 6)
    forward, blocks = FORWARDS[name]
    ghost = surrogate(model, GhostSkips(RADIUS))
    purpose = 8 * SOURCE_SLOT
    factors = philox_uniform(
        INDICES, COPIES, (blocks,), seed=SEED, step=STEP, purpose=purpose, low=1 - RADIUS, high=1 + RADIUS
    )
    # Row k N + n is copy k of image n.
    of_rows = factors.reshape(6, blocks).double().tolist()
    assert len({round(value, 6) for row in of_rows for value in row}) == 6 * blocks

    def by_hand(x: Tensor) -> Tensor:
        return torch.cat([forward(model, x[row : row + 1], of_rows[row]) for row in range(6)])

    torch.testing.assert_close(attacked(ghost, images), by_hand(images), rtol=1e-9, atol=1e-12)
    gradient = input_gradient(lambda x: attacked(ghost, x), images)
    torch.testing.assert_close(gradient, input_gradient(by_hand, images), rtol=1e-8, atol=1e-14)


def test_features_are_those_of_the_ghost() -> None:
    """A layer's own hooks see what the next layer is given."""
    model, images, seen = net("before"), photos("before", 6), []
    ghost = surrogate(model, GhostSkips(RADIUS))
    with model[1].shortcut.register_forward_hook(lambda module, inputs, output: seen.append(output)):
        attacked(ghost, images)
    assert not torch.equal(seen[0], model[0](images))


def test_without_draws_it_is_the_model() -> None:
    model, images = net("cifar", torch.float32), photos("cifar", dtype=torch.float32)
    assert torch.equal(surrogate(model, GhostSkips(RADIUS)).logits(images), model(images))


def test_with_weaker_branches() -> None:
    model, images = net("cifar"), photos("cifar", 6)
    both = [
        surrogate(surrogate(model, first), second)
        for first, second in ((GhostSkips(RADIUS), SkipGradient(0.0)), (SkipGradient(0.0), GhostSkips(RADIUS)))
    ]
    one, other = (input_gradient(lambda x, source=source: attacked(source, x), images) for source in both)
    assert torch.equal(one, other)
    assert not torch.equal(one, input_gradient(lambda x: attacked(surrogate(model, GhostSkips(RADIUS)), x), images))


@pytest.mark.parametrize("name", ["densenet", "vit", "plain"])
def test_models_without_skips_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="has no skip connection that is known; allowed are residual blocks"):
        surrogate(net(name), GhostSkips())


@pytest.mark.parametrize("radius", [-0.1, 1.5, "wide"])
def test_the_radius_is_checked(radius: Any) -> None:
    with pytest.raises(ValueError, match="radius: got"):
        GhostSkips(radius)
