"""Bare passes: the same computation on both sides, and that a wrong preparation is noticed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from alignfast.bench import networks, passes
from alignfast.bench.networks import CIFAR_RESNET20, classifier, input_gradient
from alignfast.bench.passes import PreparationRun
from alignfast.models import prepare

CPU = torch.device("cpu")
SHAPE = (2, 3, 32, 32)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(dtype: torch.dtype = torch.float32) -> PreparationRun:
    return PreparationRun("test_resnet", SHAPE, dtype, CPU)


@pytest.mark.filterwarnings("ignore:precision. cpu computes bf16 in software")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepared_and_loaded_agree(dtype: torch.dtype) -> None:
    sides, fault = run(dtype).prepare(compiled=False)
    assert fault is None
    ours, loaded = (call() for call in sides.values())
    assert list(sides) == ["ours", "as loaded"]
    assert (ours.dtype, loaded.dtype) == (dtype, torch.float32)


@pytest.mark.filterwarnings("ignore:precision. cpu computes bf16 in software")
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, "1%"), (torch.bfloat16, "10%")])
@pytest.mark.parametrize("value", [None, float("nan")])
def test_another_model_is_noticed(
    dtype: torch.dtype, allowed: str, value: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepared(model: Any, images: torch.Tensor, precision: Any) -> Any:
        made = prepare(model, images, precision)
        last = list(made.parameters())[-2]
        last.data = last.data.flip(0) if value is None else torch.full_like(last, value)
        return made

    monkeypatch.setattr(passes, "prepare", prepared)
    _, fault = run(dtype).prepare(compiled=False)
    assert fault is not None
    assert fault.startswith("ours: ")
    assert fault.endswith(f"of the gradient's signs are others than as loaded, allowed are {allowed}")


def test_the_input_is_the_batch_that_the_module_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Normalised, in the model's dtype and layout; nothing of that is part of a pass."""
    model = classifier("test_resnet", SHAPE[1:], CPU)
    model.memory_format = torch.channels_last
    images = torch.rand(SHAPE)
    labels = torch.tensor([3, 4])
    call = input_gradient(model, images, labels)
    monkeypatch.setattr(networks, "diversify", None)
    assert model.mean is not None
    assert model.std is not None
    batch = ((images - model.mean[:, None, None]) / model.std[:, None, None]).requires_grad_()
    loss = torch.nn.functional.cross_entropy(model.module(batch), labels, reduction="sum")
    (wanted,) = torch.autograd.grad(loss, batch)
    gradient = call()
    assert torch.allclose(gradient, wanted, atol=1e-6)
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_small_network_takes_small_images() -> None:
    model = classifier(CIFAR_RESNET20, (3, 32, 32), CPU)
    assert model(torch.rand(SHAPE)).shape == (2, 10)
    assert sum(isinstance(part, torch.nn.Conv2d) for part in model.modules()) == 19
    assert sum(parameter.numel() for parameter in model.parameters()) == 269_722
    assert not model.training
