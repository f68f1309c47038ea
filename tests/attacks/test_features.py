"""Objectives over features, and their presets."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from alignfast.attacks import (
    Attack,
    FeatureDistance,
    FeatureImportance,
    NeuronAttribution,
    RandomPatches,
    create,
)
from alignfast.attacks.objectives.features import middle_layer, stages
from alignfast.models import Classifier, Ensemble
from alignfast.ops import philox_uniform
from tests.attacks import samples
from tests.attacks.properties import (
    assert_all_on_the_gpu,
    assert_independent,
    assert_leaves_all_as_it_was,
    assert_nothing_waits,
    assert_replays,
)
from tests.attacks.test_presets import (
    ALPHA,
    CLASSES,
    DECAY,
    EPS,
    INDICES,
    LABELS,
    SEED,
    SIDE,
    STEPS,
    clip,
    gradient_of,
    photos,
    unit,
)

BASE = {"eps": EPS, "alpha": ALPHA, "steps": STEPS, "decay": DECAY, "seed": SEED}
COPIES = 6


def network() -> Classifier:
    """Bent behind its features too, so that their gradients are of the copy that is shown."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layers = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(4, 5, 3, stride=2),
            nn.Sigmoid(),
            nn.Flatten(),
            nn.Linear(5 * 25, CLASSES),
        )
    layers[2].weight.data *= 5
    return Classifier(layers.double(), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), CLASSES)


def features(model: Classifier, x: Tensor) -> Tensor:
    """Of the first convolution, behind its activation."""
    assert model.mean is not None
    assert model.std is not None
    normal = (x - model.mean.double()[:, None, None]) / model.std.double()[:, None, None]
    return torch.tanh(nn.functional.conv2d(normal, model.module[0].weight, model.module[0].bias, padding=1))


def uniform(number: int, purpose: int, n: int, shape: tuple[int, ...]) -> Tensor:
    """Draws of the start, where the objective has the copies from 3 times 65536 on."""
    drawn = philox_uniform(
        INDICES[n : n + 1], torch.tensor([3 * 2**16 + number]), shape, seed=SEED, step=0, purpose=purpose
    )
    return drawn[0, 0].double()


def dropped(image: Tensor, number: int, n: int, drop: float) -> Tensor:
    return torch.where(uniform(number, 0, n, (3, SIDE, SIDE)) < drop, 0.0, image)


def patched(image: Tensor, number: int, n: int, drop: float) -> Tensor:
    side = [1, 3, 5, 7][number % 4]
    count = (SIDE + side - 1) // side
    drawn, values, result = (
        uniform(number, 0, n, (3, count, count)),
        uniform(number, 1, n, (3, SIDE, SIDE)),
        image.clone(),
    )
    for c in range(3):
        for i in range(SIDE):
            for j in range(SIDE):
                if drawn[c, i // side, j // side] < drop:
                    result[c, i, j] *= values[c, i, j]
    return result


def aggregate(model: Classifier, images: Tensor, shown: Callable[[Tensor, int, int], Tensor], softmax: bool) -> Tensor:
    total = torch.zeros(3, 4, SIDE, SIDE, dtype=torch.float64)
    for n, image in enumerate(images):
        for number in range(COPIES):
            f = features(model, shown(image, number, n)[None]).detach().requires_grad_()
            z = model.module[2:](f)[0]
            value = z.exp()[LABELS[n]] / z.exp().sum() if softmax else z[LABELS[n]]
            total[n] += torch.autograd.grad(value, f)[0][0]
    return total


def ila(model: Classifier, images: Tensor, targeted: bool) -> Tensor:
    guide = follow(images, gradient_of(model, targeted))
    return (features(model, guide) - features(model, images)).detach()


def fia(model: Classifier, images: Tensor, targeted: bool) -> Tensor:
    total = aggregate(model, images, lambda image, k, n: dropped(image, k, n, 0.4), False)
    return (1 if targeted else -1) * torch.stack([one / one.square().sum().sqrt() for one in total])


def rpa(model: Classifier, images: Tensor, targeted: bool) -> Tensor:
    total = aggregate(model, images, lambda image, k, n: patched(image, k, n, 0.4), False)
    return (1 if targeted else -1) * torch.stack([one / one.square().sum().sqrt() for one in total])


def naa(model: Classifier, images: Tensor, targeted: bool) -> Tensor:
    total = aggregate(model, images, lambda image, k, n: image * (k + 1) / COPIES, True)
    return (1 if targeted else -1) * total / COPIES


def follow(images: Tensor, gradient: Callable[[Tensor], Tensor], decay: float = DECAY) -> Tensor:
    adv, m = images, torch.zeros_like(images)
    for _ in range(STEPS):
        m = decay * m + unit(gradient(adv))
        adv = clip(adv + ALPHA * m.sign(), images)
    return adv


def tap(model: Classifier, images: Tensor, targeted: bool) -> Tensor:
    """Over the convolution and its activation, image by image and pixel by pixel of the box."""
    result = []
    for n, image in enumerate(images):
        adv = image[None]
        for _ in range(STEPS):
            leaf = adv.clone().requires_grad_()
            z = model(leaf)[0]
            gain = (torch.logsumexp(z, 0) - z[LABELS[n]]) * (-1 if targeted else 1)
            after, before = features(model, leaf), features(model, image[None])
            for f, g in ((after, before), (torch.atanh(after), torch.atanh(before))):
                root_f, root_g = (v.sign() * v.abs() ** 0.4 for v in (f, g))
                gain = gain + 0.3 * (root_f - root_g).square().sum()
            moved = nn.functional.pad(leaf - image, (2, 2, 2, 2))[0]
            sums = [moved[:, i : i + 5, j : j + 5].sum((1, 2)).abs().sum() for i in range(SIDE) for j in range(SIDE)]
            gain = gain + 0.2 * sum(sums) / 25
            adv = clip(adv + ALPHA * torch.autograd.grad(gain, leaf)[0].sign(), image)
        result.append(adv)
    return torch.cat(result)


@pytest.mark.parametrize("targeted", [False, True])
def test_tap(targeted: bool) -> None:
    model, images = network(), photos()
    given = {"lam": 0.3, "alpha_tap": 0.4, "yita": 0.2, "s": 5, "layers": ["0", "1"], "targeted": targeted}
    found = create("tap", model, eps=EPS, alpha=ALPHA, steps=STEPS, **given)(images, LABELS)
    torch.testing.assert_close(found, tap(model, images, targeted), rtol=0, atol=1e-9)
    bare = create("tap", model, eps=EPS, alpha=ALPHA, steps=STEPS, targeted=targeted, lam=0.0, yita=0.0)
    plain = create("bim", model, eps=EPS, alpha=ALPHA, steps=STEPS, targeted=targeted)(images, LABELS)
    assert torch.equal(bare(images, LABELS), plain)
    assert not torch.equal(found, plain)


def test_features_of_zero_have_no_slope() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 4)).double()
    model[0].bias.data.fill_(-0.5)
    model[0].weight.data.abs_()
    adv = create("tap", model, layers=["1"], lam=1.0)(photos(), LABELS)
    assert not adv.isnan().any()
    assert not torch.equal(adv, photos())


