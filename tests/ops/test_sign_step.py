import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignfast.ops import sign_step
from tests import cases
from tests.ops import checks

NUMBERS = {"alpha": 0.1, "eps": 0.16, "decay": 0.9}
FINITE = st.floats(allow_nan=False, allow_infinity=False)


def inputs(shape, seed, dtype=torch.float64, momentum=True, eps=0.16):
    """Images in [0, 1], a point in the ball around them, a gradient and a momentum."""
    images = cases.random(shape, seed, dtype)
    adv = (images.double() + eps * cases.random(shape, seed + 1, low=-1)).clamp(0, 1).to(dtype)
    grad = cases.normal(shape, seed + 2, dtype, scale=0.01)
    return adv, images, grad, cases.normal(shape, seed + 3, dtype) if momentum else None


def expected(adv, images, grad, momentum, *, alpha, eps, decay=0.0, low=0.0, high=1.0, norm="linf"):
    """The new point, the new momentum and the direction, image by image in float64."""
    points, momenta, directions = [], [], []
    for n in range(len(images)):
        a, x, d = adv[n].double(), images[n].double(), grad[n].double()
        if momentum is not None:
            size = d.abs().mean()
            d = decay * momentum[n].double() + (d / size if size > 0 else 0 * d)
        if norm == "linf":
            delta = (a + alpha * d.sign() - x).clamp(-eps, eps)
        else:
            delta = a - x + (alpha * d / d.norm() if d.norm() > 0 else 0)
            delta = delta * (eps / delta.norm()) if delta.norm() > eps else delta
        points.append((x + delta).clamp(low, high))
        momenta.append(d)
        directions.append(d)
    empty = images.double()
    return tuple(torch.stack(v) if v else empty for v in (points, momenta, directions))


def check_against_formula(adv, images, grad, momentum, **numbers):
    point, memory, direction = expected(adv, images, grad, momentum, **numbers)
    given = grad.clone(), images.clone()
    assert sign_step(adv, images, grad, momentum, **numbers) is None
    assert torch.equal(grad, given[0])
    assert torch.equal(images, given[1])
    if momentum is not None:
        cases.assert_near(momentum, memory, ulps=4, scale=1.0)
        # What is rounded to zero, or across it, has another sign; leave those few elements out.
        sure = direction.abs() > 8 * torch.finfo(adv.dtype).eps
        assert adv.numel() == 0 or float(sure.double().mean()) > 0.8
        if numbers.get("norm", "linf") == "linf":
            adv, point = torch.where(sure, adv, 0), torch.where(sure, point, 0)
    cases.assert_near(adv, point, ulps=4, scale=1.0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("shape", cases.IMAGES)
def test_it_is_the_formula(shape, dtype, momentum, norm):
    check_against_formula(*inputs(shape, 1, dtype, momentum), norm=norm, **NUMBERS)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    "change",
    [
        {"alpha": 0.0},
        {"eps": 0.0},
        {"decay": 0.0},
        {"decay": 1.5},
        {"alpha": 5.0, "eps": 10.0},
        {"low": 0.25, "high": 0.5},
        {"low": -math.inf, "high": math.inf},
        {"eps": 1e-3},
    ],
)
def test_numbers(change, norm):
    check_against_formula(*inputs((3, 3, 6, 7), 2, torch.float32), norm=norm, **{**NUMBERS, **change})


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("layout", cases.IMAGE_LAYOUTS)
def test_memory_layout_does_not_matter(layout, which):
    tensors = list(inputs((3, 3, 6, 8), 3, torch.float32))
    tensors[which] = layout(tensors[which])
    place = tensors[which].data_ptr(), tensors[which].stride()
    check_against_formula(*tensors, **NUMBERS)
    assert (tensors[which].data_ptr(), tensors[which].stride()) == place


