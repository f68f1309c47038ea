from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate, pad

from alignfast.ops import Mixing, Noise, ResizePad, diversify, philox_uniform
from tests import cases
from tests.ops import checks

PARTS = ["noise", "mixing", "scale", "shrink", "enlarge", "normalise"]


def geometry(copies, count, side, padded, seed):
    """Sides from 1 (or from the image's own, where padding enlarges) up to `padded`; some copies left as they are."""
    grid = (copies, count)
    resized = cases.integers(grid, seed, 1 if padded == side else side, padded + 1)
    top = cases.integers(grid, seed + 1, 0, padded - resized + 1)
    left = cases.integers(grid, seed + 2, 0, padded - resized + 1)
    return ResizePad(resized * (cases.random(grid, seed + 3) < 0.8), top, left, padded)


def options_for(parts, images, copies, seed):
    count, channels, side = images.shape[:3]
    grid = (copies, count)
    wide = torch.float64 if images.dtype == torch.float64 else torch.float32
    made = {"copies": copies}
    if "noise" in parts:
        indices = cases.integers((count,), seed, 0, 2**32)
        made["noise"] = Noise(0.2, seed, 3, 17, indices, cases.integers((copies,), seed + 1, 0, 2**24))
    if "mixing" in parts:
        pool = cases.random((5, *images.shape[1:]), seed + 2, images.dtype)
        made["mixing"] = Mixing(pool, cases.integers(grid, seed + 3, 0, 5), cases.random(grid, seed + 4, wide))
    if "scale" in parts:
        made["scale"] = cases.random(grid, seed + 5, wide, low=-1.0)
    if "shrink" in parts:
        made["resize_pad"] = geometry(copies, count, side, side, seed + 6)
    if "enlarge" in parts:
        made["resize_pad"] = geometry(copies, count, side, side + 1 + side // 3, seed + 6)
    if "normalise" in parts:
        made["mean"] = cases.random((channels,), seed + 7, wide)
        made["std"] = cases.random((channels,), seed + 8, wide, low=0.2)
    return made


def expected(images, *, copies=1, noise=None, mixing=None, scale=None, resize_pad=None, mean=None, std=None):
    """Copy by copy and image by image in float64."""
    rows = []
    for k in range(copies):
        for n in range(len(images)):
            x = images[n].double()
            if noise is not None:
                keys = {"seed": noise.seed, "step": noise.step, "purpose": noise.purpose}
                bounds = {"low": -noise.radius, "high": noise.radius}
                draws = philox_uniform(noise.images[n : n + 1], noise.copies[k : k + 1], x.shape, **keys, **bounds)
                x = x + draws[0, 0].double()
            if mixing is not None:
                x = x + mixing.weight[k, n].double() * mixing.pool[mixing.partner[k, n]].double()
            if scale is not None:
                x = x * scale[k, n].double()
            if resize_pad is not None and resize_pad.resized[k, n] > 0:
                x = resized_and_padded(
                    x, *(int(getattr(resize_pad, a)[k, n]) for a in ("resized", "top", "left")), resize_pad.padded
                )
            if mean is not None:
                x = (x - mean.double()[:, None, None]) / std.double()[:, None, None]
            rows.append(x)
    return torch.stack(rows) if rows else images.new_zeros(images.shape, dtype=torch.float64)


def resized_and_padded(x, resized, top, left, padded):
    side = x.shape[-1]
    small = interpolate(x[None], size=(resized, resized), mode="bilinear", align_corners=False)
    placed = pad(small, (left, padded - resized - left, top, padded - resized - top))
    back = placed if padded == side else interpolate(placed, size=(side, side), mode="bilinear", align_corners=False)
    return back[0]


def check_against_definition(images, options, layout=cases.contiguous):
    images = layout(images.detach()).requires_grad_()
    batch = diversify(images, **options)
    wide = images.detach().double().requires_grad_()
    wanted = expected(wide, **options)
    assert batch.dtype == images.dtype
    assert batch.is_contiguous()
    # Values before normalisation stay below 3, and a rounding of one is worth up to five after it.
    narrow = images.dtype in cases.HALF_DTYPES
    # A sampling point is rounded like the side, and its rounding is that of its two weights.
    ulps = 1 if narrow else 24 + 2 * images.shape[-1]
    cases.assert_near(batch, wanted.detach(), ulps=ulps, scale=0.01 if narrow else 15.0)
    weight = cases.normal(batch.shape, 99, images.dtype)
    (gradient,) = torch.autograd.grad(batch, images, weight)
    (wanted_gradient,) = torch.autograd.grad(wanted, wide, weight.double()) if len(images) else (wide,)
    assert gradient.dtype == images.dtype
    size = float(wanted_gradient.abs().max()) if len(images) else 0.0
    cases.assert_near(gradient, wanted_gradient, ulps=ulps, scale=(0.01 if narrow else 1.0) * size)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("part", ["nothing", *PARTS])
@pytest.mark.parametrize("square", cases.SQUARES)
def test_each_part_alone(square, part, dtype):
    images = cases.random((*square[:2], square[2], square[2]), 1, dtype)
    check_against_definition(images, options_for([part], images, 3, 2))


@pytest.mark.parametrize("geometric", ["shrink", "enlarge"])
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("square", cases.SQUARES)
def test_all_parts_in_their_order(square, dtype, geometric):
    images = cases.random((*square[:2], square[2], square[2]), 3, dtype)
    check_against_definition(images, options_for(["noise", "mixing", "scale", geometric, "normalise"], images, 2, 4))


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("shape", cases.IMAGES)
def test_images_need_not_be_square_without_resizing(shape, dtype):
    images = cases.random(shape, 5, dtype)
    check_against_definition(images, options_for(["noise", "mixing", "scale", "normalise"], images, 2, 6))


@pytest.mark.parametrize("layout", cases.IMAGE_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_memory_layout_does_not_matter(layout, dtype):
    images = cases.random((3, 3, 9, 9), 7, dtype)
    options = options_for(["noise", "mixing", "scale", "enlarge", "normalise"], images, 2, 8)
    options["mixing"] = replace(options["mixing"], pool=layout(options["mixing"].pool))
    options["scale"] = options["scale"].t().contiguous().t()
    check_against_definition(images, options, layout)


@pytest.mark.parametrize("given", cases.DTYPES)
@pytest.mark.parametrize("wanted", cases.DTYPES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_result_has_the_dtype_and_format_asked_for(given, wanted, memory_format):
    images = cases.random((2, 3, 6, 6), 9, given)
    options = options_for(["scale", "shrink", "normalise"], images, 2, 10)
    batch = diversify(images, **options, dtype=wanted, memory_format=memory_format)
    assert batch.dtype == wanted
    assert batch.is_contiguous(memory_format=memory_format)
    near = torch.float32 if torch.float32 in (given, wanted) else wanted
    coarse = max(torch.finfo(near).eps, torch.finfo(wanted).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(batch.double(), expected(images, **options), rtol=4 * coarse, atol=4 * coarse)


def test_halves_are_widened_before_they_are_summed():
    """A gradient over 300 copies would stall at 256 if it were summed in bfloat16."""
    images = torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16, requires_grad=True)
    diversify(images, copies=320).sum().backward()
    assert torch.equal(images.grad, torch.full((1, 1, 2, 2), 320, dtype=torch.bfloat16))


@pytest.mark.parametrize("part", PARTS)
def test_gradcheck(part):
    images = cases.random((2, 2, 4, 4), 11).requires_grad_()
    options = options_for([part], images, 2, 12)
    assert torch.autograd.gradcheck(lambda x: diversify(x, **options), images)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    copies=st.integers(1, 3),
    count=st.integers(1, 3),
    side=st.integers(1, 9),
    geometric=st.sampled_from(["shrink", "enlarge", "nothing"]),
)
def test_adjoint(seed, copies, count, side, geometric):
    """<A x, y> = <x, A' y> for the linear part, A found by its action and A' by autograd."""
    x = cases.normal((count, 2, side, side), seed)
    options = options_for(["scale", geometric], x, copies, seed + 1)
    options["mean"], options["std"] = torch.zeros(2, dtype=x.dtype), cases.random((2,), seed, low=0.2)
    y = cases.normal((copies * count, 2, side, side), seed + 2)
    point = cases.normal(x.shape, seed + 3).requires_grad_()
    (adjoint,) = torch.autograd.grad(diversify(point, **options), point, y)
    torch.testing.assert_close((diversify(x, **options) * y).sum(), (x * adjoint).sum(), rtol=1e-10, atol=1e-9)
    # Linear: the gradient is the same everywhere, and so is the response to a sum.
    torch.testing.assert_close(
        diversify(x + point.detach(), **options),
        diversify(x, **options) + diversify(point.detach(), **options),
        rtol=1e-10,
        atol=1e-10,
    )


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), dtype=st.sampled_from([torch.float32, torch.float64]), data=st.data())
def test_an_image_does_not_depend_on_its_batch(seed, dtype, data):
    images = cases.random((4, 3, 8, 8), seed, dtype)
    options = options_for(["noise", "mixing", "scale", "enlarge", "normalise"], images, 3, seed + 1)
    whole = diversify(images, **options).unflatten(0, (3, 4))
    rows = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
    copies = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=3))

    def part(values):
        return values[copies][:, rows]

    noise, mixing, pads = options["noise"], options["mixing"], options["resize_pad"]
    options |= {
        "copies": len(copies),
        "noise": replace(noise, images=noise.images[rows], copies=noise.copies[copies]),
        "mixing": replace(mixing, partner=part(mixing.partner), weight=part(mixing.weight)),
        "scale": part(options["scale"]),
        "resize_pad": replace(pads, resized=part(pads.resized), top=part(pads.top), left=part(pads.left)),
    }
    batch = diversify(images[rows], **options).unflatten(0, (len(copies), len(rows)))
    rounding = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(batch, part(whole), rtol=rounding, atol=10 * rounding)


