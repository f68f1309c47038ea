"""Every preset against its paper's equations, written out a second time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import conv2d, interpolate, pad

from alignfast.attacks import PRESETS, Attack, create
from alignfast.attacks.presets import parameters_of
from alignfast.models import Classifier
from alignfast.ops import philox_uniform
from tests.attacks.samples import GENERAL, PARAMETERS

SIDE, CLASSES, SEED = 12, 4, 2**40 + 17
EPS, ALPHA, STEPS, DECAY = 0.09, 0.031, 5, 0.8
INDICES = torch.tensor([905, 3, 2**32 - 1])
LABELS = torch.tensor([2, 0, 3])

Gradient = Callable[[Tensor], Tensor]


def network(seed: int = 0) -> Classifier:
    """Smooth, float64, and different for every pixel."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(4 * SIDE * SIDE, CLASSES)
        )
        nn.init.normal_(layers[-1].weight, std=0.05)
    return Classifier(layers.double(), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), CLASSES)


def photos(count: int = 3, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand((count, 3, SIDE, SIDE), generator=generator, dtype=torch.float64) * 1.3 - 0.15
    return images.clamp(0, 1)


def gradient_of(model: Classifier, targeted: bool) -> Gradient:
    """Of log p(label), negated unless targeted, per image."""

    def gradient(x: Tensor) -> Tensor:
        leaf = x.detach().clone().requires_grad_()
        mean = torch.tensor([0.4, 0.5, 0.6], dtype=torch.float32).double()[:, None, None]
        std = torch.tensor([0.2, 0.3, 0.25], dtype=torch.float32).double()[:, None, None]
        logits = model.module((leaf - mean) / std)
        log_p = logits[range(len(x)), LABELS] - torch.logsumexp(logits, 1)
        (log_p if targeted else -log_p).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    return gradient


def clip(adv: Tensor, images: Tensor) -> Tensor:
    return torch.maximum(torch.minimum(adv, images + EPS), images - EPS).clamp(0, 1)


def unit(g: Tensor) -> Tensor:
    """g over its mean absolute value, image by image."""
    return torch.stack([one / one.abs().mean() for one in g])


def noise(radius: float, step: int, purpose: int, copies: int = 1, passed: int = 0) -> Tensor:
    """[copies, N, 3, SIDE, SIDE]; purpose is 8 times the slot plus the draw's number; the start has slot 0,
    transforms count from 1, and estimators have 30. Copies of a pass count from 65536 times its number in the step."""
    return philox_uniform(
        INDICES,
        2**16 * passed + torch.arange(copies),
        (3, SIDE, SIDE),
        seed=SEED,
        step=step,
        purpose=purpose,
        low=-radius,
        high=radius,
    ).double()


def diversity(x: Tensor, step: int, rate: float, p: float, copy: int = 0, seed: int = SEED) -> Tensor:
    """Image by image: size, top, left and whether at all are draws 0 to 3 of the first component."""

    def draw(number: int) -> list[float]:
        return philox_uniform(INDICES, torch.tensor([copy]), (), seed=seed, step=step, purpose=8 + number)[0].tolist()

    low, high = sorted((SIDE, int(SIDE * rate)))
    result = []
    for image, size, top, left, done in zip(x, draw(0), draw(1), draw(2), draw(3), strict=True):
        side = low + math.floor(size * (high - low))
        up, before = (math.floor(value * (high - side)) for value in (top, left))
        small = interpolate(image[None], size=(side, side), mode="bilinear", align_corners=False)
        padded = pad(small, (before, high - side - before, up, high - side - up))
        back = interpolate(padded, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        result.append(back if done < p else image[None])
    return torch.cat(result)


def fgsm(images: Tensor, grad: Gradient) -> Tensor:
    return (images + EPS * grad(images).sign()).clamp(0, 1)


def bim(images: Tensor, grad: Gradient) -> Tensor:
    adv = images
    for _ in range(STEPS):
        adv = clip(adv + ALPHA * grad(adv).sign(), images)
    return adv


def pgd(images: Tensor, grad: Gradient) -> Tensor:
    adv = (images + noise(EPS, 0, 0)[0]).clamp(0, 1)
    for _ in range(STEPS):
        adv = clip(adv + ALPHA * grad(adv).sign(), images)
    return adv


def mifgsm(images: Tensor, grad: Gradient) -> Tensor:
    adv, m = images, torch.zeros_like(images)
    for _ in range(STEPS):
        m = DECAY * m + unit(grad(adv))
        adv = clip(adv + ALPHA * m.sign(), images)
    return adv


def nifgsm(images: Tensor, grad: Gradient) -> Tensor:
    adv, m = images, torch.zeros_like(images)
    for _ in range(STEPS):
        m = DECAY * m + unit(grad(adv + ALPHA * DECAY * m))
        adv = clip(adv + ALPHA * m.sign(), images)
    return adv


def sinifgsm(images: Tensor, grad: Gradient, m: int = 3) -> Tensor:
    adv, momentum = images, torch.zeros_like(images)
    for _ in range(STEPS):
        ahead = adv + ALPHA * DECAY * momentum
        # d/dx J(x / 2^i) has the factor 1 / 2^i.
        mean = torch.stack([grad(ahead / 2**i) / 2**i for i in range(m)]).mean(0)
        momentum = DECAY * momentum + unit(mean)
        adv = clip(adv + ALPHA * momentum.sign(), images)
    return adv


def variance_tuned(images: Tensor, grad: Gradient, look: float, neighbors: int = 3, beta: float = 1.2) -> Tensor:
    adv, m, v = images, torch.zeros_like(images), torch.zeros_like(images)
    for step in range(STEPS):
        g = grad(adv + look * ALPHA * DECAY * m)
        around = noise(beta * EPS, step, 8 * 30, neighbors, passed=1)
        tuned, v = g + v, torch.stack([grad(adv + r) for r in around]).mean(0) - g
        m = DECAY * m + unit(tuned)
        adv = clip(adv + ALPHA * m.sign(), images)
    return adv


def difgsm(images: Tensor, grad: Gradient, rate: float = 0.7, p: float = 0.6) -> Tensor:
    adv, m = images, torch.zeros_like(images)
    for step in range(STEPS):
        m = DECAY * m + unit(through(lambda x, at=step: diversity(x, at, rate, p), grad, adv))
        adv = clip(adv + ALPHA * m.sign(), images)
    return adv


def tifgsm(images: Tensor, grad: Gradient, rate: float = 1.3, p: float = 0.8, size: int = 5) -> Tensor:
    points = [2.0 * (2 * i / (size - 1) - 1) for i in range(size)]
    line = torch.tensor([math.exp(-x * x / 2) for x in points], dtype=torch.float64)
    kernel = torch.outer(line, line) / line.sum() ** 2
    adv = images
    for step in range(STEPS):
        g = through(lambda x, at=step: diversity(x, at, rate, p), grad, adv)
        smoothed = conv2d(g.flatten(0, 1)[:, None], kernel[None, None], padding=size // 2).reshape(g.shape)
        adv = clip(adv + ALPHA * smoothed.sign(), images)
    return adv


def through(transform: Callable[[Tensor], Tensor], grad: Gradient, x: Tensor) -> Tensor:
    """The gradient of J(transform(x)), by the chain rule."""
    leaf = x.detach().clone().requires_grad_()
    shown = transform(leaf)
    (result,) = torch.autograd.grad(shown, leaf, grad(shown.detach()))
    return result


BASE = {"eps": EPS, "alpha": ALPHA, "steps": STEPS}
EQUATIONS: dict[str, tuple[Callable[[Tensor, Gradient], Tensor], dict[str, Any]]] = {
    "FGSM": (fgsm, {"eps": EPS}),
    "BIM": (bim, BASE),
    "PGD": (pgd, BASE),
    "MIFGSM": (mifgsm, BASE | {"decay": DECAY}),
    "NIFGSM": (nifgsm, BASE | {"decay": DECAY}),
    "SINIFGSM": (sinifgsm, BASE | {"decay": DECAY, "m": 3}),
    "VMIFGSM": (lambda x, g: variance_tuned(x, g, 0.0), BASE | {"decay": DECAY, "N": 3, "beta": 1.2}),
    "VNIFGSM": (lambda x, g: variance_tuned(x, g, 1.0), BASE | {"decay": DECAY, "N": 3, "beta": 1.2}),
    "DIFGSM": (difgsm, BASE | {"decay": DECAY, "resize_rate": 0.7, "diversity_prob": 0.6}),
    "TIFGSM": (
        tifgsm,
        BASE | {"len_kernel": 5, "nsig": 2.0, "resize_rate": 1.3, "diversity_prob": 0.8},
    ),
}


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("name", EQUATIONS)
def test_the_papers_equations(name: str, targeted: bool) -> None:
    equation, parameters = EQUATIONS[name]
    model, images = network(), photos()
    expected = equation(images, gradient_of(model, targeted))
    attack = create(name, model, seed=SEED, targeted=targeted, **parameters)
    adv = attack(images, LABELS, indices=INDICES)
    assert (expected - images).abs().amax((1, 2, 3)).min() > 0.9 * EPS
    torch.testing.assert_close(adv, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("pair", [("BIM", "PGD"), ("BIM", "MIFGSM"), ("MIFGSM", "NIFGSM"), ("VMIFGSM", "VNIFGSM")])
def test_the_equations_tell_attacks_apart(pair: tuple[str, str]) -> None:
    """Otherwise the test above could not see one preset built as another."""
    grad = gradient_of(network(), False)
    first, second = (EQUATIONS[name][0](photos(), grad) for name in pair)
    assert ((first - second).abs() > 1e-3).double().mean() > 0.002


@pytest.mark.parametrize("name", [name for name in EQUATIONS if name != "FGSM"])
def test_gain_falls_when_targeted_and_rises_otherwise(name: str) -> None:
    model, images = network(), photos()
    away = create(name, model, **EQUATIONS[name][1])(images, LABELS)
    toward = create(name, model, targeted=True, **EQUATIONS[name][1])(images, LABELS)
    with torch.no_grad():
        before, left, reached = (
            nn.functional.cross_entropy(model(x), LABELS, reduction="none") for x in (images, away, toward)
        )
    assert bool((left > before).all())
    assert bool((reached < before).all())


DEFAULTS = {
    "fgsm": {"eps": 8 / 255},
    "bim": {"alpha": 2 / 255, "steps": 10},
    "pgd": {"random_start": True},
    "mifgsm": {"decay": 1.0},
    "nifgsm": {"decay": 1.0},
    "sinifgsm": {"decay": 1.0, "m": 5},
    "vmifgsm": {"decay": 1.0, "N": 5, "beta": 1.5},
    "vnifgsm": {"decay": 1.0, "N": 5, "beta": 1.5},
    "difgsm": {"decay": 0.0, "resize_rate": 0.9, "diversity_prob": 0.5, "random_start": False},
    "tifgsm": {"decay": 0.0, "kernel_name": "gaussian", "len_kernel": 15, "nsig": 3.0, "random_start": False},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_torchattacks(name: str) -> None:
    common = {"eps": 8 / 255, "seed": 0, "targeted": False, "max_batch": None}
    wanted = common | ({} if name == "fgsm" else {"alpha": 2 / 255, "steps": 10}) | DEFAULTS[name]
    given = parameters_of(name)
    assert {key: given[key] for key in wanted} == wanted


@pytest.mark.parametrize("name", GENERAL)
def test_the_defaults_that_are_listed_are_used(name: str) -> None:
    model, images = network(), photos(2)
    given = create(name, model, **parameters_of(name)).parameters()
    assert given == create(name, model).parameters()
    assert given["steps"] == parameters_of(name).get("steps", 1)
    few = {"steps": 2} if "steps" in parameters_of(name) else {}
    adv = PRESETS[name](model, **few)(images, LABELS[:2])
    assert torch.equal(adv, create(name.upper(), model, **few)(images, LABELS[:2]))


@pytest.mark.parametrize("name", GENERAL)
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_images_stay_in_the_ball_and_the_unit_cube(name: str, data: st.DataObject) -> None:
    side = data.draw(st.integers(1, 9), "side")
    shape = (data.draw(st.integers(1, 3), "N"), data.draw(st.integers(1, 4), "C"), side, side)
    classes = data.draw(st.integers(1, 3), "classes")
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]), "dtype")
    seed = data.draw(st.integers(0, 2**64 - 1), "seed")
    eps = data.draw(st.floats(0, 1), "eps")
    parameters: dict[str, Any] = {"eps": eps, "seed": seed, "targeted": data.draw(st.booleans(), "targeted")}
    parameters |= {"alpha": data.draw(st.floats(0, 1), "alpha"), "steps": data.draw(st.integers(1, 3), "steps")}
    parameters = PARAMETERS.get(name, {}) | {
        key: value for key, value in parameters.items() if key in parameters_of(name)
    }
    generator = torch.Generator().manual_seed(seed % 2**31)
    # Rounded to thirds, so that many pixels lie on the faces of the cube.
    images = (torch.rand(shape, generator=generator, dtype=dtype) * 3).round() / 3
    weight = torch.randn((classes, shape[1] * side * side), generator=generator, dtype=dtype)
    model = nn.Sequential(nn.Flatten(), linear(weight))
    labels = torch.randint(classes, shape[:1], generator=generator)
    adv = create(name, model, **parameters)(images, labels)
    assert adv.shape == images.shape
    assert adv.dtype == dtype
    assert not adv.isnan().any()
    assert adv.min() >= 0
    assert adv.max() <= 1
    # One rounding of the sum images + delta.
    assert (adv - images).abs().max() <= eps + torch.finfo(dtype).eps


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    return layer


class Constant(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :1] * torch.zeros(self.classes, dtype=images.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("model", [Constant(4), nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 1))])
@pytest.mark.parametrize("name", GENERAL)
def test_a_zero_gradient_moves_nothing(name: str, model: nn.Module, dtype: torch.dtype) -> None:
    """A constant network, and one class: the cross-entropy is 0 whatever the image."""
    images, labels = photos().to(dtype), torch.zeros(3, dtype=torch.int64)
    few = {key: value for key, value in PARAMETERS.get(name, {}).items() if key not in ("eps", "alpha")}
    few |= {"steps": 4} if "steps" in parameters_of(name) else {}
    attack = create(name, model.to(dtype), seed=SEED, **few)
    adv = attack(images, labels, indices=INDICES)
    if attack.random_start:
        parameters = parameters_of(name)
        length = (adv - images).abs().amax((1, 2, 3)) if name != "pgdl2" else (adv - images).flatten(1).norm(dim=1)
        assert length.min() > 0
        assert length.max() <= parameters["eps"] + torch.finfo(dtype).eps
        longer = {"steps": 12} if "steps" in parameters else {"alpha": 0.5}
        assert torch.equal(create(name, model, seed=SEED, **few | longer)(images, labels, indices=INDICES), adv)
    else:
        assert torch.equal(adv, images)
    if name == "pgd":
        start = (images + noise(8 / 255, 0, 0)[0].to(dtype)).clamp(0, 1)
        torch.testing.assert_close(adv, start, rtol=0, atol=torch.finfo(dtype).eps)


def test_one_image_of_zero_gradient_among_others() -> None:
    """Its neighbours move as they would without it."""

    class Dark(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            total = images.flatten(1).sum(1, keepdim=True)
            return torch.cat([total.clamp(max=0), -total.clamp(max=0)], 1) + torch.cat(
                [total - total, (total > 1) * total], 1
            )

    images = torch.stack([torch.zeros(1, 2, 2), torch.full((1, 2, 2), 0.5)]).double()
    adv = create("mifgsm", Dark(), eps=0.1, alpha=0.05, steps=3)(images, torch.tensor([0, 0]))
    assert not adv.isnan().any()
    torch.testing.assert_close(adv[1], images[1] + 0.1)


# With a random start, one step may not lead back; attacks that show other images may show nothing of one pixel, and
# integrated gradients attribute nothing to black.
NOT_OF_ONE_PIXEL = {"difgsm", "dim", "ffgsm", "mig", "mumodig", "tifgsm"}


@pytest.mark.parametrize("name", [name for name in GENERAL if name not in NOT_OF_ONE_PIXEL])
def test_single_pixel_images(name: str) -> None:
    weight = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    model = nn.Sequential(nn.Flatten(), linear(weight))
    images = torch.tensor([0.5, 0.0, 1.0, 0.5], dtype=torch.float64).view(4, 1, 1, 1)
    adv = create(name, model, eps=0.25)(images, torch.tensor([1, 1, 1, 0]))
    if name == "fgsm":
        assert torch.equal(adv.flatten(), torch.tensor([0.75, 0.25, 1.0, 0.25], dtype=torch.float64))
    else:
        # Ten steps of 2/255 do not reach the boundary; what counts is the direction.
        assert torch.equal((adv - images).flatten().sign()[[1, 2]], torch.tensor([1.0, 0.0], dtype=torch.float64))


def test_preset_names_and_parameters_are_checked() -> None:
    model = network()
    with pytest.raises(
        ValueError, match=r"attack: got 'mifgms' \(did you mean 'mifgsm'\?\); allowed is one of .*difgsm"
    ):
        create("mifgms", model)
    with pytest.raises(
        ValueError, match=r"mifgsm: got unknown parameter 'decey' \(did you mean 'decay'\?\); allowed are"
    ):
        create("mifgsm", model, decey=1.0)
    with pytest.raises(ValueError, match=r"fgsm: got unknown parameter 'steps'"):
        create("fgsm", model, steps=3)


@pytest.mark.parametrize("name", GENERAL)
def test_a_preset_is_an_attack_on_its_source(name: str) -> None:
    model = network()
    attack = create(name, model, eps=0.1, seed=5, max_batch=7)
    assert isinstance(attack, Attack)
    assert attack.source is model
    assert (attack.eps, attack.seed, attack.max_batch) == (0.1, 5, 7)
