"""Attacks over many operators or other views, against their definitions written out a second time."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample, interpolate, pad

from alignfast.attacks import (
    Attack,
    DiversityEnsemble,
    Operators,
    QuantisedPaths,
    ShiftGrid,
    SignStep,
    SummedStep,
    Transform,
    create,
)
from alignfast.attacks.estimators import diverse_paths
from alignfast.draws import Draws
from tests.attacks import samples
from tests.attacks.properties import (
    assert_all_on_the_gpu,
    assert_independent,
    assert_leaves_all_as_it_was,
    assert_nothing_waits,
    assert_replays,
)
from tests.attacks.test_inputs import Show, drawn, over_copies, shown, turned
from tests.attacks.test_presets import (
    ALPHA,
    BASE,
    DECAY,
    EPS,
    INDICES,
    LABELS,
    SEED,
    STEPS,
    Constant,
    Gradient,
    clip,
    gradient_of,
    network,
    photos,
    through,
    unit,
)


def padded(image: Tensor, rate: float, shares: list[float]) -> Tensor:
    """Resized, padded to `rate` times its size, and resized back; `shares` say size, top and left."""
    sizes = tuple(image.shape[1:])
    larger = [int(size * rate + 1e-9) for size in sizes]
    resized = [size + math.floor(shares[0] * (large - size)) for size, large in zip(sizes, larger, strict=True)]
    top, left = (
        math.floor(share * (large - small)) for share, large, small in zip(shares[1:], larger, resized, strict=True)
    )
    grown = interpolate(image[None], resized, mode="bilinear", align_corners=False)
    framed = pad(grown, (left, larger[1] - resized[1] - left, top, larger[0] - resized[0] - top))
    return interpolate(framed, sizes, mode="bilinear", align_corners=False)[0]


def operated(image: Tensor, number: int, shares: list[float], shift: float) -> Tensor:
    """By one of the 31, in the order of their list."""
    height, width = image.shape[1:]
    angles = (5, -5, 15, -15, 45, -45, 90, -90, 180)
    operators: list[Callable[[], Tensor]] = [
        lambda: image,
        lambda: image.flip(1),
        lambda: image.flip(2),
        lambda: image.roll(math.floor(shift * height), 1),
        lambda: image.roll(math.floor(shift * width), 2),
        *(lambda angle=angle: turned(image, -math.radians(angle)) for angle in angles),
        *(lambda divisor=divisor: image / divisor for divisor in range(2, 9)),
        *(lambda i=i: padded(image, 1.1 + 0.2 * i, shares) for i in range(10)),
    ]
    assert len(operators) == 31
    return operators[number]()


def ops(image: Tensor, n: int, copy: int, step: int, beta: float = 0.7) -> Tensor:
    if copy == 0:
        return image
    level, shell = (float(u) for u in drawn(n, copy, step, 0, (2,)))
    radius = beta * EPS * (1 + math.floor(6 * shell)) / 4
    image = image + radius * (2 * drawn(n, copy, step, 2, image.shape) - 1)
    for number, *shares, shift in drawn(n, copy, step, 1, (4, 5)).tolist()[: 2 + math.floor(3 * level)]:
        image = operated(image, math.floor(31 * number), shares, shift)
    return image


RATES = (1.2, 1.45, 2.0)


def dem(image: Tensor, n: int, copy: int, step: int) -> Tensor:
    return padded(image, RATES[copy], drawn(n, copy, step, 0, (3,)).tolist())


def shifted(image: Tensor, n: int, copy: int, step: int) -> Tensor:
    """Of 3 x 3 shifts, the one to the side counting first."""
    right, below = (0.4 * (place - 1) for place in divmod(copy, 3))
    theta = torch.tensor([[[1, 0, right], [0, 1, below]]], dtype=image.dtype)
    grid = affine_grid(theta, [1, *image.shape], align_corners=False)
    return grid_sample(image[None], grid, align_corners=False)[0]


def anda(images: Tensor, grad: Gradient) -> Tensor:
    adv, total = images, torch.zeros_like(images)
    for _ in range(STEPS):
        for copy in range(9):
            shown = partial(lambda x, k: torch.stack([shifted(image, 0, k, 0) for image in x]), k=copy)
            total = total + through(shown, grad, adv)
        adv = clip(adv + ALPHA * total.sign(), images)
    return adv


def viewed(image: Tensor, n: int, copy: int, step: int) -> Tensor:
    number, share, *shares = drawn(n, copy, step, 0, (5,), slot=30).tolist()
    ways: list[Callable[[], Tensor]] = [
        lambda: image.roll(math.floor(share * image.shape[1]), 1),
        lambda: image.roll(math.floor(share * image.shape[2]), 2),
        lambda: image.flip(1),
        lambda: image.flip(2),
        lambda: turned(image, -math.radians(90 * share - 45)),
    ]
    if copy == 0:
        return image
    return padded(image, 245 / 224, shares) if number >= 0.5 else ways[math.floor(10 * number)]()


def quantised(image: Tensor, n: int, copy: int, step: int) -> Tensor:
    """Pixel by pixel, of three regions."""
    result = image.clone()
    for plane, shares in zip(result, drawn(n, copy, step, 1, (3, 2), slot=30).tolist(), strict=True):
        least, most = float(plane.min()), float(plane.max())
        levels = [least, *(least + share * (most - least) for share in shares)]
        plane.apply_(lambda value, levels=levels: max(level for level in levels if level <= value))
    return result


def mumodig(images: Tensor, grad: Gradient) -> Tensor:
    adv, m = images, torch.zeros_like(images)
    for step in range(STEPS):
        total = torch.zeros_like(images)
        for copy in range(6):

            def each(x: Tensor, of: Show, k: int = copy, at: int = step) -> Tensor:
                return torch.stack([of(image, n, k, at) for n, image in enumerate(x)])

            view = each(adv, viewed)
            base = each(view, quantised)
            leaf = adv.clone().requires_grad_()
            (pulled,) = torch.autograd.grad(each(leaf, viewed), leaf, grad(0.3 * base + 0.7 * view))
            total = total + (view - base) * pulled
        m = DECAY * m + unit(total)
        adv = clip(adv + ALPHA * m.sign(), images)
    return adv


EQUATIONS: dict[str, tuple[Callable[[Tensor, Gradient], Tensor], dict[str, Any]]] = {
    "OPS": (over_copies(ops, 5), {"beta": 0.7, "num_sample_neighbor": 2, "num_sample_operator": 2, "decay": DECAY}),
    "DEM": (over_copies(dem, 3), {"resize_rates": RATES, "decay": DECAY}),
    "MUMODIG": (mumodig, {"N_trans": 5, "region_num": 3, "lamb": 0.7, "decay": DECAY}),
    "ANDA": (anda, {"n_ens": 9, "aug_max": 0.4}),
}


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_papers_equations(name: str) -> None:
    equation, parameters = EQUATIONS[name]
    model, images = network(), photos()
    expected = equation(images, gradient_of(model, targeted=True))
    attack = create(name, model, seed=SEED, targeted=True, **BASE | parameters)
    assert (expected - images).abs().amax((1, 2, 3)).min() > 0.9 * EPS
    torch.testing.assert_close(attack(images, LABELS, indices=INDICES), expected, rtol=0, atol=1e-9)


VIEWS: dict[str, tuple[Transform, int, Show]] = {
    "ops": (Operators(7, 5, 0.7 * EPS), 36, ops),
    "dem": (DiversityEnsemble(RATES), 3, dem),
    "anda": (ShiftGrid(3, 0.4), 9, shifted),
}


@pytest.mark.parametrize("case", VIEWS)
@pytest.mark.parametrize("size", [(11, 16), (4, 3), (1, 1)])
def test_views_are_what_is_written_out_image_by_image(case: str, size: tuple[int, int]) -> None:
    """Also of images that are not square; and so is their adjoint. But for the rounding of draws to float32."""
    transform, copies, show = VIEWS[case]
    images = torch.rand((3, 3, *size), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    leaf, plain = images.clone().requires_grad_(), images.clone().requires_grad_()
    views = shown(transform, leaf, copies, step=6)
    expected = torch.stack([torch.stack([show(x, n, k, 6) for n, x in enumerate(plain)]) for k in range(copies)])
    torch.testing.assert_close(views, expected, rtol=0, atol=1e-6)
    weight = torch.rand(views.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    (grad,) = torch.autograd.grad((views * weight).sum(), leaf)
    (wanted,) = torch.autograd.grad((expected * weight).sum(), plain)
    torch.testing.assert_close(grad, wanted, rtol=0, atol=1e-5)
    assert shown(transform, images.float(), copies).dtype == torch.float32


def test_views_that_are_large_enough_to_be_padded() -> None:
    images = torch.rand((3, 1, 51, 67), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    draws = Draws(SEED, 6, INDICES, torch.arange(8), 30)
    found = diverse_paths.viewed(images.repeat(8, 1, 1, 1), torch.arange(24) < 3, draws)
    expected = [viewed(image, n, copy, 6) for copy in range(8) for n, image in enumerate(images)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-6)


def test_all_operators_are_among_those() -> None:
    numbers = [drawn(n, copy, 6, 1, (4, 5))[:2, 0] for n in range(3) for copy in range(1, 36)]
    assert {math.floor(31 * float(u)) for pair in numbers for u in pair} == set(range(31))


def test_the_first_view_is_the_image_itself() -> None:
    images = photos().float()
    assert torch.equal(shown(Operators(2, 2), images, 5)[0], images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_zero_gradient_moves_nothing(dtype: torch.dtype) -> None:
    images = photos().to(dtype)
    adv = create("ops", Constant(4), steps=2, **samples.PARAMETERS["ops"])(images, LABELS)
    assert torch.equal(adv, images)
    assert adv.dtype == dtype


def test_what_holds_for_every_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    def on(model: nn.Module, **options: Any) -> Attack:
        return samples.build("ops", model, **{"steps": 2} | options)

    module = samples.Network()
    assert_independent(partial(on, samples.Halving()))
    assert_leaves_all_as_it_was(partial(on, module), module)
    assert_replays(partial(on, samples.Halving()), monkeypatch)
    few = partial(on, steps=1, num_sample_neighbor=1)
    assert_nothing_waits(few, samples.Network())
    assert_all_on_the_gpu(few, samples.Network, monkeypatch)


def test_defaults_and_numbers_of_views() -> None:
    assert create("ops", network(), eps=0.1).transforms == [Operators(30, 30, 0.2)]
    assert create("ops", network()).passes == 901
    model = samples.Halving()
    attack = samples.build("ops", model)
    attack(samples.photos(2), samples.labels_of(2))
    assert sum(model.batches) == 2 * attack.steps * attack.passes
    assert create("mumodig", network()).estimator == QuantisedPaths(6, 2, 0.65)
    with pytest.raises(ValueError, match=r"eps: got -0\.1"):
        create("ops", model, eps=-0.1)
    for n_ens in (3, 8):
        with pytest.raises(ValueError, match=f"n_ens: got {n_ens}; allowed is a"):
            create("anda", model, n_ens=n_ens)
    dem, anda = create("dem", model, eps=0.1), create("anda", model)
    assert (dem.alpha, dem.transforms, dem.step) == (0.1, [DiversityEnsemble()], SignStep(1.0))
    assert (anda.transforms, anda.step, anda.passes) == ([ShiftGrid(5, 0.3)], SummedStep(), 25)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DiversityEnsemble([]), "rates: got none"),
        (lambda: DiversityEnsemble([1.2, 0.9]), "rates: got 0.9"),
        (lambda: ShiftGrid(1), "side: got 1; allowed is a whole number, at least 2"),
        (lambda: ShiftGrid(2, -0.1), "reach: got -0.1"),
        (lambda: QuantisedPaths(0), "views: got 0"),
        (lambda: QuantisedPaths(regions=0), "regions: got 0"),
        (lambda: QuantisedPaths(position=1.1), "position: got 1.1"),
        (lambda: Operators(0), "neighbors: got 0"),
        (lambda: Operators(1, 0), "operators: got 0"),
        (lambda: Operators(1, 1, -0.1), "radius: got -0.1"),
    ],
)
def test_numbers_outside_their_range_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
