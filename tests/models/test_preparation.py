from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from alignfast.attacks import create
from alignfast.models import Classifier, Ensemble, preparation, prepare
from alignfast.models.preparation import Form
from alignfast.surrogates import Surrogate
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


@pytest.fixture(autouse=True)
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "_CHOSEN", {})


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_copy_computes_in_its_precision_and_the_model_stays(precision: Any) -> None:
    source = model().train()
    before = copy.deepcopy(source.state_dict())
    prepared = prepare(source, images(), precision)
    assert source.training
    assert source.preparation is None
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in source.parameters())
    assert all(torch.equal(source.state_dict()[name], value) for name, value in before.items())
    assert not any(parameter.requires_grad for parameter in prepared.parameters())
    assert not prepared.training
    wanted = HALVES.get(precision, torch.float32)
    assert {parameter.dtype for parameter in prepared.parameters()} == {wanted}
    with torch.no_grad():
        logits, exact = prepared(images()), source.eval()(images())
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, exact, rtol=0, atol=16 * torch.finfo(wanted).eps)


def test_batch_norms_are_folded_and_convolutions_laid_out() -> None:
    source = Classifier(timm.create_model("resnet18", num_classes=5), MEAN, STD, 5).eval()
    x = cases.random((2, 3, 32, 32), 1, torch.float32)
    prepared = prepare(source, x, "fp32")
    assert not any(isinstance(part, nn.BatchNorm2d) for part in prepared.modules())
    convolutions = [part for part in prepared.modules() if isinstance(part, nn.Conv2d)]
    assert all(one.weight.is_contiguous(memory_format=torch.channels_last) for one in convolutions)
    assert prepared.memory_format == torch.channels_last
    torch.testing.assert_close(prepared(x), source(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient_of(prepared, x), gradient_of(source, x), rtol=1e-3, atol=1e-6)
    assert str(prepared.preparation) == "fp32, channels-last"


def test_what_changes_when_folded_is_left_with_a_warning() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model().module

        def forward(self, rows: Tensor) -> Tensor:
            logits: Tensor = self.body(rows) * self.body[0].weight.abs().mean()
            return logits

    source = Classifier(Reader(), MEAN, STD, 5).eval()
    source.module.body[1].weight.data.mul_(3)
    with pytest.warns(RuntimeWarning, match="batch normalisation is not folded"):
        prepared = prepare(source, images(), "fp32")
    assert any(isinstance(part, nn.BatchNorm2d) for part in prepared.modules())
    torch.testing.assert_close(prepared(images()), source(images()))


def test_what_is_chosen_does_not_depend_on_time_where_the_precision_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "_seconds", None)
    assert prepare(model(), images(), "fp32").preparation == preparation.Preparation(Form(torch.float32))


def test_transformers_keep_their_layout_and_both_attentions_are_tried() -> None:
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5, depth=2)
    source, x = Classifier(network, MEAN, STD, 5).eval(), cases.random((2, 3, 32, 32), 1, torch.float32)
    named = prepare(source, x, "fp32")
    assert named.preparation is not None
    assert named.preparation.form == Form(torch.float32, fused_attention=True)
    prepared = prepare(source, x)
    assert prepared.preparation is not None
    tried = {trial.form.fused_attention for trial in prepared.preparation.trials}
    assert tried == {True, False}
    assert network.blocks[0].attn.fused_attn
    for form in (Form(torch.float32, fused_attention=fused) for fused in (True, False)):
        other = preparation.shaped(named, form, preparation.Fusions())
        assert other.module.blocks[0].attn.fused_attn is form.fused_attention
        torch.testing.assert_close(other(x), source(x), rtol=1e-4, atol=1e-5)


def test_a_compiled_form_gives_the_same() -> None:
    source = model()
    prepared = prepare(source, images(), "fp32", compiled=True)
    assert prepared.preparation is not None
    assert prepared.preparation.form.compiled
    torch.testing.assert_close(gradient_of(prepared, images()), gradient_of(source, images()), rtol=1e-3, atol=1e-6)
    assert [form.compiled for form in preparation._forms(source, [torch.float32], True)] == [False, True]


