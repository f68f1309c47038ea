import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import kl_div, log_softmax

from alignfast.ops import kl_div_with_logits
from tests import cases

DIRECTIONS = ["forward", "reverse", "symmetric", "jsd"]
REDUCTIONS = ["batchmean", "sum", "none"]
COMBINES = ["mean", "max", "min"]
LOWEST = -1e5
ARGUMENTS = (4.0, "forward", "batchmean", "mean")


def expected_losses(student, teacher, temperature, direction):
    """[B] in float64, for one teacher, by the definitions."""
    log_q = log_softmax(student.double() / temperature, -1)
    log_p = log_softmax(teacher.double() / temperature, -1)

    def divergence(log_a, log_b):
        return kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)

    if direction == "forward":
        losses = divergence(log_p, log_q)
    elif direction == "reverse":
        losses = divergence(log_q, log_p)
    elif direction == "symmetric":
        losses = (divergence(log_p, log_q) + divergence(log_q, log_p)) / 2
    else:
        # Where both underflow, their weights are zero and any finite logarithm does.
        log_m = ((log_p.exp() + log_q.exp()) / 2).clamp(min=1e-300).log()
        losses = (divergence(log_p, log_m) + divergence(log_q, log_m)) / 2
    return losses * temperature**2


def expected_loss(student, teacher, temperature=4.0, direction="forward", reduction="batchmean", combine="mean"):
    witnesses = teacher if teacher.ndim == 3 else teacher[None]
    losses = torch.stack([expected_losses(student, witness, temperature, direction) for witness in witnesses])
    losses = {"mean": losses.mean(0), "max": losses.amax(0), "min": losses.amin(0)}[combine]
    if reduction == "none":
        return losses
    return losses.sum() / max(len(losses), 1) if reduction == "batchmean" else losses.sum()


