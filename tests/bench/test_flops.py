"""Operations counted by hand, of layers of every kind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d
from torch.utils.flop_counter import FlopCounterMode

from alignfast import ops
from alignfast.bench.flops import CORRECTED, count_flops
from alignfast.bench.networks import CIFAR_RESNET20, flops_of

# 2 images of 8 channels and 6 x 6 pixels. A 3 x 3 convolution with margins has 36 places in each, at stride 2 only 9.
IMAGES = (2, 8, 6, 6)
LAYERS = {
    "plain": (nn.Conv2d(8, 4, 3, padding=1, bias=False), 2 * 2 * 36 * 4 * 8 * 9),
    "strided": (nn.Conv2d(8, 4, 3, stride=2, padding=1), 2 * 2 * 9 * 4 * 8 * 9),
    # A weight is that of one group.
    "grouped": (nn.Conv2d(8, 4, 3, padding=1, groups=2), 2 * 2 * 36 * 4 * 4 * 9),
    "depthwise": (nn.Conv2d(8, 8, 3, padding=1, groups=8), 2 * 2 * 36 * 8 * 1 * 9),
    "depthwise, two each": (nn.Conv2d(8, 16, 3, padding=1, groups=8), 2 * 2 * 36 * 16 * 1 * 9),
    # Every pixel that goes in meets every weight of its group.
    "transposed": (nn.ConvTranspose2d(8, 4, 3, groups=2), 2 * 2 * 36 * 8 * 2 * 9),
    "linear": (nn.Linear(6, 5), 2 * 2 * 8 * 6 * 6 * 5),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_gradient_takes_as_many_operations_as_the_forward_pass(name: str, device: str) -> None:
    layer, forward = LAYERS[name]
    images = torch.zeros(IMAGES, device=device)
    for kind, times in {"forward": 1, "input gradient": 2, "training": 2}.items():
        assert count_flops(layer.to(device), images, kind) == times * forward, kind


def test_both_gradients_are_counted_in_the_middle_of_a_network() -> None:
    """Training needs the gradients of a depthwise layer's weights and of its input, for the layer before."""
    first, second = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
    before, depthwise = 2 * 2 * 36 * 8 * 8, 2 * 2 * 36 * 8 * 9
    network = nn.Sequential(first, second)
    images = torch.zeros(IMAGES)
    assert count_flops(network, images, "training") == 2 * before + 3 * depthwise
    assert count_flops(network, images, "input gradient") == 2 * (before + depthwise)


@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 0)])
@pytest.mark.parametrize("leaves", ["", "images", "weight", "images weight"])
def test_the_depthwise_op_counts_as_the_grouped_convolution(leaves: str, stride: int, padding: int) -> None:
    """By torch's own counter, the forward pass by torch's own formula."""

    def counted(run: Callable[[Tensor, Tensor], Tensor]) -> int:
        images, weight = torch.zeros(IMAGES), torch.zeros(8, 1, 3, 3)
        for name, tensor in (("images", images), ("weight", weight)):
            tensor.requires_grad_(name in leaves)
        with FlopCounterMode(display=False, custom_mapping=CORRECTED) as counter:
            result = run(images, weight)
            if leaves:
                result.sum().backward()
        flops: int = counter.get_total_flops()
        return flops

    strides, around = (stride, stride), (padding,) * 4
    wanted = counted(lambda images, weight: conv2d(images, weight, None, stride, padding, groups=8))
    assert wanted == (1 + len(leaves.split())) * 2 * 2 * {1: 36, 2: 4}[stride] * 8 * 9
    assert counted(lambda *given: ops.depthwise_conv2d(*given, stride=strides, padding=around)) == wanted


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("gradient", [False, True])
def test_an_inverted_residual_counts_as_its_convolutions(stride: int, gradient: bool) -> None:
    """48 channels between are a whole block."""
    expand, depthwise, project = torch.zeros(48, 8, 1, 1), torch.zeros(48, 1, 3, 3), torch.zeros(5, 48, 1, 1)
    packed = ops.PackedResidual.of(expand, None, depthwise, None, project, None)
    images = torch.zeros(IMAGES, requires_grad=gradient)
    with FlopCounterMode(display=False, custom_mapping=CORRECTED) as counter:
        result = ops.inverted_residual(images, packed, stride=(stride, stride), padding=(1, 1, 1, 1))
        if gradient:
            result.sum().backward()
    places = {1: 36, 2: 9}[stride]
    wanted = 2 * 2 * (36 * 8 * 48 + places * 48 * 9 + places * 48 * 5)
    assert counter.get_total_flops() == (1 + gradient) * wanted


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("gradient", [False, True])
def test_minimal_filtering_counts_as_the_plain_convolution(gradient: bool, padding: int) -> None:
    images, weight = torch.zeros(IMAGES, requires_grad=gradient), torch.zeros(5, 8, 3, 3)
    with FlopCounterMode(display=False, custom_mapping=CORRECTED) as counter:
        result = ops.winograd_conv2d(images, weight, padding=(padding, padding))
        if gradient:
            result.sum().backward()
    assert counter.get_total_flops() == (1 + gradient) * 2 * 2 * {0: 16, 1: 36}[padding] * 5 * 8 * 9


@pytest.mark.parametrize("gradient", [False, True])
def test_a_basic_block_counts_as_its_convolutions(gradient: bool) -> None:
    images, first, second = (
        torch.zeros(IMAGES, requires_grad=gradient),
        torch.zeros(5, 8, 3, 3),
        torch.zeros(8, 5, 3, 3),
    )
    with FlopCounterMode(display=False, custom_mapping=CORRECTED) as counter:
        result = ops.basic_block(images, first, None, second, None)
        if gradient:
            result.sum().backward()
    assert counter.get_total_flops() == (1 + gradient) * 2 * 2 * 2 * 36 * 5 * 8 * 9


@pytest.mark.parametrize("gradient", [False, True])
def test_attention_counts_as_its_products(gradient: bool) -> None:
    packed = torch.zeros(2, 7, 3, 5, 4, requires_grad=gradient)
    with FlopCounterMode(display=False) as counter:
        result = ops.attention(packed)
        if gradient:
            result.sum().backward()
    assert counter.get_total_flops() == (1 + 2 * gradient) * 2 * (2 * 2 * 5 * 7 * 7 * 4)


def test_training_of_a_network_with_depthwise_layers_is_three_forward_passes() -> None:
    """Less the gradient of the images, which is that of the first layer's input."""
    forward, trained = (flops_of("tf_efficientnet_lite0", (3, 64, 64), kind) for kind in ("forward", "training"))
    assert 2.9 * forward < trained < 3 * forward


def test_the_small_network_is_he_et_als() -> None:
    """40.8 million multiply-adds, as its authors' successors count them."""
    assert flops_of(CIFAR_RESNET20, (3, 32, 32), "forward") == pytest.approx(2 * 40.55e6, rel=2e-3)
