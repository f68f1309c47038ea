"""Attacks that change what the model is shown, against their papers' equations written out a second time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy.fft import dct, dctn
from scipy.interpolate import RBFInterpolator
from torch import Tensor, nn
from torch.nn.functional import affine_grid, conv2d, grid_sample, interpolate, pad

from alignfast.attacks import (
    Attack,
    BlockMasks,
    BlockOperations,
    BlockShuffle,
    ConstrainedWarps,
    Mixes,
    MixMask,
    RandomCrop,
    Scales,
    SignStep,
    SpectrumMask,
    Transform,
    Translation,
    UniformScales,
    Warp,
    create,
    graph,
)
from alignfast.attacks.views import Views
from alignfast.draws import Draws
from alignfast.models import Classifier
from alignfast.ops import philox_uniform
from tests.attacks import samples, test_engine, test_graph, test_no_sync
from tests.attacks.no_sync import NoSync
from tests.attacks.tape import Taping
from tests.attacks.test_presets import (
    ALPHA,
    BASE,
    DECAY,
    EPS,
    INDICES,
    LABELS,
    SEED,
    SIDE,
    STEPS,
    Constant,
    Gradient,
    clip,
    diversity,
    gradient_of,
    network,
    photos,
    through,
    unit,
)

POOLED = {"admix", "usmm"}
# Values that turn signs and are clipped when mixed in.
POOL = photos(4, seed=17)

# Shows an image, [C, H, W], as copy number `copy` of image number `n` in step `step`.
Show = Callable[[Tensor, int, int, int], Tensor]


def bounded(x: Tensor) -> Tensor:
    """In [0, 1], with the slope of x at both ends."""
    return torch.where(x < 0, 0, torch.where(x > 1, 1, x))


def drawn(n: int, copy: int, step: int, number: int, shape: Sequence[int] = (), slot: int = 1) -> Tensor:
    """Draw `number` of the transform in place `slot`, for copy `copy` of image n; float64 of the given shape."""
    index, purpose = INDICES[n : n + 1], 8 * slot + number
    table = philox_uniform(index, torch.tensor([copy]), tuple(shape), seed=SEED, step=step, purpose=purpose)
    return table[0, 0].double()


def normal(n: int, copy: int, step: int, number: int, shape: Sequence[int]) -> Tensor:
    """Box and Muller's, of two uniform draws; rounded as float32 would be, hence not exact."""
    first, second = (drawn(n, copy, step, number + i, shape) for i in range(2))
    return (-2 * (1 - first).log()).sqrt() * (2 * math.pi * second).cos()


def over_copies(show: Show, copies: int) -> Callable[[Tensor, Gradient], Tensor]:
    """Momentum over the mean gradient of so many copies, each shown in its own way."""

    def attack(images: Tensor, grad: Gradient) -> Tensor:
        adv, m = images, torch.zeros_like(images)
        for step in range(STEPS):
            total = torch.zeros_like(images)
            for copy in range(copies):

                def shown(x: Tensor, k: int = copy, at: int = step) -> Tensor:
                    return torch.stack([show(image, n, k, at) for n, image in enumerate(x)])

                total = total + through(shown, grad, adv) / copies
            m = DECAY * m + unit(total)
            adv = clip(adv + ALPHA * m.sign(), images)
        return adv

    return attack


def dim(images: Tensor, grad: Gradient) -> Tensor:
    adv, m = images, torch.zeros_like(images)
    for step in range(STEPS):
        m = DECAY * m + unit(through(lambda x, at=step: diversity(x, at, 1.3, 0.6), grad, adv))
        adv = clip(adv + ALPHA * m.sign(), images)
    return adv


def tim(images: Tensor, grad: Gradient) -> Tensor:
    line = torch.tensor([math.exp(-x * x / 2) for x in (-2.0, -1.0, 0.0, 1.0, 2.0)], dtype=torch.float64)
    kernel = (torch.outer(line, line) / line.sum() ** 2)[None, None]
    adv, m = images, torch.zeros_like(images)
    for _ in range(STEPS):
        g = grad(adv)
        smoothed = conv2d(g.flatten(0, 1)[:, None], kernel, padding=2).reshape(g.shape)
        m = DECAY * m + unit(smoothed)
        adv = clip(adv + ALPHA * m.sign(), images)
    return adv