def check_against_definition(student, teacher, ulps=32, **options):
    temperature = options.get("temperature", 4.0)
    student = student.detach().requires_grad_()
    loss = kl_div_with_logits(student, teacher, **options)
    wide = student.detach().double().requires_grad_()
    wanted = expected_loss(wide, teacher, **options)
    both = (student.dtype, teacher.dtype)
    assert loss.dtype == (torch.float64 if torch.float64 in both else torch.float32)
    size = float(max(student.detach().abs().max(), teacher.abs().max())) if student.numel() else 0.0
    rows = len(student) if options.get("reduction") == "sum" else 1
    cases.assert_near(loss, wanted.detach(), ulps=ulps, scale=rows * temperature * (temperature + size))
    weight = cases.random(wanted.shape, 9, low=0.5, high=1.5)
    (gradient,) = torch.autograd.grad((loss * weight).sum(), student)
    (wanted_gradient,) = torch.autograd.grad((wanted * weight).sum(), wide)
    assert gradient.dtype == student.dtype
    # Intermediates are float32 whatever the logits are, so half precision pays for one rounding of the gradient only.
    error = torch.finfo(torch.float32).eps / torch.finfo(student.dtype).eps if student.dtype in cases.HALF_DTYPES else 1
    cases.assert_near(
        gradient, wanted_gradient, ulps=1 + ulps * error, scale=min(error, 1) * temperature * (1 + size / temperature)
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("shape", cases.LOGITS)
def test_value_and_gradient_are_those_of_the_definition(shape, dtype, direction):
    student = cases.normal(shape, 1, dtype, scale=3.0)
    teacher = cases.normal(shape, 2, dtype, scale=3.0)
    check_against_definition(student, teacher, direction=direction)


@pytest.mark.parametrize("classes", [63, 64, 65, 1023, 1024, 1025, 1536, 1537, 3072, 3073])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_around_the_sizes_they_are_cut_into(dtype, direction, classes):
    student, teacher = cases.normal((2, classes), 31, dtype, 3.0), cases.normal((2, classes), 32, dtype, 3.0)
    check_against_definition(student, teacher, direction=direction, reduction="sum")
    check_against_definition(cases.every_other(student), teacher, direction=direction, reduction="none")


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_witnesses_are_combined_per_sample(dtype, direction, combine):
    student = cases.normal((6, 11), 3, dtype, scale=2.0)
    teacher = cases.normal((3, 6, 11), 4, dtype, scale=2.0)
    check_against_definition(student, teacher, direction=direction, combine=combine, reduction="none")


@pytest.mark.parametrize("combine", ["max", "min"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_witnesses_that_tie_share_the_gradient(direction, combine):
    student = torch.zeros(1, 2, requires_grad=True)
    # Mirror images of one another, so their losses are equal and their gradients opposite; the third is out of the run.
    teacher = torch.tensor([[[1.0, -1.0]], [[-1.0, 1.0]], [[0.0, 0.5]] if combine == "max" else [[0.0, 5.0]]])
    loss = kl_div_with_logits(student, teacher, direction=direction, combine=combine)
    alone = kl_div_with_logits(student, teacher[0], direction=direction)
    assert torch.equal(loss, alone)
    assert bool((torch.autograd.grad(alone, student)[0].abs() > 0.1).all())
    assert bool((torch.autograd.grad(loss, student)[0].abs() < 1e-6).all())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_temperatures_and_reductions(temperature, reduction):
    student, teacher = cases.normal((5, 9), 5, torch.float32, 4.0), cases.normal((5, 9), 6, torch.float32, 4.0)
    check_against_definition(student, teacher, temperature=temperature, reduction=reduction)


def test_the_defaults_are_the_papers():
    student, teacher = cases.normal((8, 10), 7), cases.normal((8, 10), 8)
    target = (teacher / 4).softmax(-1)
    paper = kl_div((student / 4).log_softmax(-1), target, reduction="batchmean") * 16
    torch.testing.assert_close(kl_div_with_logits(student, teacher), paper, rtol=1e-13, atol=0)


def test_the_forward_gradient_is_t_times_the_difference_of_distributions():
    student, teacher = cases.normal((6, 5), 9).requires_grad_(), cases.normal((6, 5), 10)
    kl_div_with_logits(student, teacher, temperature=3.0).backward()
    wanted = 3.0 * ((student / 3).softmax(-1) - (teacher / 3).softmax(-1)) / 6
    torch.testing.assert_close(student.grad, wanted.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("layout", cases.MATRIX_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_layout_does_not_matter(layout, dtype):
    student, teacher = cases.normal((5, 37), 11, dtype), cases.normal((2, 5, 37), 12, dtype)
    check_against_definition(layout(student), layout(teacher))
    check_against_definition(student, layout(teacher))
    check_against_definition(layout(student), teacher.mT.contiguous().mT)


def test_a_broadcast_teacher_is_read_by_its_strides():
    student, teacher = cases.normal((4, 6), 13, torch.float32), cases.normal((1, 6), 14, torch.float32)
    check_against_definition(student, teacher.expand(4, 6))
    check_against_definition(student, teacher.expand(3, 4, 6))


@pytest.mark.parametrize("pair", [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)])
def test_student_and_teacher_may_differ_in_precision(pair):
    check_against_definition(cases.normal((4, 9), 15, pair[0]), cases.normal((4, 9), 16, pair[1]))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_logits_of_ten_thousand(dtype, direction):
    student = (cases.integers((6, 8), 17, -1, 2) * 1e4).to(dtype)
    teacher = (cases.integers((6, 8), 18, -1, 2) * 1e4).to(dtype)
    check_against_definition(student, teacher, direction=direction, reduction="none")


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_masked_classes_leave_loss_and_gradient_finite(dtype, direction):
    student, teacher = cases.normal((6, 5), 19, dtype), cases.normal((6, 5), 20, dtype)
    student[0, 1] = student[1, :4] = student[2] = student[3, 0] = -math.inf
    teacher[0, 2] = teacher[1, 1:] = teacher[3, 0] = teacher[4] = -math.inf
    student.requires_grad_()
    losses = kl_div_with_logits(student, teacher, direction=direction, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), student)
    assert losses.isfinite().all()
    assert gradient.isfinite().all()
    wanted = expected_losses(
        student.detach().double().clamp(min=LOWEST), teacher.double().clamp(min=LOWEST), 4.0, direction
    )
    torch.testing.assert_close(losses.detach().double(), wanted, rtol=1e-5, atol=1e-4)
    # A class that both mask out is as if it were not there.
    same = kl_div_with_logits(student[3:4, 1:], teacher[3:4, 1:], direction=direction, reduction="none")
    torch.testing.assert_close(losses[3:4], same, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("classes", [7, 21841])
def test_a_logit_below_the_lowest_has_no_gradient(classes, dtype, direction):
    student, teacher = cases.normal((5, classes), 35, dtype), cases.normal((2, 5, classes), 36, dtype)
    student[0, 1:] = student[1] = -math.inf
    student[2] = 0.99 * LOWEST
    student[2, ::2] = 1.01 * LOWEST
    teacher[0, 3, 1:] = teacher[1, 4] = -math.inf
    student.requires_grad_()
    losses = kl_div_with_logits(student, teacher, 2.0, direction, "none")
    (gradient,) = torch.autograd.grad(losses.sum(), student)
    wide = student.detach().double().requires_grad_()
    wanted = expected_loss(wide.clamp(min=LOWEST), teacher.double().clamp(min=LOWEST), 2.0, direction, "none")
    (wanted_gradient,) = torch.autograd.grad(wanted.sum(), wide)
    torch.testing.assert_close(losses.detach().double(), wanted.detach(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=1e-4, atol=1e-5)
    assert torch.equal(gradient[student < LOWEST], torch.zeros_like(gradient[student < LOWEST]))
    assert bool((student.detach() < LOWEST).any())


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["student", "teacher"])
def test_what_is_no_number_shows(which, bad, direction):
    logits = {"student": cases.normal((3, 70), 37, torch.float32), "teacher": cases.normal((3, 70), 38, torch.float32)}
    logits[which][1, 65] = bad
    losses = kl_div_with_logits(**logits, direction=direction, reduction="none")
    assert losses.isnan().tolist() == [False, True, False]
    for combine in COMBINES:
        witnesses = torch.stack([cases.normal((3, 70), 39, torch.float32), logits["teacher"]])
        losses = kl_div_with_logits(
            logits["student"], witnesses, direction=direction, reduction="none", combine=combine
        )
        assert losses.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("witnesses", [None, 1, 3])
def test_gradcheck(witnesses, reduction, direction):
    shape = (3, 5) if witnesses is None else (witnesses, 3, 5)
    student, teacher = cases.normal((3, 5), 21).requires_grad_(), cases.normal(shape, 22)
    for combine in COMBINES if witnesses == 3 else ["mean"]:
        assert torch.autograd.gradcheck(
            lambda x, combine=combine: kl_div_with_logits(x, teacher, 2.0, direction, reduction, combine), student
        )


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    direction=st.sampled_from(DIRECTIONS),
    temperature=st.floats(0.1, 50.0),
    scale=st.floats(0.0, 100.0),
    classes=st.integers(1, 40),
)
@example(seed=0, direction="jsd", temperature=4.0, scale=0.0, classes=3)
def test_it_is_never_negative_and_zero_for_equal_logits(seed, direction, temperature, scale, classes):
    student, teacher = cases.normal((4, classes), seed, scale=scale), cases.normal((4, classes), seed + 1, scale=scale)
    options = {"temperature": temperature, "direction": direction, "reduction": "none"}
    rounding = 1e-13 * temperature * (temperature + scale)
    assert bool((kl_div_with_logits(student, teacher, **options) >= -rounding).all())
    assert bool((kl_div_with_logits(student, student + 7.0, **options).abs() <= rounding).all())
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(kl_div_with_logits(student, student.detach(), **options).sum(), student)
    assert bool((gradient.abs() <= rounding).all())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), temperature=st.floats(0.5, 20.0))
def test_directions_relate_as_they_must(seed, temperature):
    student, teacher = cases.normal((4, 6), seed, scale=5.0), cases.normal((4, 6), seed + 1, scale=5.0)
    forward, reverse, symmetric, jsd = (
        kl_div_with_logits(student, teacher, temperature, direction, "none") for direction in DIRECTIONS
    )
    torch.testing.assert_close(kl_div_with_logits(teacher, student, temperature, "forward", "none"), reverse)
    torch.testing.assert_close((forward + reverse) / 2, symmetric)
    torch.testing.assert_close(kl_div_with_logits(teacher, student, temperature, "jsd", "none"), jsd)
    assert bool((jsd <= math.log(2) * temperature**2 * (1 + 1e-12)).all())


def test_samples_do_not_see_each_other():
    student, teacher = cases.normal((7, 33), 23, torch.float32), cases.normal((2, 7, 33), 24, torch.float32)
    whole = kl_div_with_logits(student, teacher, reduction="none")
    parts = [kl_div_with_logits(student[i : i + 1], teacher[:, i : i + 1], reduction="none") for i in range(7)]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.cpu_only
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", [(40, 1000), (3, 21841), (1500, 33)])
def test_the_number_of_threads_does_not_matter(shape, direction):
    student = cases.normal(shape, 40, torch.float32, scale=4.0).requires_grad_()
    teacher = cases.normal((2, *shape), 41, torch.float32, scale=4.0)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            loss = kl_div_with_logits(student, teacher, direction=direction, combine="max")
            results.append((loss.detach(), *torch.autograd.grad(loss, student)))
    finally:
        torch.set_num_threads(before)
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_one_class_costs_nothing():
    student = cases.normal((4, 1), 25, torch.float32, scale=50.0).requires_grad_()
    loss = kl_div_with_logits(student, cases.normal((4, 1), 26, torch.float32))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(student.grad, torch.zeros(4, 1))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)])