def test_the_view_that_was_given_is_updated_and_nothing_around_it():
    adv, images, grad, momentum = inputs((4, 3, 5, 5), 4, torch.float32)
    whole, memory = adv.clone(), momentum.clone()
    sign_step(adv[1:3], images[1:3], grad[1:3], momentum[1:3], **NUMBERS)
    assert torch.equal(adv[0], whole[0])
    assert torch.equal(adv[3], whole[3])
    assert torch.equal(momentum[::3], memory[::3])
    sign_step(whole, images, grad, memory, **NUMBERS)
    assert torch.equal(adv[1:3], whole[1:3])
    assert torch.equal(momentum[1:3], memory[1:3])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_start_may_be_the_images_themselves(norm):
    _, images, grad, momentum = inputs((2, 3, 4, 4), 5)
    check_against_formula(images.clone(), images, grad, momentum, norm=norm, **NUMBERS)


def test_mi_fgsm_by_hand():
    """Two steps on one image of two pixels: mean |g| is 1.5, then 2."""
    images = torch.full((1, 1, 1, 2), 0.5)
    adv, momentum = images.clone(), torch.zeros(1, 1, 1, 2)
    sign_step(adv, images, torch.tensor([[[[1.0, -2.0]]]]), momentum, alpha=0.1, eps=0.15, decay=1.0)
    torch.testing.assert_close(momentum.flatten(), torch.tensor([2 / 3, -4 / 3]))
    torch.testing.assert_close(adv.flatten(), torch.tensor([0.6, 0.4]))
    sign_step(adv, images, torch.tensor([[[[3.0, 1.0]]]]), momentum, alpha=0.1, eps=0.15, decay=1.0)
    torch.testing.assert_close(momentum.flatten(), torch.tensor([2 / 3 + 1.5, -4 / 3 + 0.5]))
    torch.testing.assert_close(adv.flatten(), torch.tensor([0.65, 0.35]))


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(cases.DTYPES),
    norm=st.sampled_from(["linf", "l2"]),
    momentum=st.booleans(),
    alpha=st.floats(0.0, 2.0),
    eps=st.floats(0.0, 2.0),
    decay=st.floats(0.0, 2.0),
)
def test_ball_and_range_are_never_left(seed, dtype, norm, momentum, alpha, eps, decay):
    adv, images, grad, memory = inputs((3, 2, 3, 5), seed, dtype, momentum, eps)
    for _ in range(3):
        sign_step(adv, images, grad, memory, alpha=alpha, eps=eps, decay=decay, norm=norm)
    assert bool(((adv >= 0) & (adv <= 1)).all())
    change = (adv.double() - images.double()).flatten(1)
    size = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
    # One rounding of a value of up to 1, and of eps itself, an element.
    rounding = torch.finfo(dtype).eps * (1 if norm == "linf" else math.sqrt(30)) * (1 + eps)
    assert bool((size <= eps + rounding).all())


@settings(max_examples=120, deadline=None)
@given(
    values=st.lists(FINITE, min_size=12, max_size=12),
    power=st.integers(-45, 38),
    dtype=st.sampled_from(cases.DTYPES),
    norm=st.sampled_from(["linf", "l2"]),
    momentum=st.booleans(),
)
def test_no_finite_gradient_makes_nan(values, power, dtype, norm, momentum):
    adv, images, _, memory = inputs((2, 1, 2, 3), 6, dtype, momentum)
    largest = torch.finfo(dtype).max / 8
    raw = torch.tensor(values, dtype=torch.float64).clamp(-1, 1) * 10.0**power
    grad = raw.clamp(-largest, largest).to(dtype).view(2, 1, 2, 3)
    for sign in (1, -1, 0, 1):
        sign_step(adv, images, grad * sign, memory, norm=norm, **NUMBERS)
        assert bool(adv.isfinite().all())
        assert memory is None or bool(memory.isfinite().all())


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("momentum", [False, True])
def test_a_zero_gradient_is_no_step(momentum, norm, dtype):
    adv, images, grad, memory = inputs((3, 3, 4, 4), 7, dtype, momentum)
    grad[1] = 0
    if memory is not None:
        memory[1] = 0
    before = adv.clone()
    sign_step(adv, images, grad, memory, norm=norm, alpha=0.1, eps=2.0, decay=0.9)
    torch.testing.assert_close(adv[1], before[1], rtol=0, atol=torch.finfo(dtype).eps)
    assert not torch.equal(adv[0], before[0])
    assert memory is None or torch.equal(memory[1], torch.zeros_like(memory[1]))


