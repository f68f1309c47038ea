"""Estimators over the members of an ensemble, and their presets."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alignfast.attacks import AdaptiveEnsemble, Attack, CommonWeakness, ReducedVariance, create
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
from tests.attacks.test_presets import ALPHA, DECAY, EPS, LABELS, STEPS, clip, network, photos, unit

BASE = {"eps": EPS, "alpha": ALPHA, "steps": STEPS, "decay": DECAY}
MEMBERS = 3


def networks() -> list[Classifier]:
    """Of very different slopes, so that it matters which one counts how much."""
    models = [network(seed) for seed in range(MEMBERS)]
    for power, model in enumerate(models):
        model.module[-1].weight.data *= 3.0**power
    return models


def loss_of(models: list[Classifier], weights: list[float], x: Tensor, label: int) -> Tensor:
    z: Tensor = sum(weight * model(x)[0] for weight, model in zip(weights, models, strict=True))
    return torch.logsumexp(z, 0) - z[label]


def slope(models: list[Classifier], weights: list[float], x: Tensor, label: int, sign: int = 1) -> Tensor:
    leaf = x.detach().clone().requires_grad_()
    return sign * torch.autograd.grad(loss_of(models, weights, leaf, label), leaf)[0]


def mean_slope(models: list[Classifier], combine: str, x: Tensor, label: int, sign: int) -> Tensor:
    equal = [1 / MEMBERS] * MEMBERS
    if combine == "logits":
        return slope(models, equal, x, label, sign)
    return sum(slope([model], [1.0], x, label, sign) for model in models) / MEMBERS


def svre(models: list[Classifier], combine: str, image: Tensor, label: int, sign: int) -> Tensor:
    adv, outer = image, torch.zeros_like(image)
    for _ in range(STEPS):
        whole = mean_slope(models, combine, adv, label, sign)
        inner, m = adv, torch.zeros_like(image)
        for number in range(2 * MEMBERS):
            one = [models[number % MEMBERS]]
            g = slope(one, [1.0], inner, label, sign) - (slope(one, [1.0], adv, label, sign) - whole)
            m = DECAY * m + unit(g)
            inner = clip(inner + 0.7 * ALPHA * m.sign(), image)
        outer = DECAY * outer + unit(m)
        adv = clip(adv + ALPHA * outer.sign(), image)
    return adv


def adaea(models: list[Classifier], combine: str, image: Tensor, label: int, sign: int) -> Tensor:
    adv, m = image, torch.zeros_like(image)
    for _ in range(STEPS):
        slopes = [slope([model], [1.0], adv, label) for model in models]
        own = [clip(adv + ALPHA * g.sign(), image) for g in slopes]
        scores = []
        for k in range(MEMBERS):
            ratios = [
                (loss_of([models[i]], [1.0], own[k], label) / loss_of([models[i]], [1.0], own[i], label)).item()
                for i in range(MEMBERS)
                if i != k
            ]
            scores.append(math.exp(4.0 * sum(ratios)))
        g = slope(models, [score / sum(scores) for score in scores], adv, label)
        for y in range(g.shape[2]):
            for x in range(g.shape[3]):
                cosines = [
                    float(torch.dot(a[0, :, y, x], b[0, :, y, x]) / (a[0, :, y, x].norm() * b[0, :, y, x].norm()))
                    for i, a in enumerate(slopes)
                    for b in slopes[:i]
                ]
                if sum(cosines) / len(cosines) < 0.1:
                    g[:, :, y, x] = 0
        m = DECAY * m + unit(g)
        adv = clip(adv + ALPHA * m.sign(), image)
    return adv


def cwa(models: list[Classifier], combine: str, image: Tensor, label: int, sign: int) -> Tensor:
    adv, inside, outer = image, torch.zeros_like(image), torch.zeros_like(image)
    for _ in range(STEPS):
        inner = clip(adv - 0.01 * mean_slope(models, combine, adv, label, sign).sign(), image)
        for model in models:
            g = slope([model], [1.0], inner, label, sign)
            inside = DECAY * inside + g / g.square().sum().sqrt()
            inner = clip(inner + 0.3 * inside, image)
        outer = DECAY * outer + unit(inner - adv)
        adv = clip(adv + ALPHA * outer.sign(), image)
    return adv


EQUATIONS: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "svre": (svre, {"rounds": 2, "beta": 0.7}),
    "adaea": (adaea, {"beta": 4.0, "threshold": 0.1, "random_start": False}),
    "cwa": (cwa, {"r_size": 0.01, "inner_step_size": 0.3}),
}
TARGETED = [("svre", False), ("svre", True), ("adaea", False), ("cwa", False), ("cwa", True)]


@pytest.mark.parametrize("combine", ["logits", "losses"])
@pytest.mark.parametrize(("name", "targeted"), TARGETED)
def test_the_papers_equations(name: str, targeted: bool, combine: Any) -> None:
    """Image by image."""
    models, images = networks(), photos()
    equation, given = EQUATIONS[name]
    sign = -1 if targeted else 1
    expected = torch.cat([equation(models, combine, images[n : n + 1], int(LABELS[n]), sign) for n in range(3)])
    attack = create(name, Ensemble(models, combine), **BASE, **given, targeted=targeted)
    assert (expected - images).abs().amax((1, 2, 3)).min() > 0.9 * EPS
    torch.testing.assert_close(attack(images, LABELS), expected, rtol=0, atol=1e-9)


def test_each_pass_shows_a_row_to_a_member() -> None:
    """And the steps of AdaEA's members are tried on all of them."""
    for name, forward in (("svre", 0), ("adaea", 2), ("cwa", 0)):
        members = [samples.Halving(), samples.Halving()]
        attack = create(name, Ensemble(members), steps=2)
        attack(samples.photos(3), samples.labels_of(3))
        expected = 2 * 3 * (attack.passes + forward)
        assert [sum(member.batches) for member in members] == [expected] * 2
    assert create("svre", Ensemble([samples.Halving()] * 2)).passes == 6


