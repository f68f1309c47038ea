from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from alignfast.models import Classifier, Ensemble
from alignfast.models.folding import fold_batch_norm, folded
from tests import cases

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def trained(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """The module in evaluation mode, with statistics and weights of its batch normalisations that do something."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = make()
        for part in module.modules():
            if isinstance(part, _BatchNorm) and part.running_mean is not None:
                part.running_mean.uniform_(-0.2, 0.2)
                part.running_var.uniform_(0.5, 1.5)
            if isinstance(part, _BatchNorm) and part.affine:
                nn.init.uniform_(part.weight, 0.5, 1.5)
                nn.init.uniform_(part.bias, -0.2, 0.2)
    return module.eval()


def images(count: int = 2, side: int = 8, channels: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return cases.random((count, channels, side, side), 1, dtype)


def norms_of(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if isinstance(part, _BatchNorm)]


NETWORKS = {
    "timm:resnet50": (lambda: timm.create_model("resnet50"), 64, 53),
    "timm:tf_efficientnet_lite2": (lambda: timm.create_model("tf_efficientnet_lite2"), 64, 64),
    "timm:vit_tiny": (lambda: timm.create_model("vit_tiny_patch16_224", img_size=32), 32, 0),
    # The first normalisation of each of 16 blocks, and the last of all, stand behind sums.
    "timm:resnetv2_50": (lambda: timm.create_model("resnetv2_50"), 64, 32),
    "torchvision:resnet50": (torchvision.models.resnet50, 64, 53),
    "torchvision:vgg11_bn": (lambda: torchvision.models.vgg11_bn().features, 64, 8),
    # The stem, and the second normalisation of each of 58 layers.
    "torchvision:densenet121": (torchvision.models.densenet121, 64, 59),
    "torchvision:mobilenet_v3_small": (torchvision.models.mobilenet_v3_small, 64, 34),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    make, side, pairs = NETWORKS[name]
    module, rows = trained(make).double(), images(side=side, dtype=torch.float64)
    exact = copy.deepcopy(module)
    before = len(norms_of(module))
    assert fold_batch_norm(module, rows[:1]) == pairs
    assert len(norms_of(module)) == before - pairs
    with torch.no_grad():
        wanted, logits = exact(rows), module(rows)
        torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-10 * float(wanted.abs().max()))
        single, wide = module.float()(rows.float()), exact.float()(rows.float())
    torch.testing.assert_close(single, wide, rtol=0, atol=1e-5 * float(wide.abs().max()))


class Odd(nn.Module):
    """A convolution and a normalisation, which `use` puts together."""

    def __init__(self, use: Callable[[Any, Tensor], Any], conv: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = conv or nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.other = nn.BatchNorm2d(3)
        self.use = use
        self.kept: Any = None

    def forward(self, rows: Tensor) -> Any:
        return self.use(self, rows)


def kept(one: Any, rows: Tensor) -> Tensor:
    one.kept = one.conv(rows)
    normed: Tensor = one.norm(one.kept)
    return normed


def shared(one: Any, rows: Tensor) -> Tensor:
    both: Tensor = one.norm(one.conv(rows)) + one.norm(rows)
    return both


def residual(one: Any, rows: Tensor) -> Tensor:
    out = one.conv(rows)
    both: Tensor = one.norm(out) + out
    return both


def changed(one: Any, rows: Tensor) -> Tensor:
    out = one.conv(rows)
    out.relu_()
    normed: Tensor = one.norm(out)
    return normed


def returned(one: Any, rows: Tensor) -> Any:
    out = one.conv(rows)
    return one.norm(out), [out]


class Standardised(nn.Conv2d):
    """Its pass does not scale with its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight / self.weight.std(), self.bias)


LEFT = {
    "before": lambda one, rows: one.conv(one.norm(rows)),
    "view": lambda one, rows: one.norm(one.conv(rows).flatten(2)[..., None]),
    "twice": lambda one, rows: one.norm(one.conv(one.conv(rows))),
    "two norms": lambda one, rows: [one.norm(out := one.conv(rows)), one.other(out)],
    "shared": shared,
    "residual": residual,
    "changed": changed,
    "returned": returned,
    "kept": kept,
}


@pytest.mark.parametrize("name", LEFT)
def test_what_has_another_use_is_left(name: str) -> None:
    module = trained(lambda: Odd(LEFT[name]))
    assert fold_batch_norm(module, images()) == 0
    assert len(norms_of(module)) == 2


def straight(one: Any, rows: Tensor) -> Tensor:
    normed: Tensor = one.norm(one.conv(rows))
    return normed