def test_the_step_of_noise_may_be_in_memory():
    images = cases.random((3, 2, 5, 5), 20, torch.float32)
    noise = options_for(["noise"], images, 2, 21)["noise"]
    held = replace(noise, step=torch.tensor(noise.step))
    assert torch.equal(diversify(images, copies=2, noise=held), diversify(images, copies=2, noise=noise))
    with pytest.raises(ValueError, match=r"^noise.step: got dtype torch.float32; allowed is torch.int64"):
        diversify(images, copies=2, noise=replace(noise, step=torch.tensor(1.0)))


def test_a_size_of_zero_or_the_images_own_changes_nothing():
    images = cases.random((2, 3, 7, 7), 13, torch.float32)
    still = torch.zeros(2, 2, dtype=torch.int64)
    for resized, padded in ((0, 7), (7, 7), (0, 9)):
        batch = diversify(images, copies=2, resize_pad=ResizePad(still + resized, still, still, padded))
        torch.testing.assert_close(batch, images.repeat(2, 1, 1, 1), rtol=0, atol=0)


def test_padding_is_zero_and_normalised_like_any_value():
    images = torch.ones(1, 1, 6, 6)
    at = torch.tensor([[2]])
    batch = diversify(
        images, resize_pad=ResizePad(at + 1, at, at - 1, 6), mean=torch.tensor([0.5]), std=torch.tensor([0.25])
    )
    wanted = torch.full((6, 6), -2.0)
    wanted[2:5, 1:4] = 2.0
    torch.testing.assert_close(batch[0, 0], wanted)


