from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cosine_similarity
from torch.utils._pytree import tree_iter

from alignfast.alignment.witnesses import Witnesses
from alignfast.attacks.observe import observe
from alignfast.draws import SOURCE_SLOT, Draws
from alignfast.models import Classifier, Ensemble, preparation, prepare
from alignfast.models.dataflow import has_hooks
from alignfast.models.depthwise import (
    DepthwiseConv2d,
    DepthwiseConv2dSame,
    ReLU6Left,
    chains_of,
    same_padding,
    use_kernel,
)
from alignfast.models.folding import fold_batch_norm
from alignfast.models.frozen import keep_less
from alignfast.models.preparation import Form, Preparation
from alignfast.surrogates import (
    FeatureNoise,
    GhostDropout,
    GhostSkips,
    LinearBackward,
    SkipGradient,
    SmoothBackward,
    Surgery,
    surrogate,
)
from tests import cases

KERNELS = (DepthwiseConv2d, DepthwiseConv2dSame)


def lively(make: Callable[[], nn.Module], in_place: bool = True) -> nn.Module:
    """In evaluation mode, with statistics of its own activations, so that ReLU6 clips some of them on either side."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        module = make()
        norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = None
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, 0.0, 6.0)
        with torch.no_grad():
            module.train()(torch.rand(8, 3, 32, 32))
        for norm in norms:
            norm.running_var.mul_(0.75 + torch.rand_like(norm.running_var) / 2)
    for part in module.modules():
        if isinstance(part, nn.ReLU6):
            part.inplace = in_place
    return module.eval()


def _timm() -> nn.Module:
    """Names and layers are those of tf_efficientnet_lite0."""
    options: Any = {"pad_type": "same", "act_layer": nn.ReLU6}
    blocks = nn.Sequential(
        DepthwiseSeparableConv(8, 6, **options),
        InvertedResidual(6, 6, exp_ratio=2, **options),
        InvertedResidual(6, 12, dw_kernel_size=5, stride=2, exp_ratio=2, **options),
    )
    return nn.Sequential(
        OrderedDict(
            conv_stem=Conv2dSame(3, 8, 3, stride=2, bias=False),
            bn1=BatchNormAct2d(8, act_layer=nn.ReLU6),
            blocks=blocks,
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classifier=nn.Linear(12, 5),
        )
    )


class Bottleneck(nn.Module):
    """A block whose names surgeries know."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width)
        self.conv2 = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width, bias=False)
        self.norm2, self.act1, self.act2 = nn.BatchNorm2d(2 * width), nn.ReLU6(), nn.ReLU6()
        self.conv3 = nn.Conv2d(2 * width, width, 1)

    def forward(self, rows: Tensor) -> Tensor:
        out = self.act1(self.norm1(self.conv1(rows)))
        result: Tensor = rows + self.conv3(self.act2(self.norm2(self.conv2(out))))
        return result


def _own() -> nn.Module:
    stem = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6))
    return nn.Sequential(stem, Bottleneck(6), Bottleneck(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))


SMALL: dict[str, Callable[[], nn.Module]] = {
    "timm": _timm,
    "torchvision": lambda: torchvision.models.MobileNetV2(5, 0.25, [[1, 64, 1, 1], [2, 64, 2, 2]]),
    "own": _own,
}
# How many rectifiers of each its depthwise convolutions take.
TAKEN = {"timm": 6, "torchvision": 6, "own": 4}


def images(count: int = 2, side: int = 18, dtype: torch.dtype = torch.float64) -> Tensor:
    return cases.random((count, 3, side, side), 1, dtype)


