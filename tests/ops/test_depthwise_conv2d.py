from itertools import product
from math import inf

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn.functional import conv2d, hardtanh, pad, relu6

from alignfast.ops import depthwise_conv2d
from alignfast.reference.depthwise_conv2d import depthwise_conv2d as reference
from tests import cases
from tests.ops import checks

# It has kernels for the CPU alone.
pytestmark = pytest.mark.cpu_only

EVERYTHING = (-inf, inf)
RELU6 = (0.0, 6.0)
NO_PADDING = (0, 0, 0, 0)
# [N, C, H, W], the kernel's sides, the stride and the padding: above, below, on the left and on the right.
CONVOLUTIONS = [
    ((0, 3, 5, 5), (3, 3), (1, 1), (1, 1, 1, 1)),
    ((1, 1, 1, 1), (1, 1), (1, 1), (0, 0, 0, 0)),
    ((2, 3, 1, 1), (3, 3), (1, 1), (1, 1, 1, 1)),
    ((2, 15, 7, 5), (3, 3), (1, 1), (1, 1, 1, 1)),
    ((1, 16, 9, 4), (3, 3), (2, 2), (1, 1, 1, 1)),
    ((9, 17, 6, 9), (5, 5), (1, 1), (2, 2, 2, 2)),
    ((1, 31, 5, 3), (2, 4), (1, 3), (0, 1, 2, 1)),
    ((2, 32, 11, 10), (5, 5), (2, 2), (1, 2, 1, 2)),
    ((1, 33, 8, 7), (3, 3), (3, 2), (0, 0, 0, 0)),
    ((2, 48, 7, 13), (7, 7), (1, 1), (3, 3, 3, 3)),
    ((1, 130, 5, 9), (2, 4), (2, 1), (1, 2, 3, 0)),
    ((3, 4, 3, 70), (3, 3), (1, 1), (1, 1, 1, 1)),
    # Larger strides than the kernel, which some pixels lie between, and than the result.
    ((1, 65, 6, 6), (3, 3), (4, 5), (1, 0, 2, 1)),
    ((2, 18, 9, 8), (1, 1), (2, 3), (0, 0, 0, 0)),
    ((1, 16, 5, 7), (3, 3), (9, 100), (1, 1, 1, 1)),
    # More padding than the kernel is large, and nothing but padding.
    ((1, 3, 2, 2), (3, 3), (1, 1), (5, 4, 6, 5)),
    ((1, 18, 3, 2), (1, 1), (2, 1), (2, 0, 1, 3)),
    ((2, 17, 0, 0), (3, 3), (1, 1), (2, 2, 2, 3)),
    # The largest.
    ((1, 2, 33, 34), (32, 32), (1, 1), (0, 1, 0, 0)),
]
CLIPS = [
    (RELU6, RELU6),
    (RELU6, EVERYTHING),
    (EVERYTHING, RELU6),
    ((-inf, 0.75), (-0.5, inf)),
    ((-0.5, inf), (-inf, 0.75)),
]
SMALL = [
    ((1, 2, 3, 4), (3, 3), (1, 1), (1, 1, 1, 1)),
    ((2, 1, 4, 3), (2, 3), (2, 1), (0, 1, 1, 0)),
    ((1, 3, 2, 5), (1, 2), (2, 3), (1, 2, 0, 1)),
]
EVERY_CONVOLUTION = pytest.mark.parametrize(("shape", "kernel", "stride", "padding"), CONVOLUTIONS)
EVERY_CLIP = pytest.mark.parametrize(("before", "after"), CLIPS)
EVERY_DTYPE = pytest.mark.parametrize("dtype", cases.DTYPES)


def eighths(shape, seed, dtype=torch.float64, low=-3, high=9):
    """Multiples of 1/8, whose products and sums are exact in any order and so on the same side of a bound."""
    return (cases.random(shape, seed, low=8 * low, high=8 * high).floor() / 8).to(dtype)


def inputs(shape, kernel, dtype=torch.float64, seed=0):
    """Images, weight and bias."""
    weight = eighths((shape[1], 1, *kernel), seed + 2, dtype, -1, 1)
    return eighths(shape, seed + 1, dtype), weight, eighths((shape[1],), seed + 3, dtype, -2, 2)