def test_the_pool_gets_no_gradient_and_nothing_is_changed():
    images = cases.random((3, 2, 5, 5), 14).requires_grad_()
    options = options_for(["noise", "mixing", "scale", "shrink", "normalise"], images, 2, 15)
    pool = options["mixing"].pool.requires_grad_()
    before = images.detach().clone(), pool.detach().clone()
    diversify(images, **options).sum().backward()
    assert pool.grad is None
    assert torch.equal(images.detach(), before[0])
    assert torch.equal(pool.detach(), before[1])


def test_images_mixed_with_themselves_get_the_gradient_of_their_own_place_only():
    images = cases.random((2, 1, 3, 3), 16).requires_grad_()
    mixing = Mixing(images, torch.tensor([[1, 0]]), torch.full((1, 2), 0.2, dtype=torch.float64))
    diversify(images, mixing=mixing).sum().backward()
    assert torch.equal(images.grad, torch.ones_like(images))


GRID = torch.zeros(2, 3, dtype=torch.int64)
NOISE = Noise(0.1, 0, 0, 0, torch.arange(3), torch.arange(2))
MIXING = Mixing(torch.zeros(4, 3, 8, 8), GRID, torch.zeros(2, 3))
PAD = ResizePad(GRID + 6, GRID, GRID, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(3, 8, 8)}, "images: got shape"),
        ({"images": torch.zeros(3, 3, 8, 8, dtype=torch.uint8)}, "images: got dtype torch.uint8"),
        ({"copies": 0}, "copies: got 0; allowed is a whole number, at least 1"),
        ({"copies": 2.0}, "copies: got 2.0"),
        ({"noise": replace(NOISE, radius=-0.1)}, "noise.radius: got -0.1"),
        ({"noise": replace(NOISE, images=torch.arange(2))}, r"noise.images: got shape \[2\]; allowed is \[3\]"),
        ({"noise": replace(NOISE, copies=torch.arange(3))}, r"noise.copies: got shape \[3\]; allowed is \[2\]"),
        (
            {"noise": replace(NOISE, images=torch.zeros(3))},
            "noise.images: got dtype torch.float32; allowed is torch.int64",
        ),
        (
            {"noise": replace(NOISE, copies=torch.arange(2, device="meta"))},
            "noise.copies: on meta; allowed is the device",
        ),
        ({"mixing": replace(MIXING, pool=torch.zeros(4, 3, 8, 7))}, r"mixing.pool: .* allowed is \[any, 3, 8, 8\]"),
        ({"mixing": replace(MIXING, pool=torch.zeros(4, 3, 8, 8, device="meta"))}, "mixing.pool: on meta"),
        ({"mixing": replace(MIXING, partner=GRID.t())}, r"mixing.partner: got shape \[3, 2\]; allowed is \[2, 3\]"),
        ({"mixing": replace(MIXING, partner=GRID.float())}, "mixing.partner: got dtype torch.float32"),
        ({"mixing": replace(MIXING, weight=torch.zeros(3))}, "mixing.weight: got shape"),
        ({"scale": torch.ones(3, 2)}, r"scale: got shape \[3, 2\]; allowed is \[2, 3\]"),
        ({"scale": torch.ones(2, 3, device="meta")}, "scale: on meta; allowed is the device of images, cpu"),
        ({"resize_pad": replace(PAD, padded=7)}, "resize_pad.padded: got 7; allowed is a whole number, at least 8"),
        ({"resize_pad": replace(PAD, resized=GRID[0])}, "resize_pad.resized: got shape"),
        ({"resize_pad": replace(PAD, top=GRID.t())}, "resize_pad.top: got shape"),
        ({"resize_pad": replace(PAD, left=GRID.float())}, "resize_pad.left: got dtype torch.float32"),
        ({"images": torch.zeros(3, 3, 8, 7), "resize_pad": PAD}, "resize_pad: got images of 8 x 7; allowed is square"),
        ({"mean": torch.zeros(3)}, "mean, std: got one of them"),
        ({"std": torch.ones(3)}, "mean, std: got one of them"),
        ({"mean": torch.zeros(4), "std": torch.ones(4)}, r"mean: got shape \[4\]; allowed is \[3\]"),
        ({"mean": torch.zeros(3), "std": torch.ones(1)}, "std: got shape"),
        ({"mean": torch.zeros(3), "std": torch.ones(3, device="meta")}, "std: on meta"),
        ({"dtype": torch.uint8}, "dtype: got torch.uint8; allowed is a floating-point dtype"),
        ({"memory_format": torch.preserve_format}, "memory_format: got torch.preserve_format"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        diversify(**{"images": torch.zeros(3, 3, 8, 8), "copies": 2, **change})


def test_tensors_other_than_the_images_are_constants():
    for name, change in {
        "mixing.weight": {"mixing": replace(MIXING, weight=torch.zeros(2, 3, requires_grad=True))},
        "scale": {"scale": torch.ones(2, 3, requires_grad=True)},
        "mean": {"mean": torch.zeros(3, requires_grad=True), "std": torch.ones(3)},
        "std": {"mean": torch.zeros(3), "std": torch.ones(3, requires_grad=True)},
    }.items():
        with pytest.raises(ValueError, match=rf"^{name}: requires grad; allowed is a constant"):
            diversify(torch.zeros(3, 3, 8, 8), copies=2, **change)
        with torch.no_grad():
            diversify(torch.zeros(3, 3, 8, 8), copies=2, **change)


NOTHING = (0.0, (), None, None, None, None, None, None, None, None, None, 0, None, None)


def raw(images, copies, options, dtype=None, channels_last=False):
    """The op's own arguments, and those of its adjoint for a gradient of its result."""
    noise, mixing, pads = (options.get(name) for name in ("noise", "mixing", "resize_pad"))
    resize = (pads.resized, pads.top, pads.left, pads.padded) if pads else (None, None, None, 0)
    key = (noise.seed & 0xFFFFFFFF, noise.seed >> 32, noise.step, noise.purpose) if noise else ()
    noises = (noise.radius, key, noise.images, noise.copies) if noise else (0.0, (), None, None)
    mixed = (mixing.pool, mixing.partner, mixing.weight) if mixing else (None, None, None)
    scale, mean, std = (options.get(name) for name in ("scale", "mean", "std"))
    forward = (images, copies, *noises, *mixed, scale, *resize, mean, std, dtype or images.dtype, channels_last)
    return forward, (copies, scale, *resize, std, images.dtype)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("geometric", ["shrink", "enlarge", "nothing"])
def test_the_operators(geometric, dtype, channels_last):
    images = cases.random((2, 3, 7, 7), 17).float().requires_grad_()
    options = options_for(["noise", "mixing", "scale", geometric, "normalise"], images, 2, 18)
    forward, adjoint = raw(images, 2, options, dtype, channels_last)
    checks.operator("diversify", *forward)
    grad = cases.normal((4, 3, 7, 7), 19, dtype)
    checks.operator("diversify_backward", cases.channels_last(grad).requires_grad_(), *adjoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(3, 8, 8)}, "images: got shape"),
        ({0: torch.zeros(3, 3, 8, 8, dtype=torch.int64)}, "images: got dtype int64"),
        ({1: 0}, "copies: got 0; allowed is a whole number, at least 1"),
        ({2: -0.1, 3: (0, 0, 0, 0), 4: torch.arange(3), 5: torch.arange(2)}, "noise.radius: got -0.1"),
        ({3: (0, 0, 0, 256), 4: torch.arange(3), 5: torch.arange(2)}, "noise.purpose: got 256; allowed is 0 to 255"),
        ({3: (0, 0, 0, 0), 4: torch.arange(2), 5: torch.arange(2)}, r"noise.images: got shape \[2\]"),
        ({6: torch.zeros(4, 3, 8, 7), 7: GRID, 8: torch.zeros(2, 3)}, "mixing.pool: got shape"),
        ({6: torch.zeros(4, 3, 8, 8), 7: GRID.t(), 8: torch.zeros(2, 3)}, "mixing.partner: got shape"),
        ({9: torch.ones(3, 2)}, r"scale: got shape \[3, 2\]; allowed is \[2, 3\]"),
        ({10: GRID, 11: GRID, 12: GRID, 13: 7}, "resize_pad.padded: got 7; allowed is a whole number, at least 8"),
        ({10: GRID.t(), 11: GRID, 12: GRID, 13: 8}, "resize_pad.resized: got shape"),
        ({14: torch.zeros(4)}, r"mean: got shape \[4\]; allowed is \[3\]"),
        ({15: torch.zeros(4)}, r"std: got shape \[4\]; allowed is \[3\]"),
        ({16: torch.int64}, "dtype: got dtype int64"),
    ],
)
def test_the_operator_and_its_fake_refuse(change, message):
    arguments = [torch.zeros(3, 3, 8, 8), 2, *NOTHING, torch.float32, False]
    for place, value in change.items():
        arguments[place] = value
    checks.refusal("diversify", tuple(arguments), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(6, 3, 8)}, "grad: got shape"),
        ({1: 4}, "copies: got 4 for a gradient of 6 images; allowed is a divisor"),
        ({2: torch.ones(3, 2)}, r"scale: got shape \[3, 2\]; allowed is \[2, 3\]"),
        ({7: torch.zeros(4)}, r"std: got shape \[4\]; allowed is \[3\]"),
    ],
)
def test_the_adjoint_and_its_fake_refuse(change, message):
    arguments = [torch.zeros(6, 3, 8, 8), 2, None, None, None, None, 0, None, torch.float32]
    for place, value in change.items():
        arguments[place] = value
    checks.refusal("diversify_backward", tuple(arguments), message)


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resize_pad": replace(PAD, resized=GRID + 9)}, "resize_pad.resized: got 9; allowed is 0 to 8"),
        ({"resize_pad": replace(PAD, resized=GRID - 1)}, "resize_pad.resized: got -1; allowed is 0 to 8"),
        ({"resize_pad": replace(PAD, top=GRID + 3)}, "resize_pad.top: got 3 for a side of 6 in 8; allowed is 0 to 2"),
        ({"resize_pad": replace(PAD, left=GRID - 1)}, "resize_pad.left: got -1 for a side of 6 in 8"),
        ({"mixing": replace(MIXING, partner=GRID + 4)}, "mixing.partner: got 4; allowed is 0 to 3"),
        ({"noise": replace(NOISE, images=torch.arange(3) - 1)}, "noise.images: got -1; allowed is 0 to 4294967295"),
        ({"noise": replace(NOISE, copies=torch.arange(2) + 2**24)}, "noise.copies: got 16777216"),
        ({"noise": replace(NOISE, step=torch.tensor(-1))}, "noise.step: got -1; allowed is 0 to 4294967295"),
    ],
)
def test_values_in_tensors_are_checked_on_the_cpu(change, message):
    with pytest.raises(RuntimeError, match=f"^{message}"):
        diversify(torch.zeros(3, 3, 8, 8), copies=2, **change)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("geometric", ["shrink", "enlarge", "nothing"])
