from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from alignfast.attacks import create
from alignfast.models import Classifier, Ensemble, preparation, prepare
from tests import cases

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def model(seed: int = 0) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 5)
        )
        return Classifier(layers, MEAN, STD, 5).eval()


def images(count: int = 6) -> Tensor:
    return cases.random((count, 3, 8, 8), 1, torch.float32)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_copy_computes_in_its_precision_and_the_model_stays(precision: Any) -> None:
    source = model().train()
    before = copy.deepcopy(source.state_dict())
    prepared = prepare(source, images(), precision)
    assert source.training
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in source.parameters())
    assert all(torch.equal(source.state_dict()[name], value) for name, value in before.items())
    assert not any(parameter.requires_grad for parameter in prepared.parameters())
    assert not prepared.training
    wanted = HALVES.get(precision, torch.float32)
    assert {parameter.dtype for parameter in prepared.parameters()} == {wanted}
    with torch.no_grad():
        logits, exact = prepared(images()), source.eval()(images())
    assert logits.dtype == torch.float32
    if precision == "fp32":
        assert torch.equal(logits, exact)
    else:
        assert not torch.equal(logits, exact)
        torch.testing.assert_close(logits, exact, rtol=0, atol=16 * torch.finfo(wanted).eps)


def test_members_of_an_ensemble_are_prepared_each() -> None:
    prepared = prepare(Ensemble([model(0), model(1)], "losses"), images(), "bf16")
    assert [member.dtype for member in prepared.members] == [torch.bfloat16] * 2
    assert {parameter.dtype for parameter in prepared.parameters()} == {torch.bfloat16}


def test_auto_takes_the_fastest_faithful_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "_computes_bf16", lambda device: True)
    seconds = {torch.float32: 2.0, torch.bfloat16: 1.0}
    monkeypatch.setattr(preparation, "_seconds", lambda prepared, images: seconds[prepared.dtype])
    assert prepare(model(), images()).dtype == torch.bfloat16
    seconds[torch.bfloat16] = 3.0
    assert prepare(model(), images()).dtype == torch.float32
    seconds[torch.bfloat16] = 1.0
    monkeypatch.setattr(preparation, "FAITHFUL", 0.99999999)
    assert prepare(model(), images()).dtype == torch.float32
    monkeypatch.undo()
    monkeypatch.setattr(preparation, "_computes_bf16", lambda device: False)
    assert prepare(model(), images()).dtype == torch.float32


class Confident(nn.Module):
    """A linear network whose predictions leave gradients that float16 does not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(192, 4)
        with torch.no_grad():
            self.layer.weight.copy_(cases.normal((4, 192), 3, torch.float32) / 16)
            self.layer.bias.copy_(torch.tensor([20.0, 0.0, 0.0, 0.0]))

    def forward(self, rows: Tensor) -> Tensor:
        logits: Tensor = self.layer(rows.flatten(1))
        return logits


def gradient_of(source: Classifier, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    loss = cross_entropy(source.logits(leaf), torch.zeros(len(x), dtype=torch.int64), reduction="sum")
    (grad,) = torch.autograd.grad(loss, leaf)
    return grad


def test_gradients_too_small_for_float16_are_scaled_image_by_image() -> None:
    source, x = Classifier(Confident(), MEAN, STD, 4), images()
    prepared = prepare(source, x, "fp16")
    exact = gradient_of(source, x)
    # Without a scale nothing is left of them.
    assert not gradient_of(prepared, x).any()
    labels = torch.zeros(len(x), dtype=torch.int64)
    ours, wanted = (create("bim", one, eps=0.1, alpha=0.05, steps=1)(x, labels) - x for one in (prepared, source))
    sure = exact.abs() > exact.abs().amax((1, 2, 3), keepdim=True) / 100
    assert torch.equal(ours.sign()[sure], wanted.sign()[sure])
    assert cosine_similarity(ours.flatten(1), wanted.flatten(1)).min() > 0.98


class Exploding(nn.Module):
    """The identity, with a gradient beyond float16."""

    def forward(self, rows: Tensor) -> Tensor:
        flat = rows.flatten(1)[:, :4]
        return flat + (flat - flat.detach()) * 60000 * 60000


def test_what_overflows_moves_nothing_and_is_no_nan() -> None:
    x, labels = images(), torch.zeros(6, dtype=torch.int64)
    source = Classifier(Exploding(), num_classes=4)
    assert not torch.equal(create("mifgsm", source)(x, labels), x)
    assert torch.equal(create("mifgsm", prepare(source, x, "fp16"))(x, labels), x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((images(), "fp8"), "precision: got 'fp8'"),
        ((images() * 255, "fp32"), r"images: values span .*; allowed is \[0, 1\]"),
        ((images()[:, :2], "fp32"), r"images: got shape \[6, 2, 8, 8\]"),
        ((images()[..., :7], "fp32"), "precision: got 'fp32', in which the model does not run on cpu"),
    ],
)
def test_bad_input(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(model(), *arguments)
