from itertools import product
from math import inf

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn.functional import conv2d

from alignfast.ops import winograd_conv2d
from alignfast.reference.winograd_conv2d import winograd_conv2d as reference
from tests import cases
from tests.ops import checks

# It has kernels for the CPU alone.
pytestmark = pytest.mark.cpu_only

# [N, C, H, W], channels of the result and the padding: none, one pixel, below, at and above tiles, lanes and slices.
CONVOLUTIONS = [
    ((0, 3, 5, 5), 2, (1, 1)),
    ((1, 1, 1, 1), 1, (1, 1)),
    ((2, 3, 3, 3), 5, (0, 0)),
    ((1, 15, 4, 5), 17, (1, 1)),
    ((2, 16, 8, 9), 16, (1, 1)),
    ((1, 17, 6, 7), 15, (2, 0)),
    ((3, 33, 7, 5), 64, (1, 1)),
    ((1, 64, 9, 4), 65, (1, 2)),
    ((2, 20, 5, 6), 100, (2, 2)),
    ((1, 3, 1, 40), 130, (1, 0)),
    # More tiles than are worked on together, and fewer channels than a vector holds.
    ((30, 2, 13, 17), 3, (1, 1)),
    # So many channels that the tiles that are worked on together are fewer.
    ((1, 1030, 9, 14), 16, (1, 1)),
]
SMALL = [((1, 2, 3, 4), 3, (1, 1)), ((2, 1, 5, 3), 2, (0, 2)), ((1, 3, 4, 6), 1, (2, 0))]
EVERY_CONVOLUTION = pytest.mark.parametrize(("shape", "channels", "padding"), CONVOLUTIONS)
EVERY_DTYPE = pytest.mark.parametrize("dtype", cases.DTYPES)
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def inputs(shape, channels, dtype=torch.float64, seed=0):
    """Images, weight and bias."""
    shapes = (shape, (channels, shape[1], 3, 3), (channels,))
    return [cases.normal(one, seed + i, dtype) for i, one in enumerate(shapes)]


def side(size, padding):
    return size + 2 * padding - 2


def passes(compute, leaves, incoming):
    """The result, and the gradients of all leaves."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    result = compute(*leaves)
    return result.detach(), *torch.autograd.grad(result, leaves, incoming(result))


def check(images, weight, bias=None, padding=(1, 1), layout=cases.contiguous):
    """Against torch's convolution in float64; errors are those of the largest sum nearby, which tiles share."""
    leaves = [images, weight] if bias is None else [images, weight, bias]

    def incoming(result):
        return layout(cases.normal(result.shape, 9, result.dtype))

    found = passes(lambda *given: winograd_conv2d(*given, padding=padding), leaves, incoming)
    doubles = [leaf.double() for leaf in leaves]
    grad = incoming(found[0]).double()
    wanted = passes(lambda *given: conv2d(*given, padding=padding), doubles, lambda _: grad)
    sizes = passes(
        lambda *given: conv2d(*given, padding=padding), [leaf.abs() for leaf in doubles], lambda _: grad.abs()
    )
    half = images.dtype in cases.HALF_DTYPES
    for one, other, size in zip(found, wanted, sizes, strict=True):
        assert one.dtype == images.dtype
        largest = size.amax() if size.numel() else size.sum()
        cases.assert_near(one, other, ulps=0.6 if half else 32, scale=largest * (2**-5 if half else 1))
    for one in found[:2]:
        assert one.is_contiguous(memory_format=torch.channels_last)


@EVERY_DTYPE
@EVERY_CONVOLUTION
def test_it_is_the_convolution(shape, channels, padding, dtype):
    images, weight, bias = inputs(shape, channels, dtype)
    check(images, weight, bias, padding)
    check(images, weight, None, padding)


