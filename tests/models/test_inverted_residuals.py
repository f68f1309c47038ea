from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from alignfast.alignment.witnesses import Witnesses
from alignfast.models import Classifier, inverted_residual, preparation, prepare
from alignfast.models.dataflow import has_hooks
from alignfast.models.depthwise import chains_of, use_kernel
from alignfast.models.folding import fold_batch_norm
from alignfast.models.frozen import keep_less
from alignfast.models.inverted_residual import Expanding, Residual, use_residual_kernel, with_residuals
from alignfast.models.preparation import Form, Preparation
from alignfast.surrogates import surrogate
from tests import cases
from tests.models.test_depthwise import (
    SMALL,
    SURGERIES,
    check_near,
    check_network,
    check_seen_alike,
    flat,
    gradient_in_attack,
    images,
    lively,
    passes,
)

pytestmark = pytest.mark.skipif(
    inverted_residual.cpu_isa() == "baseline", reason="it has no use where fused multiply-adds are software"
)
# How many inverted residuals each has.
COUNTS = {"timm": 2, "torchvision": 2, "own": 2}


def forms(module: nn.Module, x: Tensor, *, fold: bool = True) -> tuple[nn.Module, nn.Module]:
    """The module frozen, folded and laid out, without the kernels and with them."""
    plain = copy.deepcopy(module).eval().requires_grad_(False)
    if fold:
        fold_batch_norm(plain, x[:1])

    def run() -> Any:
        return plain(x[:1])

    chains = with_residuals(plain, run, chains_of(plain, run))
    plain = plain.to(memory_format=torch.channels_last)
    fused = copy.deepcopy(plain)
    use_kernel(fused, chains)
    use_residual_kernel(fused, chains)
    keep_less(plain)
    keep_less(fused)
    return plain, fused


def small(name: str, in_place: bool = True) -> tuple[nn.Module, nn.Module]:
    return forms(lively(SMALL[name], in_place).double(), images())


