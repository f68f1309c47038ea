"""Objectives over logits, and their presets."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alignfast.attacks import (
    Attack,
    CrossEntropy,
    Divergence,
    Jittered,
    Logit,
    LogitMargin,
    LogitRatio,
    Margin,
    NormalStart,
    PoincareTriplet,
    Seen,
    SignStep,
    create,
)
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
    STEPS,
    clip,
    conv2d,
    diversity,
    network,
    noise,
    photos,
    unit,
)

BASE = {"eps": EPS, "alpha": ALPHA, "steps": STEPS}
# Of one image at a step: from its logits, its label or target, the class of the clean image and its logits.
Gain = Callable[[list[Tensor], int, int, Tensor], Tensor]


def others(z: list[Tensor], label: int) -> Tensor:
    return max((value for i, value in enumerate(z) if i != label), key=lambda value: value.item())


def margin(z: list[Tensor], label: int, kappa: float) -> Tensor:
    gain = others(z, label) - z[label]
    return gain if gain < kappa else 0 * gain


def targeted_margin(z: list[Tensor], target: int, kappa: float) -> Tensor:
    gain = z[target] - others(z, target)
    return gain if gain < kappa else 0 * gain


def ratio(z: list[Tensor], label: int) -> Tensor:
    first, _, third, _ = sorted(z, key=lambda value: value.item(), reverse=True)
    return -(z[label] - others(z, label)) / (first - third)


def targeted_ratio(z: list[Tensor], target: int, clean: int) -> Tensor:
    first, _, third, fourth = sorted(z, key=lambda value: value.item(), reverse=True)
    return -(z[clean] - z[target]) / (first - (third + fourth) / 2)


def calibrated(z: list[Tensor], label: int) -> Tensor:
    first, second = sorted((float(value.detach()) for value in z), reverse=True)[:2]
    scaled = [value / (first - second) for value in z]
    return sum(torch.exp(value - scaled[label]) for value in scaled).log()


def poincare_triplet(z: list[Tensor], target: int, clean: int, lam: float, gamma: float) -> Tensor:
    total = sum(value.abs() for value in z)
    u = [value / total for value in z]
    v = [1 - 1e-5 if i == target else 0.0 for i in range(len(z))]
    apart = sum((a - b) ** 2 for a, b in zip(u, v, strict=True))
    x = 1 + 2 * apart / ((1 - sum(a * a for a in u)) * (1 - sum(b * b for b in v)))
    distance = (x + (x * x - 1) ** 0.5).log()
    length = sum(value * value for value in z) ** 0.5
    triplet = (1 - z[target].abs() / length) - (1 - z[clean].abs() / length) + gamma
    return -distance - lam * (triplet if triplet > 0 else 0 * triplet)


def divergence(z: list[Tensor], clean: Tensor) -> Tensor:
    log_total, clean_total = sum(value.exp() for value in z).log(), clean.exp().sum().log()
    return sum(math.exp(c - clean_total) * ((c - clean_total) - (a - log_total)) for c, a in zip(clean, z, strict=True))


GAINS: dict[str, tuple[Any, bool, Gain]] = {
    "margin": (Margin(kappa=0.4), False, lambda z, y, *_: margin(z, y, 0.4)),
    "margin, targeted": (Margin(True, 0.4), True, lambda z, y, *_: targeted_margin(z, y, 0.4)),
    "ratio": (LogitRatio(), False, lambda z, y, *_: ratio(z, y)),
    "ratio, targeted": (LogitRatio(True), True, lambda z, y, c, _: targeted_ratio(z, y, c)),
    "logit": (Logit(), False, lambda z, y, *_: -z[y]),
    "logit, targeted": (Logit(True), True, lambda z, y, *_: z[y]),
    "logit margin": (LogitMargin(), False, lambda z, y, *_: calibrated(z, y)),
    "logit margin, targeted": (LogitMargin(True), True, lambda z, y, *_: -calibrated(z, y)),
    "triplet": (PoincareTriplet(True, 0.3, 0.5), True, lambda z, y, c, _: poincare_triplet(z, y, c, 0.3, 0.5)),
    "divergence": (Divergence(), False, lambda z, y, c, clean: divergence(z, clean)),
}


def gradient(model: nn.Module, x: Tensor, images: Tensor, gain: Gain) -> Tensor:
    """Image by image."""
    result = []
    for n in range(len(x)):
        leaf = x[n : n + 1].detach().clone().requires_grad_()
        clean = model(images[n : n + 1])[0].detach()
        (grad,) = torch.autograd.grad(gain(list(model(leaf)[0]), int(LABELS[n]), int(clean.argmax()), clean), leaf)
        result.append(grad)
    return torch.cat(result)


@pytest.mark.parametrize("name", GAINS)
def test_the_papers_objectives(name: str) -> None:
    """A whole attack: with momentum, so that magnitudes count, and from a random start, where no gradient is zero."""
    objective, _, gain = GAINS[name]
    model, images = network(), photos()
    adv, m = (images + noise(EPS, 0, 0)[0]).clamp(0, 1), torch.zeros_like(images)
    for _ in range(STEPS):
        g = gradient(model, adv, images, gain)
        m = DECAY * m + torch.stack([one / one.abs().mean().clamp(min=1e-300) for one in g])
        adv = clip(adv + ALPHA * m.sign(), images)
    found = Attack(model, **BASE, seed=SEED, step=SignStep(DECAY), objective=objective, random_start=True)
    assert (adv - images).abs().amax((1, 2, 3)).min() > 0.5 * EPS
    torch.testing.assert_close(found(images, LABELS, indices=INDICES), adv, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", GAINS)
def test_values_of_the_objectives(name: str) -> None:
    """Over rows of two views and two sets of logits."""
    objective, _, gain = GAINS[name]
    generator = torch.Generator().manual_seed(4)
    heads = torch.randn((2, 6, CLASSES), generator=generator, dtype=torch.float64)
    clean = torch.randn((3, CLASSES), generator=generator, dtype=torch.float64)
    kept = {"classes": clean.argmax(1), "clean": clean.log_softmax(1)}
    found = objective.gain(Seen(heads, {}), LABELS.repeat(4), kept).tolist()
    expected = [
        float(gain(list(row), int(LABELS[i % 3]), int(clean[i % 3].argmax()), clean[i % 3]))
        for i, row in enumerate(heads.flatten(0, 1))
    ]
    clipped = [0.4 if f == pytest.approx(0.4) and e == 0 else e for f, e in zip(found, expected, strict=True)]
    assert found == pytest.approx(clipped)


def test_a_margin_is_worth_no_more_than_kappa() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0], [1.0, 3.0, 2.5]]).requires_grad_()
    gains = Margin(kappa=0.25).gain(Seen(logits[None], {}), torch.tensor([0, 2]), {})
    assert gains.tolist() == [-1.0, 0.25]
    (grad,) = torch.autograd.grad(gains.sum(), logits)
    assert grad.tolist() == [[-1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]


PRESET_OBJECTIVES: dict[str, tuple[dict[str, Any], bool, Any]] = {
    "cwpgd": ({"kappa": 0.3}, False, Margin(kappa=0.3)),
    "tpgd": ({}, False, Divergence()),
    "upgd": ({}, True, CrossEntropy(True)),
    "upgd margin": ({"loss": "margin"}, True, Margin(True, 0.0)),
    "upgd dlr": ({"loss": "dlr"}, False, LogitRatio()),
    "upgd logit": ({"loss": "logit"}, True, Logit(True)),
    "upgd logit_margin": ({"loss": "logit_margin"}, False, LogitMargin()),
    "jitter": ({"scale": 3.0, "std": 0.4}, True, Jittered(True, 3.0, 0.4)),
    "logit": ({}, True, Logit(True)),
    "logit_margin": ({}, False, LogitMargin()),
    "potrip": ({"lamb": 0.1, "gamma": 0.2}, True, PoincareTriplet(True, 0.1, 0.2)),
}


@pytest.mark.parametrize("case", PRESET_OBJECTIVES)
def test_presets_have_the_objectives_of_their_names(case: str) -> None:
    given, targeted, objective = PRESET_OBJECTIVES[case]
    attack = create(case.split()[0], network(), targeted=targeted, **given)
    assert attack.objective == objective
    assert attack.steps == (300 if case in ("logit", "logit_margin", "potrip") else 10)
    assert attack.random_start == (case in ("cwpgd", "tpgd", "jitter"))


@pytest.mark.parametrize("case", ["logit", "logit_margin", "potrip"])
def test_the_targeted_attacks_are_diverse_and_smoothed(case: str) -> None:
    """Against equations: one step of input diversity, smoothing and sign, then momentum."""
    gain = GAINS[{"logit": "logit, targeted", "logit_margin": "logit margin, targeted", "potrip": "triplet"}[case]][2]
    model, images = network(), photos()
    line = torch.tensor([math.exp(-0.5 * x * x) for x in (-3.0, -1.5, 0.0, 1.5, 3.0)], dtype=torch.float64)
    kernel = torch.outer(line, line) / line.sum() ** 2
    adv, m = images, torch.zeros_like(images)
    for step in range(3):
        leaf = adv.clone().requires_grad_()
        shown = diversity(leaf, step, 1.3, 0.7)
        (g,) = torch.autograd.grad(shown, leaf, gradient(model, shown.detach(), images, gain))
        g = conv2d(g.flatten(0, 1)[:, None], kernel[None, None], padding=2).reshape(g.shape)
        m = DECAY * m + (unit(g) if case == "logit_margin" else g)
        adv = clip(adv + ALPHA * m.sign(), images)
    more = {"lamb": 0.3, "gamma": 0.5} if case == "potrip" else {}
    attack = create(
        case, model, eps=EPS, alpha=ALPHA, steps=3, decay=DECAY, resize_rate=1.3, seed=SEED, targeted=True, **more
    )
    torch.testing.assert_close(attack(images, LABELS, indices=INDICES), adv, rtol=0, atol=1e-9)


def normal(step: int, slot: int, shape: tuple[int, ...]) -> Tensor:
    first, second = (
        philox_uniform(INDICES, torch.tensor([0]), shape, seed=SEED, step=step, purpose=8 * slot + i)[0] for i in (0, 1)
    )
    return (-2 * (1 - first).log()).sqrt() * (2 * math.pi * second).cos()


def test_tpgd_starts_at_normal_noise() -> None:
    model, images = network(), photos()
    adv = (images + 0.001 * normal(0, 0, (3, 12, 12))).clamp(0, 1)
    for _ in range(STEPS):
        adv = clip(adv + ALPHA * gradient(model, adv, images, GAINS["divergence"][2]).sign(), images)
    found = create("tpgd", model, **BASE, seed=SEED)(images, LABELS, indices=INDICES)
    torch.testing.assert_close(found, adv, rtol=0, atol=1e-9)
    assert torch.equal(create("tpgd", model, **BASE, seed=SEED)(images, LABELS.flip(0), indices=INDICES), found)


def test_a_normal_start_stays_in_the_ball() -> None:
    attack = Attack(samples.Halving(), 0.01, 0.0, 1, step=NormalStart(spread=0.02), random_start=True)
    moved = (attack(samples.photos(3), samples.labels_of(3)) - samples.photos(3)).abs()
    assert moved.max() <= 0.01 + 1e-12
    assert ((moved > 0.0099) & (moved > 0)).double().mean() > 0.3


@pytest.mark.parametrize("targeted", [False, True])
def test_jitter(targeted: bool) -> None:
    model, images, scale, std = network(), photos(), 4.0, 0.3
    adv = (images + noise(EPS, 0, 0)[0]).clamp(0, 1)
    divided = 0
    for step in range(STEPS):
        drawn, rows = normal(step, 29, (CLASSES,)).double(), []
        for n in range(3):
            leaf = adv[n : n + 1].clone().requires_grad_()
            z, label = model(leaf)[0], int(LABELS[n])
            p = torch.softmax(scale * z / max(abs(value) for value in z), 0)
            loss = sum((p[c] + std * drawn[n, c] - float(c == label)) ** 2 for c in range(CLASSES)) / CLASSES
            if targeted:
                loss = -loss
            elif int(z.argmax()) != label:
                loss, divided = loss / (leaf - images[n : n + 1]).abs().max(), divided + 1
            rows.append(torch.autograd.grad(loss, leaf)[0])
        adv = clip(adv + ALPHA * torch.cat(rows).sign(), images)
    assert divided > 0 or targeted
    attack = create("jitter", model, **BASE, scale=scale, std=std, targeted=targeted, seed=SEED)
    torch.testing.assert_close(attack(images, LABELS, indices=INDICES), adv, rtol=0, atol=1e-9)


def test_the_clean_prediction_of_an_ensemble_is_its_own() -> None:
    """Also where its members' losses are averaged."""
    model, images = network(), photos()
    for name, targeted in (("tpgd", False), ("potrip", True)):
        alone = create(name, model, steps=3, targeted=targeted)(images, LABELS)
        for combine in ("logits", "probabilities", "losses"):
            source = Ensemble([model, model], combine)
            found = create(name, source, steps=3, targeted=targeted)(images, LABELS)
            if combine == "losses" or name == "tpgd":
                torch.testing.assert_close(found, alone, rtol=0, atol=1e-9)
            assert not torch.equal(found, images)