@pytest.mark.parametrize("columns", range(1, 14))
def test_every_number_of_columns_and_channels(columns):
    """Of which tiles hold four, and vectors sixteen."""
    for channels, made, dtype in product((1, 16, 18), (15, 32, 49), (torch.float32, torch.bfloat16)):
        check(*inputs((2, channels, 14 - columns, columns), made, dtype, columns))


@pytest.mark.parametrize("tiles", range(1, 30))
def test_every_number_of_tiles(tiles):
    """Of which registers hold six to twelve."""
    for channels in (16, 32, 64):
        check(*inputs((tiles, 3, 4, 4), channels, torch.float32, tiles))


@pytest.mark.parametrize("layout", cases.IMAGE_LAYOUTS)
@FLOATS
def test_memory_layout_of_images_does_not_matter(layout, dtype):
    images, weight, bias = inputs((2, 17, 6, 5), 18, dtype, 30)
    check(layout(images), weight, bias, layout=layout)


def channels_apart(weight):
    """With the channels of the result side by side."""
    return weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


@pytest.mark.parametrize("layout", [*cases.IMAGE_LAYOUTS, channels_apart])
@FLOATS
def test_memory_layout_of_the_weight_and_bias_does_not_matter(layout, dtype):
    images, weight, bias = inputs((2, 17, 6, 5), 18, dtype, 40)
    check(images, layout(weight), cases.every_other(bias))
    assert torch.equal(winograd_conv2d(images, layout(weight)), winograd_conv2d(images, weight))


def test_what_is_expanded_is_read_as_it_is():
    images, weight, bias = inputs((2, 17, 6, 5), 18, torch.float32, 50)
    check(images[:1].expand(3, -1, -1, -1), weight[:1].expand(18, -1, -1, -1), bias[:1].expand(18))


def test_a_single_one_changes_next_to_nothing():
    """Sixths and twenty-fourths are no sums of powers of two."""
    images = cases.normal((2, 19, 7, 6), 60, torch.float32)
    weight = torch.zeros(19, 19, 3, 3)
    weight[range(19), range(19), 1, 1] = 1
    torch.testing.assert_close(winograd_conv2d(images, weight), images, rtol=0, atol=1e-5)


def test_beyond_the_border_lie_zeros():
    ones = torch.ones(1, 1, 4, 5)
    summed = winograd_conv2d(ones, torch.ones(1, 1, 3, 3), padding=(1, 2))
    wanted = torch.outer(torch.tensor([2.0, 3, 3, 2]), torch.tensor([1.0, 2, 3, 3, 3, 2, 1]))
    torch.testing.assert_close(summed[0, 0], wanted)


@pytest.mark.parametrize("bad", [torch.nan, inf])
def test_what_is_not_a_number_stays_in_the_tiles_that_see_it(bad):
    images, weight, bias = inputs((2, 3, 12, 12), 18, torch.float32, 70)
    clean = winograd_conv2d(images, weight, bias)
    # In the middle of the second of three tiles, which the others see nothing of.
    images[0, 1, 5, 6] = bad
    found = winograd_conv2d(images, weight, bias)
    touched = torch.zeros_like(found, dtype=torch.bool)
    touched[0, :, 4:8, 4:8] = True
    assert not found[0, :, 4:7, 5:8].isfinite().any()
    assert torch.equal(found[~touched], clean[~touched])


@EVERY_DTYPE
def test_extreme_values(dtype):
    """The largest that a tile is computed from without an overflow, and the smallest."""
    info = torch.finfo(dtype)
    large = 2.0 ** (15 if dtype == torch.float16 else 100)
    for size in (large, info.smallest_normal):
        images, weight = torch.full((1, 1, 6, 6), size, dtype=dtype), torch.full((1, 1, 3, 3), 1 / 16, dtype=dtype)
        found = winograd_conv2d(images, weight, padding=(0, 0)).double()
        assert torch.allclose(found, torch.tensor(size * 9 / 16, dtype=torch.float64), rtol=1e-2, atol=info.tiny)


