from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, cross_entropy, interpolate, pad

from alignfast.attacks import (
    Attack,
    CrossEntropy,
    InputDiversity,
    Neighbors,
    Scales,
    SignStep,
    Smoothing,
    Transform,
    VarianceTuning,
)
from alignfast.attacks.component import Position, Start
from alignfast.attacks.gradient import Gradient
from alignfast.attacks.observe import Seen
from alignfast.attacks.views import Views
from alignfast.draws import Draws
from alignfast.models import as_classifier
from alignfast.ops import Mixing, philox_uniform

SEED, STEP, SIDE = 11, 3, 10
MANY = torch.arange(4000)


def draws_of(count: int, copies: int, slot: int = 1) -> Draws:
    return Draws(SEED, STEP, 7 * torch.arange(count), torch.arange(copies), slot)


def photos(count: int, side: int = SIDE) -> Tensor:
    return torch.rand((count, 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def geometry(transform: InputDiversity, side: int, count: int = 4000) -> tuple[Tensor, Tensor, Tensor, int]:
    views = transform.view(Views(torch.zeros(count, 1, side, side)), torch.zeros(1).long(), draws_of(count, 1))
    assert views.resize_pad is not None
    part = views.resize_pad
    return part.resized[0], part.top[0], part.left[0], part.padded


@pytest.mark.parametrize(
    ("rate", "side", "low", "high"),
    [(0.9, 32, 28, 32), (0.5, 9, 4, 9), (0.9, 5, 4, 5), (1.1, 32, 32, 35), (2.0, 6, 6, 12), (1.5, 7, 7, 10)],
)
def test_diversity_draws_every_size_and_place_of_its_range(rate: float, side: int, low: int, high: int) -> None:
    """Both definitions: [floor(rate S), S) in S below 1, and [S, floor(rate S)) in floor(rate S) above."""
    resized, top, left, padded = geometry(InputDiversity(rate, 1.0), side)
    assert padded == high
    assert sorted(set(resized.tolist())) == list(range(low, high))
    for offset in (top, left):
        for size in range(low, high):
            assert sorted(set(offset[resized == size].tolist())) == list(range(high - size))
    counts = torch.bincount(resized - low)
    expected = len(resized) / (high - low)
    assert bool(((counts - expected).abs() < 5 * expected**0.5).all())
    if high - low > 1:
        assert not torch.equal(top, left)


def test_sides_that_leave_nothing_to_draw() -> None:
    for rate in (0.9, 1.1, 0.01, 2.0):
        resized, top, left, padded = geometry(InputDiversity(rate, 1.0), 1)
        assert set(resized.tolist()) == {1}
        assert set(top.tolist()) == set(left.tolist()) == {0}
        assert padded == (2 if rate == 2.0 else 1)


def test_probability_of_diversity() -> None:
    """A size of 0 stands for an image that stays as it is."""
    assert not geometry(InputDiversity(0.9, 0.0), 32)[0].any()
    assert bool((geometry(InputDiversity(0.9, 1.0), 32)[0] > 0).all())
    share = (geometry(InputDiversity(0.9, 0.3), 32)[0] > 0).double().mean()
    # Five standard deviations of 4000 draws.
    assert abs(share - 0.3) < 5 * (0.3 * 0.7 / 4000) ** 0.5


def test_diversity_of_probability_zero_is_the_identity() -> None:
    images = photos(3)
    views = InputDiversity(1.2, 0.0).view(Views(images.repeat(2, 1, 1, 1)), torch.zeros(2).long(), draws_of(3, 2))
    assert torch.equal(views.render(), images.repeat(2, 1, 1, 1))


def test_diversity_is_drawn_image_by_image_and_copy_by_copy() -> None:
    images = photos(1, 40).expand(6, -1, -1, -1)
    views = InputDiversity(0.5, 1.0).view(Views(images.repeat(3, 1, 1, 1)), torch.zeros(3).long(), draws_of(6, 3))
    shown = views.render()
    different = {tuple(row.tolist()) for row in shown.flatten(1)}
    assert len(different) >= 16


def test_diversity_takes_square_images_only() -> None:
    calls = Counting()
    attack = Attack(calls, 0.1, 0.1, 1, transforms=[InputDiversity()])
    with pytest.raises(ValueError, match="images: got 4 x 5; allowed is square images"):
        attack(torch.zeros(1, 3, 4, 5), torch.tensor([0]))
    assert calls.count == 0


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, images: Tensor) -> Tensor:
        self.count += 1
        return images.flatten(1)


def test_scales_are_powers_of_one_half_and_sum_in_the_gradient() -> None:
    images = photos(2).requires_grad_()
    views = Scales(4).view(Views(images.repeat(4, 1, 1, 1)), torch.arange(4), draws_of(2, 4))
    shown = views.render()
    for i in range(4):
        assert torch.equal(shown[2 * i : 2 * i + 2], images / 2**i)
    (grad,) = torch.autograd.grad(shown.sum(), images)
    assert torch.equal(grad, torch.full_like(images, 1 + 1 / 2 + 1 / 4 + 1 / 8))


def test_neighbors_are_uniform_in_their_cube_and_all_different() -> None:
    images, radius = torch.full((3, 3, 20, 20), 0.5, dtype=torch.float64), 0.02
    views = Neighbors(5, radius).view(Views(images.repeat(5, 1, 1, 1)), torch.arange(5), draws_of(3, 5))
    offset = (views.render() - 0.5) / radius
    assert offset.abs().max() <= 1 + 1e-6
    assert offset.abs().max() > 0.99
    assert abs(offset.mean()) < 5 * (1 / 3 / offset.numel()) ** 0.5
    assert abs(offset.var() - 1 / 3) < 0.02
    rows = offset.flatten(1)
    correlation = np.corrcoef(rows.numpy()) - np.eye(15)
    assert np.abs(correlation).max() < 5 / 1200**0.5


def gkern(size: int, nsig: float) -> np.ndarray[Any, Any]:
    from scipy import stats

    line = stats.norm.pdf(np.linspace(-nsig, nsig, size))
    kernel = np.outer(line, line)
    return kernel / kernel.sum()


def lkern(size: int) -> np.ndarray[Any, Any]:
    line = 1 - np.abs(np.linspace((1 - size) / 2, (size - 1) / 2, size) / (size + 1) * 2)
    kernel = np.outer(line, line)
    return kernel / kernel.sum()


KERNELS: dict[str, Callable[[int], np.ndarray[Any, Any]]] = {
    "gaussian": lambda size: gkern(size, 2.5),
    "linear": lkern,
    "uniform": lambda size: np.full((size, size), 1 / size**2),
}


@pytest.mark.parametrize("size", [1, 3, 7, 15])
@pytest.mark.parametrize("kernel", KERNELS)
def test_smoothing_weights_are_torchattacks(kernel: Any, size: int) -> None:
    # At one point a linspace is its start, of no consequence as a kernel of one is 1.
    expected = np.ones((1, 1)) if size == 1 else KERNELS[kernel](size)
    weights = Smoothing(kernel, size, 2.5).weights()
    assert weights.dtype == torch.float64
    torch.testing.assert_close(torch.outer(weights, weights), torch.from_numpy(expected), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("kernel", "method"), [("gaussian", "gkern"), ("uniform", "ukern"), ("linear", "lkern")])
def test_smoothing_weights_against_torchattacks_itself(kernel: Any, method: str) -> None:
    torchattacks = pytest.importorskip("torchattacks")
    peer = torchattacks.TIFGSM(nn.Linear(1, 1))
    expected = getattr(peer, method)(9, 3) if kernel == "gaussian" else getattr(peer, method)(9)
    weights = Smoothing(kernel, 9, 3.0).weights()
    torch.testing.assert_close(torch.outer(weights, weights), torch.from_numpy(expected), rtol=1e-12, atol=0)


def test_smoothing_is_a_depthwise_convolution_with_zero_padding() -> None:
    grad = torch.randn((2, 3, 9, 6), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kernel = torch.from_numpy(KERNELS["gaussian"](5))[None, None]
    expected = torch.cat([conv2d(grad[:, c : c + 1], kernel, padding=2) for c in range(3)], 1)
    torch.testing.assert_close(Smoothing("gaussian", 5, 2.5).shape(grad), expected, rtol=0, atol=1e-14)


class Mixed(Transform):
    """Admix as a transform: `weight` times the next image of the batch."""

    copies = 1

    def view(self, views: Views, which: Tensor, draws: Draws) -> Views:
        count = len(draws.images)
        partner = ((torch.arange(count) + 1) % count).expand(len(draws.copies), count)
        weight = 0.1 * (1 + draws.copies.double())[:, None].expand(-1, count)
        return views.with_mixing(Mixing(POOL, partner, weight))


POOL = torch.rand((3, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def one_by_one(transform: Transform, rows: Tensor, which: Tensor, draws: Draws) -> Tensor:
    """`transform` of rows k N + n on their own, with the plain operations of PyTorch."""
    count = len(draws.images)

    def each(purpose: int) -> list[float]:
        return drawn(draws, purpose).flatten().tolist()

    if isinstance(transform, Neighbors):
        noise = drawn(draws, 0, (3, SIDE, SIDE), -transform.radius, transform.radius)
        return rows + noise.flatten(0, 1)
    if isinstance(transform, Scales):
        return torch.stack([row / 2 ** int(which[i // count]) for i, row in enumerate(rows)])
    if isinstance(transform, Mixed):
        copies, images = [int(c) for c in draws.copies for _ in range(count)], [*range(count)] * len(draws.copies)
        return torch.stack(
            [row + 0.1 * (1 + k) * POOL[(n + 1) % count] for row, k, n in zip(rows, copies, images, strict=True)]
        )
    assert isinstance(transform, InputDiversity)
    low, high = sorted((SIDE, int(SIDE * transform.rate)))
    result = []
    for row, size, up, before, done in zip(rows, each(0), each(1), each(2), each(3), strict=True):
        side = low + int(size * (high - low))
        top, left = int(up * (high - side)), int(before * (high - side))
        small = interpolate(row[None], size=(side, side), mode="bilinear", align_corners=False)
        padded = pad(small, (left, high - side - left, top, high - side - top))
        back = interpolate(padded, size=(SIDE, SIDE), mode="bilinear", align_corners=False)[0]
        result.append(back if done < transform.p else row)
    return torch.stack(result)


def drawn(draws: Draws, purpose: int, shape: Sequence[int] = (), low: float = 0.0, high: float = 1.0) -> Tensor:
    """A component in place i of the chain makes draw p under purpose 8 i + p."""
    key = 8 * draws.slot + purpose
    return philox_uniform(
        draws.images, draws.copies, shape, seed=SEED, step=STEP, purpose=key, low=low, high=high
    ).double()


NOISE, SMALL, LARGE = Neighbors(2, 0.05), InputDiversity(0.6, 0.8), InputDiversity(1.6, 0.8)
CHAINS: list[list[Transform]] = [
    [NOISE, Scales(3), SMALL],
    [SMALL, Scales(3)],
    [Scales(3), LARGE],
    [SMALL, NOISE],
    [Scales(2), NOISE],
    [NOISE, NOISE],
    [Scales(2), Scales(3)],
    [SMALL, SMALL],
    [LARGE, SMALL, Scales(2)],
    [SMALL, Scales(2), NOISE, LARGE],
    [Mixed(), Scales(2), SMALL],
    [Scales(2), Mixed()],
    [SMALL, Mixed(), Mixed()],
    [NOISE, SMALL, Mixed(), Scales(2), SMALL, NOISE],
]


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: "-".join(type(part).__name__ for part in chain))
def test_parts_in_any_order_are_applied_one_after_another(chain: list[Transform]) -> None:
    images = photos(3)
    total = int(np.prod([transform.copies for transform in chain]))
    leaf, plain = images.clone().requires_grad_(), images.clone().requires_grad_()
    views, rows, stride = Views(leaf.repeat(total, 1, 1, 1)), plain.repeat(total, 1, 1, 1), 1
    for slot, transform in enumerate(chain, 1):
        draws = draws_of(3, total, slot)
        which = torch.arange(total) // stride % transform.copies
        views, rows = transform.view(views, which, draws), one_by_one(transform, rows, which, draws)
        stride *= transform.copies
    shown = views.render()
    torch.testing.assert_close(shown, rows, rtol=0, atol=1e-12)
    weight = torch.randn(shown.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (grad,) = torch.autograd.grad((shown * weight).sum(), leaf)
    (expected,) = torch.autograd.grad((rows * weight).sum(), plain)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-12)


def test_normalisation_is_part_of_the_view() -> None:
    images, mean, std = photos(2), torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 1.5, 2.5])
    views = Scales(2).view(Views(images.repeat(2, 1, 1, 1)), torch.arange(2), draws_of(2, 2))
    plain = torch.cat([images, images / 2])
    expected = (plain - mean.double()[:, None, None]) / std.double()[:, None, None]
    torch.testing.assert_close(views.render(mean, std), expected, rtol=0, atol=1e-15)


def test_the_views_of_an_image_are_the_product_of_the_copies() -> None:
    """Scales(2) and Neighbors(3) give each scale with each of three offsets, drawn anew for all six views."""
    seen: list[Tensor] = []

    class Recording(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images.detach())
            return images.flatten(1)

    image = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64)
    Attack(Recording(), 0.1, 0.1, 1, transforms=[Scales(2), Neighbors(3, 0.01)])(image, torch.tensor([0]))
    shown = torch.cat(seen)
    assert shown.shape == (6, 1, 2, 2)
    assert sorted((shown.mean((1, 2, 3)) * 4).round().tolist()) == [1, 1, 1, 2, 2, 2]
    assert len({tuple(row.tolist()) for row in shown.flatten(1)}) == 6


@pytest.mark.parametrize("targeted", [False, True])
def test_cross_entropy_per_image(targeted: bool) -> None:
    logits = torch.randn((5, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 1, 0])
    gain = CrossEntropy(targeted).gain(Seen(logits[None], {}), labels, {})
    expected = torch.stack([cross_entropy(logits[i : i + 1], labels[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(gain, -expected if targeted else expected)


def start_at(images: Tensor) -> Start:
    """Where neither labels nor the source matter."""
    indices = torch.arange(len(images))
    draws = Draws(SEED, 0, indices, torch.tensor([0]))
    return Start(as_classifier(nn.Flatten()), images, indices, indices, images, 0.1, 0.1, dict, draws)


def at(images: Tensor, adv: Tensor, point: Tensor | None = None, *, alpha: float = 0.1, last: bool = False) -> Position:
    return Position(images, adv, adv if point is None else point, torch.tensor(0), 5, 0.1, alpha, last)


def test_step_rule_without_momentum_keeps_nothing() -> None:
    images = photos(2)
    assert SignStep().memory(start_at(images)) == {}
    assert SignStep(nesterov=True).look_ahead(images, {}, 0.1) is images
    (momentum,) = SignStep(0.5).memory(start_at(images)).values()
    assert torch.equal(momentum, torch.zeros_like(images))


def test_look_ahead_is_for_nesterov_only() -> None:
    adv, memory = photos(2), {"momentum": torch.ones(2, 3, SIDE, SIDE, dtype=torch.float64)}
    assert torch.equal(SignStep(0.5).look_ahead(adv, memory, 0.1), adv)
    torch.testing.assert_close(SignStep(0.5, nesterov=True).look_ahead(adv, memory, 0.1), adv + 0.05)


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_step_rule_moves_in_place(momentum: float) -> None:
    images = torch.tensor([0.5, 0.5, 0.02, 0.5], dtype=torch.float64).view(1, 1, 2, 2)
    grad = torch.tensor([3.0, -1.0, -4.0, 0.0], dtype=torch.float64).view(1, 1, 2, 2)
    adv, rule = images.clone(), SignStep(momentum)
    memory = rule.memory(start_at(images))
    rule.update(at(images, adv, alpha=0.2), grad, memory)
    assert adv.flatten().tolist() == pytest.approx([0.6, 0.4, 0.0, 0.5])
    rule.update(at(images, adv, alpha=0.05), -2 * grad, memory)
    assert adv.flatten().tolist() == pytest.approx([0.55, 0.45, 0.05, 0.5])
    if memory:
        # 3/2 * 0.7 - 3/2, and so on: mean |grad| is 2.
        assert memory["momentum"].flatten().tolist() == pytest.approx([-0.45, 0.15, 0.6, 0.0])


def test_variance_tuning_follows_the_gradient_and_the_last_variance() -> None:
    asked: list[float] = []

    class Asked(Gradient):
        def __init__(self) -> None:
            pass

        def __call__(self, point: Tensor) -> Tensor:
            asked.append(float(point.mean()))
            return point.clone()

        def mean(self, samples: int, contribution: Any) -> Tensor:
            asked.append(samples)
            return torch.full((1, 1, 1, 1), 10.0)

    rule = VarianceTuning(4, 1.5)
    adv, point = torch.full((1, 1, 1, 1), 1.0), torch.full((1, 1, 1, 1), 2.0)
    memory = rule.memory(start_at(adv))
    (place,) = (tensor.data_ptr() for tensor in memory.values())
    assert rule.estimate(Asked(), at(adv, adv, point), memory).item() == 2.0
    assert rule.estimate(Asked(), at(adv, adv, point), memory).item() == 2.0 + (10.0 - 2.0)
    assert rule.estimate(Asked(), at(adv, adv, point + 1, last=True), memory).item() == 3.0 + (10.0 - 2.0)
    assert [tensor.data_ptr() for tensor in memory.values()] == [place]
    # None are asked for at the last step.
    assert asked == [2.0, 4, 2.0, 4, 3.0]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: InputDiversity(0.0), r"rate: got 0.0; allowed is a number in \(0, 2\]"),
        (lambda: InputDiversity(2.1), "rate: got 2.1"),
        (lambda: InputDiversity(1.0), "rate: got 1"),
        (lambda: InputDiversity(float("nan")), "rate: got nan"),
        (lambda: InputDiversity(0.9, -0.1), "p: got -0.1"),
        (lambda: InputDiversity(0.9, 1.1), "p: got 1.1"),
        (lambda: Scales(0), "copies: got 0"),
        (lambda: Scales(2.0), "copies: got 2.0"),
        (lambda: Neighbors(0, 0.1), "copies: got 0"),
        (lambda: Neighbors(1, -0.1), "radius: got -0.1"),
        (lambda: Smoothing("gausian"), r"kernel: got 'gausian' \(did you mean 'gaussian'\?\)"),
        (lambda: Smoothing(size=4), "size: got 4; allowed is an odd whole number"),
        (lambda: Smoothing(size=0), "size: got 0"),
        (lambda: Smoothing(sigma=0.0), "sigma: got 0.0"),
        (lambda: SignStep(-1.0), "momentum: got -1.0"),
        (lambda: VarianceTuning(0), "neighbors: got 0"),
        (lambda: VarianceTuning(beta=-1.0), "beta: got -1.0"),
    ],
)
def test_components_check_their_numbers(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(("low", "high"), [(0, 1), (3, 4), (5, 5), (6, 2), (2, 9)])
def test_whole_draws_stay_in_their_range(low: int, high: int) -> None:
    values = Draws(SEED, STEP, MANY, torch.arange(2)).integers(0, low, high)
    assert values.shape == (2, len(MANY))
    assert values.dtype == torch.int64
    assert sorted(set(values.flatten().tolist())) == (list(range(low, high)) or [low])


def test_whole_draws_with_a_bound_for_each_image() -> None:
    high = MANY % 5
    values = Draws(SEED, STEP, MANY, torch.arange(1)).integers(0, 0, high.expand(1, -1))[0]
    for bound in range(5):
        assert sorted(set(values[high == bound].tolist())) == (list(range(bound)) or [0])