def test_a_zero_gradient_leaves_what_momentum_there_is():
    adv, images, grad, momentum = inputs((2, 3, 4, 4), 8)
    before = momentum.clone()
    sign_step(adv, images, torch.zeros_like(grad), momentum, **NUMBERS)
    torch.testing.assert_close(momentum, 0.9 * before)


@pytest.mark.parametrize("size", [1e-44, 1e-35, 1e-25, 1e-10, 1e10, 1e25, 1e35])
@pytest.mark.parametrize(("momentum", "norm"), [(False, "linf"), (False, "l2"), (True, "linf"), (True, "l2")])
def test_the_size_of_the_gradient_does_not_matter(momentum, norm, size):
    """Squares of 1e-25 vanish in float32 and those of 1e25 overflow."""
    adv, images, _, _ = inputs((2, 3, 4, 4), 9, torch.float32)
    memory = torch.zeros_like(adv) if momentum else None
    signs = torch.where(cases.normal(adv.shape, 10) > 0, 1.0, -1.0).float()
    sign_step(adv, images, signs * size, memory, alpha=0.01, eps=1.0, norm=norm)
    wanted, other = inputs((2, 3, 4, 4), 9, torch.float32)[:2]
    sign_step(wanted, other, signs, None, alpha=0.01, eps=1.0, norm=norm)
    torch.testing.assert_close(adv, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", cases.HALF_DTYPES)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_one_tiny_value_in_half_precision_is_a_gradient(norm, dtype):
    """Its mean over the image is not representable in float16."""
    images = torch.full((1, 3, 8, 8), 0.5, dtype=dtype)
    adv, grad, momentum = images.clone(), torch.zeros_like(images), torch.zeros_like(images)
    grad[0, 1, 2, 3] = torch.finfo(torch.float16).smallest_normal / 64
    sign_step(adv, images, grad, momentum, alpha=0.125, eps=0.25, norm=norm)
    assert float(momentum[0, 1, 2, 3]) == pytest.approx(192, rel=0.01)
    assert float(adv[0, 1, 2, 3]) == 0.625
    assert int((adv != images).sum()) == 1


def test_images_do_not_see_each_other():
    for norm in ("linf", "l2"):
        adv, images, grad, momentum = inputs((4, 3, 5, 7), 11, torch.float32)
        parts = [[tensor[n : n + 1].clone() for tensor in (adv, images, grad, momentum)] for n in range(4)]
        sign_step(adv, images, grad, momentum, norm=norm, **NUMBERS)
        for part in parts:
            sign_step(*part, norm=norm, **NUMBERS)
        assert torch.equal(adv, torch.cat([part[0] for part in parts]))
        assert torch.equal(momentum, torch.cat([part[3] for part in parts]))


X = torch.full((2, 3, 4, 4), 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adv": X[:1]}, r"adv: got torch.float32 \[1, 3, 4, 4\] on cpu; allowed is that of images"),
        ({"adv": X.double()}, "adv: got torch.float64"),
        ({"grad": X.half()}, "grad: got torch.float16"),
        ({"grad": X.to("meta")}, "grad: got torch.float32 .* on meta"),
        ({"momentum": X[:, :1]}, "momentum: got torch.float32"),
        ({"images": X[0]}, "(adv|images): got torch.float32"),
        (dict.fromkeys(("adv", "images", "grad"), X[0]), r"adv: got .* allowed is floating-point \[N, C, H, W\]"),
        (dict.fromkeys(("adv", "images", "grad"), X.long()), "adv: got torch.int64"),
        ({"alpha": -0.1}, "alpha: got -0.1; allowed is a number of at least 0"),
        ({"alpha": math.nan}, "alpha: got nan"),
        ({"eps": -1}, "eps: got -1"),
        ({"eps": math.inf}, "eps: got inf"),
        ({"decay": -0.5}, "decay: got -0.5"),
        ({"norm": "l1"}, "norm: got 'l1'.* allowed is one of linf, l2"),
        ({"low": 1.0, "high": 0.0}, "low, high: got 1.0, 0.0; allowed is low <= high"),
        ({"low": math.nan}, "low, high: got nan"),
    ],
)
def test_bad_input_is_refused_and_nothing_changed(change, message):
    adv, grad, momentum = X.clone(), torch.ones_like(X), torch.zeros_like(X)
    arguments = {"adv": adv, "images": X, "grad": grad, "momentum": momentum, "alpha": 0.1, "eps": 0.2, "decay": 1.0}
    with pytest.raises(ValueError, match=f"^{message}"):
        sign_step(**{**arguments, **change})
    assert torch.equal(adv, X)
    assert torch.equal(momentum, torch.zeros_like(X))