def flat(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def forms(module: nn.Module, x: Tensor, *, fold: bool = True) -> tuple[nn.Module, nn.Module]:
    """The module frozen, folded and laid out, without the kernel and with it."""
    plain = copy.deepcopy(module).eval().requires_grad_(False)
    if fold:
        fold_batch_norm(plain, x[:1])
    chains = chains_of(plain, lambda: plain(x[:1]))
    plain = plain.to(memory_format=torch.channels_last)
    fused = copy.deepcopy(plain)
    use_kernel(fused, chains)
    keep_less(plain)
    keep_less(fused)
    return plain, fused


def small(name: str, in_place: bool = True) -> tuple[nn.Module, nn.Module]:
    return forms(lively(SMALL[name], in_place).double(), images())


def prepared(model: nn.Module, x: Tensor, precision: Any = "fp32") -> tuple[Classifier, Classifier]:
    """Without the kernel and with it; without that of inverted residuals."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "use_residual_kernel", lambda module, chains: None)
        fused = prepare(model, x, precision)
        patch.setattr(preparation, "use_kernel", lambda module, chains: None)
        return prepare(model, x, precision), fused


def taken(module: nn.Module) -> int:
    """Rectifiers whose convolution does their work."""
    return sum(bool(part.unseen) for part in module.modules() if isinstance(part, ReLU6Left))


def passes(module: nn.Module, x: Tensor, *, second: bool = True) -> list[Tensor]:
    """The output, the input gradient of its square sum, and the product of the Hessian with a vector."""
    leaf = x.clone().requires_grad_()
    output = module(flat(leaf))
    (grad,) = torch.autograd.grad(output.square().sum(), leaf, create_graph=second)
    if not second:
        return [output.detach(), grad]
    vector = cases.normal(tuple(x.shape), 2, x.dtype)
    (product,) = torch.autograd.grad((grad * vector).sum(), leaf)
    return [output.detach(), grad.detach(), product]


def check_near(found: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-9) -> None:
    """As a part of the largest value of each."""
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * float(other.abs().amax().clamp(min=1e-12)))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "timm:tf_efficientnet_lite0": (lambda: timm.create_model("tf_efficientnet_lite0", num_classes=9), 33, 32),
    "timm:mobilenetv2_100": (lambda: timm.create_model("mobilenetv2_100", num_classes=9), 35, 34),
    "torchvision:mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(num_classes=9), 35, 34),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    make, rectifiers, wanted = NETWORKS[name]
    model, x = Classifier(lively(make), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)), images(side=24, dtype=torch.float32)
    plain, fused = prepared(model, x)
    assert sum(isinstance(part, nn.ReLU6) for part in fused.modules()) == rectifiers
    assert taken(fused) == wanted
    assert sum(isinstance(part, KERNELS) for part in fused.modules()) == wanted // 2
    assert not any(isinstance(part, (*KERNELS, ReLU6Left)) for part in plain.modules())
    check_network(forms, model, x, plain, fused)


def check_network(
    forms: Callable[[nn.Module, Tensor], tuple[nn.Module, nn.Module]],
    model: Classifier,
    x: Tensor,
    plain: nn.Module,
    fused: nn.Module,
) -> None:
    """A model in float32, which ends in float64, and what was prepared of it without and with kernels; forms: of a
    module, likewise."""
    check_near([fused(x)], [plain(x)], 1e-5)
    # A rectifier's gradient is a step, which one of very many values may be so near to that rounding decides.
    ours, theirs = (passes(one, x, second=False)[1] for one in (fused, plain))
    assert cosine_similarity(ours.flatten(1), theirs.flatten(1)).min() > 1 - 1e-5
    # Double precision leaves it nothing to decide.
    exact = [passes(one, x.double(), second=False) for one in forms(model.module.double(), x.double())]
    check_near(exact[1], exact[0])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "torchvision", "own"])
def test_half_precision(name: str, precision: str) -> None:
    make = SMALL.get(name, lambda: timm.create_model("tf_efficientnet_lite0", num_classes=9))
    model, x = Classifier(lively(make)), images(side=24, dtype=torch.float32)
    exact = passes(prepare(model, x, "fp32"), x, second=False)
    plain, fused = (passes(one, x, second=False) for one in prepared(model, x, precision))
    for one, other, wanted in zip(fused, plain, exact, strict=True):
        error = (other - wanted).norm()
        assert error > 0
        assert (one - wanted).norm() < 1.1 * error
        assert (one - other).norm() < error / 2


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "mnasnet_small", "efficientnet_lite0"])
def test_other_rectifiers_are_left(name: str) -> None:
    options: Any = {"act_layer": nn.SiLU} if name == "efficientnet_lite0" else {}
    model, x = Classifier(timm.create_model(name, num_classes=5, **options).eval()), images(1, 32, torch.float32)
    plain, fused = prepared(model, x)
    assert [type(part) for part in fused.modules()] == [type(part) for part in plain.modules()]
    assert torch.equal(fused(x), plain(x))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_all_derivatives(name: str, in_place: bool) -> None:
    module, x = lively(SMALL[name], in_place).double(), images()
    plain, fused = forms(module, x)
    assert taken(fused) == TAKEN[name]
    wanted = passes(plain, x)
    assert wanted[2].any()
    check_near(passes(fused, x), wanted)
    check_near(passes(fused, x), passes(module.requires_grad_(False), x))
    check_near([fused(flat(x))], wanted[:1])
    single = forms(module.float(), x.float())
    check_near(passes(single[1], x.float()), passes(single[0], x.float()), 1e-5)


class Odd(nn.Module):
    """A depthwise convolution between two rectifiers, which `use` puts together."""

    def __init__(self, use: Callable[[Any, Tensor], Any], in_place: bool = False) -> None:
        super().__init__()
        self.before, self.after = nn.ReLU6(in_place), nn.ReLU6(in_place)
        self.conv, self.other = (nn.Conv2d(3, 3, 3, padding=1, groups=3) for _ in range(2))
        self.use = use
        self.kept: Any = None

    def forward(self, rows: Tensor) -> Any:
        return self.use(self, rows * 20 - 8)


def straight(one: Any, rows: Tensor) -> Any:
    return one.after(one.conv(one.before(rows)))


def residual(one: Any, rows: Tensor) -> Any:
    given = one.before(rows)
    return one.after(one.conv(given)) + given


def inner_residual(one: Any, rows: Tensor) -> Any:
    made = one.conv(one.before(rows))
    return one.after(made) + made


def returned(one: Any, rows: Tensor) -> Any:
    given = one.before(rows)
    return one.after(one.conv(given)), [given]


def kept(one: Any, rows: Tensor) -> Any:
    one.kept = one.before(rows)
    return one.after(one.conv(one.kept))


def shared(one: Any, rows: Tensor) -> Any:
    given = one.before(rows)
    return one.after(one.conv(given)) + one.other(given)


def seen_through_a_view(one: Any, rows: Tensor) -> Any:
    view = rows[:, 1:]
    return one.after(one.conv(one.before(rows)))[:, 1:] + view


def input_changed(one: Any, rows: Tensor) -> Any:
    given = one.before(rows)
    rows.mul_(2)
    return one.after(one.conv(given))


def result_changed(one: Any, rows: Tensor) -> Any:
    made = one.after(one.conv(one.before(rows * 1)))
    made += rows
    return made


def two_convolutions(one: Any, rows: Tensor) -> Any:
    return one.after(one.other(one.before(one.conv(rows))))


# Which of the two rectifiers are taken: where they return tensors of their own, and where they work in place.
ODD: dict[str, tuple[Callable[[Any, Tensor], Any], str, str]] = {
    "straight": (straight, "before after", "before after"),
    "residual": (residual, "after", "after"),
    # What is added was rectified too.
    "inner residual": (inner_residual, "before", "before after"),
    "returned": (returned, "after", "after"),
    "kept": (kept, "after", "after"),
    "shared": (shared, "after", "after"),
    "a view before": (seen_through_a_view, "before after", "after"),
    "input changed": (input_changed, "after", "after"),
    "result changed": (result_changed, "before", "before"),
    "convolution twice": (lambda one, rows: one.after(one.conv(one.conv(one.before(rows)))), "", ""),
    "rectifier twice": (lambda one, rows: one.before(one.conv(one.before(rows))), "", ""),
    "no rectifier": (lambda one, rows: one.conv(rows), "", ""),
    "something before": (lambda one, rows: one.after(one.conv(one.before(rows) + 1)), "after", "after"),
    "something behind": (lambda one, rows: one.after(one.conv(one.before(rows)) + 1), "before", "before"),
    "a view": (lambda one, rows: one.after(one.conv(one.before(rows)[:, :, 1:])), "after", "after"),
    # In place the second is given what something has changed, of which there may be views.
    "rectified twice": (lambda one, rows: one.conv(one.after(one.before(rows))), "after", ""),
    "two convolutions": (two_convolutions, "before after", "before after"),
}


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", ODD)
def test_what_has_another_use_is_left(name: str, in_place: bool) -> None:
    use, *wanted = ODD[name]
    module, x = Odd(use, in_place).double(), images(side=8)
    plain, fused = forms(module, x)
    found = [part for part in ("before", "after") if isinstance(fused.get_submodule(part), ReLU6Left)]
    assert found == wanted[in_place].split()
    with torch.no_grad():
        ours, theirs = ((made if isinstance(made, Tensor) else made[0]) for made in (fused(x), plain(x)))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_results_that_are_changed_later_have_their_gradients() -> None:
    plain, fused = forms(Odd(result_changed).double(), images(side=8))
    check_near(passes(fused, images(side=8)), passes(plain, images(side=8)))


def test_what_has_two_names_is_left() -> None:
    x = images(side=8)
    for part, wanted in (("before", 1), ("after", 1), ("conv", 0)):
        module = Odd(straight).double()
        module.alias = module.get_submodule(part)
        plain, fused = forms(module, x)
        assert taken(fused) == wanted
        check_near(passes(fused, x), passes(plain, x))
    module = Odd(lambda one, rows: one.conv(one.before(rows)))
    module.alias = module.before
    assert chains_of(module, lambda: module(x.float())) == []


def test_a_rectifier_between_two_convolutions() -> None:
    def use(one: Any, rows: Tensor) -> Any:
        return one.other(one.before(one.conv(rows)))

    plain, fused = forms(Odd(use, True).double(), images(side=8))
    assert taken(fused) == 1
    assert fused.conv.after is fused.before.unseen
    assert not isinstance(fused.other, KERNELS)
    for part in ("conv", "before", "other"):
        check_seen_alike(plain, fused, part, "forward", images(side=8))


def change(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output + 1


def change_given(module: nn.Module, inputs: Any) -> Any:
    return (inputs[0] * 2 - 1,)


def change_gradient(module: nn.Module, given: Any, made: Any) -> Any:
    return (given[0] * 2,)


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda part: part.register_forward_hook(change),
    "before forward": lambda part: part.register_forward_pre_hook(change_given),
    "backward": lambda part: part.register_full_backward_hook(change_gradient),
    "before backward": lambda part: part.register_full_backward_pre_hook(lambda part, given: (given[0] * 3,)),
}


@pytest.mark.parametrize("part", ["before", "conv", "after"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_that_are_there_already(kind: str, part: str) -> None:
    plain, x = Odd(straight).double().requires_grad_(False), images(side=8)
    module = copy.deepcopy(plain)
    handle = HOOKS[kind](module.get_submodule(part))
    wanted = passes(module, x)
    use_kernel(module, chains_of(module, lambda: module(x)))
    assert taken(module) < 2
    check_near(passes(module, x), wanted)
    handle.remove()
    check_near(passes(module, x), passes(plain, x))


def tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_iter(values) if isinstance(value, Tensor)]


def seen(module: nn.Module, name: str, kind: str, x: Tensor) -> list[Tensor]:
    """What a hook sees when it is called, what that is in the end, its gradients, the logits and theirs."""
    at_once: list[Tensor] = []
    kept: list[Tensor] = []

    def hook(part: nn.Module, *values: Any) -> None:
        kept.extend(tensors(values))
        at_once.extend(value.detach().clone() for value in tensors(values))

    part = module.get_submodule(name)
    register = {
        "forward": part.register_forward_hook,
        "before forward": part.register_forward_pre_hook,
        "backward": part.register_full_backward_hook,
    }[kind]
    leaf = x.clone().requires_grad_()
    with register(hook):
        logits = module(flat(leaf * 1))
        (grad,) = torch.autograd.grad(logits.square().sum(), leaf, retain_graph=True)
    slopes = [torch.autograd.grad(value.square().sum(), leaf, retain_graph=True)[0] for value in kept if value.grad_fn]
    assert len(slopes) == (0 if kind == "backward" else len(kept))
    return [*at_once, *(value.detach() for value in kept), *slopes, logits.detach(), grad]


def check_seen_alike(plain: nn.Module, fused: nn.Module, name: str, kind: str, x: Tensor) -> None:
    check_near(seen(fused, name, kind, x), seen(plain, name, kind, x))


@pytest.mark.parametrize("kind", ["forward", "before forward", "backward"])
@pytest.mark.parametrize("name", SMALL)
def test_hooks_see_what_they_did(name: str, kind: str) -> None:
    """On every part, whether it belongs to a chain or not."""
    # torch has backward hooks make views, which its own rectifiers do not change in place.
    in_place, x = kind != "backward", images()
    plain, fused = small(name, in_place)
    before = fused(flat(x))
    for path, part in plain.named_modules():
        check_seen_alike(plain, fused, path, kind, x)
        assert not has_hooks(part)
        assert taken(fused) == TAKEN[name]
        assert torch.equal(fused(flat(x)), before)


@pytest.mark.parametrize("in_place", [False, True])
def test_only_what_a_hook_could_see_is_undone(in_place: bool) -> None:
    def less(fused: nn.Module, path: str) -> int:
        count = taken(fused)
        with fused.get_submodule(path).register_forward_hook(lambda *given: None):
            return count - taken(fused)

    _, fused = small("timm", in_place)
    wanted = {
        "blocks.1": 0,
        "blocks.1.conv_pw": int(in_place),
        "blocks.1.bn1": 1,
        "blocks.1.bn1.act": 1,
        "blocks.1.conv_dw": 2,
        "blocks.1.bn2": 1,
        "blocks.1.bn2.drop": 1,
        "blocks.1.bn2.act": 1,
        "blocks.1.conv_pwl": 0,
        # Between the stem and the first convolution of the blocks.
        "conv_stem": int(in_place),
        "bn1": 1,
        "blocks": 1,
        "blocks.0": 1,
        "": 0,
    }
    assert {path: less(fused, path) for path in wanted} == wanted
    _, fused = small("torchvision", in_place)
    # Two layers of a convolution, what was its normalisation and a rectifier.
    wanted = {"features.2": 0, "features.2.conv": 0, "features.2.conv.0": 1, "features.2.conv.1": 1}
    wanted |= {"features.2.conv.1.0": 2, "features.2.conv.1.1": 1, "features.2.conv.1.2": 1}
    assert {path: less(fused, path) for path in wanted} == wanted


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "layer", ["bn1", *(f"blocks.1.{part}" for part in ("conv_pw", "bn1", "conv_dw", "bn2")), "blocks.1"]
)
def test_features_that_attacks_observe(layer: str, precision: str) -> None:
    model, x = Classifier(lively(_timm)), images(dtype=torch.float32)

    def features(source: Classifier) -> list[Tensor]:
        leaf = x.clone().requires_grad_()

        def render(mean: Any, std: Any, dtype: Any, memory_format: Any) -> Tensor:
            return (leaf * 1).to(dtype, memory_format=memory_format)

        one = observe(source, render, (layer,))
        (grad,) = torch.autograd.grad(one.features[layer].square().sum(), leaf, retain_graph=True)
        (both,) = torch.autograd.grad(one.logits.square().sum(), leaf)
        return [one.features[layer].detach(), one.logits.detach(), grad, both]

    plain, fused = prepared(model, x, precision)
    check_near(features(fused), features(plain), 1e-5 if precision == "fp32" else 0.05)


def test_copies_are_whole() -> None:
    plain, fused = small("timm")
    x = images()
    wanted = passes(fused, x)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert taken(other) == TAKEN["timm"]
        assert all(torch.equal(*pair) for pair in zip(passes(other, x), wanted, strict=True))
        with fused.blocks[1].conv_dw.register_forward_hook(lambda *given: None):
            assert (taken(fused), taken(other)) == (4, 6)
        with other.blocks[1].bn2.act.register_forward_pre_hook(lambda *given: None):
            assert (taken(fused), taken(other)) == (6, 5)
        check_seen_alike(plain, other, "blocks.1.bn1", "forward", x)
        other.blocks[1].conv_dw.weight.data.zero_()
        assert not torch.equal(other(flat(x)), wanted[0])
        assert torch.equal(fused(flat(x)), wanted[0])


@pytest.mark.parametrize("name", SMALL)
def test_names_types_and_weights_stay(name: str) -> None:
    model, x = Classifier(lively(SMALL[name])), images(dtype=torch.float32)
    plain, fused = prepared(model, x)
    assert list(fused.state_dict()) == list(plain.state_dict())
    for key, tensor in plain.state_dict().items():
        assert torch.equal(fused.state_dict()[key], tensor)
        assert fused.state_dict()[key].stride() == tensor.stride()
    parts, others = dict(plain.named_modules()), dict(fused.named_modules())
    assert list(parts) == list(others)
    for path, part in parts.items():
        other = others[path]
        for kind in (nn.Conv2d, Conv2dSame, nn.ReLU6):
            assert isinstance(other, kind) == isinstance(part, kind)
        assert other.extra_repr() == part.extra_repr()
        assert other.training == part.training
    # Weights that are put there later count.
    state = {key: tensor * 1.1 for key, tensor in plain.state_dict().items()}
    for one in (plain, fused):
        one.load_state_dict(state)
    check_near([fused(x)], [plain(x)], 1e-5)


def test_the_model_that_is_prepared_stays() -> None:
    model, x = Classifier(lively(_timm)), images(dtype=torch.float32)
    kinds, wanted = [type(part) for part in model.modules()], model(x)
    prepare(model, x, "fp32")
    assert [type(part) for part in model.modules()] == kinds
    assert torch.equal(model(x), wanted)
    assert not any(has_hooks(part) for part in model.modules())


def kept_for_backward(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Besides weights."""
    weights = {tensor.data_ptr() for tensor in module.parameters()}
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            found[tensor.data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x.requires_grad_())
    return list(found.values())


@pytest.mark.parametrize("in_place", [False, True])
def test_the_raw_images_and_the_result_are_kept(in_place: bool) -> None:
    def chain() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 6, 1), nn.ReLU6(in_place), Conv2dSame(6, 6, 3, stride=2, groups=6), nn.ReLU6(in_place)
        )

    x = flat(images() * 30 - 10)
    _, fused = forms(lively(chain).double(), x)
    raw, result = kept_for_backward(fused, x)
    assert torch.equal(raw, fused[0](x))
    assert raw.min() < 0
    assert raw.max() > 6
    assert torch.equal(result, fused(x))
    # All the more where something looks at what lies between.
    with fused[2].register_forward_hook(lambda *given: None):
        assert len(kept_for_backward(fused, x)) == 2


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5, (2, 4)])
@pytest.mark.parametrize("size", [(8, 8), (7, 7), (9, 10), (5, 6), (1, 2)])
def test_padding_as_tensorflow_has_it(size: tuple[int, int], kernel: Any, stride: int) -> None:
    layer = Conv2dSame(4, 4, kernel, stride=stride, groups=4)
    x = cases.normal((2, 4, *size), 1, torch.float64, 5)
    plain = nn.Sequential(nn.ReLU6(), layer, nn.ReLU6()).double().requires_grad_(False)
    _, fused = forms(plain, x)
    assert taken(fused) == 2
    check_near(passes(fused, x), passes(plain, x))
    assert fused(flat(x)).shape == plain(x).shape


