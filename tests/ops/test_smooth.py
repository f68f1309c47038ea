import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import conv2d

from alignfast.ops import smooth
from tests import cases
from tests.ops import checks


def expected(grad, kernel):
    """A dense depthwise convolution in float64."""
    channels, size = grad.shape[1], len(kernel)
    dense = torch.outer(kernel.double(), kernel.double()).expand(channels, 1, size, size)
    return conv2d(grad.double(), dense, padding=size // 2, groups=channels)


def check_against_dense(grad, kernel):
    smoothed = smooth(grad, kernel)
    assert smoothed.dtype == grad.dtype
    scale = expected(grad.abs(), kernel.abs())
    cases.assert_near(smoothed, expected(grad, kernel), ulps=4 if grad.dtype in cases.HALF_DTYPES else 16, scale=scale)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize(("shape", "size"), cases.SMOOTHING)
def test_it_is_the_dense_depthwise_convolution(shape, size, dtype):
    # Neither symmetric nor summing to one, so that a flipped or a normalised kernel is found out.
    check_against_dense(cases.normal(shape, 1, dtype), cases.random((size,), 2, dtype, low=-0.5))


@pytest.mark.parametrize("layout", cases.IMAGE_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_layout_does_not_matter(layout, dtype):
    check_against_dense(layout(cases.normal((2, 3, 9, 11), 3, dtype)), cases.random((5,), 4, dtype))


def test_a_kernel_may_be_a_strided_view():
    grad, kernel = cases.normal((2, 3, 8, 8), 5), cases.random((5,), 6)
    assert torch.equal(smooth(grad, cases.every_other(kernel)), smooth(grad, kernel))


def test_a_single_one_changes_nothing():
    grad = cases.normal((2, 3, 7, 6), 7, torch.float32)
    kernel = torch.zeros(9)
    kernel[4] = 1
    assert torch.equal(smooth(grad, kernel), grad)
    assert torch.equal(smooth(grad, torch.ones(1)), grad)


def test_beyond_the_border_lie_zeros():
    smoothed = smooth(torch.ones(1, 1, 4, 5), torch.ones(3))
    assert torch.equal(smoothed[0, 0], torch.outer(torch.tensor([2.0, 3, 3, 2]), torch.tensor([2.0, 3, 3, 3, 2])))


def test_an_impulse_shows_the_kernel_back_to_front():
    impulse = torch.zeros(1, 1, 7, 7, dtype=torch.float64)
    impulse[0, 0, 3, 3] = 1
    kernel = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    assert torch.equal(smooth(impulse, kernel)[0, 0, 2:5, 2:5], torch.outer(kernel.flip(0), kernel.flip(0)))


def test_images_and_channels_do_not_see_each_other():
    grad, kernel = cases.normal((4, 3, 9, 9), 8, torch.float32), cases.random((7,), 9, torch.float32)
    whole = smooth(grad, kernel)
    for n in range(4):
        for c in range(3):
            part = smooth(grad[n : n + 1, c : c + 1], kernel)
            torch.testing.assert_close(part, whole[n : n + 1, c : c + 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("shape", "size"), [((1, 2, 3, 4), 3), ((2, 1, 2, 2), 5), ((1, 1, 1, 1), 1)])
def test_gradcheck(shape, size):
    kernel = cases.random((size,), 10)
    assert torch.autograd.gradcheck(lambda x: smooth(x, kernel), cases.normal(shape, 11).requires_grad_())


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31), size=st.sampled_from([1, 3, 5, 7]), height=st.integers(1, 8), width=st.integers(1, 8)
)
def test_adjoint(seed, size, height, width):
    """<A x, y> = <x, A' y>, where A' smooths with the kernel back to front."""
    x, y = cases.normal((2, 2, height, width), seed), cases.normal((2, 2, height, width), seed + 1)
    kernel = cases.random((size,), seed + 2, low=-1)
    x.requires_grad_()
    ax = smooth(x, kernel)
    (adjoint,) = torch.autograd.grad(ax, x, y)
    torch.testing.assert_close((ax * y).sum(), (x * adjoint).sum(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(adjoint, smooth(y, kernel.flip(0)), rtol=1e-10, atol=1e-12)


def test_the_input_is_left_alone():
    grad, kernel = cases.normal((1, 3, 5, 5), 12), cases.random((3,), 13)
    before = grad.clone(), kernel.clone()
    smooth(grad, kernel)
    assert torch.equal(grad, before[0])
    assert torch.equal(kernel, before[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.zeros(3, 4, 4)}, "grad: got shape"),
        ({"grad": torch.zeros(1, 3, 4, 4, dtype=torch.int64)}, "grad: got dtype torch.int64"),
        ({"kernel": torch.zeros(4)}, "kernel: got size 4; allowed is an odd size"),
        ({"kernel": torch.zeros(0)}, "kernel: got size 0"),
        ({"kernel": torch.zeros(3, 3)}, r"kernel: got shape \[3, 3\]; allowed is \[any\]"),
        ({"kernel": torch.zeros(3, dtype=torch.float64)}, "kernel: got torch.float64 on cpu for a gradient of"),
        ({"kernel": torch.zeros(3, device="meta")}, "kernel: got torch.float32 on meta"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        smooth(**{"grad": torch.zeros(1, 3, 4, 4), "kernel": torch.ones(3), **change})


def test_a_kernel_that_requires_grad_is_refused():
    grad, kernel = torch.zeros(1, 3, 4, 4), torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match=r"^kernel: requires grad; allowed is a constant"):
        smooth(grad, kernel)
    with torch.no_grad():
        assert torch.equal(smooth(grad, kernel), grad)


@pytest.mark.parametrize("name", ["smooth", "smooth_backward"])
@pytest.mark.parametrize("layout", [cases.contiguous, cases.channels_last, cases.every_other])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator(name, layout, dtype):
    grad = layout(cases.normal((2, 3, 6, 5), 14, dtype)).requires_grad_()
    checks.operator(name, grad, cases.random((5,), 15, dtype))


@pytest.mark.parametrize("name", ["smooth", "smooth_backward"])
@pytest.mark.parametrize(
    ("grad", "kernel", "message"),
    [
        (torch.zeros(3, 4, 4), torch.ones(3), "grad: got shape"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.int64), torch.ones(3, dtype=torch.int64), "grad: got dtype int64"),
        (torch.zeros(1, 3, 4, 4), torch.zeros(4), "kernel: got size 4; allowed is an odd size"),
        (torch.zeros(1, 3, 4, 4), torch.zeros(0), "kernel: got size 0"),
        (torch.zeros(1, 3, 4, 4), torch.zeros(3, 3), r"kernel: got shape \[3, 3\]; allowed is \[any\]"),
        (torch.zeros(1, 3, 4, 4), torch.zeros(3, dtype=torch.float64), "kernel: got dtype float64"),
    ],
)
def test_the_operator_and_its_fake_refuse(name, grad, kernel, message):
    checks.refusal(name, (grad, kernel), message)


@pytest.mark.parametrize("size", [1, 5, 15])
@pytest.mark.parametrize("width", [1, 15, 16, 17, 63, 64, 65, 80, 100, 128, 700, 2047, 2048, 2049, 2113, 4100])
def test_every_width_of_a_row(width, size):
    check_against_dense(cases.normal((1, 3, 3, width), 16, torch.float32), cases.random((size,), 17, torch.float32))
    nhwc = cases.channels_last(cases.normal((1, 3, 3, width), 18, torch.bfloat16))
    check_against_dense(nhwc, cases.random((size,), 19, torch.bfloat16))


def test_channels_last_stays_channels_last():
    grad, kernel = cases.normal((2, 3, 9, 8), 20, torch.float32), cases.random((5,), 21, torch.float32)
    smoothed = smooth(cases.channels_last(grad), kernel)
    assert smoothed.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(smoothed, smooth(grad, kernel))
    for layout in (cases.contiguous, cases.transposed, cases.every_other):
        assert smooth(layout(grad), kernel).is_contiguous()


@pytest.mark.cpu_only
def test_threads_change_nothing():
    grad, kernel = cases.normal((5, 3, 67, 70), 22, torch.float32), cases.random((15,), 23, torch.float32)
    checks.same_on_any_thread_count(lambda: [smooth(grad, kernel)])


@pytest.mark.parametrize("layout", [cases.contiguous, cases.channels_last])
def test_it_compiles_whole(layout):
    kernel = cases.random((5,), 24, torch.float32)
    grad = layout(cases.normal((2, 3, 8, 8), 25, torch.float32)).requires_grad_()
    checks.compiles_whole(lambda grad: smooth(grad * 2, kernel).sin(), grad)


def test_gradgradcheck():
    grad, kernel = cases.normal((1, 2, 3, 4), 27).requires_grad_(), cases.random((3,), 26)
    assert torch.autograd.gradgradcheck(lambda grad: smooth(grad, kernel) ** 2, grad)
