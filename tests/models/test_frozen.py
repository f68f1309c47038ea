from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks

from alignfast.models import frozen
from alignfast.models.frozen import FrozenConv2d, is_plain, keep_less, reclassed
from tests import cases

CONVOLUTIONS: dict[str, Callable[[], nn.Conv2d]] = {
    "plain": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "no bias": lambda: nn.Conv2d(4, 6, 1, bias=False),
    "strided": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "dilated": lambda: nn.Conv2d(4, 6, 3, dilation=2),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 4, 5, padding=2, groups=4),
    "oblong": lambda: nn.Conv2d(4, 6, (1, 3), stride=(2, 1), padding=(0, 1)),
    "same": lambda: Conv2dSame(4, 6, 3, stride=2),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


def rows(shape: tuple[int, ...] = (2, 4, 7, 9), layout: str = "contiguous") -> Tensor:
    return cases.normal(shape, 1, torch.float64).contiguous(memory_format=LAYOUTS[layout])


def both(module: nn.Module) -> tuple[nn.Sequential, nn.Sequential]:
    """The module in double precision, frozen, and the same with less kept."""
    plain = nn.Sequential(module.double().eval().requires_grad_(False))
    less = copy.deepcopy(plain)
    keep_less(less)
    return plain, less


def passes(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the gradient to the input, and the one of its square sum."""
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    output = module(leaf * 1)
    (grad,) = torch.autograd.grad(output.pow(3).sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(grad.pow(2).sum(), leaf)
    return output, grad, second


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_give_the_same_bits(name: str, layout: str) -> None:
    plain, less = both(CONVOLUTIONS[name]())
    assert type(less[0]) in (frozen.FrozenConv2d, frozen.FrozenConv2dSame)
    x = rows(layout=layout)
    for wanted, found in zip(passes(plain, x), passes(less, x), strict=True):
        assert torch.equal(wanted, found)
        assert wanted.stride() == found.stride()
    assert torch.equal(plain(x[:0]), less(x[:0]))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_gradients_of_convolutions(name: str) -> None:
    _, less = both(CONVOLUTIONS[name]())
    x = rows((2, 4, 5, 6)).requires_grad_()
    assert gradcheck(less, x)
    assert gradgradcheck(less, x)


def test_rectifiers_give_the_same_bits() -> None:
    plain, less = both(nn.ReLU6(inplace=True))
    assert isinstance(less[0], nn.ReLU6)
    x = 5 * rows()
    x.view(-1)[:3] = torch.tensor([0.0, 6.0, -0.0])
    for wanted, found in zip(passes(plain, x), passes(less, x), strict=True):
        assert torch.equal(wanted, found)


@pytest.mark.parametrize("shape", [(2, 4, 8, 10), (2, 4, 7, 9), (2, 4, 7, 8), (2, 4, 8, 7), (1, 4, 1, 1)])
@pytest.mark.parametrize(
    "make",
    [
        lambda: Conv2dSame(4, 8, 3, stride=2),
        lambda: Conv2dSame(4, 4, 3, stride=2, groups=4),
        lambda: Conv2dSame(4, 8, 5, stride=2, groups=4, bias=False),
        lambda: Conv2dSame(4, 4, 4, groups=4),
        lambda: Conv2dSame(4, 4, 2, groups=4, dilation=3),
    ],
    ids=["full", "depthwise", "wide", "even", "dilated"],
)
def test_padding_as_tensorflow_has_it(make: Callable[[], nn.Conv2d], shape: tuple[int, ...]) -> None:
    plain, less = both(make())
    for layout in LAYOUTS:
        for wanted, found in zip(passes(plain, rows(shape, layout)), passes(less, rows(shape, layout)), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def kept(module: nn.Module, x: Tensor) -> int:
    """Bytes of what the backward pass finds, besides weights."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in module.parameters()}
    found: dict[int, int] = {}
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in weights:
            found[place] = tensor.untyped_storage().nbytes()
            held.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x.clone().requires_grad_())
    return sum(found.values())


def test_a_network_keeps_less() -> None:
    network = timm.create_model("tf_efficientnet_lite0").eval().requires_grad_(False)
    less = copy.deepcopy(network)
    keep_less(less)
    x = cases.random((1, 3, 64, 64), 1, torch.float32)
    assert kept(less, x) < 0.75 * kept(network, x)
    assert torch.equal(less(x), network(x))
    assert list(less.state_dict()) == list(network.state_dict())
    assert [name for name, _ in less.named_modules()] == [name for name, _ in network.named_modules()]


def test_what_has_further_behaviour_is_left_alone() -> None:
    class Other(nn.Conv2d):
        pass

    hooked = nn.Conv2d(4, 4, 1)
    hooked.register_forward_hook(lambda module, inputs, output: output + 1)
    parametrized = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
    parts = nn.Sequential(
        Other(4, 4, 1), hooked, parametrized, nn.Conv2d(4, 4, 3, padding="same"), nn.ReLU6()
    ).requires_grad_(False)
    parts.append(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect").requires_grad_(False))
    parts.append(nn.Conv2d(4, 4, 1))
    before = [type(part) for part in parts]
    keep_less(parts)
    assert [type(part) for part in parts] == before


def test_another_class_for_the_same_object() -> None:
    layer = nn.Conv2d(4, 6, 3, padding=1).requires_grad_(False).eval()
    other = reclassed(FrozenConv2d, layer)
    assert type(layer) is nn.Conv2d
    assert type(other) is FrozenConv2d
    assert str(other) == str(layer).replace("Conv2d", "FrozenConv2d")
    assert other.weight is layer.weight
    assert not other.training
    # Hooks of the one are hooks of the other.
    assert is_plain(layer)
    with other.register_forward_hook(lambda *given: None):
        assert not is_plain(layer)
    assert is_plain(layer)