def sizes(shape, kernel, stride, padding):
    """[N, C, H, W] of the result."""
    sides = (shape[2] + padding[0] + padding[1], shape[3] + padding[2] + padding[3])
    return [*shape[:2], *((s - k) // step + 1 for s, k, step in zip(sides, kernel, stride, strict=True))]


def clipped(values, low, high, dtype=torch.float64):
    """torch's hardtanh, whose gradient passes where what a value is rounded to lies inside."""
    rounded = values.detach().to(dtype).double()
    return torch.where((low < rounded) & (rounded < high), values, hardtanh(values.detach(), low, high))


def expected(
    images,
    weight,
    bias=None,
    dtype=torch.float64,
    stride=(1, 1),
    padding=NO_PADDING,
    before=EVERYTHING,
    after=EVERYTHING,
):
    """In float64, of inputs in float64; dtype: of the op."""
    top, bottom, left, right = padding
    padded = pad(clipped(images, *before), (left, right, top, bottom))
    return clipped(conv2d(padded, weight, bias, stride, groups=images.shape[1]), *after, dtype)


def in_float64(*tensors):
    return [None if tensor is None else tensor.detach().double() for tensor in tensors]


def sizes_of_terms(images, weight, bias, before):
    """Inputs in float64 whose result and gradients are the sums of the sizes of what is summed."""
    images, weight, bias = in_float64(images, weight, bias)
    return images.clamp(*before).abs(), weight.abs(), None if bias is None else bias.abs()


def assert_rounded_once(actual, wanted, scale):
    """Half precision is summed in float32, which is good to a small part of a rounding of the terms of a sum."""
    half = actual.dtype in cases.HALF_DTYPES
    cases.assert_near(actual, wanted, ulps=0.6 if half else 16, scale=scale * (2**-8 if half else 1))


def check_values(images, weight, bias=None, stride=(1, 1), padding=NO_PADDING, before=EVERYTHING, after=EVERYTHING):
    result = depthwise_conv2d(images, weight, bias, stride=stride, padding=padding, before=before, after=after)
    assert result.dtype == images.dtype
    assert result.is_contiguous(memory_format=torch.channels_last)
    wanted = expected(*in_float64(images, weight, bias), images.dtype, stride, padding, before, after)
    scale = expected(*sizes_of_terms(images, weight, bias, before), stride=stride, padding=padding)
    assert_rounded_once(result, wanted, scale)


def gradients(compute, leaves, incoming):
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    return torch.autograd.grad(compute(*leaves), leaves, incoming)


def check_gradients(
    images, weight, bias, incoming, stride=(1, 1), padding=NO_PADDING, before=EVERYTHING, after=EVERYTHING
):
    def ours(images, weight, bias):
        return depthwise_conv2d(images, weight, bias, stride=stride, padding=padding, before=before, after=after)

    def theirs(*leaves):
        return expected(*leaves, images.dtype, stride, padding, before, after)

    def unclipped(*leaves):
        return expected(*leaves, stride=stride, padding=padding)

    found = gradients(ours, (images, weight, bias), incoming)
    wanted = gradients(theirs, in_float64(images, weight, bias), incoming.double())
    scale = gradients(unclipped, sizes_of_terms(images, weight, bias, before), incoming.double().abs())
    for one, other, size in zip(found, wanted, scale, strict=True):
        assert one.dtype == images.dtype
        assert_rounded_once(one, other, size)
    assert found[0].is_contiguous(memory_format=torch.channels_last)


@EVERY_DTYPE
@EVERY_CONVOLUTION
def test_it_is_the_grouped_convolution(shape, kernel, stride, padding, dtype):
    images, weight, bias = cases.normal(shape, 1, dtype), *inputs(shape, kernel, dtype)[1:]
    check_values(images, cases.normal(weight.shape, 2, dtype), None, stride, padding)
    check_values(images, cases.normal(weight.shape, 3, dtype), bias, stride, padding)


@EVERY_DTYPE
@EVERY_CONVOLUTION
def test_gradients_are_those_of_the_grouped_convolution(shape, kernel, stride, padding, dtype):
    images, weight, bias = (cases.normal(x.shape, seed, dtype) for seed, x in enumerate(inputs(shape, kernel), 4))
    incoming = cases.normal(sizes(shape, kernel, stride, padding), 7, dtype)
    check_gradients(images, weight, bias, incoming, stride, padding)


@EVERY_DTYPE
@EVERY_CLIP
@EVERY_CONVOLUTION
def test_clips_before_and_after(shape, kernel, stride, padding, before, after, dtype):
    images, weight, bias = inputs(shape, kernel, dtype, 10)
    check_values(images, weight, bias, stride, padding, before, after)
    incoming = cases.normal(sizes(shape, kernel, stride, padding), 14, dtype)
    check_gradients(images, weight, bias, incoming, stride, padding, before, after)


@pytest.mark.parametrize("channels", [1, 3, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 96, 130])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_every_number_of_channels_and_columns(channels, stride):
    """Below, at and above the numbers of either that are summed at a time."""
    for columns, dtype in product(range(1, 11), [torch.float32, torch.bfloat16]):
        shape, padding = (2, channels, 3, columns), (1, 1, 2, 1)
        images, weight, bias = inputs(shape, (3, 3), dtype, columns)
        check_values(images, weight, bias, (1, stride), padding, after=RELU6)
        incoming = cases.normal(sizes(shape, (3, 3), (1, stride), padding), 20, dtype)
        check_gradients(images, weight, bias, incoming, (1, stride), padding, RELU6)


@pytest.mark.parametrize("layout", cases.IMAGE_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 5, 16])
def test_memory_layout_of_images_does_not_matter(layout, dtype, channels):
    images, weight, bias = inputs((2, channels, 6, 5), (3, 3), dtype, 30)
    incoming = cases.normal((2, channels, 3, 3), 34, dtype)
    settings = ((2, 2), (1, 1, 1, 1), RELU6, RELU6)
    check_values(layout(images), weight, bias, *settings)
    check_gradients(layout(images), weight, bias, layout(incoming), *settings)


def channels_apart(weight):
    """With the channels of a tap side by side, as in channels-last memory."""
    return weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


WEIGHT_LAYOUTS = [*cases.MATRIX_LAYOUTS, channels_apart, cases.channels_last]


@pytest.mark.parametrize("layout", WEIGHT_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", [(1, 1), (2, 4)])
def test_memory_layout_of_the_weight_and_bias_does_not_matter(layout, dtype, kernel):
    images, weight, bias = inputs((2, 17, 6, 5), kernel, dtype, 40)
    incoming = cases.normal((2, 17, 7 - kernel[0], 6 - kernel[1]), 44, dtype)
    check_values(images, layout(weight), cases.every_other(bias))
    check_gradients(images, layout(weight), cases.every_other(bias), incoming)


def test_what_is_expanded_is_read_as_it_is():
    images, weight, bias = inputs((2, 17, 6, 5), (3, 3), torch.float32, 50)
    check_values(images[:1].expand(3, -1, -1, -1), weight[:1].expand(17, -1, -1, -1), bias[:1].expand(17))
    check_gradients(images, weight, bias, torch.ones(()).expand(2, 17, 4, 3))


def test_all_layouts_give_the_same_bits():
    images, weight, bias = inputs((2, 18, 6, 5), (3, 3), torch.float32, 60)
    wanted = depthwise_conv2d(images, weight, bias)
    assert torch.equal(depthwise_conv2d(cases.channels_last(images), weight, bias), wanted)
    assert torch.equal(depthwise_conv2d(images, channels_apart(weight), cases.every_other(bias)), wanted)


def test_a_single_one_changes_nothing():
    images = cases.normal((2, 19, 7, 6), 70, torch.float32)
    weight = torch.zeros(19, 1, 3, 3)
    weight[:, :, 1, 2] = 1
    assert torch.equal(depthwise_conv2d(images, weight, padding=(1, 1, 2, 0)), images)


def test_beyond_the_border_lie_zeros():
    ones = torch.ones(1, 1, 3, 4)
    summed = depthwise_conv2d(ones, torch.ones(1, 1, 3, 3), padding=(1, 1, 2, 0))
    assert torch.equal(summed[0, 0], torch.outer(torch.tensor([2.0, 3, 2]), torch.tensor([1.0, 2, 3, 3])))


def test_zeros_beyond_the_border_are_not_clipped():
    ones = torch.full((1, 1, 2, 2), 0.5)
    summed = depthwise_conv2d(ones, torch.ones(1, 1, 3, 3), padding=(1, 1, 1, 1), before=(1.0, 2.0))
    assert torch.equal(summed, torch.full((1, 1, 2, 2), 4.0))


@EVERY_DTYPE
def test_no_gradient_passes_at_a_bound(dtype):
    """As in torch's ReLU6, on both sides."""
    images = torch.tensor([-1.0, 0.0, 0.5, 6.0, 7.0], dtype=dtype).view(1, 1, 1, 5)
    one = torch.ones(1, 1, 1, 1, dtype=dtype)
    inside = torch.tensor([0, 0, 1, 0, 0], dtype=dtype).view(1, 1, 1, 5)
    for clips in ({"before": RELU6}, {"after": RELU6}):
        leaf = images.clone().requires_grad_()
        result = depthwise_conv2d(leaf, one, **clips)
        assert torch.equal(result, relu6(images))
        (found,) = torch.autograd.grad(result.sum(), leaf)
        assert torch.equal(found, inside)


@EVERY_DTYPE
@pytest.mark.parametrize("bound", [0.7, 0.3, 1 / 3])
def test_no_gradient_passes_at_a_bound_that_the_dtype_rounds(bound, dtype):
    """A value that was clipped to it is that bound, wherever it lies."""
    images = torch.tensor([-1.0, 0.0, 1.0], dtype=dtype).view(1, 1, 1, 3)
    for clips in ({"before": (-bound, bound)}, {"after": (-bound, bound)}):
        leaves = [images.clone().requires_grad_(), torch.ones(1, 1, 1, 1, dtype=dtype, requires_grad=True)]
        leaves.append(torch.zeros(1, dtype=dtype, requires_grad=True))
        result = depthwise_conv2d(*leaves, **clips)
        assert torch.equal(result, hardtanh(images, -bound, bound))
        for_images, for_weight, for_bias = torch.autograd.grad(result.sum(), leaves)
        assert for_images.flatten().tolist() == [0, 1, 0]
        assert for_weight.item() == 0
        assert for_bias.item() == (1 if "after" in clips else 3)


@EVERY_DTYPE
@pytest.mark.parametrize("channels", [3, 17])
def test_nan_passes_through_the_clips(channels, dtype):
    images, weight, bias = inputs((1, channels, 6, 7), (3, 3), dtype, 80)
    clean = depthwise_conv2d(images, weight, bias, before=RELU6, after=RELU6)
    images[0, 1, 2, 3] = torch.nan
    found = depthwise_conv2d(images, weight, bias, before=RELU6, after=RELU6)
    touched = torch.zeros_like(found, dtype=torch.bool)
    touched[0, 1, :3, 1:4] = True
    assert torch.equal(found.isnan(), touched)
    assert torch.equal(found[~touched], clean[~touched])


@EVERY_DTYPE
@pytest.mark.parametrize("channels", [1, 16])
def test_extreme_values(channels, dtype):
    """What a sum is in wider arithmetic; beyond the largest value comes infinity, which clips take back."""
    largest, tiny = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal / 4
    row = torch.tensor([largest, -largest, tiny, -tiny, inf, -inf], dtype=dtype)
    images = row.view(1, 1, 1, 6).expand(1, channels, 1, 6)
    one, two = (torch.full((channels, 1, 1, 1), factor, dtype=dtype) for factor in (1.0, 2.0))
    assert torch.equal(depthwise_conv2d(images, one), images)
    assert torch.equal(depthwise_conv2d(images, two), images * 2)
    assert torch.equal(
        depthwise_conv2d(images, two, before=RELU6, after=(-inf, 11.0)), (relu6(images) * 2).clamp(max=11)
    )
    assert torch.equal(depthwise_conv2d(images, two, after=RELU6), relu6(images * 2))


def test_half_precision_is_not_rounded_on_the_way():
    """2048 + 1 is no float16, 2048 + 1 + 1 is one."""
    images = torch.tensor([2048.0, 1.0, 1.0], dtype=torch.float16).view(1, 1, 1, 3)
    assert depthwise_conv2d(images, torch.ones(1, 1, 1, 3, dtype=torch.float16)).item() == 2050


def test_images_and_channels_do_not_see_each_other():
    images, weight, bias = inputs((4, 35, 9, 9), (3, 3), torch.float32, 90)
    whole = depthwise_conv2d(images, weight, bias, stride=(2, 1))
    for n, c in product(range(4), (0, 15, 16, 31, 32, 34)):
        part = depthwise_conv2d(images[n : n + 1, c : c + 1], weight[c : c + 1], bias[c : c + 1], stride=(2, 1))
        assert torch.equal(part, whole[n : n + 1, c : c + 1])


@pytest.mark.parametrize("frozen", [False, True])
@EVERY_CLIP
@pytest.mark.parametrize(("shape", "kernel", "stride", "padding"), SMALL)
def test_gradcheck(shape, kernel, stride, padding, before, after, frozen):
    leaves = [cases.normal(x.shape, 100 + i).requires_grad_() for i, x in enumerate(inputs(shape, kernel))]
    chosen = leaves[:1] if frozen else leaves

    def compute(*given):
        given = [*given, *(leaf.detach() for leaf in leaves[len(given) :])]
        return depthwise_conv2d(*given, stride=stride, padding=padding, before=before, after=after)

    assert torch.autograd.gradcheck(compute, chosen)
    assert torch.autograd.gradgradcheck(lambda *given: compute(*given) ** 2, chosen)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    channels=st.sampled_from([1, 2, 16, 17]),
    side=st.tuples(st.integers(1, 7), st.integers(1, 9)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    padding=st.tuples(*[st.integers(0, 3)] * 4),
)
def test_adjoint(seed, channels, side, kernel, stride, padding):
    """The sum of A x times y is linear in the images x, in the weight and in y, whose gradient it is."""
    assume(side[0] + sum(padding[:2]) >= kernel[0])
    assume(side[1] + sum(padding[2:]) >= kernel[1])
    x = cases.normal((2, channels, *side), seed).requires_grad_()
    weight = cases.normal((channels, 1, *kernel), seed + 1).requires_grad_()
    result = depthwise_conv2d(x, weight, stride=stride, padding=padding)
    y = cases.normal(result.shape, seed + 2)
    for_x, for_weight = torch.autograd.grad(result, [x, weight], y)
    torch.testing.assert_close((x * for_x).sum(), (result * y).sum(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close((weight * for_weight).sum(), (result * y).sum(), rtol=1e-10, atol=1e-10)


def kept(images, weight, bias=None, **settings):
    """Names of what is kept for the backward pass."""
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: found.append(tensor) or tensor, lambda tensor: tensor):
        result = depthwise_conv2d(images, weight, bias, **settings)
    known = {tensor.data_ptr(): name for name, tensor in (("images", images), ("weight", weight), ("result", result))}
    return {known[tensor.data_ptr()] for tensor in found}


@pytest.mark.parametrize(
    ("settings", "trained", "wanted"),
    [
        ({}, False, {"weight"}),
        ({"before": RELU6}, False, {"images", "weight"}),
        ({"after": RELU6}, False, {"weight", "result"}),
        ({"before": (-inf, 6.0), "after": (0.0, inf)}, False, {"images", "weight", "result"}),
        ({}, True, {"images", "weight"}),
        ({"after": RELU6}, True, {"images", "weight", "result"}),
    ],
)
def test_only_what_is_needed_is_kept(settings, trained, wanted):
    images, weight, bias = inputs((2, 3, 5, 5), (3, 3), torch.float32, 110)
    images = cases.channels_last(images).requires_grad_()
    assert kept(images, weight.requires_grad_(trained), bias, **settings) == wanted


def test_nothing_is_kept_without_a_gradient():
    images, weight, bias = inputs((2, 3, 5, 5), (3, 3), torch.float32, 120)
    assert kept(images, weight, bias, before=RELU6, after=RELU6) == set()


def test_only_the_gradients_that_are_wanted_are_found():
    images, weight, bias = inputs((2, 3, 5, 5), (3, 3), torch.float32, 130)
    for wanted in range(3):
        leaves = [x.clone().requires_grad_(i == wanted) for i, x in enumerate((images, weight, bias))]
        depthwise_conv2d(*leaves, before=RELU6, after=RELU6).sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [i == wanted for i in range(3)]


def test_the_inputs_are_left_alone():
    leaves = [cases.channels_last(x) if x.ndim == 4 else x for x in inputs((2, 17, 5, 5), (3, 3), torch.float32, 140)]
    before = [leaf.clone() for leaf in leaves]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    result = depthwise_conv2d(*leaves, padding=(1, 1, 1, 1), before=RELU6, after=RELU6)
    kept, incoming = result.detach().clone(), cases.channels_last(cases.normal(result.shape, 144, torch.float32))
    given = incoming.clone()
    torch.autograd.grad(result, leaves, incoming)
    for found, wanted in zip([*leaves, result, incoming], [*before, kept, given], strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kernel", "stride"), [((3, 3), (1, 1)), ((5, 5), (2, 2))])
def test_threads_change_nothing(kernel, stride, dtype):
    images, weight, bias = inputs((9, 70, 30, 31), kernel, dtype, 150)
    incoming = cases.normal(sizes(images.shape, kernel, stride, (2, 1, 0, 2)), 154, dtype)

    def compute():
        leaves = [x.clone().requires_grad_() for x in (images, weight, bias)]
        settings = {"stride": stride, "padding": (2, 1, 0, 2), "before": RELU6, "after": RELU6}
        result = depthwise_conv2d(*leaves, **settings)
        return result, *torch.autograd.grad(result, leaves, incoming)

    checks.same_on_any_thread_count(compute)


SIZES = ([2, 1], [1, 0, 2, 1])


def operands(dtype=torch.float32, channels=5):
    """Of the three operators, by name: [2, C, 6, 5] becomes [2, C, 3, 6]."""
    images, weight, bias = inputs((2, channels, 6, 5), (3, 3), dtype, 160)
    images, grad = (cases.channels_last(x) for x in (images, cases.normal((2, channels, 3, 6), 164, dtype)))
    result = depthwise_conv2d(images, weight, bias, stride=SIZES[0], padding=SIZES[1], before=RELU6, after=RELU6)
    return {
        "depthwise_conv2d": [images, weight, bias, *SIZES, *RELU6, *RELU6],
        "depthwise_conv2d_backward": [grad, weight, images, result, [6, 5], *SIZES, *RELU6, *RELU6],
        "depthwise_conv2d_weight": [grad, images, [3, 3], *SIZES],
    }


OPERATORS = list(operands())
# Those that a gradient flows to.
DIFFERENTIABLE = {"depthwise_conv2d": 3, "depthwise_conv2d_backward": 2, "depthwise_conv2d_weight": 2}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [False, True])
def test_the_operator(name, dtype, trained):
    arguments = operands(dtype)[name]
    for argument in arguments[: DIFFERENTIABLE[name] if trained else 1]:
        argument.requires_grad_()
    checks.operator(name, *arguments)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("depthwise_conv2d", {2: None, 5: -inf, 6: inf, 7: -inf, 8: inf}),
        ("depthwise_conv2d_backward", {2: None, 3: None, 7: -inf, 8: inf, 9: -inf, 10: inf}),
    ],
)
def test_the_operator_without_what_may_be_missing(name, arguments):
    given = [arguments.get(i, argument) for i, argument in enumerate(operands()[name])]
    given[0].requires_grad_()
    checks.operator(name, *given)


IMAGES, WEIGHT, BIAS = torch.zeros(1, 3, 4, 4), torch.ones(3, 1, 3, 3), torch.zeros(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(3, 4, 4)}, r"images: got shape \[3, 4, 4\]"),
        ({"images": IMAGES.long()}, "images: got dtype torch.int64"),
        ({"weight": torch.ones(3, 1, 3)}, "weight: got shape"),
        ({"weight": torch.ones(3, 3, 3, 3)}, r"weight: got shape .*; allowed is \[3, 1, any, any\]"),
        ({"weight": torch.ones(4, 1, 3, 3)}, r"weight: got shape .*; allowed is \[3, 1, any, any\]"),
        ({"weight": torch.ones(3, 1, 0, 3)}, r"weight: got sides of \[0, 3\]; allowed is 1 to 32"),
        ({"weight": torch.ones(3, 1, 3, 33)}, r"weight: got sides of \[3, 33\]; allowed is 1 to 32"),
        ({"weight": WEIGHT.double()}, "weight: got torch.float64 on cpu for images of torch.float32 on cpu"),
        ({"weight": WEIGHT.to("meta")}, "weight: got torch.float32 on meta"),
        ({"weight": torch.ones(3, 1, 5, 3)}, "images: got a padded side of 4; allowed is at least the kernel's 5"),
        ({"bias": torch.zeros(4)}, r"bias: got shape \[4\]; allowed is \[3\]"),
        ({"bias": torch.zeros(3, 1)}, r"bias: got shape \[3, 1\]"),
        ({"bias": BIAS.double()}, "bias: got torch.float64 on cpu"),
        ({"bias": BIAS.to("meta")}, "bias: got torch.float32 on meta"),
        ({"stride": (1,)}, r"stride: got \[1\]; allowed is 2 sizes from 1 on"),
        ({"stride": (1, 0)}, r"stride: got \[1, 0\]"),
        ({"padding": (1, 1)}, r"padding: got \[1, 1\]; allowed is 4 sizes from 0 on"),
        ({"padding": (0, 0, -1, 0)}, r"padding: got \[0, 0, -1, 0\]"),
        ({"before": (6.0, 0.0)}, r"before: got \(6.0, 0.0\); allowed is a lowest value below the highest"),
        ({"after": (1.0, 1.0)}, r"after: got \(1.0, 1.0\)"),
        ({"after": (float("nan"), 1.0)}, r"after: got \(nan, 1.0\)"),
    ],
)
def test_bad_input_is_refused(change, message):
    given = {"images": IMAGES, "weight": WEIGHT, "bias": BIAS, **change}
    with pytest.raises(ValueError, match=f"^{message}"):
        depthwise_conv2d(**given)