def test_uneven_padding_lies_below_and_on_the_right() -> None:
    x = torch.zeros(1, 4, 8, 7)
    assert same_padding(x, Conv2dSame(4, 4, 3, stride=2, groups=4)) == (0, 1, 1, 1)
    assert same_padding(x, Conv2dSame(4, 4, 5, stride=2, groups=4)) == (1, 2, 2, 2)
    assert same_padding(x, Conv2dSame(4, 4, (3, 2), groups=4)) == (1, 1, 0, 1)


def rectified(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.ReLU6(), layer, nn.ReLU6()).requires_grad_(False)


class Other(nn.Conv2d):
    pass


class OtherReLU6(nn.ReLU6):
    pass


def hooked() -> nn.Module:
    layer = nn.Conv2d(4, 4, 3, groups=4)
    layer.register_forward_hook(lambda *given: None)
    return layer


UNLIKE: dict[str, Callable[[], nn.Module]] = {
    "dilated": lambda: nn.Conv2d(4, 4, 3, dilation=2, groups=4),
    "fewer groups": lambda: nn.Conv2d(4, 4, 3, groups=2),
    "more channels": lambda: nn.Conv2d(4, 8, 3, groups=4),
    "pointwise": lambda: nn.Conv2d(4, 4, 1),
    "large": lambda: nn.Conv2d(4, 4, (33, 1), padding=(16, 0), groups=4),
    "subclass": lambda: Other(4, 4, 3, groups=4),
    "hooked": hooked,
    "named padding": lambda: nn.Conv2d(4, 4, 3, padding="same", groups=4),
    "reflected": lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", groups=4),
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, groups=4)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", UNLIKE)
def test_layers_that_the_kernel_does_not_do_are_left(name: str, dtype: torch.dtype) -> None:
    module = rectified(UNLIKE[name]()).to(dtype)
    x = cases.random((1, 4, 8, 8), 1, dtype)
    kinds = [type(part) for part in module]
    use_kernel(module, chains_of(module, lambda: module(x)))
    assert [type(part) for part in module] == kinds