@pytest.mark.parametrize("given", [cases.contiguous, cases.channels_last])
@pytest.mark.parametrize("wanted", [torch.contiguous_format, torch.channels_last])
def test_any_number_of_channels(channels, geometric, given, wanted):
    images = given(cases.random((2, channels, 11, 11), 20, torch.float32)).requires_grad_()
    options = options_for(["mixing", "scale", geometric, "normalise"], images, 2, 21)
    batch = diversify(images, **options, memory_format=wanted)
    wide = images.detach().double().requires_grad_()
    right = expected(wide, **options)
    cases.assert_near(batch.detach(), right.detach(), ulps=64, scale=15.0)
    weight = cases.normal(batch.shape, 22, torch.float32).contiguous(memory_format=wanted)
    (gradient,) = torch.autograd.grad(batch, images, weight)
    (right_gradient,) = torch.autograd.grad(right, wide, weight.double())
    cases.assert_near(gradient, right_gradient, ulps=64, scale=float(right_gradient.abs().max()))


@pytest.mark.parametrize("resized", [1, 2, 7, 60, 224, 245, 246])
@pytest.mark.parametrize("padded", [224, 246, 700])
def test_geometry_of_common_size(resized, padded):
    """Every pair of interpolation and padding, also those far from what attacks draw."""
    images = cases.random((1, 3, 224, 224), 23, torch.float32).requires_grad_()
    at = torch.full((1, 1), min(resized, padded))
    pads = ResizePad(at, (padded - at) // 2, (padded - at) // 3, padded)
    batch = diversify(images, resize_pad=pads)
    wide = images.detach().double().requires_grad_()
    right = expected(wide, resize_pad=pads)
    cases.assert_near(batch.detach(), right.detach(), ulps=16, scale=1.0)
    weight = cases.normal(batch.shape, 24, torch.float32)
    (gradient,) = torch.autograd.grad(batch, images, weight)
    (right_gradient,) = torch.autograd.grad(right, wide, weight.double())
    cases.assert_near(gradient, right_gradient, ulps=64, scale=float(right_gradient.abs().max()))


def test_batches_larger_than_the_caches():
    """Rows are asked for ahead then; images at both ends of the batch are those of a small one."""
    images = cases.random((40, 3, 224, 224), 25, torch.float32)
    options = options_for(["scale", "enlarge", "normalise"], images, 1, 26)
    pads, weight = options["resize_pad"], cases.normal(images.shape, 27, torch.float32)
    for rows in (slice(0, 2), slice(38, 40)):
        few = options | {
            "scale": options["scale"][:, rows],
            "resize_pad": ResizePad(*(part[:, rows] for part in (pads.resized, pads.top, pads.left)), pads.padded),
        }
        results = []
        for whole, chosen, part in ((images, options, rows), (images[rows], few, slice(None))):
            leaf = whole.clone().requires_grad_()
            batch = diversify(leaf, **chosen)
            (gradient,) = torch.autograd.grad(batch, leaf, weight if whole is images else weight[rows])
            results.append((batch[part].detach(), gradient[part]))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])


@pytest.mark.cpu_only
def test_threads_change_nothing():
    images = cases.random((3, 3, 33, 33), 28, torch.float32).requires_grad_()
    options = options_for(["noise", "mixing", "scale", "enlarge", "normalise"], images, 3, 29)

    def compute():
        batch = diversify(images, **options)
        return batch, *torch.autograd.grad(batch.sin().sum(), images)

    checks.same_on_any_thread_count(compute)


@pytest.mark.parametrize("geometric", ["shrink", "enlarge", "nothing"])
def test_it_compiles_whole(geometric):
    images = cases.random((2, 3, 8, 8), 30, torch.float32).requires_grad_()
    options = options_for(["noise", "mixing", "scale", geometric, "normalise"], images, 2, 31)
    checks.compiles_whole(
        lambda images: (
            diversify(images * 2, **options, dtype=torch.bfloat16, memory_format=torch.channels_last).float().sin()
        ),
        images,
    )


def test_gradgradcheck():
    images = cases.random((2, 2, 4, 4), 32).requires_grad_()
    options = options_for(["mixing", "scale", "shrink", "normalise"], images, 2, 33)
    assert torch.autograd.gradgradcheck(lambda x: diversify(x, **options) ** 2, images)