GRAD = torch.zeros(2, 5, 3, 6)
OF_KERNEL = [
    (1, torch.ones(4, 1, 3, 3), r"weight: got shape \[4, 1, 3, 3\]; allowed is \[5, 1, any, any\]"),
    (1, torch.ones(5, 1, 33, 3), "weight: got a side of 33; allowed is 1 to 32"),
    (1, torch.ones(5, 1, 3, 3).half(), "weight: got dtype float16; allowed is float32"),
]


def of_clips(at):
    return [
        (at + 1, 0.0, r"before: got \(0, 0\); allowed is a lowest value below the highest"),
        (at + 2, inf, r"after: got \(inf, 6\)"),
        (at + 3, float("nan"), r"after: got \(0, nan\)"),
    ]


def of_images(at, name, shape):
    like = torch.zeros(shape)
    return [
        (at, cases.channels_last(like[1:]), f"{name}: got shape"),
        (at, cases.channels_last(like.double()), f"{name}: got dtype float64; allowed is float32"),
        (at, like, f"{name}: not in channels-last memory; allowed is that alone"),
    ]


REFUSED = {
    "depthwise_conv2d": [
        (0, torch.zeros(5, 6, 5), "images: got shape"),
        (0, torch.zeros(2, 5, 6, 5).long(), "images: got dtype int64"),
        (0, torch.zeros(2, 5, 6, 5), "images: not in channels-last memory; allowed is that alone"),
        (0, cases.channels_last(torch.zeros(2, 5, 1, 5)), "images: got a padded side of 2"),
        *OF_KERNEL,
        (2, torch.zeros(4), r"bias: got shape \[4\]; allowed is \[5\]"),
        (2, torch.zeros(5).bfloat16(), "bias: got dtype bfloat16; allowed is float32"),
        *checks.of_geometry(3),
        *of_clips(5),
    ],
    "depthwise_conv2d_backward": [
        (0, torch.zeros(5, 3, 6), "grad: got shape"),
        (0, GRAD.long(), "grad: got dtype int64"),
        (0, GRAD, "grad: not in channels-last memory; allowed is that alone"),
        (0, cases.channels_last(GRAD[:, :, :2]), r"grad: got shape \[2, 5, 2, 6\]; allowed is \[2, 5, 3, 6\]"),
        *OF_KERNEL,
        *of_images(2, "images", (2, 5, 6, 5)),
        *of_images(3, "result", (2, 5, 3, 6)),
        (4, [6], "size: allowed is 2 sizes from 0 on"),
        (4, [6, -1], "size: allowed is 2 sizes from 0 on"),
        (4, [1, 5], "images: got a padded side of 2"),
        *checks.of_geometry(5),
        *of_clips(7),
    ],
    "depthwise_conv2d_weight": [
        (0, torch.zeros(5, 3, 6), "grad: got shape"),
        (0, GRAD.long(), "grad: got dtype int64"),
        (0, GRAD, "grad: not in channels-last memory; allowed is that alone"),
        (0, cases.channels_last(GRAD[:, :, :2]), r"grad: got shape \[2, 5, 2, 6\]; allowed is \[2, 5, 3, 6\]"),
        *of_images(1, "images", (2, 5, 6, 5)),
        (2, [3], "size: allowed is 2 sizes from 1 on"),
        (2, [0, 3], "size: allowed is 2 sizes from 1 on"),
        (2, [3, 33], "weight: got a side of 33; allowed is 1 to 32"),
        (2, [8, 3], "images: got a padded side of 7"),
        *checks.of_geometry(3),
    ],
}