def prepared(model: nn.Module, x: Tensor, precision: Any = "fp32") -> tuple[Classifier, Classifier]:
    """Without the kernels and with them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("use_kernel", "use_residual_kernel"):
            patch.setattr(preparation, name, lambda module, chains: None)
        plain = prepare(model, x, precision)
    return plain, prepare(model, x, precision)


def working(module: nn.Module) -> int:
    """Inverted residuals that the kernel does now."""
    return sum(bool(part.whole) for part in module.modules() if isinstance(part, Expanding))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "timm:tf_efficientnet_lite0": (lambda: timm.create_model("tf_efficientnet_lite0", num_classes=9), 15),
    "timm:mobilenetv2_100": (lambda: timm.create_model("mobilenetv2_100", num_classes=9), 16),
    "torchvision:mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(num_classes=9), 16),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    make, count = NETWORKS[name]
    model, x = Classifier(lively(make), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)), images(side=24, dtype=torch.float32)
    plain, fused = prepared(model, x)
    assert (working(plain), working(fused)) == (0, count)
    check_network(forms, model, x, plain, fused)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "torchvision", "own"])
def test_half_precision(name: str, precision: str) -> None:
    """As near to float32 as the layers, in the gradient but for single rectifiers, which are steps."""
    make = SMALL.get(name, lambda: timm.create_model("tf_efficientnet_lite0", num_classes=9))
    model, x = Classifier(lively(make)), images(side=24, dtype=torch.float32)
    exact = passes(prepare(model, x, "fp32"), x, second=False)
    plain, fused = (passes(one, x, second=False) for one in prepared(model, x, precision))
    for one, other, wanted, factor in zip(fused, plain, exact, (1.1, 2.0), strict=True):
        assert (other - wanted).norm() > 0
        assert (one - wanted).norm() < factor * (other - wanted).norm()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_all_derivatives(name: str, in_place: bool) -> None:
    module, x = lively(SMALL[name], in_place).double(), images()
    plain, fused = forms(module, x)
    assert working(fused) == COUNTS[name]
    wanted = passes(plain, x)
    assert wanted[2].any()
    check_near(passes(fused, x), wanted)
    check_near(passes(fused, x), passes(module.requires_grad_(False), x))
    with torch.no_grad():
        check_near([fused(flat(x))], wanted[:1])


@pytest.mark.parametrize("kind", ["forward", "before forward", "backward"])
@pytest.mark.parametrize("name", SMALL)
def test_hooks_see_what_they_did(name: str, kind: str) -> None:
    """On every part, whether it belongs to an inverted residual or not."""
    # torch has backward hooks make views, which its own rectifiers do not change in place.
    plain, fused = small(name, kind != "backward")
    x = images()
    before = fused(flat(x))
    for path, part in plain.named_modules():
        check_seen_alike(plain, fused, path, kind, x)
        assert not has_hooks(part)
        assert working(fused) == COUNTS[name]
        assert torch.equal(fused(flat(x)), before)


@pytest.mark.parametrize("in_place", [False, True])
def test_only_what_a_hook_could_see_is_undone(in_place: bool) -> None:
    _, fused = small("timm", in_place)
    inside = ("conv_pw", "bn1", "bn1.act", "conv_dw", "bn2", "bn2.drop", "bn2.act", "conv_pwl")
    for path, wanted in [("", 2), ("blocks.1", 2), ("conv_stem", 2), *((f"blocks.1.{name}", 1) for name in inside)]:
        with fused.get_submodule(path).register_forward_hook(lambda *given: None):
            assert working(fused) == wanted, path
        assert working(fused) == 2


def test_copies_are_whole() -> None:
    _, fused = small("timm")
    x = images()
    wanted = passes(fused, x)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert working(other) == 2
        assert all(torch.equal(*pair) for pair in zip(passes(other, x), wanted, strict=True))
        with fused.blocks[1].conv_dw.register_forward_hook(lambda *given: None):
            assert (working(fused), working(other)) == (1, 2)
        other.blocks[1].conv_dw.weight.data.zero_()
        assert torch.equal(fused(flat(x)), wanted[0])


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "in place": lambda part: part.weight.mul_(1.5),
    "by a state": lambda part: part.load_state_dict({key: 1.5 * value for key, value in part.state_dict().items()}),
    "another tensor": lambda part: setattr(part, "weight", nn.Parameter(1.5 * part.weight, requires_grad=False)),
    "another storage": lambda part: setattr(part.weight, "data", 1.5 * part.weight.data),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("part", ["conv_pw", "conv_dw", "conv_pwl"])
def test_weights_that_are_changed_later_count(part: str, change: str) -> None:
    both, x = small("timm"), images()
    before = both[1](flat(x))
    for one in both:
        CHANGES[change](one.get_submodule(f"blocks.1.{part}"))
    found, wanted = (one(flat(x)) for one in reversed(both))
    assert not torch.allclose(found, before)
    check_near([found], [wanted])


def test_names_types_and_weights_stay() -> None:
    model, x = Classifier(lively(SMALL["timm"])), images(dtype=torch.float32)
    plain, fused = prepared(model, x)
    assert list(fused.state_dict()) == list(plain.state_dict())
    parts, others = dict(plain.named_modules()), dict(fused.named_modules())
    assert list(parts) == list(others)
    for path, part in parts.items():
        for kind in (nn.Conv2d, Conv2dSame, nn.ReLU6):
            assert isinstance(others[path], kind) == isinstance(part, kind)
        assert others[path].extra_repr() == part.extra_repr()


def test_bits_are_all_that_is_kept() -> None:
    module = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU6(True), Conv2dSame(6, 6, 3, stride=2, groups=6))
    module = nn.Sequential(*module, nn.ReLU6(True), nn.Conv2d(6, 4, 1))
    x = flat(images() * 30 - 10)
    _, fused = forms(lively(lambda: module).double(), x)
    found: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: found.append(tensor) or tensor, lambda tensor: tensor):
        fused(x.requires_grad_())
    assert [tensor.dtype for tensor in found] == [torch.int16, torch.int16]
    # A last block of channels is filled up.
    assert [tensor.numel() for tensor in found] == [2 * 18 * 18 * 3, 2 * 9 * 9 * 3]


class Odd(nn.Module):
    """Three convolutions with two rectifiers, which `use` puts together."""

    def __init__(self, use: Callable[[Any, Tensor], Any], **options: Any) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.before, self.after = nn.ReLU6(options.get("in_place", False)), nn.ReLU6(options.get("in_place", False))
        self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.last = options.get("last", nn.Conv2d(8, 3, 1))
        self.use = use

    def forward(self, rows: Tensor) -> Any:
        return self.use(self, rows * 20 - 8)


def straight(one: Any, rows: Tensor) -> Any:
    return one.last(one.after(one.conv(one.before(one.first(rows)))))


def used_again(one: Any, rows: Tensor) -> Any:
    made = one.first(rows)
    return one.last(one.after(one.conv(one.before(made)))) + made[:, :3]


def behind_used_again(one: Any, rows: Tensor) -> Any:
    made = one.after(one.conv(one.before(one.first(rows))))
    return one.last(made) + made[:, :3]


def input_changed(one: Any, rows: Tensor) -> Any:
    given = rows * 1
    made = one.first(given)
    given += 100
    return one.last(one.after(one.conv(one.before(made))))


def added_in_place(one: Any, rows: Tensor) -> Any:
    made = straight(one, rows)
    made += rows
    return made


ODD: dict[str, tuple[Callable[[Any, Tensor], Any], bool]] = {
    "straight": (straight, True),
    "residual": (lambda one, rows: rows + straight(one, rows), True),
    "added in place": (added_in_place, True),
    "input changed": (input_changed, True),
    "used again": (used_again, False),
    "used again behind": (behind_used_again, False),
    "scaled before": (lambda one, rows: one.last(one.after(one.conv(one.before(one.first(rows) * 2)))), False),
    "scaled behind": (lambda one, rows: one.last(one.after(one.conv(one.before(one.first(rows)))) * 2), False),
    "twice": (lambda one, rows: straight(one, straight(one, rows)), False),
    "first twice": (lambda one, rows: straight(one, rows) + one.first(rows)[:, :3], False),
}


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", ODD)
def test_what_has_another_use_is_left(name: str, in_place: bool) -> None:
    use, wanted = ODD[name]
    module, x = Odd(use, in_place=in_place).double(), images(side=8)
    plain, fused = forms(module, x)
    assert working(fused) == wanted
    check_near(passes(fused, x), passes(plain, x))


LAST: dict[str, Callable[[], nn.Module]] = {
    "strided": lambda: nn.Conv2d(8, 3, 1, stride=2),
    "padded": lambda: nn.Conv2d(8, 3, 1, padding=1),
    "larger": lambda: nn.Conv2d(8, 3, 3),
    "grouped": lambda: nn.Conv2d(8, 4, 1, groups=2),
    "of TensorFlow": lambda: Conv2dSame(8, 3, 1),
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 3, 1)),
}


@pytest.mark.parametrize("name", LAST)
def test_layers_that_the_kernel_does_not_do_are_left(name: str) -> None:
    plain, fused = forms(Odd(straight, last=LAST[name]()).double(), images(side=8))
    assert not any(isinstance(part, Expanding) for part in fused.modules())
    check_near(passes(fused, images(side=8)), passes(plain, images(side=8)))


def test_layers_to_train_or_with_hooks_are_left() -> None:
    module, x = Odd(straight).double().requires_grad_(False), images(side=8)
    chains = with_residuals(module, lambda: module(x), chains_of(module, lambda: module(x)))
    assert all(isinstance(chain, Residual) for chain in chains)
    trained, hooked = copy.deepcopy(module), copy.deepcopy(module)
    trained.last.requires_grad_()
    hooked.first.register_forward_hook(lambda part, given, made: made + 1)
    for one in (trained, hooked):
        wanted = one(x)
        use_kernel(one, chains)
        use_residual_kernel(one, chains)
        assert not any(isinstance(part, Expanding) for part in one.modules())
        check_near([one(x)], [wanted])


def test_without_fused_multiply_adds_it_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inverted_residual, "cpu_isa", lambda: "baseline")
    assert not any(isinstance(part, Expanding) for part in small("timm")[1].modules())


def test_forms_that_do_without() -> None:
    model, x = Classifier(lively(SMALL["timm"])), images(dtype=torch.float32)
    for form, wanted in ((Form(torch.float32), 0), (Form(torch.float32, channels_last=True), 2)):
        assert working(prepare(model, x, Preparation(form))) == wanted


def test_a_compiled_form_keeps_its_layers() -> None:
    def tiny() -> nn.Module:
        return nn.Sequential(Odd(straight), nn.Flatten(), nn.Linear(192, 3))

    model, x = Classifier(tiny().eval()), images(side=8, dtype=torch.float32)
    eager, compiled = (prepare(model, x, "fp32", compiled=form) for form in (False, True))
    assert (working(eager), working(compiled)) == (1, 0)
    check_near(passes(compiled, x, second=False), passes(eager, x, second=False), 1e-5)


def test_witnesses() -> None:
    model, x = Classifier(lively(SMALL["timm"])), images(dtype=torch.float32)
    witnesses = Witnesses([model], example=x)
    assert working(witnesses.models[0]) == 2
    check_near([witnesses.logits(x)[0]], [model(x).detach()], 1e-5)


def test_under_autocast() -> None:
    """The layers do it, in the precision that autocast gives them."""
    model, x = Classifier(lively(SMALL["timm"])), images(dtype=torch.float32)
    plain, fused = prepared(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert working(fused) == 0
        ours, theirs = (passes(one.logits, x, second=False) for one in (fused, plain))
    check_near(ours, theirs, 0.02)
    assert not torch.equal(ours[0], fused(x))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("surgery", SURGERIES, ids=str)
def test_surgery(surgery: Any, in_place: bool) -> None:
    model, x = Classifier(lively(SMALL["own"], in_place)), images(dtype=torch.float32)
    plain, fused = prepared(model, x)
    ours = gradient_in_attack(surrogate(fused, surgery), x)
    check_near(ours, gradient_in_attack(surrogate(plain, surgery), x), 1e-5)
    assert working(fused) == COUNTS["own"]


@pytest.mark.parametrize("side", [1, 2, 5, 8, 9])
def test_sizes_of_images(side: int) -> None:
    """TensorFlow's padding goes by them."""
    module = nn.Sequential(nn.Conv2d(3, 50, 1), nn.ReLU6(), Conv2dSame(50, 50, 3, stride=2, groups=50))
    module = nn.Sequential(*module, nn.ReLU6(), nn.Conv2d(50, 4, 1, bias=False)).double()
    plain, fused = forms(module, cases.normal((1, 3, 8, 8), 1))
    x = cases.normal((2, 3, side, 7), 2, scale=9.0)
    assert working(fused) == 1
    check_near(passes(fused, x), passes(plain, x))