def test_surgeries_are_kept_and_their_layers_too() -> None:
    # timm's starts with residual branches that add nothing.
    source = Classifier(torchvision.models.resnet18(num_classes=5), MEAN, STD, 5).eval()
    x, labels = cases.random((2, 3, 32, 32), 1, torch.float32), torch.tensor([0, 1])
    operated = create("sgm", source, steps=2).source
    assert isinstance(operated, Surrogate)
    prepared = prepare(operated, x, "fp32")
    assert isinstance(prepared, Surrogate)
    wanted, found = gradient_of(operated, x), gradient_of(prepared, x)
    assert cosine_similarity(wanted.flatten(1), gradient_of(source, x).flatten(1)).max() < 0.99
    assert cosine_similarity(wanted.flatten(1), found.flatten(1)).min() > 0.9999
    ours, theirs = (create("sgm", one, steps=2)(x, labels) for one in (prepare(source, x, "fp32"), source))
    assert (ours != theirs).float().mean() < 0.02


def test_members_of_an_ensemble_are_prepared_each() -> None:
    prepared = prepare(Ensemble([model(0), model(1)], "losses"), images(), "bf16")
    assert [member.dtype for member in prepared.members] == [torch.bfloat16] * 2
    assert {parameter.dtype for parameter in prepared.parameters()} == {torch.bfloat16}
    assert not prepared.training
    assert isinstance(prepared, Ensemble)
    assert prepared.combine == "losses"
    assert str(prepared.preparation) == "bf16, contiguous\nbf16, contiguous"


def two_halves(monkeypatch: pytest.MonkeyPatch, seconds: dict[torch.dtype, float]) -> None:
    monkeypatch.setattr(preparation, "in_hardware", lambda dtype, device: True)
    monkeypatch.setattr(preparation, "_seconds", lambda prepared, images: seconds[prepared.dtype])


def test_auto_takes_the_fastest_faithful_form_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {torch.float32: 2.0, torch.bfloat16: 1.0}
    two_halves(monkeypatch, seconds)
    prepared = prepare(model(), images())
    assert prepared.dtype == torch.bfloat16
    told = str(prepared.preparation).splitlines()
    assert told[0] == "bf16, contiguous, the fastest faithful of:"
    assert told[1].startswith("  fp32, contiguous: 2000 ms, cosine to fp32 1.0000")
    assert told[2].startswith("  bf16, contiguous: 1000 ms, cosine to fp32 0.99")


def test_auto_takes_float32_where_it_is_faster_or_alone_is_faithful(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {torch.float32: 2.0, torch.bfloat16: 3.0}
    two_halves(monkeypatch, seconds)
    assert prepare(model(0), images()).dtype == torch.float32
    seconds[torch.bfloat16] = 1.0
    monkeypatch.setattr(preparation, "FAITHFUL", 0.99999999)
    prepared = prepare(model(1), images())
    assert prepared.dtype == torch.float32
    assert "below 0.99999999, so not taken" in str(prepared.preparation)


def test_auto_tries_what_the_device_computesin_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "in_hardware", lambda dtype, device: dtype == torch.float32)
    prepared = prepare(model(), images())
    assert prepared.preparation is not None
    assert [trial.form.dtype for trial in prepared.preparation.trials] == [torch.float32]


def test_auto_remembers_its_choice_for_the_same_weights_and_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(model(), images())
    measured: list[None] = []
    measure = preparation._measured
    monkeypatch.setattr(preparation, "_measured", lambda *given: measured.append(None) or measure(*given))
    again = prepare(model(), images())
    assert again.preparation == first.preparation
    assert not measured
    torch.testing.assert_close(again(images()), first(images()), rtol=0, atol=0)
    prepare(model(), images(5))
    prepare(model(3), images())
    assert len(measured) == 2


def test_a_choice_can_be_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    found = prepare(model(), images()).preparation
    monkeypatch.setattr(preparation, "_seconds", None)
    assert found is not None
    other = preparation.Preparation(replace(found.form, channels_last=True))
    for chosen in (found, other):
        assert prepare(model(1), images(), chosen).preparation == chosen
    both = prepare(
        Ensemble([model(0), model(1)]), images(), preparation.Preparation(found.form, members=(found, other))
    )
    assert [member.preparation for member in both.members] == [found, other]
    assert [member.memory_format for member in both.members] == [torch.contiguous_format] * 2


def test_what_the_device_computes_in_software_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "in_hardware", lambda dtype, device: dtype == torch.float32)
    with pytest.warns(RuntimeWarning, match="precision: cpu computes bf16 in software, far slower than fp32"):
        prepare(model(), images(), "bf16")


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
