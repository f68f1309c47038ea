from math import inf

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import conv2d

from alignfast.ops import basic_block, winograd_conv2d
from alignfast.reference.basic_block import basic_block as reference
from tests import cases
from tests.ops import checks

# It has kernels for the CPU alone.
pytestmark = pytest.mark.cpu_only

# [N, C, H, W] and channels between the convolutions: none, one pixel, below, at and above tiles, lanes and slices.
BLOCKS = [
    ((0, 3, 5, 5), 2),
    ((1, 1, 1, 1), 1),
    ((2, 3, 3, 3), 5),
    ((1, 15, 4, 5), 17),
    ((2, 16, 8, 9), 16),
    ((3, 33, 7, 5), 64),
    ((1, 65, 9, 4), 130),
    # More images than are taken together.
    ((61, 2, 5, 3), 3),
    ((7, 4, 30, 34), 20),
]
SMALL = [((1, 2, 3, 4), 3), ((2, 1, 5, 3), 2)]
EVERY_BLOCK = pytest.mark.parametrize(("shape", "middle"), BLOCKS)
EVERY_DTYPE = pytest.mark.parametrize("dtype", cases.DTYPES)
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def inputs(shape, middle, dtype=torch.float64, seed=0):
    """Images and two weights with their biases."""
    channels = shape[1]
    shapes = (shape, (middle, channels, 3, 3), (middle,), (channels, middle, 3, 3), (channels,))
    return [cases.normal(one, seed + i, dtype) for i, one in enumerate(shapes)]


def passes(compute, images, *weights):
    """The result and the gradient of the images."""
    leaf = images.detach().requires_grad_()
    result = compute(leaf, *weights)
    return result.detach(), *torch.autograd.grad(result, leaf, cases.normal(result.shape, 9, result.dtype))


def by_gates(inside, outside):
    """The block whose rectifiers let through what these two others say."""

    def compute(images, first, first_bias, second, second_bias):
        between = conv2d(images, first, first_bias, padding=1) * inside
        return (images + conv2d(between, second, second_bias, padding=1)) * outside

    return compute


def check(images, *weights, layout=cases.contiguous):
    """Against plain sums in float64; what lies within an error of zero may pass a rectifier or not, so that the gates
    are those that were found, and lie on the other side for such values only."""
    found = passes(basic_block, layout(images), *weights)
    doubles = [None if one is None else one.double() for one in weights]
    first, first_bias, second, second_bias = doubles
    x = images.double()
    # Of the convolution of sizes, as the largest sum nearby is in winograd_conv2d.
    half = images.dtype in cases.HALF_DTYPES
    unit = torch.finfo(images.dtype).eps * (1 if half else 64)
    sizes = conv2d(x.abs(), first.abs(), None if first_bias is None else first_bias.abs(), padding=1)
    before = conv2d(x, first, first_bias, padding=1)
    largest = sizes.amax() if sizes.numel() else 0
    result, first_bits, second_bits = torch.ops.alignfast.basic_block(cases.channels_last(images), *weights)
    inside, outside = (unpacked(bits, count) for bits, count in ((first_bits, len(first)), (second_bits, len(second))))
    assert torch.equal(result, found[0])
    assert bool((before[inside != (before > 0)].abs() <= unit * largest).all())
    wanted = passes(by_gates(inside, outside), x, *doubles)
    bound = passes(by_gates(inside, outside), x.abs(), *(None if one is None else one.abs() for one in doubles))
    for one, other, size in zip(found, wanted, bound, strict=True):
        assert one.dtype == images.dtype
        assert one.is_contiguous(memory_format=torch.channels_last)
        scale = float(size.abs().amax()) if size.numel() else 0.0
        assert bool(((one.double() - other).abs() <= unit * scale).all())
    after = x + conv2d(before * inside, second, second_bias, padding=1)
    scale = float(bound[0].abs().amax()) if x.numel() else 0.0
    assert bool((after[outside != (after > 0)].abs() <= unit * scale).all())


def unpacked(bits, channels):
    """[N, C, H, W] of zeros and ones, of [N, H, W, words]."""
    each = (bits.to(torch.int32)[..., None] >> torch.arange(16)) & 1
    return each.flatten(-2)[..., :channels].permute(0, 3, 1, 2).double()


@EVERY_DTYPE
@EVERY_BLOCK
def test_it_is_the_block(shape, middle, dtype):
    images, first, first_bias, second, second_bias = inputs(shape, middle, dtype)
    check(images, first, first_bias, second, second_bias)
    check(images, first, None, second, None)


