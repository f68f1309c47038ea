from itertools import product
from math import inf

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn.functional import conv2d, hardtanh, pad

from alignfast.ops import PackedResidual, inverted_residual
from alignfast.ops.inverted_residual import BLOCK
from alignfast.reference.inverted_residual import inverted_residual as reference
from tests import cases
from tests.ops import checks

# It has kernels for the CPU alone.
pytestmark = pytest.mark.cpu_only

RELU6 = (0.0, 6.0)
EVERYTHING = (-inf, inf)
NO_PADDING = (0, 0, 0, 0)
# [N, C, H, W], channels between the pointwise convolutions and behind them, the kernel's sides, the stride and the
# padding: above, below, on the left and on the right.
RESIDUALS = [
    ((0, 3, 5, 5), 4, 2, (3, 3), (1, 1), (1, 1, 1, 1)),
    ((1, 1, 1, 1), 1, 1, (1, 1), (1, 1), (0, 0, 0, 0)),
    ((2, 3, 1, 1), 5, 3, (3, 3), (1, 1), (1, 1, 1, 1)),
    ((2, 15, 7, 5), 47, 16, (3, 3), (1, 1), (1, 1, 1, 1)),
    ((1, 16, 9, 4), 48, 15, (3, 3), (2, 2), (1, 1, 1, 1)),
    ((9, 17, 6, 9), 49, 17, (5, 5), (1, 1), (2, 2, 2, 2)),
    ((1, 31, 5, 3), 96, 33, (2, 4), (1, 3), (0, 1, 2, 1)),
    ((2, 8, 11, 10), 97, 48, (5, 5), (2, 2), (1, 2, 1, 2)),
    ((1, 24, 8, 7), 144, 65, (3, 3), (3, 2), (0, 0, 0, 0)),
    ((3, 4, 3, 70), 50, 100, (3, 3), (1, 1), (1, 1, 1, 1)),
    # Larger strides than the kernel, which some pixels lie between, and than the result.
    ((1, 6, 6, 6), 7, 5, (3, 3), (4, 5), (1, 0, 2, 1)),
    ((2, 18, 9, 8), 20, 6, (1, 1), (2, 3), (0, 0, 0, 0)),
    ((1, 16, 5, 7), 17, 4, (3, 3), (9, 100), (1, 1, 1, 1)),
    # More padding than the kernel is large.
    ((1, 3, 2, 2), 4, 3, (3, 3), (1, 1), (5, 4, 6, 5)),
    # The largest kernel.
    ((1, 2, 33, 34), 3, 2, (32, 32), (1, 1), (0, 1, 0, 0)),
]
CLIPS = [RELU6, EVERYTHING, (-inf, 0.75), (-0.5, inf), (-0.25, 0.5)]
SMALL = [
    ((1, 2, 3, 4), 3, 2, (3, 3), (1, 1), (1, 1, 1, 1)),
    ((2, 1, 4, 3), 50, 2, (2, 3), (2, 1), (0, 1, 1, 0)),
]
NAMES = ("shape", "middle", "channels", "kernel", "stride", "padding")
EVERY_RESIDUAL = pytest.mark.parametrize(NAMES, RESIDUALS)
EVERY_DTYPE = pytest.mark.parametrize("dtype", cases.DTYPES)


def eighths(shape, seed, dtype=torch.float64, low=-1, high=1):
    """Multiples of 1/8, whose products and sums are exact in any order and so on the same side of a bound."""
    return (cases.random(shape, seed, low=8 * low, high=8 * high).floor() / 8).to(dtype)


def inputs(shape, middle, channels, kernel, dtype=torch.float64, seed=0, make=eighths):
    """Images, and the weights and biases of three convolutions."""
    shapes = [shape, (middle, shape[1], 1, 1), (middle,), (middle, 1, *kernel), (middle,)]
    shapes += [(channels, middle, 1, 1), (channels,)]
    return [make(one, seed + i, dtype) for i, one in enumerate(shapes)]


def clipped(values, low, high):
    inside = (low < values) & (values < high)
    return torch.where(inside, values, hardtanh(values.detach(), low, high))