def test_layers_that_are_not_plain_are_left() -> None:
    parametrized = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 3))
    hooked = nn.Conv2d(3, 3, 3)
    hooked.register_forward_hook(lambda module, inputs, output: output * 2)
    watched = nn.Conv2d(3, 3, 3)
    watched.register_full_backward_hook(lambda module, given, made: None)
    for conv in (Standardised(3, 3, 3), parametrized, hooked, watched, nn.ConvTranspose2d(3, 3, 3)):
        assert fold_batch_norm(trained(lambda conv=conv: Odd(straight, conv)), images()) == 0
    assert fold_batch_norm(trained(lambda: Odd(straight)), images()) == 1
    assert fold_batch_norm(trained(lambda: Odd(straight)).bfloat16(), images().bfloat16()) == 0
    batch_only = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    assert fold_batch_norm(batch_only, images()) == 0
    # Rows of a sequence as long as the layer is wide: the normalisation is over another dimension.
    sequence = trained(lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)))
    assert fold_batch_norm(sequence, cases.random((2, 8, 8), 1, torch.float32)) == 0


FOLDED: dict[str, Callable[[], nn.Module]] = {
    "without affine": lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False)),
    "groups": lambda: nn.Sequential(nn.Conv2d(3, 6, 3, groups=3, padding="same"), nn.BatchNorm2d(6, eps=0.1)),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.BatchNorm1d(5)),
    "activation": lambda: nn.Sequential(
        timm.layers.create_conv2d(3, 4, 3, stride=2, padding="same"),
        timm.layers.BatchNormAct2d(4, act_layer=nn.SiLU, drop_layer=nn.Dropout),
    ),
    "tied": lambda: (lambda conv: nn.ModuleDict({"a": nn.Sequential(conv, nn.BatchNorm2d(4)), "b": conv})["a"])(
        nn.Conv2d(3, 4, 3)
    ),
    "one dimension": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 4, 5), nn.BatchNorm1d(4)),
}


@pytest.mark.parametrize("name", FOLDED)
def test_kinds_of_pairs(name: str) -> None:
    module, rows = trained(FOLDED[name]).double(), images(dtype=torch.float64)
    exact = copy.deepcopy(module)
    module.train()
    assert fold_batch_norm(module, rows) == 1
    assert module.training
    assert all(part.training for part in module.modules())
    module.eval()
    assert not norms_of(module)
    torch.testing.assert_close(module(rows), exact(rows), rtol=1e-12, atol=1e-12)
    changed_layer = next(part for part in module.modules() if isinstance(part, (nn.Conv1d, nn.Conv2d, nn.Linear)))
    for tensor in (changed_layer.weight, changed_layer.bias):
        assert isinstance(tensor, nn.Parameter)
        assert not tensor.requires_grad


def network(classes: int = 5) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, classes)
    )


def test_a_folded_copy_leaves_the_model_as_it_is() -> None:
    model = Classifier(trained(network), MEAN, STD, 5, (3, 8, 8)).train()
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copied = folded(model, images(side=12))
    assert not norms_of(copied)
    assert not copied.training
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    assert model.training
    assert len(norms_of(model)) == 1
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    torch.testing.assert_close(copied(images()), model.eval()(images()), rtol=1e-5, atol=1e-6)


def test_members_of_an_ensemble_are_folded() -> None:
    members = [Classifier(trained(network, seed), MEAN, STD, 5) for seed in range(2)]
    ensemble = Ensemble(members, "probabilities").eval()
    copied = folded(ensemble, images())
    assert isinstance(copied, Ensemble)
    assert not norms_of(copied)
    torch.testing.assert_close(copied(images()), ensemble(images()), rtol=1e-5, atol=1e-6)


class Reads(nn.Module):
    """Looks at its normalisation, or at the number of images, in its pass."""

    def __init__(self, by_count: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.by_count = nn.Conv2d(3, 5, 8), nn.BatchNorm2d(5), by_count

    def forward(self, rows: Tensor) -> Tensor:
        out = self.conv(rows)
        if self.by_count and len(rows) > 1:
            return out.flatten(1)
        normed: Tensor = self.norm(out).flatten(1)
        return normed if self.by_count else normed * self.norm.weight


@pytest.mark.parametrize(("by_count", "reason"), [(True, "its logits change by"), (False, "it does not run then")])
def test_models_that_would_change_are_left_with_a_warning(by_count: bool, reason: str) -> None:
    model = Classifier(trained(lambda: Reads(by_count)), MEAN, STD, 5)
    with pytest.warns(RuntimeWarning, match=f"Reads: batch normalisation is not folded, because {reason}"):
        copied = folded(model, images())
    assert len(norms_of(copied)) == 1
    assert torch.equal(copied(images()), model(images()))


def test_an_example_without_images() -> None:
    with pytest.raises(ValueError, match="example: got no image"):
        folded(Classifier(network()), images(0))