def pick(n: int, copy: int, step: int, slot: int) -> Tensor:
    return POOL[math.floor(float(drawn(n, copy, step, 0, slot=slot)) * len(POOL))]


def admix(image: Tensor, n: int, copy: int, step: int) -> Tensor:
    """Copy i of the 3 scales has number 2 i, or 2 i + 1 as the second of the 2 mixes."""
    return (image + 0.3 * pick(n, copy, step, 1)) / 2 ** (copy // 2)


def usmm(image: Tensor, n: int, copy: int, step: int) -> Tensor:
    scale = (0.2, 0.5, 0.8)[copy % 3]
    return bounded(scale * image * (0.6 + 0.8 * pick(n, copy, step, 2)))


WAVES = torch.from_numpy(dct(np.eye(SIDE), axis=0, norm="ortho"))


def ssm(image: Tensor, n: int, copy: int, step: int) -> Tensor:
    noisy = image + 0.1 * normal(n, copy, step, 0, image.shape)
    mask = 1 + 0.4 * (2 * drawn(n, copy, step, 2, image.shape) - 1)
    return torch.stack([WAVES.T @ (WAVES @ c @ WAVES.T * m) @ WAVES for c, m in zip(noisy, mask, strict=True)])


def sia(image: Tensor, n: int, copy: int, step: int) -> Tensor:
    """Block by block, at most 3 x 3 of them."""
    height, width = image.shape[1:]
    down, along = (
        ordered(drawn(n, copy, step, number, (size - 1,)))[:2] for number, size in enumerate((height, width))
    )
    down, along = ([0, *sorted(place + 1 for place in cut), size] for cut, size in ((down, height), (along, width)))
    op, share = (drawn(n, copy, step, number, (3, 3)) for number in (2, 3))
    noisy = bounded(image + (2 * drawn(n, copy, step, 4, image.shape) - 1) * 16 / 255)
    dropped = drawn(n, copy, step, 5, (len(image), 3, 3)) < 0.1
    lines = []
    for i, (top, bottom) in enumerate(pairwise(down)):
        blocks = []
        for j, (left, right) in enumerate(pairwise(along)):
            part = np.s_[:, top:bottom, left:right]
            number, factor = math.floor(10 * float(op[i, j])), float(share[i, j])
            blocks.append(operated(image[part], number, factor, noisy[part], dropped[:, i, j]))
        lines.append(torch.cat(blocks, 2))
    return torch.cat(lines, 1)


def operated(block: Tensor, number: int, share: float, noisy: Tensor, dropped: Tensor) -> Tensor:
    height, width = block.shape[1:]
    if number in (0, 1):
        return block.roll(int(share * block.shape[1 + number]), 1 + number)
    if number in (2, 3):
        return block.flip(number - 1)
    if number == 4:
        return block.rot90(2, (1, 2))
    if number == 5:
        return share * block
    if number == 6:
        return noisy
    if number == 7:
        size = (int(0.8 * height) + 1, int(0.8 * width) + 1)
        small = interpolate(block[None], size, mode="bilinear", align_corners=False)
        return bounded(interpolate(small, (height, width), mode="bilinear", align_corners=False)[0])
    if number == 8:
        low_pass = []
        for size in (height, width):
            waves = torch.from_numpy(dct(np.eye(size), axis=0, norm="ortho"))[: size - int(0.4 * size)]
            low_pass.append(waves.T @ waves)
        return low_pass[0] @ block @ low_pass[1]
    return torch.where(dropped[:, None, None], 0, block / 0.9)


def ordered(draws: Tensor) -> list[int]:
    """Places from the smallest draw to the largest."""
    return sorted(range(len(draws)), key=lambda place: float(draws[place]))


def bsr(image: Tensor, n: int, copy: int, step: int) -> Tensor:
    """Three strips of three blocks, turned by up to 50 degrees."""
    upright = bool(drawn(n, copy, step, 0) < 0.5)
    share, order = 1 + drawn(n, copy, step, 1, (4, 3)), drawn(n, copy, step, 2, (4, 3))
    # In a transposed image, the sense of rotation is the other.
    angle = (2 * drawn(n, copy, step, 3, (3, 3)) - 1) * math.radians(50) * (1 if upright else -1)
    strips = cut(image if upright else image.mT, 1, share[0])
    lines = []
    for i in ordered(order[0]):
        blocks = [turned(block, float(angle[i, j])) for j, block in enumerate(cut(strips[i], 2, share[1 + i]))]
        lines.append(torch.cat([blocks[j] for j in ordered(order[1 + i])], 2))
    whole = torch.cat(lines, 1)
    return whole if upright else whole.mT


def cut(x: Tensor, axis: int, share: Tensor) -> list[Tensor]:
    ends = [0, *(round(x.shape[axis] * float(share[: k + 1].sum() / share.sum())) for k in range(3))]
    return [x.narrow(axis, first, end - first) for first, end in pairwise(ends)]


def turned(block: Tensor, angle: float) -> Tensor:
    """About its centre; what comes from outside of it is 0."""
    height, width = block.shape[1:]
    if 0 in (height, width):
        return block
    y, x = torch.meshgrid(
        torch.arange(height).double() - (height - 1) / 2, torch.arange(width).double() - (width - 1) / 2, indexing="ij"
    )
    from_y, from_x = math.cos(angle) * y - math.sin(angle) * x, math.sin(angle) * y + math.cos(angle) * x
    grid = torch.stack([2 * from_x / width, 2 * from_y / height], 2)
    return grid_sample(block[None], grid[None], padding_mode="zeros", align_corners=False)[0]


def masked(image: Tensor, n: int, copy: int, step: int) -> Tensor:
    """Without block number `copy` of 3 x 3, counted along the rows."""
    seen = torch.ones_like(image)
    ends = [[i * size // 3 for i in range(4)] for size in image.shape[1:]]
    i, j = copy // 3, copy % 3
    seen[:, ends[0][i] : ends[0][i + 1], ends[1][j] : ends[1][j + 1]] = 0
    return image * seen


def translated(image: Tensor, n: int, copy: int, step: int) -> Tensor:
    """By -4 to 4 pixels: cut out of an image with a margin of zeros."""
    down, along = (math.floor(9 * float(drawn(n, copy, step, number))) - 4 for number in (0, 1))
    top, left = 4 - down, 4 - along
    return pad(image, (4, 4, 4, 4))[:, top : top + image.shape[1], left : left + image.shape[2]]


def cropped(image: Tensor, n: int, copy: int, step: int) -> Tensor:
    """By an affine grid, whose unit is half the image."""
    high, top, wide, left, turn = (float(drawn(n, copy, step, number)) for number in range(5))
    high, wide = 0.4 + 0.6 * high, 0.4 + 0.6 * wide
    middle_y, middle_x = (2 * place * (1 - part) + part - 1 for place, part in ((top, high), (left, wide)))
    theta = torch.tensor([[[-wide if turn < 0.5 else wide, 0, middle_x], [0, high, middle_y]]], dtype=torch.float64)
    grid = affine_grid(theta, [1, *image.shape], align_corners=False)
    return grid_sample(image[None], grid, padding_mode="border", align_corners=False)[0]


def warped(image: Tensor, n: int, copy: int, step: int) -> Tensor:
    return bent(image, (drawn(n, copy, step, 0, (4, 2)) - 0.5) * 0.8, 4)


def bent(image: Tensor, offsets: Tensor, mesh: int) -> Tensor:
    """By the interpolant of the displaced mesh that scipy finds; differentiable in image and offsets."""
    points = [(y, x) for y in np.linspace(-1, 1, mesh) for x in np.linspace(-1, 1, mesh)]
    height, width = image.shape[1:]
    places = np.stack(np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij"), 2)
    inner = [i for i, (y, x) in enumerate(points) if abs(y) < 0.99 and abs(x) < 0.99]
    spline = RBFInterpolator(points, np.eye(len(points))[:, inner], kernel="thin_plate_spline")
    basis = torch.from_numpy(spline(places.reshape(-1, 2)))
    grid = torch.from_numpy(places) + (basis @ offsets).reshape(height, width, 2)
    return grid_sample(image[None], grid.flip(2)[None], padding_mode="zeros", align_corners=True)[0]


def decowa(images: Tensor, grad: Gradient) -> Tensor:
    """Two warps with four inner points; the estimator's own draws are of slot 30."""

    def warped_by(offsets: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.stack([bent(image, move, 4) for image, move in zip(x, offsets, strict=True)])

    adv, m = images, torch.zeros_like(images)
    for step in range(STEPS):
        total = torch.zeros_like(images)
        for copy in range(2):
            first = torch.stack([drawn(n, copy, step, 0, (4, 2), slot=30) - 0.5 for n in range(len(images))])
            here = adv.clone()
            slope = through(lambda offsets, x=here: warped_by(offsets)(x), grad, first)
            total = total + through(warped_by(first - 0.4 * slope), grad, adv) / 2
        m = DECAY * m + unit(total)
        adv = clip(adv + ALPHA * m.sign(), images)
    return adv


MOMENTUM = BASE | {"decay": DECAY}
EQUATIONS: dict[str, tuple[Callable[[Tensor, Gradient], Tensor], dict[str, Any]]] = {
    "DIM": (dim, {"resize_rate": 1.3, "diversity_prob": 0.6}),
    "TIM": (tim, {"len_kernel": 5, "nsig": 2.0}),
    "SIM": (over_copies(lambda image, n, copy, step: image / 2**copy, 3), {"m": 3}),
    "Admix": (over_copies(admix, 6), {"num_scale": 3, "num_admix": 2, "admix_strength": 0.3, "pool": POOL}),
    "DeCowA": (decowa, {"num_warping": 2, "mesh": 4, "noise_scale": 1.0, "rho": 0.4}),
    "SIA": (over_copies(sia, 4), {"num_scale": 4, "num_block": 3}),
    "BSR": (over_copies(bsr, 2), {"num_scale": 2, "num_block": 3, "degrees": 50.0}),
    "MaskBlock": (over_copies(masked, 9), {"num_block": 3}),
    "SSM": (over_copies(ssm, 2), {"num_spectrum": 2, "rho": 0.4, "sigma": 0.1}),
    "USMM": (
        over_copies(usmm, 6),
        {"num_scale": 3, "scale_low": 0.2, "scale_high": 0.8, "num_mix": 2, "mix_range": 0.4, "pool": POOL},
    ),
}


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_papers_equations(name: str) -> None:
    equation, parameters = EQUATIONS[name]
    model, images = network(), photos()
    expected = equation(images, gradient_of(model, targeted=True))
    attack = create(name, model, seed=SEED, targeted=True, **MOMENTUM | parameters)
    assert (expected - images).abs().amax((1, 2, 3)).min() > 0.9 * EPS
    torch.testing.assert_close(attack(images, LABELS, indices=INDICES), expected, rtol=0, atol=1e-9)


DEFAULTS: dict[str, str] = {
    "dim": "[InputDiversity(rate=1.1, p=0.5, copies=1)]",
    "tim": "[]",
    "sim": "[Scales(copies=5)]",
    "decowa": "[]",
    "admix": "[Mixes(pool=None, copies=3, strength=0.2), Scales(copies=5)]",
    "sia": "[BlockOperations(copies=20, blocks=3)]",
    "bsr": "[BlockShuffle(copies=20, blocks=2, degrees=24.0)]",
    "maskblock": "[BlockMasks(blocks=4, copies=16)]",
    "ssm": f"[SpectrumMask(copies=20, rho=0.5, sigma={8 / 255})]",
    "usmm": "[UniformScales(copies=5, low=0.1, high=0.75), MixMask(pool=None, copies=3, mix_range=0.5)]",
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults(name: str) -> None:
    parameters = create(name, network()).parameters()
    assert parameters["transforms"].replace("()", "[]") == DEFAULTS[name]
    assert parameters["step"] == "SignStep(momentum=1.0, nesterov=False)"
    warps = "ConstrainedWarps(copies=20, mesh=3, strength=2.0, rho=0.01)"
    assert parameters["estimator"] == (warps if name == "decowa" else "Plain()")
    smoothing = "[Smoothing(kernel='gaussian', size=15, sigma=3.0)]" if name == "tim" else "()"
    assert parameters["shaping"] == smoothing


@pytest.mark.parametrize("name", sorted(POOLED))
@pytest.mark.parametrize(
    "holds",
    [
        test_engine.test_an_image_is_attacked_alike_alone_and_in_any_batch,
        test_engine.test_draws_belong_to_the_index_the_seed_and_nothing_else,
        test_engine.test_nothing_outside_is_changed,
        test_engine.test_memory_layout_and_empty_batches,
    ],
    ids=lambda holds: holds.__name__.removeprefix("test_"),
)
def test_what_holds_for_all_attacks_holds_with_a_pool(holds: Callable[[str], None], name: str) -> None:
    holds(name)


@pytest.mark.parametrize("max_batch", [1, 5])
@pytest.mark.parametrize("name", sorted(POOLED))
def test_max_batch_changes_memory_only_with_a_pool(name: str, max_batch: int) -> None:
    test_engine.test_max_batch_changes_memory_only(name, max_batch)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", sorted(POOLED))
def test_no_step_with_a_pool_waits_for_the_device(name: str, device: str) -> None:
    source = Classifier(samples.Network().eval(), (0.5, 0.5), (0.2, 0.2), samples.CLASSES).to(device)
    images, labels, indices = test_no_sync.batch(device)
    attack = samples.build(name, source)
    for transform in attack.transforms:
        if isinstance(transform, Mixes | MixMask):
            # What the border does cannot be done with a tensor without values.
            object.__setattr__(transform, "pool", samples.pool(3).to(device))
    with NoSync(device):
        assert attack._run(source, images, labels, indices).device.type == device


@pytest.mark.parametrize("name", sorted(POOLED))
def test_a_graph_replays_the_attack_with_a_pool(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taping = Taping()
    monkeypatch.setitem(graph.CAPTURES, "cpu", taping)
    test_graph.test_replays_are_the_plain_attack(name, {"max_batch": 4}, taping)


@pytest.mark.parametrize("name", sorted(POOLED))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_zero_gradient_moves_nothing_with_a_pool(name: str, dtype: torch.dtype) -> None:
    images = photos().to(dtype)
    adv = create(name, Constant(4), pool=POOL.to(dtype))(images, LABELS)
    assert torch.equal(adv, images)
    assert adv.dtype == dtype


@pytest.mark.parametrize(
    ("pool", "error", "message"),
    [
        (None, ValueError, r"pool: got None; allowed is a tensor \[M, C, H, W\] of images to mix in"),
        ([1.0], TypeError, "pool: got list"),
        (POOL[0], ValueError, r"pool: got shape \[3, 12, 12\]"),
        (POOL[:0], ValueError, "pool: got no image"),
        ((POOL * 255).byte(), ValueError, "pool: got dtype torch.uint8"),
        (POOL * 2, ValueError, r"pool: values span .*; allowed is \[0, 1\]"),
        (POOL[..., 1:], ValueError, r"pool: got images of \[3, 12, 11\]; allowed is .* \[3, 12, 12\]"),
        (POOL[:, :1], ValueError, r"pool: got images of \[1, 12, 12\]"),
    ],
)
@pytest.mark.parametrize("name", sorted(POOLED))
def test_pools_that_cannot_be_mixed_in_are_refused(name: str, pool: Any, error: type[Exception], message: str) -> None:
    module = test_engine.Counting()
    with pytest.raises(error, match=message) as raised:
        create(name, module, pool=pool)(photos(), LABELS)
    assert "\n" not in str(raised.value)
    assert module.count == 0


def test_a_pool_elsewhere_is_refused() -> None:
    mixes = Mixes(POOL)
    object.__setattr__(mixes, "pool", POOL.to("meta"))
    with pytest.raises(ValueError, match="pool: on meta; allowed is the device of images, cpu"):
        mixes.check(network(), photos())


@pytest.mark.parametrize("kind", [Mixes, MixMask])
def test_transforms_with_a_pool_compare_and_print_by_what_it_holds(kind: type[Mixes | MixMask]) -> None:
    one = kind(POOL, 2)
    same, changed = POOL.clone(), POOL.clone()
    changed[3, 2, 11, 11] = 0.123
    assert one == kind(same, 2)
    assert hash(one) == hash(kind(same, 2))
    assert one in [kind(None, 2), kind(same, 2)]
    assert kind(None) == kind(None)
    others = [kind(changed, 2), kind(POOL, 3), kind(POOL[1:], 2), kind(POOL.float(), 2), kind(None, 2), Scales(2)]
    assert one not in others[:3] + others[4:]
    assert repr(one) == repr(kind(same, 2))
    assert len({repr(one), *map(repr, others)}) == 7
    assert repr(one).startswith(f"{kind.__name__}(pool=<float64 [4, 3, 12, 12] ")
    assert len(repr(one)) < 90


def shown(transform: Transform, images: Tensor, copies: int = 1, step: int = 0) -> Tensor:
    """[copies, N, C, H, W]: the views of these images."""
    draws = Draws(SEED, step, INDICES[: len(images)], torch.arange(copies), 1)
    rows = Views(images.repeat(copies, 1, 1, 1))
    which = torch.arange(copies) % transform.copies
    return transform.view(rows, which, draws).render().reshape(copies, *images.shape)


VIEWS: dict[str, tuple[Transform, int, Show]] = {
    "operations": (BlockOperations(30, 3), 30, sia),
    "shuffle": (BlockShuffle(10, 3, 50.0), 10, bsr),
    "translation": (Translation(4, 2), 9, translated),
    "crop": (RandomCrop(0.4, 0.5, 3), 9, cropped),
    "warp": (Warp(5, 4, 0.8), 5, warped),
    "masks": (BlockMasks(3), 9, masked),
}


@pytest.mark.parametrize("case", VIEWS)
@pytest.mark.parametrize("size", [(11, 16), (4, 3)])
def test_views_are_what_is_written_out_image_by_image(case: str, size: tuple[int, int]) -> None:
    """Also of images that are not square and hardly larger than their blocks are many; and so is their adjoint.

    But for the rounding of draws to float32.
    """
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


def test_all_ten_operations_are_among_those() -> None:
    drawn_ops = {math.floor(10 * float(u)) for n in range(3) for u in drawn(n, 0, 6, 2, (3, 3)).flatten()}
    drawn_ops |= {math.floor(10 * float(u)) for k in range(9) for u in drawn(0, k, 6, 2, (3, 3)).flatten()}
    assert drawn_ops == set(range(10))


@pytest.mark.parametrize(
    "transform",
    [BlockOperations(1, 5), BlockShuffle(1, 5), BlockShuffle(1, 1, 0.0), Translation(3), RandomCrop(0.3), Warp()],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_smaller_than_the_blocks_are_many(transform: Transform, dtype: torch.dtype) -> None:
    images = torch.rand((3, 2, 1, 2), generator=torch.Generator().manual_seed(3), dtype=dtype)
    views = shown(transform, images)[0]
    assert views.dtype == dtype
    assert not views.isnan().any()
    if isinstance(transform, BlockShuffle):
        assert torch.equal(views.sort(3).values, images.sort(3).values)


def moving(source: nn.Module, **options: Any) -> Attack:
    """The transforms that no preset has."""
    moves = [RandomCrop(0.5, 0.5, 2), Translation(2), Warp(2, 3, 1.0)]
    return Attack(source, 0.1, 0.03, 2, transforms=moves, step=SignStep(1.0), **options)


def test_moves_are_alike_alone_in_any_batch_and_in_chunks() -> None:
    images, labels, indices = samples.photos(5), samples.labels_of(5), torch.tensor([40, 2, 0, 2**31, 17])
    together = moving(samples.Halving())(images, labels, indices=indices)
    chunked = moving(samples.Halving(), max_batch=5)(images, labels, indices=indices)
    assert torch.equal(chunked, together)
    order = torch.tensor([3, 4, 0, 2, 1])
    assert torch.equal(moving(samples.Halving())(images[order], labels[order], indices=indices[order]), together[order])
    for i in range(5):
        alone = moving(samples.Halving())(images[i : i + 1], labels[i : i + 1], indices=indices[i : i + 1])
        assert torch.equal(alone[0], together[i])
    assert not torch.equal(moving(samples.Halving(), seed=1)(images, labels, indices=indices), together)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_moves_do_not_wait_for_the_device(device: str) -> None:
    source = Classifier(samples.Network().eval(), (0.5, 0.5), (0.2, 0.2), samples.CLASSES).to(device)
    images, labels, indices = test_no_sync.batch(device)
    with NoSync(device):
        assert replace(moving(source), steps=1)._run(source, images, labels, indices).device.type == device


def test_combinations_show_the_product_of_all_copies() -> None:
    """Mixes, scales, masks of the spectrum and of blocks: 2 x 2 x 3 x 4 views of an image, each different."""
    model = samples.Halving()
    attack = create(
        "admix+dim+ssm+tim+maskblock",
        model,
        pool=samples.pool(3),
        num_scale=2,
        num_admix=2,
        resize_rate=1.5,
        num_spectrum=3,
        num_block=2,
        steps=1,
    )
    assert [type(transform).__name__ for transform in attack.transforms] == [
        "Mixes",
        "Scales",
        "InputDiversity",
        "SpectrumMask",
        "BlockMasks",
    ]
    assert attack.copies == 48
    images, labels = samples.photos(2), samples.labels_of(2)
    adv = attack(images, labels)
    assert sum(model.batches) == 2 * 48
    assert torch.equal(replace(attack, max_batch=10)(images, labels), adv)
    assert create("admix+sim", model, pool=samples.pool(3)).copies == 15


def test_frequencies_are_weighted_each_on_its_own() -> None:
    """Also of images that are not square: the spectrum of the view over that of the image is the mask."""
    images = torch.rand((2, 3, 7, 10), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    views = shown(SpectrumMask(2, 0.3, 0.0), images, 2)
    mask = dctn(views.numpy(), axes=(3, 4)) / dctn(images.numpy(), axes=(2, 3))
    assert 0.7 - 1e-6 < mask.min() < 0.71
    assert 1.29 < mask.max() < 1.3 + 1e-6
    assert np.unique(mask.round(9)).size == mask.size
    torch.testing.assert_close(shown(SpectrumMask(1, 0.0, 0.0), images)[0], images, rtol=0, atol=1e-12)
    noise = shown(SpectrumMask(20, 0.0, 0.5), images, 20) - images
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 0.5) < 0.02


def test_images_of_the_pool_are_all_drawn_and_alike() -> None:
    count = 4000
    draws = Draws(SEED, 0, torch.arange(count), torch.arange(2), 1)
    dark, pool = torch.zeros((2 * count, 1, 1, 1)), (torch.arange(4.0) / 4)[:, None, None, None]
    shown = Mixes(pool, 2, 1.0).view(Views(dark), torch.arange(2), draws).render()
    share = [(shown == value).double().mean() for value in pool.flatten()]
    assert all(abs(part - 0.25) < 0.02 for part in share)
    assert not torch.equal(shown[:count], shown[count:])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Mixes(POOL, 0), "copies: got 0"),
        (lambda: Mixes(POOL, 1, -0.1), "strength: got -0.1"),
        (lambda: MixMask(POOL, 1, 1.1), "mix_range: got 1.1"),
        (lambda: MixMask(POOL, 1, -0.1), "mix_range: got -0.1"),
        (lambda: BlockOperations(0), "copies: got 0"),
        (lambda: BlockOperations(1, 0), "blocks: got 0"),
        (lambda: BlockShuffle(0), "copies: got 0"),
        (lambda: BlockShuffle(1, 0), "blocks: got 0"),
        (lambda: BlockShuffle(1, 2, 181), "degrees: got 181"),
        (lambda: BlockMasks(0), "blocks: got 0"),
        (lambda: ConstrainedWarps(0), "copies: got 0"),
        (lambda: ConstrainedWarps(mesh=9), "mesh: got 9"),
        (lambda: ConstrainedWarps(strength=-1), "strength: got -1"),
        (lambda: ConstrainedWarps(rho=-1), "rho: got -1"),
        (lambda: Translation(-1), "reach: got -1"),
        (lambda: Translation(1.5), "reach: got 1.5"),
        (lambda: Translation(1, 0), "copies: got 0"),
        (lambda: RandomCrop(0.0), r"smallest: got 0.0; allowed is a number in \(0, 1\]"),
        (lambda: RandomCrop(0.5, 1.5), "flip: got 1.5"),
        (lambda: RandomCrop(0.5, 0.5, 0), "copies: got 0"),
        (lambda: Warp(0), "copies: got 0"),
        (lambda: Warp(1, 2), "mesh: got 2; allowed is a whole number, 3 to 8"),
        (lambda: Warp(1, 3, -1.0), "strength: got -1.0"),
        (lambda: SpectrumMask(0), "copies: got 0"),
        (lambda: SpectrumMask(rho=1.1), "rho: got 1.1"),
        (lambda: SpectrumMask(sigma=-1), "sigma: got -1"),
        (lambda: UniformScales(0), "copies: got 0"),
        (lambda: UniformScales(2, 0.5, 0.4), r"low: got 0.5; allowed is a number in \[0, 0.4\]"),
        (lambda: UniformScales(2, 0.5, 1.1), "high: got 1.1"),
    ],
)
def test_numbers_outside_their_range_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
