from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate, pad

from alignfast.ops import Mixing, Noise, ResizePad, diversify, philox_uniform
from tests import cases

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