WEIGHTS: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "ila": (ila, {}),
    "fia": (fia, {"num_ens": COPIES, "drop_rate": 0.4}),
    "rpa": (rpa, {"num_ens": COPIES, "patch_prob": 0.6}),
    "naa": (naa, {"N": COPIES}),
}


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("name", WEIGHTS)
def test_the_papers_equations(name: str, targeted: bool) -> None:
    model, images = network(), photos()
    weights_of, given = WEIGHTS[name]
    weights = weights_of(model, images, targeted)

    def gradient(x: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad((weights * features(model, leaf)).sum(), leaf)[0]

    expected = follow(images, gradient, 0.0 if name == "ila" else DECAY)
    found = create(name, model, **BASE, **given, targeted=targeted, layer="1")(images, LABELS, indices=INDICES)
    assert (expected - images).abs().amax((1, 2, 3)).min() > 0.9 * EPS
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_the_layer_is_the_one_that_is_named() -> None:
    model, images = network(), photos()
    first, second = (create("fia", model, layer=layer, num_ens=2)(images, LABELS) for layer in ("0", "2"))
    assert not torch.equal(first, second)
    assert torch.equal(create("fia", model, num_ens=2)(images, LABELS), first)


MIDDLES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "resnet": (torchvision.models.resnet50, "layer2"),
    "regnet": (partial(timm.create_model, "regnety_004"), "s2"),
    "swin": (partial(timm.create_model, "swin_tiny_patch4_window7_224"), "layers.1"),
    "convnext": (torchvision.models.convnext_tiny, "features.3"),
    "vgg": (torchvision.models.vgg16, "features.14"),
    "mobilenet": (torchvision.models.mobilenet_v2, "features.9"),
    "densenet": (torchvision.models.densenet121, "features.transition2"),
    "inception": (partial(torchvision.models.inception_v3, init_weights=False), "Mixed_6a"),
    "vit": (partial(timm.create_model, "vit_tiny_patch16_224"), "blocks.5"),
    "efficientnet": (partial(timm.create_model, "efficientnet_lite0"), "blocks.3"),
    "network": (samples.Network, "layers.0"),
    "wrapped": (lambda: nn.Sequential(nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.Conv2d(1, 1, 1))), "0.0"),
}


@pytest.mark.parametrize("case", MIDDLES)
def test_the_middle_of_common_models(case: str) -> None:
    make, layer = MIDDLES[case]
    with torch.device("meta"):
        source = Classifier(make())
    assert middle_layer(source) == layer
    assert middle_layer(source.module) == layer
    assert set(stages(source)) < {name for name, _ in source.module.named_modules()}