def test_an_empty_batch_costs_nothing(shape):
    student, teacher = torch.zeros(0, 5, requires_grad=True), torch.zeros(shape)
    for reduction in ("batchmean", "sum"):
        loss = kl_div_with_logits(student, teacher, reduction=reduction)
        assert loss.shape == ()
        assert loss.item() == 0.0
    assert kl_div_with_logits(student, teacher, reduction="none").shape == (0,)


def test_the_teacher_gets_no_gradient_and_nothing_is_changed():
    student, teacher = cases.normal((3, 4), 27).requires_grad_(), cases.normal((3, 4), 28).requires_grad_()
    before = student.detach().clone(), teacher.detach().clone()
    kl_div_with_logits(student, teacher, direction="jsd").backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert torch.equal(student.detach(), before[0])
    assert torch.equal(teacher.detach(), before[1])
    assert not kl_div_with_logits(student.detach(), teacher).requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": torch.zeros(3)}, r"student: got shape \[3\]; allowed is \[any, any\]"),
        ({"student": torch.zeros(1, 2, 3)}, "student: got shape"),
        ({"student": torch.zeros(2, 3, dtype=torch.int64)}, "student: got dtype torch.int64"),
        ({"teacher": torch.zeros(2, 4)}, r"teacher: got shape \[2, 4\]; allowed is \[2, 3\]"),
        ({"teacher": torch.zeros(3)}, "teacher: got shape"),
        ({"teacher": torch.zeros(5, 2, 4)}, r"teacher: got shape \[5, 2, 4\]; allowed is \[any, 2, 3\]"),
        ({"teacher": torch.zeros(1, 1, 2, 3)}, "teacher: got shape"),
        ({"teacher": torch.zeros(0, 2, 3)}, "teacher: got no witness"),
        ({"teacher": torch.zeros(2, 3, dtype=torch.uint8)}, "teacher: got dtype torch.uint8"),
        ({"teacher": torch.zeros(2, 3, device="meta")}, "teacher: on meta; allowed is the device of student, cpu"),
        ({"temperature": 0.0}, "temperature: got 0.0; allowed is a number greater than 0"),
        ({"temperature": -1.0}, "temperature: got -1.0"),
        ({"temperature": math.nan}, "temperature: got nan"),
        ({"temperature": math.inf}, "temperature: got inf"),
        ({"temperature": True}, "temperature: got True"),
        ({"direction": "foward"}, "direction: got 'foward' .*did you mean 'forward'"),
        ({"reduction": "mean"}, "reduction: got 'mean'.* allowed is one of batchmean, sum, none"),
        ({"combine": "median"}, "combine: got 'median'"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        kl_div_with_logits(**{"student": torch.zeros(2, 3), "teacher": torch.zeros(2, 3), **change})


def op(*arguments, **changes):
    return torch.ops.alignfast.kl_div_with_logits(*arguments, **changes)


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize(
    ("direction", "reduction", "combine"), [("forward", "batchmean", "mean"), ("jsd", "none", "max")]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck(dtype, direction, reduction, combine, with_gradient):
    student = cases.normal((4, 7), 42, dtype).requires_grad_(with_gradient)
    for teacher in (cases.normal((4, 7), 43, torch.float32), cases.normal((2, 4, 7), 44, torch.float32)):
        arguments = (student, teacher, 2.0, direction, reduction, combine)
        torch.library.opcheck(torch.ops.alignfast.kl_div_with_logits.default, (*arguments, with_gradient))
        loss, gradient = op(*arguments, True)
        torch.library.opcheck(
            torch.ops.alignfast.kl_div_with_logits_backward.default, (torch.ones_like(loss), gradient, student.detach())
        )


def test_no_gradient_is_made_where_none_is_needed():
    student, teacher = cases.normal((4, 7), 45), cases.normal((4, 7), 46)
    loss, gradient = op(student, teacher, *ARGUMENTS, False)
    assert gradient.shape == (0,)
    assert torch.equal(loss, op(student, teacher, *ARGUMENTS, True)[0])
    student.requires_grad_()
    with torch.no_grad():
        assert not kl_div_with_logits(student, teacher).requires_grad
    loss, _ = op(student, teacher, *ARGUMENTS, False)
    with pytest.raises(RuntimeError, match="with_gradient: got False"):
        loss.backward()


def test_the_gradient_that_comes_with_the_loss_is_not_differentiable():
    student, teacher = cases.normal((4, 7), 47).requires_grad_(), cases.normal((4, 7), 48)
    loss, gradient = op(student, teacher, *ARGUMENTS, True)
    assert loss.requires_grad
    assert not gradient.requires_grad
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], gradient)


