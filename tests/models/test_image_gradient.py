from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from alignfast.models import frozen
from alignfast.models.frozen import keep_less
from alignfast.models.image_gradient import image_gradient
from tests import cases

pytestmark = pytest.mark.cpu_only

# Outputs, kernel, stride, padding, and sides of the images.
BLOCKS: dict[str, Any] = {
    "resnet": (8, 7, 2, 3, (32, 32)),
    "odd sides": (8, 7, 2, 3, (31, 27)),
    "one more row than kernels reach": (5, 5, 3, 0, (33, 12)),
    "alexnet": (6, 11, 4, 2, (39, 41)),
    "no padding": (3, 4, 2, 0, (16, 9)),
    "much padding": (3, 5, 3, 4, (7, 8)),
    "oblong": (4, (5, 4), (3, 2), (1, 2), (17, 10)),
    "one output": (1, 6, 2, 1, (6, 6)),
}
PATCHES: dict[str, Any] = {
    "patches": (12, 4, 4, 0, (16, 24)),
    "left over": (12, 4, 4, 0, (19, 18)),
    "oblong patches": (5, (2, 3), (2, 3), 0, (8, 9)),
    "pixels": (5, 1, 1, 0, (3, 2)),
    "the whole image": (7, 6, 6, 0, (6, 6)),
}
LEFT: dict[str, Any] = {
    "overlap at stride 1": (4, 3, 1, 1, (8, 8)),
    "mostly zeros": (4, 3, 2, 1, (8, 8)),
    "gaps": (4, 1, 2, 0, (8, 8)),
}


def pair(value: Any) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def given(case: Any, dtype: torch.dtype, layout: Any = cases.channels_last, channels: int = 3) -> tuple[Any, ...]:
    """The arguments of image_gradient."""
    outputs, kernel, stride, padding, sides = case
    stride, padding = pair(stride), pair(padding)
    images = cases.normal((2, channels, *sides), 1, dtype)
    weight = layout(cases.normal((outputs, channels, *pair(kernel)), 2, dtype))
    result = torch.conv2d(images, weight, None, stride, padding)
    grad = layout(cases.normal(tuple(result.shape), 3, dtype))
    return grad, weight, images.shape, stride, padding


def by_torch(grad: Tensor, weight: Tensor, size: Any, stride: Any, padding: Any) -> Tensor:
    return torch.nn.grad.conv2d_input(size, weight.double(), grad.double(), stride, padding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [cases.contiguous, cases.channels_last])
@pytest.mark.parametrize("name", BLOCKS | PATCHES)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_it_is_the_gradient_of_the_convolution(name: str, layout: Any, dtype: torch.dtype, channels: int) -> None:
    arguments = given((BLOCKS | PATCHES)[name], dtype, layout, channels)
    found, wanted = image_gradient(*arguments), by_torch(*arguments)
    assert found is not None
    assert (found.shape, found.dtype) == (wanted.shape, dtype)
    error = float((found.double() - wanted).norm() / wanted.norm())
    assert error < {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_to_torch(name: str) -> None:
    assert image_gradient(*given(LEFT[name], torch.float32)) is None


def test_many_channels_float64_and_empty_batches_are_left_to_torch() -> None:
    assert image_gradient(*given(BLOCKS["resnet"], torch.float32, channels=16)) is None
    assert image_gradient(*given(BLOCKS["resnet"], torch.float64)) is None
    grad, weight, size, *settings = given(BLOCKS["resnet"], torch.float32)
    assert image_gradient(grad[:0], weight, (0, *size[1:]), *settings) is None


@pytest.mark.parametrize("name", BLOCKS | PATCHES | LEFT)
def test_frozen_convolutions_use_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, kernel, stride, padding, sides = (BLOCKS | PATCHES | LEFT)[name]
    plain = nn.Sequential(nn.Conv2d(3, outputs, kernel, stride, padding)).eval().requires_grad_(False)
    less = nn.Sequential(*plain)
    keep_less(less)
    asked = []

    def watched(*arguments: Any) -> Tensor | None:
        asked.append(image_gradient(*arguments))
        return asked[-1]

    monkeypatch.setattr(frozen, "image_gradient", watched)
    images = cases.normal((2, 3, *sides), 4, torch.float32).requires_grad_()
    wanted, found = (torch.autograd.grad(one(images).pow(2).sum(), images)[0] for one in (plain, less))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert [one is None for one in asked] == [name in LEFT]


def test_second_derivatives() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3)).eval().requires_grad_(False)
    less = nn.Sequential(*plain)
    keep_less(less)
    images = cases.normal((1, 3, 16, 16), 4, torch.float32).requires_grad_()
    seconds = []
    for module in (plain, less):
        (first,) = torch.autograd.grad(module(images).pow(3).sum(), images, create_graph=True)
        seconds.append(torch.autograd.grad(first.pow(2).sum(), images)[0])
    torch.testing.assert_close(*seconds)


@pytest.mark.parametrize("groups", [3, 1])
def test_groups_and_dilation_are_left_to_torch(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    less = nn.Sequential(nn.Conv2d(3, 6, 4, 2, groups=groups, dilation=1 if groups > 1 else 2)).requires_grad_(False)
    keep_less(less)
    monkeypatch.setattr(frozen, "image_gradient", None)
    images = cases.normal((1, 3, 16, 16), 4, torch.float32).requires_grad_()
    less(images).sum().backward()
    assert images.grad is not None


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_the_first_layers_of_models_are_served(name: str) -> None:
    network = timm.create_model(name)
    first = next(part for part in network.modules() if isinstance(part, nn.Conv2d))
    sides = (64, 64)
    case = (first.out_channels, first.kernel_size, first.stride, first.padding, sides)
    assert image_gradient(*given(case, torch.float32)) is not None
