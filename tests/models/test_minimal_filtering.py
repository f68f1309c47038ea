from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from alignfast.models import minimal_filtering, prepare
from alignfast.models.minimal_filtering import FEWEST_TILES, is_minimal, is_served, use_minimal_filtering
from tests import cases
from tests.models.test_frozen import passes

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.skipif(not minimal_filtering.FUSED, reason="fused multiply-adds are computed in software"),
]

LAYERS: dict[str, Callable[[], nn.Conv2d]] = {
    "plain": lambda: nn.Conv2d(16, 20, 3, padding=1),
    "no bias": lambda: nn.Conv2d(20, 16, 3, bias=False),
    "unequal padding": lambda: nn.Conv2d(16, 16, 3, padding=(2, 0)),
    "same": lambda: Conv2dSame(16, 20, 3),
}


def features(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (FEWEST_TILES, 16, 6, 7)) -> Tensor:
    return cases.channels_last(cases.normal(shape, 1, dtype))


class Calls(TorchDispatchMode):
    """How often a kernel is called."""

    def __init__(self, op: Any = torch.ops.alignfast.winograd_conv2d) -> None:
        super().__init__()
        self.op = op.default
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is self.op
        return func(*args, **(kwargs or {}))


@contextmanager
def served(times: int, op: Any = torch.ops.alignfast.winograd_conv2d) -> Iterator[None]:
    with Calls(op) as calls:
        yield
    assert calls.count == times


def both(layer: nn.Conv2d) -> tuple[nn.Sequential, nn.Sequential]:
    """The layer frozen and channels-last, and the same by the kernel."""
    plain = nn.Sequential(layer).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    minimal = copy.deepcopy(plain)
    use_minimal_filtering(minimal)
    return plain, minimal


@pytest.mark.parametrize("name", LAYERS)
def test_passes_are_those_of_the_layer(name: str) -> None:
    plain, minimal = both(LAYERS[name]())
    x = features(shape=(FEWEST_TILES, plain[0].in_channels, 6, 7))
    wanted = passes(copy.deepcopy(plain).double(), x.double())
    # Forward, back, forward again for the second derivative of the gradient and back again.
    with served(4):
        found = passes(minimal, x)
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-5
        assert one.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("sides", [(1, 1), (4, 5), (7, 2)])
def test_padding_as_tensorflow_has_it_is_one_zero_all_around(sides: tuple[int, int]) -> None:
    plain, minimal = both(Conv2dSame(16, 16, 3))
    x = features(shape=(FEWEST_TILES, 16, *sides))
    with served(1):
        torch.testing.assert_close(minimal(x), plain(x), rtol=1e-4, atol=1e-5)


def test_the_layer_stays_what_it_is() -> None:
    plain, minimal = both(nn.Conv2d(16, 16, 3))
    assert isinstance(minimal[0], nn.Conv2d)
    assert type(minimal[0]) is not nn.Conv2d
    assert list(minimal.state_dict()) == list(plain.state_dict())
    assert str(minimal).replace("Minimal", "") == str(plain)


def test_nothing_is_kept_but_the_weight() -> None:
    _, minimal = both(nn.Conv2d(16, 16, 3))
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        minimal(features().requires_grad_())
    assert [one.data_ptr() for one in found] == [minimal[0].weight.data_ptr()]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(16, 16, 1),
        nn.Conv2d(16, 16, (3, 5)),
        nn.Conv2d(16, 16, 3, stride=(1, 2)),
        nn.Conv2d(16, 16, 3, dilation=2),
        nn.Conv2d(32, 32, 3, groups=2),
        nn.Conv2d(16, 16, 3, padding=3),
        nn.Conv2d(16, 16, 3, padding="same"),
        nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(15, 16, 3),
        nn.Conv2d(16, 15, 3),
        nn.Linear(16, 16),
    ],
    ids=str,
)
def test_other_layers_are_left_to_torch(layer: nn.Module) -> None:
    assert not is_minimal(layer)
    parts = nn.Sequential(layer).requires_grad_(False)
    use_minimal_filtering(parts)
    assert parts[0] is layer


def test_what_has_further_behaviour_is_left_alone() -> None:
    class Other(nn.Conv2d):
        pass

    hooked = nn.Conv2d(16, 16, 3)
    hooked.register_forward_hook(lambda module, inputs, output: output + 1)
    parametrized = nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 16, 3))
    parts = nn.Sequential(Other(16, 16, 3), hooked, parametrized).requires_grad_(False)
    parts.append(nn.Conv2d(16, 16, 3))
    before = list(parts)
    use_minimal_filtering(parts)
    assert all(one is other for one, other in zip(parts, before, strict=True))


def test_torch_serves_where_the_kernel_is_no_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, minimal = both(nn.Conv2d(16, 16, 3, padding=1))
    x = features()
    with served(1):
        minimal(x)
    few = x[: FEWEST_TILES // 4 - 1]
    with served(0):
        assert torch.equal(minimal(few), plain(few))
        assert torch.equal(minimal(x.contiguous()), plain(x.contiguous()))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(minimal(x), plain(x))
        with monkeypatch.context() as patch:
            patch.setattr(minimal_filtering, "FUSED", False)
            assert torch.equal(minimal(x), plain(x))
        assert torch.equal(minimal.bfloat16()(x.bfloat16()), plain.bfloat16()(x.bfloat16()))


def test_tiles_are_those_of_the_result() -> None:
    """6 x 7 pixels make 4 x 5 without padding and 8 x 9 with two zeros on each side, in 2 and 6 tiles."""
    assert is_served(features(shape=(FEWEST_TILES // 2, 16, 6, 7)), (0, 0))
    assert not is_served(features(shape=(FEWEST_TILES // 2 - 1, 16, 6, 7)), (0, 0))
    assert is_served(features(shape=(FEWEST_TILES // 6, 16, 6, 7)), (2, 2))
    assert not is_served(features(shape=(FEWEST_TILES // 6 - 1, 16, 6, 7)), (2, 2))


@pytest.mark.parametrize(("name", "side", "times"), [("resnet26", 64, 2), ("tf_efficientnetv2_b0", 64, 2)])
def test_a_prepared_network_has_it(name: str, side: int, times: int) -> None:
    """Forward and back, in the first stages, whose images are large enough."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=10).eval()
    images = cases.random((4, 3, side, side), 2, torch.float32).requires_grad_()
    double = images.detach().double().requires_grad_()
    prepared = prepare(model, images.detach(), "fp32")

    def gradient(module: nn.Module, leaf: Tensor) -> tuple[Tensor, Tensor]:
        logits = module(leaf)
        return logits, torch.autograd.grad(logits.pow(2).sum(), leaf)[0]

    with Calls() as calls:
        found = gradient(prepared, images)
    assert calls.count == 2 * times
    for one, other in zip(found, gradient(copy.deepcopy(model).double(), double), strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-4
    with served(0):
        gradient(prepare(model, images.detach(), "bf16"), images)


@pytest.mark.slow
def test_it_compiles() -> None:
    _, minimal = both(nn.Conv2d(16, 16, 3, padding=1))
    x = features()
    torch.testing.assert_close(torch.compile(minimal, fullgraph=True)(x), minimal(x))