@pytest.mark.parametrize("name", [name for name in GAINS if not name.startswith("ratio")])
def test_a_constant_network_moves_nothing(name: str) -> None:
    class Constant(nn.Module):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.classes = classes

        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)[:, :1] * torch.zeros(self.classes, dtype=images.dtype)

    images = photos().float()
    for classes in (4, 2) if name == "triplet" else (4, 2, 1):
        attack = Attack(Constant(classes), 0.1, 0.02, 3, objective=GAINS[name][0])
        assert torch.equal(attack(images, torch.zeros(3, dtype=torch.int64)), images)


@pytest.mark.parametrize("objective", [Margin(), Margin(True), LogitMargin(), LogitMargin(True), Divergence()])
def test_one_class_has_nothing_to_gain(objective: Any) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 144, 1, dtype=torch.float64))
    adv = Attack(model, 0.1, 0.02, 3, objective=objective)(photos(), torch.zeros(3, dtype=torch.int64))
    assert torch.equal(adv, photos())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Margin(kappa=-1.0), r"kappa: got -1\.0"),
        (lambda: Margin(kappa=math.inf), "kappa: got inf"),
        (lambda: PoincareTriplet(False), "targeted: got False; allowed is True for Po"),
        (lambda: PoincareTriplet(True, -0.1), r"lam: got -0\.1"),
        (lambda: PoincareTriplet(True, 0.1, -0.1), r"gamma: got -0\.1"),
        (lambda: Divergence(True), "targeted: got True; allowed is False for the divergence"),
        (lambda: Jittered(scale=0.0), r"scale: got 0\.0"),
        (lambda: Jittered(std=-0.1), r"std: got -0\.1"),
        (lambda: NormalStart(spread=-0.1), r"spread: got -0\.1"),
        (lambda: NormalStart(-1.0), r"momentum: got -1\.0"),
        (lambda: create("tpgd", network(), targeted=True), "targeted: got True"),
        (lambda: create("potrip", network()), "targeted: got False"),
        (lambda: create("upgd", network(), loss="drl"), r"loss: got 'drl' \(did you mean 'dlr'\?\)"),
    ],
)
def test_bad_parameters(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    ("objective", "classes", "least"), [(LogitRatio(), 2, 3), (LogitRatio(True), 3, 4), (PoincareTriplet(), 1, 2)]
)
def test_too_few_classes_are_refused(objective: Any, classes: int, least: int, known: bool) -> None:
    """Before the model runs, where their number is known."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 144, classes, dtype=torch.float64))
    calls: list[object] = []
    module.register_forward_hook(lambda *given: calls.append(given))
    source = Classifier(module, num_classes=classes if known else None)
    with pytest.raises(ValueError, match=f"source: got {classes} classes; allowed are at least {least}"):
        Attack(source, 0.1, 0.1, 1, objective=objective)(photos(), torch.zeros(3, dtype=torch.int64))
    assert known == (not calls)


SMALL = {"eps": 0.1, "alpha": 0.03, "steps": 3}
PARTICULAR: dict[str, dict[str, Any]] = {
    "jitter": SMALL | {"std": 0.5},
    "logit": SMALL | {"resize_rate": 1.5},
    "tpgd": SMALL,
    "potrip": SMALL | {"targeted": True, "resize_rate": 1.5},
    "upgd": SMALL | {"loss": "dlr"},
}


@pytest.mark.parametrize("name", PARTICULAR)
def test_what_holds_for_every_attack(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def on(model: nn.Module, **options: Any) -> Attack:
        return create(name, model, **PARTICULAR[name], **options)

    network = samples.Network()
    assert_independent(partial(on, samples.Halving()))
    assert_leaves_all_as_it_was(partial(on, network), network)
    assert_replays(partial(on, samples.Halving()), monkeypatch)
    assert_nothing_waits(on, samples.Network())
    assert_all_on_the_gpu(on, samples.Network, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PARTICULAR)
def test_particular_attacks_stay_in_the_ball(name: str, dtype: torch.dtype) -> None:
    images = (samples.photos(3, dtype) * 3).round() / 3
    adv = create(name, samples.Halving().to(dtype), **PARTICULAR[name])(images, samples.labels_of(3))
    assert adv.dtype == dtype
    assert (adv - images).abs().max() <= 0.1 + torch.finfo(dtype).eps
    assert 0 <= adv.min() <= adv.max() <= 1


def test_draws_of_an_objective_are_its_own() -> None:
    """Of every view and step: another seed, index or view gives other noise."""
    images, labels = samples.photos(1).expand(2, -1, -1, -1), torch.zeros(2, dtype=torch.int64)
    first, second, third = (
        create("jitter", samples.Halving(), **(SMALL | {"std": 5.0, "steps": 8}), seed=seed, random_start=False)(
            images, labels
        )
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize(("loss", "steps"), [("ce", STEPS), ("dlr", 1)])
def test_upgd_is_torchattacks(loss: str, steps: int) -> None:
    """Whose margin takes the label's own logit for 0 among the others, so that it is left out.

    DLR is constant where the label is third, and follows its rounding there; so it is compared before it comes to that.
    """
    torchattacks = pytest.importorskip("torchattacks")
    model, images = network().eval(), photos()
    labels, given = model(images).argmax(1), BASE | {"steps": steps, "loss": loss, "decay": DECAY}
    theirs = torchattacks.UPGD(model, **given)(images, labels)
    torch.testing.assert_close(create("upgd", model, **given)(images, labels), theirs, rtol=0, atol=1e-9)


def test_a_ratio_is_constant_where_the_label_is_third() -> None:
    logits = torch.tensor([[0.3, 0.1, 0.7, -0.2]], requires_grad=True)
    gain = LogitRatio().gain(Seen(logits[None], {}), torch.tensor([1]), {})
    assert gain.item() == 1.0
    assert not torch.autograd.grad(gain.sum(), logits)[0].any()