def expected(images, expand, expand_bias, depthwise, depthwise_bias, project, bias, stride, padding, clip):
    """In float64, of inputs in float64."""
    top, bottom, left, right = padding
    between = pad(clipped(conv2d(images, expand, expand_bias), *clip), (left, right, top, bottom))
    between = clipped(conv2d(between, depthwise, depthwise_bias, stride, groups=len(depthwise)), *clip)
    return conv2d(between, project, bias)


def ours(images, *weights, stride=(1, 1), padding=NO_PADDING, clip=RELU6):
    return inverted_residual(images, PackedResidual.of(*weights), stride=stride, padding=padding, clip=clip)


def passes(compute, images, incoming):
    """The result and the gradient of the images."""
    leaf = images.detach().requires_grad_()
    result = compute(leaf)
    return result.detach(), torch.autograd.grad(result, leaf, incoming.to(result.dtype))[0]


def sizes(shape, channels, kernel, stride, padding):
    sides = (shape[2] + padding[0] + padding[1], shape[3] + padding[2] + padding[3])
    return (shape[0], channels, *((s - k) // step + 1 for s, k, step in zip(sides, kernel, stride, strict=True)))


def check(given, stride, padding, clip):
    images, *weights = given
    incoming = cases.normal(sizes(images.shape, len(weights[4]), weights[2].shape[2:], stride, padding), 20)
    incoming = incoming.to(images.dtype)
    settings = {"stride": stride, "padding": padding, "clip": clip}
    found = passes(lambda leaf: ours(leaf, *weights, **settings), images, incoming)
    exact = [tensor.double() for tensor in weights]
    wanted = passes(lambda leaf: expected(leaf, *exact, *settings.values()), images.double(), incoming.double())
    # Of what is summed, without what the clips make of it: no more than that times a few roundings of sums is lost.
    bounds = [tensor.abs() for tensor in exact]
    largest = passes(
        lambda leaf: expected(leaf, *bounds, stride, padding, EVERYTHING),
        images.double().abs(),
        incoming.double().abs(),
    )
    for one, other, size in zip(found, wanted, largest, strict=True):
        assert one.dtype == images.dtype
        assert one.is_contiguous(memory_format=torch.channels_last)
        half = images.dtype in cases.HALF_DTYPES
        cases.assert_near(one, other, ulps=0.6 if half else 64, scale=size * (2**-8 if half else 1))


@EVERY_DTYPE
@pytest.mark.parametrize("clip", CLIPS)
@EVERY_RESIDUAL
def test_it_is_the_three_convolutions(shape, middle, channels, kernel, stride, padding, clip, dtype):
    check(inputs(shape, middle, channels, kernel, dtype), stride, padding, clip)


@EVERY_DTYPE
@EVERY_RESIDUAL
def test_of_numbers_that_are_not_exact(shape, middle, channels, kernel, stride, padding, dtype):
    check(inputs(shape, middle, channels, kernel, dtype, 30, cases.normal), stride, padding, EVERYTHING)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("columns", [*range(1, 20), 28, 29, 57])
def test_every_number_of_columns(columns, stride):
    """Below, at and above the numbers that are summed, or computed together, at a time."""
    for rows, dtype in product((1, 5), (torch.float64, torch.float32)):
        check(inputs((2, 3, rows, columns), 50, 18, (3, 3), dtype, columns), (1, stride), (1, 1, 2, 1), RELU6)


@pytest.mark.parametrize("channels", [1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 95, 96, 97])
def test_every_number_of_channels(channels):
    for middle, dtype in product((channels, 2 * channels), (torch.float64, torch.float32)):
        check(inputs((2, channels, 4, 5), middle, channels, (3, 3), dtype, channels), (1, 1), (1, 1, 1, 1), RELU6)


@pytest.mark.parametrize("layout", cases.IMAGE_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_layout_of_images_does_not_matter(layout, dtype):
    images, *weights = inputs((2, 5, 6, 5), 20, 3, (3, 3), dtype, 40)
    packed = PackedResidual.of(*weights)
    incoming = cases.normal((2, 3, 4, 3), 50, dtype)
    wanted = passes(lambda leaf: inverted_residual(leaf, packed), images, incoming)
    found = passes(lambda leaf: inverted_residual(leaf, packed), layout(images), layout(incoming))
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


@pytest.mark.parametrize("layout", [*cases.MATRIX_LAYOUTS, cases.channels_last])
def test_memory_layout_of_weights_does_not_matter(layout):
    weights = inputs((2, 5, 6, 5), 20, 3, (3, 3), torch.float32, 60)[1:]
    apart = [layout(weight) if weight.ndim == 4 else cases.every_other(weight) for weight in weights]
    assert all(
        torch.equal(*pair)
        for pair in zip(PackedResidual.of(*apart)[:-1], PackedResidual.of(*weights)[:-1], strict=True)
    )


def test_without_biases():
    images, expand, _, depthwise, _, project, _ = inputs((2, 3, 5, 6), 50, 4, (3, 3), torch.float32, 70)
    zeros = [torch.zeros(len(weight)) for weight in (expand, depthwise, project)]
    wanted = ours(images, expand, zeros[0], depthwise, zeros[1], project, zeros[2])
    assert torch.equal(ours(images, expand, None, depthwise, None, project, None), wanted)


def test_zeros_beyond_the_border_are_zeros_also_with_a_bias():
    ones = [torch.ones(1, 1, 1, 1), torch.ones(1), torch.ones(1, 1, 3, 3), None, torch.ones(1, 1, 1, 1), None]
    found = ours(torch.zeros(1, 1, 3, 3), *ones, padding=(1, 1, 1, 1), clip=EVERYTHING)
    assert torch.equal(found[0, 0], torch.tensor([[4.0, 6, 4], [6, 9, 6], [4, 6, 4]]))


@EVERY_DTYPE
def test_no_gradient_passes_at_a_bound(dtype):
    images = torch.tensor([-1.0, 0.0, 0.5, 6.0, 7.0], dtype=dtype).view(1, 1, 1, 5)
    one = torch.ones(1, 1, 1, 1, dtype=dtype)
    _, grad = passes(lambda leaf: ours(leaf, one, None, one, None, one, None), images, torch.ones_like(images))
    assert grad.flatten().tolist() == [0, 0, 1, 0, 0]


@EVERY_DTYPE
def test_nan_and_infinity(dtype):
    """NaN passes through clips and infinity does not; they stay with their image and the pixels near them."""
    images, *weights = inputs((2, 3, 6, 7), 20, 4, (3, 3), dtype, 80)
    packed = PackedResidual.of(*weights)
    clean = inverted_residual(images, packed)
    images[0, 1, 2, 3] = torch.nan
    found = inverted_residual(images, packed)
    touched = torch.zeros_like(found, dtype=torch.bool)
    touched[0, :, :3, 1:4] = True
    assert torch.equal(found.isnan(), touched)
    assert torch.equal(found[~touched], clean[~touched])
    images[0, 1, 2, 3] = torch.inf
    weights[0] = weights[0].abs() + 1
    assert ours(images, *weights).isfinite().all()


def test_values_between_are_not_rounded():
    """2048 + 1 is no float16, and less 2048 it is a 1 that a float16 would have lost."""
    one = torch.ones(1, 1, 1, 1, dtype=torch.float16)
    bias = torch.full((1,), 2048.0, dtype=torch.float16)
    found = ours(one, one, bias, one, -bias, one, None, clip=EVERYTHING)
    assert found.item() == 1


def test_images_do_not_see_each_other():
    images, *weights = inputs((5, 6, 9, 9), 70, 20, (3, 3), torch.float32, 90, cases.normal)
    whole = ours(images, *weights, stride=(2, 1))
    for n in range(5):
        assert torch.equal(ours(images[n : n + 1], *weights, stride=(2, 1)), whole[n : n + 1])


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize(NAMES, SMALL)
def test_gradcheck(shape, middle, channels, kernel, stride, padding, clip):
    images, *weights = inputs(shape, middle, channels, kernel, seed=100, make=cases.normal)
    packed = PackedResidual.of(*weights)

    def compute(leaf):
        return inverted_residual(leaf, packed, stride=stride, padding=padding, clip=clip)

    assert torch.autograd.gradcheck(compute, images.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda leaf: compute(leaf) ** 2, images)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    numbers=st.tuples(*[st.sampled_from([1, 2, 16, 17, 49])] * 3),
    side=st.tuples(st.integers(1, 7), st.integers(1, 9)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    padding=st.tuples(*[st.integers(0, 3)] * 4),
)
def test_adjoint(seed, numbers, side, kernel, stride, padding):
    """Without biases and clips the sum of A x times y is linear in x, whose gradient it is."""
    assume(side[0] + sum(padding[:2]) >= kernel[0])
    assume(side[1] + sum(padding[2:]) >= kernel[1])
    first, middle, last = numbers
    x, expand, _, depthwise, _, project, _ = inputs(
        (2, first, *side), middle, last, kernel, seed=seed, make=cases.normal
    )
    x.requires_grad_()
    weights = (expand, None, depthwise, None, project, None)
    result = ours(x, *weights, stride=stride, padding=padding, clip=EVERYTHING)
    y = cases.normal(result.shape, seed + 9)
    (grad,) = torch.autograd.grad(result, x, y)
    torch.testing.assert_close((x * grad).sum(), (result * y).sum(), rtol=1e-9, atol=1e-9)


def test_a_bit_of_what_lies_between_is_kept():
    images, *weights = inputs((2, 3, 5, 6), 50, 4, (3, 3), torch.float32, 110)
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: found.append(tensor) or tensor, lambda tensor: tensor):
        ours(images.requires_grad_(), *weights)
    assert [(tensor.dtype, list(tensor.shape)) for tensor in found] == [
        (torch.int16, [2, 2, 5, 6, 3]),
        (torch.int16, [2, 2, 3, 4, 3]),
    ]


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kernel", "stride"), [((3, 3), (1, 1)), ((5, 5), (2, 2)), ((1, 2), (3, 3))])
def test_threads_change_nothing(kernel, stride, dtype, count):
    """Where there are fewer images than threads, they are cut."""
    images, *weights = inputs((count, 6, 30, 31), 70, 20, kernel, dtype, 120, cases.normal)
    packed = PackedResidual.of(*weights)
    settings = {"stride": stride, "padding": (2, 1, 0, 2)}
    incoming = cases.normal(sizes(images.shape, 20, kernel, *settings.values()), 130, dtype)

    def compute():
        return passes(lambda leaf: inverted_residual(leaf, packed, **settings), images, incoming)

    checks.same_on_any_thread_count(compute)


SIZES = ([2, 1], [1, 0, 2, 1])


def operands(dtype=torch.float32):
    """Of both operators, and of the second both ways: [2, 5, 6, 5] becomes [2, 7, 3, 6]."""
    images, *weights = inputs((2, 5, 6, 5), 50, 7, (3, 3), dtype, 140)
    packed = PackedResidual.of(*weights)
    images, grad = (cases.channels_last(x) for x in (images, cases.normal((2, 7, 3, 6), 150, dtype)))
    there = [images, *packed[:6], 50, 7, *SIZES, *RELU6]
    _, in_bits, out_bits = torch.ops.alignfast.inverted_residual(*there)
    linear = [
        images,
        packed.entering,
        packed.depthwise,
        packed.leaving,
        in_bits,
        out_bits,
        50,
        7,
        [6, 5],
        *SIZES,
        False,
    ]
    back = [packed.back_entering, packed.depthwise, packed.back_leaving]
    return {
        "inverted_residual": there,
        "inverted_residual_linear": linear,
        "back": [grad, *back, out_bits, in_bits, 50, 5, [6, 5], *SIZES, True],
    }


def operator_of(name):
    return "inverted_residual_linear" if name == "back" else name


@pytest.mark.parametrize("name", list(operands()))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_operator(name, dtype):
    checks.operator(operator_of(name), *operands(dtype)[name])


def test_the_linear_operator_is_the_one_without_biases():
    images, expand, _, depthwise, _, project, _ = inputs((2, 5, 6, 5), 50, 7, (3, 3), torch.float64, 160)
    packed = PackedResidual.of(expand, None, depthwise, None, project, None)
    result, *bits = torch.ops.alignfast.inverted_residual(
        cases.channels_last(images), *packed[:6], 50, 7, *SIZES, -inf, inf
    )
    weights = (packed.entering, packed.depthwise, packed.leaving)
    found = torch.ops.alignfast.inverted_residual_linear(
        cases.channels_last(images), *weights, *bits, 50, 7, [6, 5], *SIZES, False
    )
    assert torch.equal(found, result)


IMAGES = torch.zeros(1, 3, 4, 4)
PACKED = PackedResidual.of(torch.ones(5, 3, 1, 1), None, torch.ones(5, 1, 3, 3), None, torch.ones(2, 5, 1, 1), None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(3, 4, 4)}, r"images: got shape \[3, 4, 4\]"),
        ({"images": torch.zeros(1, 4, 4, 4)}, r"images: got shape \[1, 4, 4, 4\]; allowed is \[any, 3, any, any\]"),
        ({"images": IMAGES.long()}, "images: got dtype torch.int64"),
        ({"images": IMAGES.double()}, "packed: got torch.float32 on cpu for images of torch.float64 on cpu"),
        ({"images": IMAGES.to("meta")}, "packed: got torch.float32 on cpu for images of torch.float32 on meta"),
        ({"images": torch.zeros(1, 3, 2, 4)}, "images: got a padded side of 2; allowed is at least the kernel's 3"),
        ({"stride": (1,)}, r"stride: got \[1\]; allowed is 2 sizes from 1 on"),
        ({"stride": (1, 0)}, r"stride: got \[1, 0\]"),
        ({"padding": (1, 1)}, r"padding: got \[1, 1\]; allowed is 4 sizes from 0 on"),
        ({"padding": (0, 0, -1, 0)}, r"padding: got \[0, 0, -1, 0\]"),
        ({"clip": (6.0, 0.0)}, r"clip: got \(6.0, 0.0\); allowed is a lowest value below the highest"),
        ({"clip": (float("nan"), 1.0)}, r"clip: got \(nan, 1.0\)"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        inverted_residual(**{"images": IMAGES, "packed": PACKED, **change})


WEIGHTS = {
    "expand": torch.ones(5, 3, 1, 1),
    "expand_bias": torch.ones(5),
    "depthwise": torch.ones(5, 1, 3, 3),
    "depthwise_bias": torch.ones(5),
    "project": torch.ones(2, 5, 1, 1),
    "project_bias": torch.ones(2),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expand": torch.ones(5, 3, 3, 3)}, r"expand: got shape .*; allowed is \[any, any, 1, 1\]"),
        ({"depthwise": torch.ones(4, 1, 3, 3)}, r"depthwise: got shape .*; allowed is \[5, 1, any, any\]"),
        ({"depthwise": torch.ones(5, 5, 3, 3)}, "depthwise: got shape"),
        ({"depthwise": torch.ones(5, 1, 3, 33)}, r"weight: got sides of \[3, 33\]; allowed is 1 to 32"),
        ({"project": torch.ones(2, 4, 1, 1)}, r"project: got shape .*; allowed is \[any, 5, 1, 1\]"),
        ({"expand_bias": torch.ones(4)}, r"expand_bias: got shape \[4\]; allowed is \[5\]"),
        ({"depthwise_bias": torch.ones(4)}, "depthwise_bias: got shape"),
        ({"project_bias": torch.ones(5)}, r"project_bias: got shape \[5\]; allowed is \[2\]"),
        ({"project": torch.ones(2, 5, 1, 1).double()}, "project: got torch.float64 on cpu"),
        ({"expand_bias": torch.ones(5).to("meta")}, "expand_bias: got torch.float32 on meta"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        PackedResidual.of(**{**WEIGHTS, **change})


def of_packed(at):
    return [
        (at, torch.zeros(2, 4, BLOCK), "entering: got shape"),
        (at, torch.zeros(2, 5, BLOCK).double(), "entering: got dtype float64; allowed is float32"),
        (at, torch.zeros(2, BLOCK, 5).mT, "entering: not in contiguous memory; allowed is that alone"),
    ]


def of_depthwise(at):
    return [
        (at, torch.zeros(2, 3, 3, 47), r"depthwise: got shape .*; allowed is \[any, any, any, 48\]"),
        (at, torch.zeros(2, 3, 33, BLOCK), "weight: got a side of 33; allowed is 1 to 32"),
        (at, torch.zeros(3, 3, 3, BLOCK), "between: got 50; allowed is what fills 3 blocks of 48"),
    ]


OF_IMAGES = [
    (0, torch.zeros(5, 6, 5), "images: got shape"),
    (0, torch.zeros(2, 5, 6, 5).long(), "images: got dtype int64"),
    (0, torch.zeros(2, 5, 6, 5), "images: not in channels-last memory; allowed is that alone"),
    (0, cases.channels_last(torch.zeros(2, 4, 6, 5)), "entering: got shape"),
]
REFUSED = {
    "inverted_residual": [
        *OF_IMAGES,
        (0, cases.channels_last(torch.zeros(2, 5, 1, 5)), "images: got a padded side of 2"),
        *of_packed(1),
        (2, torch.zeros(95), r"entering_bias: got shape \[95\]; allowed is \[96\]"),
        *of_depthwise(3),
        (4, torch.zeros(95), r"depthwise_bias: got shape \[95\]; allowed is \[96\]"),
        (5, torch.zeros(2, BLOCK, 7), "leaving: got shape"),
        (6, torch.zeros(7), r"leaving_bias: got shape \[7\]; allowed is \[16\]"),
        (7, 48, "between: got 48; allowed is what fills 2 blocks of 48"),
        (8, 0, "channels: got 0; allowed is at least 1"),
        *checks.of_geometry(9),
        (11, 6.0, r"clip: got \(6, 6\); allowed is a lowest value below the highest"),
    ],
    "inverted_residual_linear": [
        *OF_IMAGES,
        (0, cases.channels_last(torch.zeros(2, 5, 6, 4)), r"images: got shape \[2, 5, 6, 4\]"),
        *of_packed(1),
        *of_depthwise(2),
        (3, torch.zeros(2, BLOCK, 7), "leaving: got shape"),
        (4, torch.zeros(2, 2, 6, 4, 3, dtype=torch.int16), "in_bits: got shape"),
        (4, torch.zeros(2, 2, 6, 5, 3), "in_bits: got dtype float32; allowed is int16"),
        (5, torch.zeros(2, 2, 3, 6, 2, dtype=torch.int16), "out_bits: got shape"),
        (5, torch.zeros(2, 2, 3, 6, 6, dtype=torch.int16)[..., ::2], "out_bits: not in contiguous memory"),
        (6, 97, "between: got 97; allowed is what fills 2 blocks of 48"),
        (7, 0, "channels: got 0; allowed is at least 1"),
        (8, [6], "size: allowed is 2 sizes from 0 on"),
        (8, [1, 5], "images: got a padded side of 2"),
        *checks.of_geometry(9),
    ],
}


@pytest.mark.parametrize(
    ("name", "at", "argument", "message"), [(name, *bad) for name, every in REFUSED.items() for bad in every]
)
def test_the_operator_and_its_fake_refuse(name, at, argument, message):
    arguments = operands()[name]
    arguments[at] = argument
    checks.refusal(name, tuple(arguments), message)


@pytest.mark.parametrize("clip", CLIPS)
@EVERY_RESIDUAL
def test_the_reference_is_the_same(shape, middle, channels, kernel, stride, padding, clip):
    images, *weights = inputs(shape, middle, channels, kernel)
    incoming = cases.normal(sizes(shape, channels, kernel, stride, padding), 170)
    found = passes(lambda leaf: reference(leaf, *weights, stride, padding, clip), images, incoming)
    wanted = passes(lambda leaf: expected(leaf, *weights, stride, padding, clip), images, incoming)
    torch.testing.assert_close(found, wanted)
