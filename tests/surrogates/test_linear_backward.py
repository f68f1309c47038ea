"""Linear ReLUs against backward passes taken block by block."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from alignfast.surrogates import LinearBackward, SkipGradient, surrogate
from alignfast.surrogates.structure import conv_blocks
from tests.surrogates.nets import input_gradient, net, photos


def let_through(x: Tensor) -> Tensor:
    """relu(x), with the gradient of x."""
    return x + (relu(x) - x).detach()


def head_gradient(head: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return input_gradient(head, x.detach())


def pulled(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Tensor:
    leaf = x.detach().clone().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf, grad)[0]


def branch_of(block: Any, x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    result: Tensor = block.bn2(block.conv2(act(block.bn1(block.conv1(x)))))
    return result


def by_hand(m: Any, images: Tensor, first: int, weight: float = 1.0) -> Tensor:
    """Block after block from the end; `weight` on what comes through a branch."""
    blocks = [*m.layer1, *m.layer2]
    inputs = [relu(m.conv1(images)).detach()]
    for block in blocks:
        x = inputs[-1]
        inputs.append(relu(branch_of(block, x, relu) + block.shortcut(x)).detach())
    grad = head_gradient(lambda x: m.linear(x.mean((2, 3))), inputs[-1])
    for number in reversed(range(len(blocks))):
        block, x = blocks[number], inputs[number]
        grad = grad * (inputs[number + 1] > 0)
        branch = pulled(lambda z, block=block: branch_of(block, z, relu), x, grad)
        if number >= first:
            linear = pulled(lambda z, block=block: branch_of(block, z, let_through), x, grad)
            for one in range(len(images)):
                branch[one] = linear[one] / linear[one].norm() * branch[one].norm()
        grad = weight * branch + pulled(block.shortcut, x, grad)
    return pulled(lambda x: relu(m.conv1(x)), images, grad)


@pytest.mark.parametrize(("layer", "first"), [(None, 2), ("layer1", 0), ("layer1.1", 1), ("layer2.1", 3)])
def test_residual_blocks(layer: str | None, first: int) -> None:
    model, images = net("cifar"), photos("cifar")
    linear = surrogate(model, LinearBackward(layer))
    expected = by_hand(model, images, first)
    torch.testing.assert_close(input_gradient(linear.logits, images), expected, rtol=1e-9, atol=1e-15)
    assert not torch.allclose(input_gradient(model, images), expected, rtol=1e-3)


@pytest.mark.parametrize("linear_first", [True, False])
def test_with_weaker_branches(linear_first: bool) -> None:
    model, images = net("cifar"), photos("cifar")
    surgeries = [LinearBackward(), SkipGradient(0.3)]
    first, second = surgeries if linear_first else surgeries[::-1]
    both = surrogate(surrogate(model, first), second)
    expected = by_hand(model, images, 2, weight=0.3)
    torch.testing.assert_close(input_gradient(both.logits, images), expected, rtol=1e-9, atol=1e-15)


def test_relus_of_a_plain_network() -> None:
    model: Any = net("plain")
    images = photos("plain")

    def forward(x: Tensor) -> Tensor:
        x = let_through(model.features["conv2"](relu(model.features["conv1"](x))))
        return model.head(x.mean((2, 3)))

    expected = input_gradient(forward, images)
    for layer in (None, "relu2"):
        linear = surrogate(model, LinearBackward(layer))
        torch.testing.assert_close(input_gradient(linear.logits, images), expected, rtol=1e-12, atol=1e-16)
    assert not torch.allclose(input_gradient(model, images), expected, rtol=1e-3)


@pytest.mark.parametrize("name", ["cifar", "before", "timm resnet18", "torchvision bottleneck", "densenet", "plain"])
def test_the_forward_pass_stays_the_same(name: str) -> None:
    model, images = net(name, torch.float32), photos(name, dtype=torch.float32)
    linear = surrogate(model, LinearBackward())
    assert torch.equal(linear.logits(images), model(images))
    assert torch.equal(linear.logits(images.clone().requires_grad_()), model(images))
    gradient = input_gradient(linear.logits, images)
    assert gradient.isfinite().all()
    assert not torch.allclose(gradient, input_gradient(model, images))


def test_the_papers_layer_is_the_middle_of_a_resnet50() -> None:
    with torch.device("meta"):
        blocks = [block.name for block in conv_blocks(timm.create_model("resnet50"))]
    assert blocks[len(blocks) // 2] == "layer3.1"


def test_nothing_of_a_pass_is_kept() -> None:
    model = net("cifar")
    kept: list[weakref.ref[Tensor]] = []
    gc.disable()
    try:
        with model.layer2[1].bn2.register_forward_hook(lambda module, inputs, output: kept.append(weakref.ref(output))):
            input_gradient(surrogate(model, LinearBackward()).logits, photos("cifar"))
    finally:
        gc.enable()
    assert len(kept) == 1
    assert kept[0]() is None


def test_layers_and_models_that_are_not_known() -> None:
    with pytest.raises(ValueError, match=r"layer: got 'layer9' .*; allowed are layer1.0, layer1.1, layer2.0, layer2.1"):
        surrogate(net("cifar"), LinearBackward("layer9"))
    with pytest.raises(ValueError, match="source: VisionTransformer has no ReLU that is known; allowed are"):
        surrogate(net("vit"), LinearBackward())
    with pytest.raises(ValueError, match="source: has had LinearBackward already"):
        surrogate(surrogate(net("cifar"), LinearBackward()), LinearBackward("layer1"))
    model = nn.Sequential(net("cifar"))
    model[0].grad_checkpointing = True
    with pytest.raises(ValueError, match="source: 0 checkpoints its gradients; allowed with LinearBackward"):
        surrogate(model, LinearBackward())
