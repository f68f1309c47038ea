from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from alignfast.alignment.training_kernels import TRAINED, trained_by_kernels
from tests.alignment import test_align as plain

WIDTH, CLASSES = 24, 5


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, WIDTH, 3, padding=1, bias=False),
            BatchNormAct2d(WIDTH, act_layer=nn.ReLU6, act_kwargs={"inplace": True}),
            nn.Conv2d(WIDTH, WIDTH, 5, 2, padding=2, groups=WIDTH, bias=False),
            nn.BatchNorm2d(WIDTH),
            nn.ReLU(),
            Conv2dSame(WIDTH, WIDTH, 3, 2, groups=WIDTH, bias=False),
            BatchNormAct2d(WIDTH, act_layer=nn.SiLU),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(WIDTH, CLASSES),
        ).to(memory_format=torch.channels_last)


def images(count: int = 4, side: int = 18) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module, shown: Tensor, *, kernels: bool, half: bool) -> dict[str, Tensor]:
    """The logits, gradients and buffers behind one pass of a copy in training mode."""
    model = copy.deepcopy(model).train()
    with trained_by_kernels(model, half=half) if kernels else nullcontext():
        with torch.autocast("cpu", torch.bfloat16, half):
            logits = model(shown.contiguous(memory_format=torch.channels_last))
        (logits * torch.linspace(-1, 1, CLASSES)).sum().backward()
    found = {"logits": logits.detach()} | dict(model.named_buffers())
    return found | {f"grad of {name}": value.grad for name, value in model.named_parameters() if value.grad is not None}


def distances(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == wanted.keys()
    return {
        name: float((found[name].double() - value).norm() / (value.double().norm() + 1e-3))
        for name, value in wanted.items()
    }


@pytest.mark.parametrize(("half", "most"), [(False, 1e-3), (True, 0.4)])
def test_passes_gradients_and_running_statistics_are_as_near_to_float64_as_those_of_torch(
    half: bool, most: float
) -> None:
    model = network()
    wanted = trained(copy.deepcopy(model).double(), images().double(), kernels=False, half=False)
    found, theirs = (
        distances(trained(model, images(), kernels=kernels, half=half), wanted) for kernels in (True, False)
    )
    assert len(found) > 15
    assert max(found.values()) < most
    assert sum(found.values()) < 4 * sum(theirs.values())


@pytest.mark.parametrize("half", [False, True])
def test_the_layers_that_are_slow_in_torch_are_served(half: bool) -> None:
    model = network()
    kinds = [type(part) for part in model]
    parameters = [id(value) for value in model.parameters()]
    with trained_by_kernels(model, half=half):
        served = [index for index, part in enumerate(model) if type(part) in TRAINED.values()]
        assert [id(value) for value in model.parameters()] == parameters
        assert all(isinstance(part, kind) for part, kind in zip(model, kinds, strict=True))
    assert served == ([1, 2, 3, 5, 6] if half else [1, 2, 3, 6])
    assert [type(part) for part in model] == kinds


def test_layers_are_as_before_behind_an_error() -> None:
    model = network()
    kinds = [type(part) for part in model]
    with pytest.raises(KeyError), trained_by_kernels(model, half=True):
        raise KeyError
    assert [type(part) for part in model] == kinds


def test_hooks_see_what_they_see_without_kernels() -> None:
    """On the rectifier inside of a normalisation, on the normalisation and on the convolution behind it."""
    seen: dict[bool, list[Tensor]] = {}
    for kernels in (False, True):
        model, kept = network().train(), seen.setdefault(kernels, [])

        def keep(part: nn.Module, inputs: Any, output: Tensor, kept: list[Tensor] = kept) -> None:
            kept.append(output.detach().clone())

        model[1].act.register_forward_pre_hook(lambda part, inputs, kept=kept: kept.append(inputs[0].detach().clone()))
        for part in (model[1].act, model[1], model[2]):
            part.register_forward_hook(keep)
        with trained_by_kernels(model, half=True) if kernels else nullcontext():
            model(images().contiguous(memory_format=torch.channels_last))
    assert len(seen[True]) == len(seen[False]) == 4
    assert float(seen[True][0].min()) < 0
    for found, wanted in zip(seen[True], seen[False], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(3, affine=False),
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.BatchNorm2d(3).double(),
        nn.BatchNorm1d(3),
    ],
    ids=["no weight", "no statistics", "float64", "flat"],
)
def test_normalisations_that_are_left_to_torch(norm: nn.Module) -> None:
    kind = type(norm)
    with trained_by_kernels(norm, half=True):
        assert type(norm) is kind


