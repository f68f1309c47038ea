import math

import pytest
import torch

from alignfast.ops import batch_norm
from alignfast.reference.batch_norm import batch_norm as reference
from tests import cases
from tests.ops import checks

pytestmark = pytest.mark.cpu_only

EVERYTHING, RELU, RELU6, LOWER = (-math.inf, math.inf), (0.0, math.inf), (0.0, 6.0), (-math.inf, 0.5)
CLIPS = [EVERYTHING, RELU, RELU6, LOWER]
SHAPES = [
    (2, 1, 3, 3),
    (1, 3, 5, 7),
    (4, 15, 2, 2),
    (2, 16, 1, 2),
    (3, 17, 4, 4),
    (2, 64, 3, 5),
    (2, 65, 6, 6),
    (5, 130, 3, 1),
    (40, 24, 33, 31),
]


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def inputs(shape, dtype, seed=1):
    """Far from zero, where a sum of squares would lose the variance."""
    images = (cases.normal(shape, seed) * 2 + 7).to(dtype)
    return images, cases.normal(shape[1:2], seed + 1, wide(dtype)), cases.normal(shape[1:2], seed + 2, wide(dtype))


def with_gradients(function, given, grad):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in given]
    result, mean, variance = function(*leaves)
    return [result.detach(), mean, variance, *torch.autograd.grad(result, leaves, grad)]


def near(found, wanted, tolerance):
    """As vectors."""
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        error = float((one.double() - other).norm()) / (float(other.norm()) + 1e-3)
        assert error <= tolerance, f"off by {error:.3g}"


TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.003}


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("clip", CLIPS)
def test_values_and_gradients_are_those_of_float64(shape, dtype, clip):
    given = inputs(shape, dtype)
    grad = cases.normal(shape, 4, dtype)
    found = with_gradients(lambda *x: batch_norm(*x, eps=1e-3, clip=clip), given, grad)
    assert [one.dtype for one in found] == [dtype, *[wide(dtype)] * 2, dtype, *[wide(dtype)] * 2]
    wide_inputs = [one.double() for one in given]
    wanted = reference(*wide_inputs, 1e-3, *clip)
    near(found[:3], wanted, TOLERANCES[dtype])
    # Where the result says that a gradient passes, as rounding takes some elements across the clip's border.
    passes = (found[0] > clip[0]) & (found[0] < clip[1])
    near(
        found[3:],
        with_gradients(lambda *x: reference(*x, 1e-3, *EVERYTHING), wide_inputs, grad * passes)[3:],
        TOLERANCES[dtype],
    )


def test_it_is_what_torch_has_without_a_clip():
    images, weight, bias = inputs((3, 5, 4, 6), torch.float64)
    wanted = torch.nn.functional.batch_norm(images, None, None, weight, bias, training=True, eps=1e-5)
    torch.testing.assert_close(batch_norm(images, weight, bias)[0], wanted)


def test_the_mean_and_the_biased_variance_come_with_it():
    images, weight, bias = inputs((3, 5, 4, 6), torch.float64)
    _, mean, variance = batch_norm(images, weight, bias)
    torch.testing.assert_close(mean, images.mean((0, 2, 3)))
    torch.testing.assert_close(variance, images.var((0, 2, 3), correction=0))
    assert not mean.requires_grad
    assert not variance.requires_grad


def test_little_cancels_far_from_zero():
    """A standard deviation of 1 about 3000, in float32."""
    images = (cases.normal((8, 20, 9, 9), 5) + 3000).float()
    _, _, variance = batch_norm(images, torch.ones(20), torch.zeros(20))
    torch.testing.assert_close(variance.double(), images.double().var((0, 2, 3), correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(2, 1, 3, 3), (2, 20, 4, 4)])
def test_a_channel_that_does_not_change_has_no_variance(shape):
    images = torch.full(shape, 0.3)
    result, mean, variance = batch_norm(images, torch.ones(shape[1]), torch.full(shape[1:2], 2.0))
    assert torch.equal(variance, torch.zeros(shape[1]))
    torch.testing.assert_close(mean, torch.full(shape[1:2], 0.3))
    torch.testing.assert_close(result, torch.full(shape, 2.0))