@pytest.mark.parametrize("shape", [(3, 5, 6, 7), (40, 16, 8, 8)])
def test_it_is_the_reference(shape):
    given = inputs(shape, 20)
    for one, other in zip(passes(basic_block, *given), passes(reference, *given), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_it_is_what_the_convolutions_give():
    """Bit by bit, since it computes them in the same way."""
    images, first, first_bias, second, second_bias = inputs((50, 20, 9, 6), 35, torch.float32, 10)
    between = winograd_conv2d(images, first, first_bias).relu()
    wanted = (winograd_conv2d(between, second, second_bias) + images).relu()
    assert torch.equal(basic_block(images, first, first_bias, second, second_bias), wanted)


@pytest.mark.parametrize("layout", cases.IMAGE_LAYOUTS)
@FLOATS
def test_memory_layout_of_images_does_not_matter(layout, dtype):
    check(*inputs((2, 17, 6, 5), 18, dtype, 30), layout=layout)


@pytest.mark.parametrize("layout", cases.IMAGE_LAYOUTS)
@FLOATS
def test_memory_layout_of_the_weights_and_biases_does_not_matter(layout, dtype):
    images, first, first_bias, second, second_bias = given = inputs((2, 17, 6, 5), 18, dtype, 40)
    found = basic_block(
        images, layout(first), cases.every_other(first_bias), layout(second), cases.every_other(second_bias)
    )
    assert torch.equal(found, basic_block(*given))


def test_what_is_zero_is_not_positive():
    """As for torch's rectifier, whose gradient is zero there; NaN and infinity pass."""
    images = torch.tensor([0.0, -0.0, 1.0, -1.0, inf, -inf, torch.nan], dtype=torch.float64).view(7, 1, 1, 1)
    none = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    wanted = passes(lambda x: x.relu(), images)
    for one, other in zip(passes(basic_block, images, none, None, none, None), wanted, strict=True):
        # Zero times infinity is no number.
        torch.testing.assert_close(one[:4], other[:4], rtol=0, atol=0)
    assert basic_block(images, none, None, none, None)[4:].isnan().all()
    large = torch.tensor([1e300, -1e300], dtype=torch.float64).view(2, 1, 1, 1)
    assert basic_block(large, none, None, none, None).flatten().tolist() == [1e300, 0.0]


def test_images_do_not_see_each_other():
    images, *weights = inputs((23, 5, 9, 9), 7, torch.float32, 80)
    whole = basic_block(images, *weights)
    for n in range(23):
        assert torch.equal(basic_block(images[n : n + 1], *weights), whole[n : n + 1])


@pytest.mark.parametrize(("shape", "middle"), SMALL)
def test_gradcheck(shape, middle):
    images, *weights = inputs(shape, middle, seed=100)
    leaf = images.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: basic_block(x, *weights), leaf)
    assert torch.autograd.gradgradcheck(lambda x: basic_block(x, *weights) ** 2, leaf)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    channels=st.sampled_from([1, 2, 16, 17]),
    middle=st.sampled_from([1, 3, 33]),
    sides=st.tuples(st.integers(1, 9), st.integers(1, 11)),
)
def test_adjoint(seed, channels, middle, sides):
    """With the bits of any block, the one way is the transpose of the other."""
    images, first, first_bias, second, second_bias = inputs((2, channels, *sides), middle, seed=seed)
    _, *bits = torch.ops.alignfast.basic_block(cases.channels_last(images), first, first_bias, second, second_bias)
    x, y = (cases.channels_last(cases.normal(images.shape, seed + i)) for i in (7, 8))

    def there(tensor, adjoint):
        return torch.ops.alignfast.basic_block_linear(tensor, first, second, *bits, adjoint)

    torch.testing.assert_close((there(x, False) * y).sum(), (there(y, True) * x).sum(), rtol=1e-9, atol=1e-9)


def test_a_bit_is_kept_of_each_value():
    images, first, first_bias, second, second_bias = inputs((2, 20, 5, 6), 40, torch.float32, 110)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        basic_block(cases.channels_last(images).requires_grad_(), first, first_bias, second, second_bias)
    weights, bits = kept[:2], kept[2:]
    assert [one.data_ptr() for one in weights] == [first.data_ptr(), second.data_ptr()]
    assert [(one.dtype, list(one.shape)) for one in bits] == [(torch.int16, [2, 5, 6, 3]), (torch.int16, [2, 5, 6, 2])]


@FLOATS
def test_threads_change_nothing(dtype):
    images, *weights = inputs((9, 33, 14, 15), 20, dtype, 130)
    checks.same_on_any_thread_count(lambda: passes(basic_block, images, *weights))