def test_half_precision_is_not_rounded_on_the_way():
    """2048 + 1 is no float16, 2048 + 1 + 1 is one."""
    images = torch.tensor([2048.0, 1.0, 1.0], dtype=torch.float16).expand(1, 1, 1, 3)
    weight = torch.zeros(1, 1, 3, 3, dtype=torch.float16)
    weight[:, :, 1] = 1
    assert winograd_conv2d(images, weight, padding=(1, 0)).item() == 2050


def test_images_and_channels_do_not_see_each_other():
    images, weight, bias = inputs((4, 5, 9, 9), 70, torch.float32, 80)
    whole = winograd_conv2d(images, weight, bias)
    for n, c in product(range(4), (0, 15, 16, 63, 64, 69)):
        part = winograd_conv2d(images[n : n + 1], weight[c : c + 1], bias[c : c + 1])
        assert torch.equal(part, whole[n : n + 1, c : c + 1])


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("shape", "channels", "padding"), SMALL)
def test_gradcheck(shape, channels, padding, frozen):
    leaves = [leaf.requires_grad_() for leaf in inputs(shape, channels, seed=100)]
    chosen = leaves[:1] if frozen else leaves

    def compute(*given):
        given = [*given, *(leaf.detach() for leaf in leaves[len(given) :])]
        return winograd_conv2d(*given, padding=padding)

    assert torch.autograd.gradcheck(compute, chosen)
    assert torch.autograd.gradgradcheck(lambda *given: compute(*given) ** 2, chosen)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    channels=st.tuples(st.sampled_from([1, 2, 16, 17]), st.sampled_from([1, 3, 33])),
    sides=st.tuples(st.integers(1, 9), st.integers(1, 11)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
)
def test_adjoint(seed, channels, sides, padding):
    """The sum of A x times y is linear in the images x, in the weight and in y, whose gradient it is."""
    assume(min(map(side, sides, padding)) >= 1)
    x, weight, _ = (leaf.requires_grad_() for leaf in inputs((2, channels[0], *sides), channels[1], seed=seed))
    result = winograd_conv2d(x, weight, padding=padding)
    y = cases.normal(result.shape, seed + 5)
    for_x, for_weight = torch.autograd.grad(result, [x, weight], y)
    torch.testing.assert_close((x * for_x).sum(), (result * y).sum(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close((weight * for_weight).sum(), (result * y).sum(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("trained", "wanted"), [(False, {"weight"}), (True, {"images", "weight"})])
def test_only_what_is_needed_is_kept(trained, wanted):
    images, weight, bias = inputs((2, 3, 5, 5), 4, torch.float32, 110)
    images, weight = cases.channels_last(images).requires_grad_(), weight.requires_grad_(trained)
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: found.append(tensor) or tensor, lambda tensor: tensor):
        winograd_conv2d(images, weight, bias)
    known = {images.data_ptr(): "images", weight.data_ptr(): "weight"}
    assert {known[tensor.data_ptr()] for tensor in found} == wanted


def test_only_the_gradients_that_are_wanted_are_found():
    for wanted in range(3):
        leaves = [x.requires_grad_(i == wanted) for i, x in enumerate(inputs((2, 3, 5, 5), 4, torch.float32, 120))]
        winograd_conv2d(*leaves).sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [i == wanted for i in range(3)]


@FLOATS
@pytest.mark.parametrize(("shape", "channels"), [((9, 33, 30, 31), 20), ((1, 20, 7, 7), 400)])
def test_threads_change_nothing(shape, channels, dtype):
    """Tiles are split among them, or where there are few of these, the channels of the result."""
    images, weight, bias = inputs(shape, channels, dtype, 130)

    def compute():
        result, for_images, *_ = passes(
            winograd_conv2d, (images, weight, bias), lambda made: cases.normal(made.shape, 134, made.dtype)
        )
        return result, for_images

    checks.same_on_any_thread_count(compute)


def operands(dtype=torch.float32):
    images, weight, bias = inputs((2, 5, 6, 7), 4, dtype, 140)
    return [cases.channels_last(images), weight, bias, [1, 0], False]


@pytest.mark.parametrize("adjoint", [False, True])
@FLOATS
def test_the_operator(dtype, adjoint):
    images, weight, bias, padding, _ = operands(dtype)
    weight = weight.transpose(0, 1) if adjoint else weight
    checks.operator("winograd_conv2d", images.requires_grad_(), weight.requires_grad_(), bias, padding, adjoint)


def test_the_adjoint_is_that_of_the_convolution():
    images, weight, _, padding, _ = operands(torch.float64)
    weight = weight.transpose(0, 1)
    result = torch.ops.alignfast.winograd_conv2d(images, weight, None, padding, True)
    wanted = torch.nn.functional.conv_transpose2d(images, weight, padding=[2 - more for more in padding])
    torch.testing.assert_close(result, wanted)
    torch.testing.assert_close(reference(images, weight, None, padding, adjoint=True), wanted)


BAD = [
    (0, torch.zeros(2, 5, 6), "images: got shape"),
    (0, torch.zeros(2, 5, 6, 7).long(), "images: got dtype"),
    (0, torch.zeros(2, 6, 6, 7), r"weight: got shape \[4, 5, 3, 3\]; allowed is \[any, 6, 3, 3\]"),
    (0, torch.zeros(2, 5, 6, 2), "images: got a padded side of 2; allowed is at least the kernel's 3"),
    (1, torch.zeros(4, 5, 3, 5), "weight: got shape"),
    (1, torch.zeros(4, 5, 3, 3).double(), "weight: got"),
    (2, torch.zeros(5), r"bias: got shape \[5\]"),
    (2, torch.zeros(4).double(), "bias: got"),
]


@pytest.mark.parametrize(("at", "argument", "message"), BAD)
def test_bad_input_is_refused(at, argument, message):
    *tensors, padding, _ = operands()
    tensors[at] = argument
    with pytest.raises(ValueError, match=f"^{message}"):
        winograd_conv2d(*tensors, padding=padding)


@pytest.mark.parametrize("padding", [(1,), (1, 1, 1, 1), (-1, 0), (0, 3)])
def test_bad_padding_is_refused(padding):
    with pytest.raises(ValueError, match=r"^padding: got \[.*\]; allowed is 2 sizes from 0 to 2"):
        winograd_conv2d(*operands()[:3], padding=padding)


@pytest.mark.parametrize(
    ("at", "argument", "message"),
    [
        *((at, cases.channels_last(one) if one.ndim == 4 and at == 0 else one, message) for at, one, message in BAD),
        (0, torch.zeros(2, 5, 6, 7), "images: not in channels-last memory"),
        (2, torch.zeros(8)[::2], "bias: not in contiguous memory"),
        (3, [1], "padding: allowed is 2 sizes from 0 on"),
        (3, [0, 3], r"padding: got \[0, 3\]; allowed is 0 to 2"),
        (4, True, r"weight: got shape \[4, 5, 3, 3\]; allowed is \[5, any, 3, 3\]"),
    ],
)
def test_the_operator_and_its_fake_refuse(at, argument, message):
    arguments = operands()
    arguments[at] = argument
    checks.refusal("winograd_conv2d", tuple(arguments), message)


def test_it_compiles_whole():
    images, weight, bias = inputs((2, 5, 6, 7), 4, torch.float32, 150)

    def compute(images, weight, bias):
        return winograd_conv2d(images / 4, weight / 4, bias).sin()

    checks.compiles_whole(compute, images.requires_grad_(), weight.requires_grad_(), bias)


def test_torch_serves_other_devices():
    images, weight, bias = (x.to("meta") for x in inputs((2, 3, 5, 5), 4, torch.float32, 160))
    result = winograd_conv2d(images, weight, bias)
    assert (result.device.type, list(result.shape)) == ("meta", [2, 4, 5, 5])