def arguments(momentum=True, norm="linf", dtype=torch.float32, layout=cases.contiguous):
    tensors = [tensor if tensor is None else layout(tensor) for tensor in inputs((3, 3, 6, 8), 30, dtype, momentum)]
    return (*tensors, 0.1, 0.16, 0.9, 0.0, 1.0, norm)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("layout", [cases.contiguous, cases.channels_last, cases.every_other])
def test_the_operator(layout, momentum, norm):
    checks.operator("sign_step", *arguments(momentum, norm, layout=layout))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(3, 3, 6, 7), "adv: got shape"),
        (2, torch.zeros(3, 3, 6, 8, dtype=torch.float64), "grad: got dtype float64; allowed is float32"),
        (3, torch.zeros(3, 3, 8, 6), "momentum: got shape"),
        (4, -0.1, "alpha: got -0.1"),
        (5, math.nan, "eps: got nan"),
        (6, -1.0, "decay: got -1"),
        (7, 2.0, "low, high: got 2, 1; allowed is low <= high"),
        (9, "l1", "norm: got 'l1'"),
    ],
)
def test_the_operator_and_its_fake_refuse(place, value, message):
    given = list(arguments())
    given[place] = value
    checks.refusal("sign_step", tuple(given), message)


@pytest.mark.parametrize(("one", "other"), [("adv", "images"), ("adv", "grad"), ("momentum", "grad")])
def test_one_memory_for_two_tensors_is_refused(one, other):
    tensors = dict(zip(("adv", "images", "grad", "momentum"), inputs((2, 3, 4, 4), 31, torch.float32), strict=True))
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    with pytest.raises((RuntimeError, ValueError), match=f"^{one}, {other}: got one memory for both"):
        sign_step(**{**tensors, one: tensors[other]}, **NUMBERS)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name])


@pytest.mark.cpu_only
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(1, 3, 130, 131), (9, 3, 33, 35)])
def test_threads_change_nothing(shape, norm):
    start = inputs(shape, 32, torch.float32)

    def compute():
        tensors = [tensor.clone() for tensor in start]
        sign_step(*tensors, norm=norm, **NUMBERS)
        return tensors[0], tensors[3]

    checks.same_on_any_thread_count(compute)


@pytest.mark.parametrize("momentum", [False, True])
def test_it_compiles_whole(momentum):
    given = inputs((3, 3, 6, 7), 33, torch.float32, momentum)

    def step(adv, images, grad, memory=None):
        adv = adv * 1.0
        memory = None if memory is None else memory * 1.0
        sign_step(adv, images, grad, memory, **NUMBERS)
        return adv if memory is None else adv + memory

    checks.compiles_whole(step, *(tensor for tensor in given if tensor is not None))