def operands(dtype=torch.float32):
    images, *weights = inputs((2, 5, 6, 7), 20, dtype, 140)
    return [cases.channels_last(images), *weights]


def linear_operands(adjoint=True):
    images, first, first_bias, second, second_bias = operands()
    _, *bits = torch.ops.alignfast.basic_block(images, first, first_bias, second, second_bias)
    return [images, first, second, *bits, adjoint]


@FLOATS
def test_the_operator(dtype):
    images, *weights = operands(dtype)
    checks.operator("basic_block", images.requires_grad_(), *weights)


@pytest.mark.parametrize("adjoint", [False, True])
def test_the_linear_operator(adjoint):
    images, *others = linear_operands(adjoint)
    checks.operator("basic_block_linear", images.requires_grad_(), *others)


BAD = [
    (0, torch.zeros(2, 5, 6), "images: got shape"),
    (0, torch.zeros(2, 5, 6, 7).long(), "images: got dtype"),
    (0, torch.zeros(2, 6, 6, 7), r"first: got shape \[20, 5, 3, 3\]; allowed is \[any, 6, 3, 3\]"),
    (1, torch.zeros(20, 5, 3, 5), "first: got shape"),
    (1, torch.zeros(20, 5, 3, 3).double(), "first: got"),
    (2, torch.zeros(5), r"first_bias: got shape \[5\]"),
    (2, torch.zeros(20).double(), "first_bias: got"),
    (3, torch.zeros(5, 19, 3, 3), r"second: got shape \[5, 19, 3, 3\]; allowed is \[5, 20, 3, 3\]"),
    (3, torch.zeros(5, 20, 3, 3).double(), "second: got"),
    (4, torch.zeros(20), r"second_bias: got shape \[20\]"),
    (4, torch.zeros(5).double(), "second_bias: got"),
]


@pytest.mark.parametrize(("at", "argument", "message"), BAD)
def test_bad_input_is_refused(at, argument, message):
    given = operands()
    given[at] = argument
    with pytest.raises(ValueError, match=f"^{message}"):
        basic_block(*given)


@pytest.mark.parametrize(("at", "name"), list(enumerate(("first", "first_bias", "second", "second_bias"), start=1)))
def test_weights_are_frozen(at, name):
    given = operands()
    given[at].requires_grad_()
    with pytest.raises(ValueError, match=f"^{name}: got a tensor that requires a gradient; allowed is one"):
        basic_block(*given)
    with torch.no_grad():
        basic_block(*given)


@pytest.mark.parametrize(
    ("at", "argument", "message"),
    [
        *((at, cases.channels_last(one) if one.ndim == 4 and at == 0 else one, message) for at, one, message in BAD),
        (0, torch.zeros(2, 5, 6, 7), "images: not in channels-last memory"),
        (2, torch.zeros(40)[::2], "first_bias: not in contiguous memory"),
        (4, torch.zeros(10)[::2], "second_bias: not in contiguous memory"),
    ],
)
def test_the_operator_and_its_fake_refuse(at, argument, message):
    given = operands()
    given[at] = argument
    checks.refusal("basic_block", tuple(given), message)


@pytest.mark.parametrize(
    ("at", "argument", "message"),
    [
        (0, torch.zeros(2, 5, 6, 7), "images: not in channels-last memory"),
        (1, torch.zeros(20, 4, 3, 3), "first: got shape"),
        (2, torch.zeros(5, 19, 3, 3), "second: got shape"),
        (3, torch.zeros(2, 6, 7, 1, dtype=torch.int16), r"first_bits: got shape \[2, 6, 7, 1\]"),
        (3, torch.zeros(2, 6, 7, 2), "first_bits: got"),
        (3, torch.zeros(2, 6, 2, 7, dtype=torch.int16).transpose(2, 3), "first_bits: not in contiguous memory"),
        (4, torch.zeros(2, 6, 7, 2, dtype=torch.int16), r"second_bits: got shape \[2, 6, 7, 2\]"),
    ],
)
def test_the_linear_operator_and_its_fake_refuse(at, argument, message):
    given = linear_operands()
    given[at] = argument
    checks.refusal("basic_block_linear", tuple(given), message)


def test_it_compiles_whole():
    images, *weights = operands()
    weights = [weight / 16 for weight in weights]

    def compute(images, *weights):
        return basic_block(images / 4, *weights).sin()

    checks.compiles_whole(compute, images.requires_grad_(), *weights)


def test_torch_serves_other_devices():
    given = [one.to("meta") for one in operands()]
    result = basic_block(*given)
    assert (result.device.type, list(result.shape)) == ("meta", [2, 5, 6, 7])