@pytest.mark.parametrize("channels", [1, 16, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_stay_in_their_channel(channels, dtype):
    images = cases.normal((2, channels, 3, 3), 6, dtype)
    images[0, 0, 1, 1] = math.nan
    images[1, -1, 1, 1] = math.inf
    result, mean, _ = batch_norm(images, torch.ones(channels), torch.zeros(channels), clip=RELU6)
    assert result[:, [0, -1]].isnan().all()
    assert not result[:, 1:-1].isnan().any()
    assert not mean[0].isfinite()
    assert not mean[-1].isfinite()


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("shape", [(2, 3, 2, 3), (3, 17, 2, 1)])
def test_gradcheck(shape, clip):
    given = [tensor.requires_grad_() for tensor in inputs(shape, torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: batch_norm(*x, clip=clip)[0], given)


def test_no_gradient_passes_at_the_borders_of_the_clip():
    """Two values, which are normalised to -1 and 1: a clip to these, and one beyond."""
    images = torch.tensor([-1.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1).requires_grad_()
    bias = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    weight = torch.ones(1, dtype=torch.float64)
    at, beyond = (
        torch.autograd.grad(batch_norm(images, weight, bias, eps=0.0, clip=(-size, size))[0].sum(), bias)[0]
        for size in (1.0, 1.5)
    )
    assert (float(at), float(beyond)) == (0.0, 2.0)


@pytest.mark.parametrize("layout", cases.IMAGE_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_layout_does_not_matter(layout, dtype):
    images, weight, bias = inputs((2, 17, 5, 4), dtype)
    wanted = batch_norm(images, weight, bias, clip=RELU)
    found = batch_norm(layout(images), cases.every_other(weight), cases.every_other(bias), clip=RELU)
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


def test_only_the_images_and_what_is_of_channels_is_kept():
    images, weight, bias = (tensor.requires_grad_() for tensor in inputs((2, 17, 5, 4), torch.float32))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda x: x):
        batch_norm(images, weight, bias, clip=RELU6)
    assert sorted(kept, key=len) == [(17,)] * 4 + [(2, 17, 5, 4)]


def test_the_inputs_are_left_alone():
    given = inputs((2, 17, 5, 4), torch.float32)
    before = [tensor.clone() for tensor in given]
    with_gradients(lambda *x: batch_norm(*x, clip=RELU6), given, torch.ones(2, 17, 5, 4))
    for one, other in zip(given, before, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [(9, 24, 40, 41), (7, 3, 90, 11)])
def test_threads_change_nothing(shape):
    given, grad = inputs(shape, torch.float32), cases.normal(shape, 7, torch.float32)
    checks.same_on_any_thread_count(lambda: with_gradients(lambda *x: batch_norm(*x, clip=RELU6), given, grad))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operators(dtype):
    images, weight, bias = inputs((2, 17, 5, 4), dtype)
    images = cases.channels_last(images)
    leaves = [tensor.requires_grad_() for tensor in (images, weight, bias)]
    checks.operator("batch_norm", *leaves, 1e-5, 0.0, 6.0)
    _, mean, variance = batch_norm(images, weight, bias)
    given = [tensor.detach() for tensor in (images, images, weight, bias, mean, variance)]
    checks.operator("batch_norm_backward", *given, 1e-5, 0.0, 6.0)


def test_it_compiles_whole():
    images, weight, bias = inputs((2, 17, 5, 4), torch.float32)
    leaves = [tensor.requires_grad_() for tensor in (cases.channels_last(images), weight, bias)]

    def function(images, weight, bias):
        return batch_norm(images * 2, weight, bias, clip=RELU)[0].sin()

    checks.compiles_whole(function, *leaves)


BAD = [
    ({"images": torch.zeros(3, 4, 4)}, "images: got shape"),
    ({"images": torch.zeros(2, 3, 4, 4, dtype=torch.int64)}, "images: got dtype"),
    ({"images": torch.zeros(0, 3, 4, 4)}, "images: got no pixel; allowed is at least one"),
    ({"weight": torch.zeros(4)}, r"weight: got shape \[4\]"),
    ({"bias": torch.zeros(1, 3)}, r"bias: got shape \[1, 3\]"),
    ({"weight": torch.zeros(3, dtype=torch.float64)}, "weight: got"),
    ({"bias": torch.zeros(3, dtype=torch.bfloat16)}, "bias: got"),
    ({"eps": -1.0}, "eps: got -1"),
]


@pytest.mark.parametrize(("change", "message"), [*BAD, ({"clip": (1.0, 1.0)}, r"clip: got \(1.0, 1.0\)")])
def test_bad_input_is_refused(change, message):
    given = {"images": torch.zeros(2, 3, 4, 4), "weight": torch.ones(3), "bias": torch.zeros(3)}
    with pytest.raises(ValueError, match=f"^{message}"):
        batch_norm(**(given | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *BAD,
        ({"images": torch.zeros(2, 3, 4, 4)}, "images: not in channels-last memory"),
        ({"low": 2.0, "high": 2.0}, "clip: got"),
    ],
)
def test_the_operator_refuses(change, message):
    given = {"images": cases.channels_last(torch.zeros(2, 3, 4, 4)), "weight": torch.ones(3), "bias": torch.zeros(3)}
    given |= {"eps": 1e-5, "low": 0.0, "high": 6.0} | change
    given["images"] = given["images"] if "images" in change else cases.channels_last(given["images"])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.alignfast.batch_norm(*given.values())