def test_frozen_statistics_stay_in_use() -> None:
    norm = nn.BatchNorm2d(3).eval()
    norm.running_mean.fill_(0.3)
    wanted = norm(images())
    with trained_by_kernels(norm, half=False):
        assert torch.equal(norm(images()), wanted)
    assert norm.num_batches_tracked == 0


def test_plain_means_of_statistics_are_left_to_torch() -> None:
    """As recalibration takes them, by a momentum of None for a while."""
    norm, other = nn.BatchNorm2d(3), nn.BatchNorm2d(3, momentum=None)
    with trained_by_kernels(norm, half=False):
        norm.momentum = None
        for seed in range(3):
            shown = images() + seed
            assert torch.equal(norm(shown), other(shown))
    torch.testing.assert_close(norm.state_dict(), other.state_dict())


@pytest.mark.parametrize("policy", ["freeze", "recalibrate"])
def test_policies_of_statistics_do_what_they_do_without_kernels(policy: str) -> None:
    found, wanted = (
        plain.align(
            plain.classifier(0),
            plain.classifier(1),
            plain.batches(),
            plain.config_of(channels_last=channels_last, batch_norm=policy),
        ).model.state_dict()
        for channels_last in (True, False)
    )
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


def test_one_value_a_channel_is_refused_as_torch_does() -> None:
    norm = nn.BatchNorm2d(3)
    with trained_by_kernels(norm, half=False), pytest.raises(ValueError, match="Expected more than 1 value"):
        norm(torch.rand(1, 3, 1, 1))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 5, groups=2),
        nn.Conv2d(4, 8, 5, groups=4),
        nn.Conv2d(4, 4, 5, groups=4, dilation=2),
        nn.Conv2d(4, 4, 5, groups=4, padding="same"),
        nn.Conv2d(4, 4, 5, groups=4, padding=2, padding_mode="reflect"),
        nn.Conv2d(4, 4, 33, groups=4),
    ],
    ids=["two channels a group", "two results a channel", "dilated", "named padding", "reflecting", "large"],
)
def test_convolutions_that_are_left_to_torch(layer: nn.Conv2d) -> None:
    with trained_by_kernels(layer, half=True):
        assert type(layer) is nn.Conv2d


def test_parametrized_weights_are_left_to_torch() -> None:
    layer = parametrizations.weight_norm(nn.Conv2d(4, 4, 5, groups=4))
    kind = type(layer)
    with trained_by_kernels(layer, half=True):
        assert type(layer) is kind


def test_twenty_steps_of_a_run_equal_the_plain_loop() -> None:
    source, witness = plain.classifier(0), plain.classifier(1)
    data = plain.batches()
    config = plain.config_of(channels_last=True)
    wanted, history = plain.plain_loop(source, [witness], data, config)
    result = plain.align(source, witness, data, config)
    assert [type(part) for part in result.model.modules()] == [type(part) for part in source.modules()]
    found = result.model.module.state_dict()
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)
    losses = [entry["loss"] for entry in result.history]
    assert losses == pytest.approx([entry["loss"] for entry in history], rel=1e-4)


@pytest.mark.slow
def test_it_compiles() -> None:
    model = network().train()
    with trained_by_kernels(model, half=False):
        eager = model(images())
        compiled = torch.compile(copy.deepcopy(model))(images())
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