def test_a_second_derivative_is_refused():
    student, teacher = cases.normal((4, 7), 49).requires_grad_(), cases.normal((4, 7), 50)
    for loss in (kl_div_with_logits(student, teacher), op(student, teacher, *ARGUMENTS, True)[0]):
        (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.square().sum().backward()


@pytest.mark.parametrize("autocast", [False, True])
def test_it_compiles_in_one_graph_forward_and_backward(autocast):
    layer = torch.nn.Linear(6, 9)
    images, teacher = cases.normal((5, 6), 51, torch.float32), cases.normal((2, 5, 9), 52, torch.float32)

    def loss_of(images, teacher):
        return kl_div_with_logits(layer(images), teacher, 3.0, "symmetric", "batchmean", "min")

    results = []
    for function in (loss_of, torch.compile(loss_of, fullgraph=True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = function(images, teacher)
        results.append((loss.detach(), *torch.autograd.grad(loss, layer.parameters())))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert torch.equal(function(images, teacher), loss)
    # In one graph, the layer's own sums are rounded to bfloat16 less often.
    near = {"rtol": 1e-2, "atol": 1e-3} if autocast else {"rtol": 1e-5, "atol": 1e-6}
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, **near)


OP_MISTAKES = [
    ({"student": torch.zeros(3)}, r"student: got shape \[3\]; allowed is \[any, any\]"),
    ({"student": torch.zeros(2, 3, dtype=torch.int64)}, "student: got dtype (torch.)?int64"),
    ({"teacher": torch.zeros(2, 4)}, r"teacher: got shape \[2, 4\]; allowed is \[2, 3\]"),
    ({"teacher": torch.zeros(5, 1, 3)}, r"teacher: got shape \[5, 1, 3\]; allowed is \[any, 2, 3\]"),
    ({"teacher": torch.zeros(0, 2, 3)}, "teacher: got no witness"),
    ({"teacher": torch.zeros(2, 3, dtype=torch.bool)}, "teacher: got dtype"),
    ({"temperature": 0.0}, "temperature: got 0"),
    ({"temperature": math.nan}, "temperature: got -?nan"),
    ({"temperature": math.inf}, "temperature: got inf"),
    ({"direction": "foward"}, "direction: got 'foward'.* allowed is one of forward, reverse, symmetric, jsd"),
    ({"reduction": "mean"}, "reduction: got 'mean'.* allowed is one of batchmean, sum, none"),
    ({"combine": "median"}, "combine: got 'median'.* allowed is one of mean, max, min"),
]


@pytest.mark.parametrize(("change", "message"), OP_MISTAKES)
def test_the_op_and_its_fake_refuse_bad_input(change, message):
    arguments = {
        "student": torch.zeros(2, 3),
        "teacher": torch.zeros(2, 3),
        "temperature": 4.0,
        "direction": "forward",
        "reduction": "none",
        "combine": "mean",
        "with_gradient": True,
        **change,
    }
    with pytest.raises((RuntimeError, ValueError), match=message):
        op(**arguments)
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=message):
        op(
            **{
                name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
                for name, value in arguments.items()
            }
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.ones(3)}, r"grad: got shape \[3\]; allowed is \[2\]"),
        ({"grad": torch.ones((), dtype=torch.float64)}, "grad: got dtype (torch.)?float64"),
        ({"gradient": torch.ones(0)}, r"gradient: got shape \[0\]; allowed is \[2, 3\]"),
        ({"student": torch.ones(2)}, r"student: got shape \[2\]"),
    ],
)
def test_the_backward_op_and_its_fake_refuse_bad_input(change, message):
    arguments = {"grad": torch.ones(()), "gradient": torch.ones(2, 3), "student": torch.ones(2, 3), **change}
    with pytest.raises((RuntimeError, ValueError), match=message):
        torch.ops.alignfast.kl_div_with_logits_backward(**arguments)
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=message):
        torch.ops.alignfast.kl_div_with_logits_backward(**{k: mode.from_tensor(v) for k, v in arguments.items()})