def test_weights_of_a_fused_ensemble_are_an_images_own() -> None:
    """Also where several copies of each go together."""
    images, labels, source = photos(), LABELS, Ensemble(networks())
    one, many = (create("adaea+sinifgsm", source, **BASE, m=3, random_start=False, max_batch=most) for most in (3, 100))
    together = many(images, labels)
    torch.testing.assert_close(one(images, labels), together, rtol=0, atol=1e-9)
    alone = torch.cat([many(images[n : n + 1], labels[n : n + 1]) for n in range(3)])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", EQUATIONS)
@pytest.mark.parametrize("source", [samples.Halving(), Ensemble([samples.Halving()])])
def test_one_model_is_refused(name: str, source: nn.Module) -> None:
    attack = create(name, source)
    with pytest.raises(ValueError, match="source: got one model; allowed is an Ensemble of at least two"):
        attack(samples.photos(2), samples.labels_of(2))


def test_a_layer_of_one_member_is_refused_where_members_are_looked_at_alone() -> None:
    source = Ensemble([samples.Network(), samples.Network()]).double()
    attack = create("svre+fia", source, layer="0.module.layers.0", num_ens=2)
    with pytest.raises(ValueError, match=r"layers: got '0\.module\.layers\.0'"):
        attack(samples.photos(2), samples.labels_of(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", EQUATIONS)
def test_a_zero_gradient_moves_nothing(name: str, dtype: torch.dtype) -> None:
    layers = [nn.Sequential(nn.Flatten(), nn.Linear(3 * 144, 1)) for _ in range(2)]
    images = photos().to(dtype)
    still = {"random_start": False} if name == "adaea" else {}
    adv = create(name, Ensemble(layers).to(dtype), **still)(images, torch.zeros(3, dtype=torch.int64))
    assert torch.equal(adv, images)


def test_adaea_starts_at_normal_noise() -> None:
    layers = [nn.Sequential(nn.Flatten(), nn.Linear(3 * 144, 1)) for _ in range(2)]
    source, images, indices = Ensemble(layers).double(), photos(), torch.tensor([4, 0, 9])
    first, second = (
        philox_uniform(indices, torch.tensor([0]), (3, 12, 12), seed=5, step=0, purpose=purpose)[0].double()
        for purpose in (0, 1)
    )
    noise = 0.001 * (-2 * (1 - first).log()).sqrt() * (2 * math.pi * second).cos()
    adv = create("adaea", source, seed=5)(images, torch.zeros(3, dtype=torch.int64), indices=indices)
    torch.testing.assert_close(adv, (images + noise).clamp(0, 1), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ReducedVariance(rounds=0), "rounds: got 0"),
        (lambda: ReducedVariance(beta=-1.0), r"beta: got -1\.0"),
        (lambda: ReducedVariance(decay=-1.0), r"decay: got -1\.0"),
        (lambda: AdaptiveEnsemble(beta=-1.0), r"beta: got -1\.0"),
        (lambda: AdaptiveEnsemble(threshold=1.5), r"threshold: got 1\.5"),
        (lambda: CommonWeakness(reverse=-1.0), r"reverse: got -1\.0"),
        (lambda: CommonWeakness(inner=-1.0), r"inner: got -1\.0"),
        (lambda: CommonWeakness(decay=-1.0), r"decay: got -1\.0"),
        (lambda: create("adaea", network(), targeted=True), "targeted: got True; allowed is False for AdaEA"),
    ],
)
def test_bad_parameters(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


class Steep(samples.Halving):
    def forward(self, images: Tensor) -> Tensor:
        return 2 * super().forward(images).roll(1, 1)


def halvings() -> Ensemble:
    return Ensemble([samples.Halving(), Steep()])


def pair() -> Ensemble:
    return Ensemble([Classifier(samples.Network(), (0.5, 0.5), (0.2, 0.2)), samples.Network()])


@pytest.mark.parametrize("name", EQUATIONS)
def test_what_holds_for_every_attack(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on = partial(create, name, eps=0.1, alpha=0.04, steps=2)
    source = pair()
    assert_independent(partial(on, halvings()))
    assert_leaves_all_as_it_was(partial(on, source), source)
    assert_replays(partial(on, halvings()), monkeypatch)
    assert_nothing_waits(on, pair())
    assert_all_on_the_gpu(on, pair, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", EQUATIONS)
def test_they_stay_in_the_ball_and_in_their_dtype(name: str, dtype: torch.dtype) -> None:
    images = (samples.photos(3, dtype) * 3).round() / 3
    attack: Attack = create(name, halvings().to(dtype), eps=0.1, alpha=0.04, steps=5)
    adv = attack(images, samples.labels_of(3))
    assert adv.dtype == dtype
    assert (adv - images).abs().max() <= 0.1 + torch.finfo(dtype).eps
    assert 0 <= adv.min() <= adv.max() <= 1