def test_weights_to_train_and_other_rectifiers_are_left() -> None:
    x = cases.random((1, 4, 8, 8), 1, torch.float32)
    layer = nn.Conv2d(4, 4, 3, groups=4)
    trained, other = rectified(layer).requires_grad_(), nn.Sequential(OtherReLU6(), layer, nn.Hardtanh(0, 6))
    for module in (trained, other):
        kinds = [type(part) for part in module]
        use_kernel(module, chains_of(module, lambda module=module: module(x)))
        assert [type(part) for part in module] == kinds


@pytest.mark.parametrize("make", [nn.Conv2d, Conv2dSame])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_convolutions_without_rectifiers(dtype: torch.dtype, make: Any) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), make(4, 4, 3, stride=2, groups=4, bias=False), nn.SiLU())
    plain = plain.requires_grad_(False).to(dtype, memory_format=torch.channels_last)
    x, fused = images(dtype=dtype), copy.deepcopy(plain)
    use_kernel(fused, chains_of(fused, lambda: fused(x)))
    assert isinstance(fused[1], KERNELS) == (dtype.itemsize == 2)
    check_near(passes(fused, x), passes(plain, x), 4 * torch.finfo(dtype).eps)


def test_forms_that_are_not_channels_last_are_left() -> None:
    model, x = Classifier(lively(_timm)), images(dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        one = prepare(model, x, Preparation(Form(dtype)))
        assert not any(isinstance(part, (*KERNELS, ReLU6Left)) for part in one.modules())
        assert taken(prepare(model, x, Preparation(Form(dtype, channels_last=True)))) == TAKEN["timm"]


def test_members_of_an_ensemble() -> None:
    both = Ensemble([Classifier(lively(make)) for make in (_timm, _own)]).eval()
    x = images(dtype=torch.float32)
    plain, fused = prepared(both, x)
    assert [taken(member) for member in fused.members] == [TAKEN["timm"], TAKEN["own"]]
    check_near([fused(x)], [plain(x)], 1e-5)


def test_witnesses() -> None:
    model, x = Classifier(lively(_timm)), images(dtype=torch.float32)
    for example, wanted in ((x, TAKEN["timm"]), (None, 0)):
        witnesses = Witnesses([model], example=example)
        assert taken(witnesses.models[0]) == wanted
        check_near([witnesses.logits(x)[0]], [model(x).detach()], 1e-5)


def test_under_autocast() -> None:
    model, x = Classifier(lively(_timm)), images(dtype=torch.float32)
    plain, fused = prepared(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (passes(one.logits, x, second=False) for one in (fused, plain))
    check_near(ours, theirs, 0.02)
    assert not torch.equal(ours[0], fused(x))


SURGERIES: list[Surgery] = [
    SkipGradient(0.3),
    GhostSkips(0.4),
    GhostDropout(0.3),
    FeatureNoise(None, 0.4),
    FeatureNoise("1.conv2", 0.4),
    FeatureNoise("1.act1", 0.4),
    FeatureNoise("2.norm2", 0.4),
    LinearBackward(),
    SmoothBackward(),
]


def gradient_in_attack(source: Classifier, x: Tensor) -> list[Tensor]:
    draws = Draws(3, 1, torch.arange(len(x)), torch.zeros(1, dtype=torch.int64), SOURCE_SLOT)
    leaf = x.clone().requires_grad_()
    logits = source.logits_of(lambda *given: flat(leaf * 1).to(given[2]), draws)
    (grad,) = torch.autograd.grad(logits.square().sum(), leaf)
    return [logits.detach(), grad]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("surgery", SURGERIES, ids=str)
def test_surgery(surgery: Surgery, in_place: bool) -> None:
    model, x = Classifier(lively(_own, in_place)), images(dtype=torch.float32)
    plain, fused = prepared(model, x)
    ours = gradient_in_attack(surrogate(fused, surgery), x)
    check_near(ours, gradient_in_attack(surrogate(plain, surgery), x), 1e-5)
    assert taken(fused) == TAKEN["own"]
    if not isinstance(surgery, (SmoothBackward, LinearBackward)):
        assert not torch.allclose(ours[1], gradient_in_attack(fused, x)[1], rtol=1e-3)
    # What has had surgery before it is prepared keeps its layers, but for those of half precision.
    plain, fused = prepared(surrogate(model, surgery), x)
    assert not any(isinstance(part, (*KERNELS, ReLU6Left)) for part in fused.modules())
    check_near(gradient_in_attack(fused, x), gradient_in_attack(plain, x), 0)
    plain, fused = prepared(surrogate(model, surgery), x, "bf16")
    assert any(isinstance(part, KERNELS) for part in fused.modules())
    check_near(gradient_in_attack(fused, x), gradient_in_attack(plain, x), 0.1)


def test_a_compiled_form() -> None:
    def tiny() -> nn.Module:
        chain = (nn.Conv2d(3, 4, 1), nn.ReLU6(True), Conv2dSame(4, 4, 3, stride=2, groups=4), nn.ReLU6(True))
        return nn.Sequential(*chain, nn.Flatten(), nn.Linear(64, 3))

    model, x = Classifier(tiny().eval()), images(side=8, dtype=torch.float32)
    eager, compiled = (prepare(model, x, "fp32", compiled=form) for form in (False, True))
    assert taken(eager) == taken(compiled) == 2
    check_near(passes(compiled, x, second=False), passes(eager, x, second=False), 1e-5)


def test_models_without_a_depthwise_layer_are_not_run() -> None:
    def run() -> None:
        raise AssertionError("passed through")

    assert chains_of(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU6()), run) == []
