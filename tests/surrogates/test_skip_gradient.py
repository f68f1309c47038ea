"""The skip gradient against forward passes in which a branch f is written gamma f + (1 - gamma) f, the latter fixed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from alignfast.models import Classifier, fingerprint
from alignfast.surrogates import SkipGradient, surrogate
from tests.surrogates.nets import NETS, input_gradient, net, photos

GAMMA = 0.3


def weakened(branch: Tensor) -> Tensor:
    return GAMMA * branch + (1 - GAMMA) * branch.detach()


def cifar(m: Any, x: Tensor) -> Tensor:
    x = relu(m.conv1(x))
    for block in [*m.layer1, *m.layer2]:
        branch = block.bn2(block.conv2(relu(block.bn1(block.conv1(x)))))
        x = relu(weakened(branch) + block.shortcut(x))
    return m.linear(x.mean((2, 3)))


def before(m: Any, x: Tensor) -> Tensor:
    x = m[0](x)
    for block in m[1:3]:
        branch = block.conv2(relu(block.bn2(block.conv1(relu(block.bn1(x))))))
        x = weakened(branch) + block.shortcut(x)
    return m[4](x.flatten(1))


def around(block: Any, x: Tensor) -> Tensor:
    return x if block.downsample is None else block.downsample(x)


def resnet18(m: Any, x: Tensor) -> Tensor:
    x = m.maxpool(relu(m.bn1(m.conv1(x))))
    for block in [*m.layer1, *m.layer2, *m.layer3, *m.layer4]:
        branch = block.bn2(block.conv2(relu(block.bn1(block.conv1(x)))))
        x = relu(weakened(branch) + around(block, x))
    return m.fc(x.mean((2, 3)))


def bottleneck(m: Any, x: Tensor) -> Tensor:
    x = m.maxpool(relu(m.bn1(m.conv1(x))))
    for block in [*m.layer1, *m.layer2, *m.layer3, *m.layer4]:
        inner = relu(block.bn2(block.conv2(relu(block.bn1(block.conv1(x))))))
        x = relu(weakened(block.bn3(block.conv3(inner))) + around(block, x))
    return m.fc(x.mean((2, 3)))


def densenet(m: Any, x: Tensor) -> Tensor:
    f = m.features
    x = f.pool0(f.norm0(f.conv0(x)))
    for block, after in ((f.denseblock1, f.transition1), (f.denseblock2, f.norm5)):
        for layer in block.values():
            x = torch.cat([x, weakened(layer.conv2(layer.norm2(layer.conv1(layer.norm1(x)))))], 1)
        x = after(x)
    return m.classifier(x.mean((2, 3)))


def vit(m: Any, x: Tensor) -> Tensor:
    x = m.patch_embed(x)
    x = torch.cat([m.cls_token.expand(len(x), -1, -1), x], 1) + m.pos_embed
    for block in m.blocks:
        x = x + weakened(block.ls1(block.attn(block.norm1(x))))
        x = x + weakened(block.ls2(block.mlp(block.norm2(x))))
    return m.head(m.norm(x)[:, 0])


FORWARDS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "cifar": cifar,
    "before": before,
    "timm resnet18": resnet18,
    "torchvision bottleneck": bottleneck,
    "densenet": densenet,
    "vit": vit,
}


@pytest.mark.parametrize("name", FORWARDS)
def test_gradients(name: str) -> None:
    model, images = net(name), photos(name)
    weak = surrogate(model, SkipGradient(GAMMA))
    expected = input_gradient(lambda x: FORWARDS[name](model, x), images)
    torch.testing.assert_close(input_gradient(weak.logits, images), expected, rtol=1e-9, atol=1e-15)
    assert not torch.allclose(input_gradient(model, images), expected, rtol=1e-3)


@pytest.mark.parametrize("name", FORWARDS)
def test_the_forward_pass_stays_the_same(name: str) -> None:
    model, images = net(name, torch.float32), photos(name, dtype=torch.float32)
    weak = surrogate(model, SkipGradient(GAMMA))
    assert torch.equal(weak.logits(images), model(images))
    assert torch.equal(weak.logits(images.clone().requires_grad_()), model(images))


def test_a_full_gradient_is_the_models_own() -> None:
    model, images = net("cifar"), photos("cifar")
    assert torch.equal(
        input_gradient(surrogate(model, SkipGradient(1.0)).logits, images), input_gradient(model, images)
    )


@pytest.mark.parametrize("name", sorted(NETS.keys() - FORWARDS.keys()))
def test_networks_without_branches_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"source: \w+ has no residual branch that is known; allowed are residual"):
        surrogate(net(name), SkipGradient())


@pytest.mark.parametrize("gamma", [-0.1, 1.1, float("nan"), "half", None])
def test_gamma_is_checked(gamma: Any) -> None:
    with pytest.raises(ValueError, match="gamma: got"):
        SkipGradient(gamma)


def test_the_fingerprint_and_numbers_are_those_of_the_source() -> None:
    source = Classifier(net("cifar"), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), 5, (3, 8, 8))
    weak = surrogate(source, SkipGradient())
    assert isinstance(weak.module, nn.Module)
    assert fingerprint(weak) == fingerprint(source)
    assert weak.module is source.module
    assert (weak.num_classes, weak.input_size) == (5, (3, 8, 8))
    assert weak.state_dict().keys() == source.state_dict().keys()
