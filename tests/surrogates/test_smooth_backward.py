"""Smooth derivatives against forward passes that have them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import relu, silu

from alignfast.surrogates import LinearBackward, SmoothBackward, surrogate
from tests.surrogates.nets import CLASSES, input_gradient, net, photos


def smooth(x: Tensor) -> Tensor:
    """relu(x), with the gradient of silu(x)."""
    return silu(x) + (relu(x) - silu(x)).detach()


def pooled(x: Tensor, kernel: int, stride: int, padding: int, temperature: float) -> Tensor:
    """Window by window."""
    rows, height, columns = [], x.shape[2], x.shape[3]
    for top in range(-padding, height + padding - kernel + 1, stride):
        row = []
        for left in range(-padding, columns + padding - kernel + 1, stride):
            inside = x[:, :, max(top, 0) : min(top + kernel, height), max(left, 0) : min(left + kernel, columns)]
            window = inside.flatten(2)
            soft = (window * torch.softmax(temperature * window, 2).detach()).sum(2)
            row.append(soft + (window.amax(2) - soft).detach())
        rows.append(torch.stack(row, 2))
    return torch.stack(rows, 2)


@pytest.mark.parametrize(("layer", "first"), [(None, 2), ("layer1.1", 1)])
def test_relus_of_blocks(layer: str | None, first: int) -> None:
    model: Any = net("cifar")
    images = photos("cifar")

    def by_hand(x: Tensor) -> Tensor:
        x = relu(model.conv1(x))
        for number, block in enumerate([*model.layer1, *model.layer2]):
            act = smooth if number >= first else relu
            x = act(block.bn2(block.conv2(act(block.bn1(block.conv1(x))))) + block.shortcut(x))
        return model.linear(x.mean((2, 3)))

    expected = input_gradient(by_hand, images)
    gradient = input_gradient(surrogate(model, SmoothBackward(layer)).logits, images)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-15)
    assert not torch.allclose(input_gradient(model, images), expected, rtol=1e-3)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 1), (2, 2, 0), (3, 1, 0)])
def test_max_pooling(kernel: int, stride: int, padding: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3).double()
    side = (6 + 2 * padding - kernel) // stride + 1
    head = nn.Linear(4 * side * side, CLASSES).double()
    model = nn.Sequential(conv, nn.MaxPool2d(kernel, stride, padding), nn.ReLU(), nn.Flatten(), head)
    images = photos("plain")
    source = surrogate(model, SmoothBackward(temperature=3.0))

    def by_hand(x: Tensor) -> Tensor:
        result: Tensor = head(smooth(pooled(conv(x), kernel, stride, padding, 3.0)).flatten(1))
        return result

    expected = input_gradient(by_hand, images)
    torch.testing.assert_close(input_gradient(source.logits, images), expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("name", ["cifar", "timm resnet18", "torchvision bottleneck", "densenet", "plain"])
def test_the_forward_pass_stays_the_same(name: str) -> None:
    model, images = net(name, torch.float32), photos(name, dtype=torch.float32)
    source = surrogate(model, SmoothBackward())
    assert torch.equal(source.logits(images), model(images))
    assert torch.equal(source.logits(images.clone().requires_grad_()), model(images))
    gradient = input_gradient(source.logits, images)
    assert gradient.isfinite().all()
    assert not torch.allclose(gradient, input_gradient(model, images))


def test_relus_are_replaced_once() -> None:
    for first, second in ((SmoothBackward(), LinearBackward()), (LinearBackward(), SmoothBackward())):
        with pytest.raises(
            ValueError, match=r"source: \w+Backward has replaced its ReLUs; allowed with \w+Backward is"
        ):
            surrogate(surrogate(net("cifar"), first), second)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf")])
def test_the_temperature_is_checked(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature: got"):
        SmoothBackward(temperature=temperature)