@pytest.mark.parametrize(
    ("name", "at", "argument", "message"), [(name, *bad) for name, every in REFUSED.items() for bad in every]
)
def test_the_operator_and_its_fake_refuse(name, at, argument, message):
    arguments = operands()[name]
    arguments[at] = argument
    checks.refusal(name, tuple(arguments), message)


@pytest.mark.parametrize("layout", [cases.contiguous, cases.channels_last])
@pytest.mark.parametrize("trained", [False, True])
def test_it_compiles_whole(layout, trained):
    images, weight, bias = inputs((2, 5, 8, 7), (3, 3), torch.float32, 170)
    leaves = [layout(images).requires_grad_(), weight.requires_grad_(trained), bias.requires_grad_(trained)]

    def compute(images, weight, bias):
        settings = {"stride": (2, 1), "padding": (1, 0, 1, 2), "before": RELU6, "after": RELU6}
        return depthwise_conv2d(images * 2, weight, bias, **settings).sin()

    checks.compiles_whole(compute, *leaves)


def test_torch_serves_other_devices():
    images, weight, bias = (x.to("meta") for x in (IMAGES, WEIGHT, BIAS))
    result = depthwise_conv2d(images, weight, bias, stride=(2, 1), padding=(1, 1, 0, 0), before=RELU6)
    assert (result.device.type, list(result.shape)) == ("meta", [1, 3, 2, 2])


@EVERY_CLIP
@EVERY_CONVOLUTION
def test_what_serves_other_devices_is_the_same(shape, kernel, stride, padding, before, after):
    settings = (stride, padding, before, after)
    incoming = cases.normal(sizes(shape, kernel, stride, padding), 184)
    found = gradients(lambda *leaves: reference(*leaves, *settings), inputs(shape, kernel), incoming)
    wanted = gradients(lambda *leaves: expected(*leaves, torch.float64, *settings), inputs(shape, kernel), incoming)
    torch.testing.assert_close(found, wanted)
    leaves = inputs(shape, kernel)
    torch.testing.assert_close(reference(*leaves, *settings), expected(*leaves, torch.float64, *settings))