@pytest.mark.parametrize(
    "source",
    [nn.Flatten(), nn.Linear(2, 2), nn.Sequential(nn.Flatten(), nn.Linear(2, 2)), Ensemble([samples.Network()])],
)
def test_a_source_without_a_middle_needs_a_layer(source: nn.Module) -> None:
    with pytest.raises(ValueError, match="layer: got None for a source without layers"):
        create("fia", source)


class Aside(samples.Network):
    """With a head for training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.aside = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("source", "layer", "message"),
    [
        (samples.Network(), "layer.0", r"layers: got 'layer.0' \(did you mean 'layers.0'\?\)"),
        (Ensemble([samples.Network()]), "layers.0", "layers: got 'layers.0'"),
        (Aside(), "aside", "layers: 'aside' has no part in a pass"),
        (Ensemble([samples.Network()], "losses"), "0.module.layers.0", "source: got an Ensemble that combines losses"),
    ],
)
def test_layers_that_cannot_be_seen_are_refused(source: nn.Module, layer: str, message: str) -> None:
    attack = create("naa", source, layer=layer)
    with pytest.raises(ValueError, match=message):
        attack(samples.photos(2, torch.float32), samples.labels_of(2))


@pytest.mark.parametrize("combine", ["logits", "probabilities"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_member_of_an_ensemble_has_layers(name: str, combine: Any) -> None:
    alone = create(name, network(), **BASE, layer="1")(photos(), LABELS)
    source = Ensemble([network()], combine)
    found = create(name, source, **BASE, layer="0.module.1")(photos(), LABELS)
    # A logit is not a log-probability; all else is the same of either.
    if combine == "logits" or name in ("ila", "naa"):
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-9)
    else:
        assert not torch.equal(found, alone)
    assert not torch.equal(found, photos())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FeatureImportance("0", copies=0), "copies: got 0"),
        (lambda: FeatureImportance("0", drop=1.5), r"drop: got 1\.5"),
        (lambda: RandomPatches("0", drop=-0.5), r"drop: got -0\.5"),
        (lambda: NeuronAttribution("0", copies=0), "copies: got 0"),
        (lambda: FeatureDistance(()), "names: got none"),
        (lambda: FeatureDistance(("0",), lam=-1.0), r"lam: got -1\.0"),
        (lambda: FeatureDistance(("0",), power=0.0), r"power: got 0\.0"),
        (lambda: FeatureDistance(("0",), eta=-1.0), r"eta: got -1\.0"),
        (lambda: FeatureDistance(("0",), size=2), "size: got 2; allowed is an odd"),
        (lambda: create("ila", lambda x: x), "model: got function"),
    ],
)
def test_bad_parameters(build: Callable[[], object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        build()


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_zero_gradient_moves_nothing(name: str) -> None:
    """A layer that the logits do not depend on, and one class."""
    layers = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(2 * SIDE * SIDE, 1)).double()
    nn.init.zeros_(layers[2].weight)
    adv = create(name, layers, layer="0", targeted=True)(photos(), torch.zeros(3, dtype=torch.int64))
    assert torch.equal(adv, photos())


SMALL = {"eps": 0.1, "alpha": 0.03, "steps": 3, "layer": "coupled"}
PARTICULAR = {
    name: SMALL | {key: 3 for key in given if key != "drop_rate" and key != "patch_prob"}
    for name, (_, given) in WEIGHTS.items()
}


PARTICULAR["tap"] = {key: value for key, value in SMALL.items() if key != "layer"} | {"layers": ["coupled"]}


@pytest.mark.parametrize("name", PARTICULAR)
def test_what_holds_for_every_attack(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def on(model: nn.Module, **options: Any) -> Attack:
        layer = {"layers": ["layers.0", "layers.2"]} if name == "tap" else {"layer": "layers.2"}
        return create(name, model, **(PARTICULAR[name] | layer), **options)

    halving, network = partial(create, name, samples.Halving(), **PARTICULAR[name]), samples.Network()
    assert_independent(halving)
    assert_leaves_all_as_it_was(partial(on, network), network)
    assert_replays(halving, monkeypatch)
    assert_nothing_waits(on, samples.Network())
    assert_all_on_the_gpu(on, samples.Network, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PARTICULAR)
def test_they_stay_in_the_ball_and_in_their_dtype(name: str, dtype: torch.dtype) -> None:
    images = (samples.photos(3, dtype) * 3).round() / 3
    adv = create(name, samples.Halving().to(dtype), **PARTICULAR[name])(images, samples.labels_of(3))
    assert adv.dtype == dtype
    assert (adv - images).abs().max() <= 0.1 + torch.finfo(dtype).eps
    assert 0 <= adv.min() <= adv.max() <= 1
