from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, softmax

from alignfast.alignment.outputs import OUTPUTS, OutputLoss, output_loss
from alignfast.ops import kl_div_with_logits
from tests.attacks.no_sync import NoSync

N, C, W = 4, 6, 3
COMBINE: dict[str, Callable[[list[float]], float]] = {"mean": fmean, "max": max, "min": min}


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def probabilities(row: Tensor, temperature: float) -> list[float]:
    powers = [math.exp(value / temperature) for value in row.tolist()]
    return [power / sum(powers) for power in powers]


def of_sample(kind: str, student: Tensor, teacher: Tensor, temperature: float) -> float:
    q, p = probabilities(student, temperature), probabilities(teacher, temperature)
    if kind == "kl":
        return temperature**2 * sum([b * math.log(b / a) for a, b in zip(q, p, strict=True)])
    if kind == "mse":
        return sum((a - b) ** 2 for a, b in zip(q, p, strict=True))
    return 0.5 * sum(abs(a - b) for a, b in zip(q, p, strict=True))


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("kind", OUTPUTS)
def test_equations(kind: Any, temperature: float, combine: Any) -> None:
    student, teachers = logits(N, C), logits(W, N, C, seed=1)
    each = [[of_sample(kind, one, teacher[n], temperature) for teacher in teachers] for n, one in enumerate(student)]
    options: dict[str, Any] = {"kind": kind, "temperature": temperature, "combine": combine}
    wanted = sum(COMBINE[combine](values) for values in each) / N
    assert float(output_loss(student, teachers, **options)) == pytest.approx(wanted, rel=1e-12)
    alone = sum(values[0] for values in each) / N
    assert float(output_loss(student, teachers[0], **options)) == pytest.approx(alone, rel=1e-12)
    assert float(output_loss(student, teachers[:1], **options)) == pytest.approx(alone, rel=1e-12)


@pytest.mark.parametrize("direction", ["forward", "reverse", "symmetric", "jsd"])
def test_directions_of_the_divergence(direction: Any) -> None:
    student, teachers = logits(N, C), logits(W, N, C, seed=1)
    loss = output_loss(student, teachers, temperature=2.0, direction=direction, combine="max")
    assert torch.equal(loss, kl_div_with_logits(student, teachers, 2.0, direction, "batchmean", "max"))
    for kind in ("mse", "l1"):
        any_direction = output_loss(student, teachers, kind=kind, direction=direction)
        assert torch.equal(any_direction, output_loss(student, teachers, kind=kind))


def test_the_default_is_the_papers_loss() -> None:
    student, teacher = logits(N, C), logits(N, C, seed=1)
    wanted = kl_div(log_softmax(student / 4, 1), softmax(teacher / 4, 1), reduction="batchmean") * 16
    torch.testing.assert_close(output_loss(student, teacher), wanted)


def test_twice_the_symmetric_divergence_is_the_references() -> None:
    student, teacher = logits(N, C), logits(N, C, seed=1)
    logs = log_softmax(student, 1), log_softmax(teacher, 1)
    reference = sum(kl_div(a, b, reduction="batchmean", log_target=True) for a, b in (logs, logs[::-1]))
    torch.testing.assert_close(2 * output_loss(student, teacher, temperature=1.0, direction="symmetric"), reference)


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("kind", OUTPUTS)
def test_gradients(kind: Any, combine: Any) -> None:
    teachers = logits(W, N, C, seed=1)
    student = logits(N, C).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: output_loss(s, teachers, kind=kind, combine=combine), student)


@pytest.mark.parametrize("kind", OUTPUTS)
def test_the_teacher_gets_no_gradient(kind: Any) -> None:
    student, teacher = logits(N, C).requires_grad_(), logits(N, C, seed=1).requires_grad_()
    output_loss(student, teacher, kind=kind).backward()
    assert student.grad is not None
    assert student.grad.abs().max() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_computed_in_float32(kind: Any, dtype: torch.dtype) -> None:
    student, teacher = logits(N, C, dtype=dtype).requires_grad_(), logits(N, C, seed=1, dtype=dtype)
    loss = output_loss(student, teacher, kind=kind)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, output_loss(student.float(), teacher.float(), kind=kind), rtol=0, atol=0)
    torch.testing.assert_close(
        loss.double(), output_loss(student.double(), teacher.double(), kind=kind), rtol=1e-5, atol=1e-7
    )
    loss.backward()
    assert student.grad is not None
    assert student.grad.dtype == dtype


@pytest.mark.parametrize("kind", OUTPUTS)
def test_degenerate_logits(kind: Any) -> None:
    masked = logits(N, C)
    masked[:, 2] = -math.inf
    cases = {
        "equal": (logits(N, C), logits(N, C)),
        "one class": (logits(N, 1), logits(N, 1, seed=1)),
        "one sample": (logits(1, C), logits(1, C, seed=1)),
        "empty": (logits(0, C), logits(0, C)),
        "masked student": (masked, logits(N, C, seed=1)),
        "masked teacher": (logits(N, C), masked),
        "masked both": (masked, masked),
        "all masked": (torch.full((N, C), -math.inf), logits(N, C)),
        "huge": (1e30 * logits(N, C), -1e30 * logits(N, C)),
    }
    for name, (student, teacher) in cases.items():
        student = student.clone().requires_grad_()
        loss = output_loss(student, teacher, kind=kind)
        loss.backward()
        assert student.grad is not None
        assert torch.isfinite(loss), name
        assert torch.isfinite(student.grad).all(), name
        if name in ("equal", "one class", "empty", "masked both"):
            assert loss == 0, name
            assert not student.grad.any(), name


def test_total_variation_is_at_most_one() -> None:
    student = torch.tensor([[50.0, 0.0], [0.0, 50.0]])
    assert float(output_loss(student, student.flip(1), kind="l1", temperature=1.0)) == pytest.approx(1.0)
    assert float(output_loss(student, student.flip(1), kind="mse", temperature=1.0)) == pytest.approx(2.0)


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_nothing_waits_for_the_device(kind: Any, device: str) -> None:
    student = logits(N, C).to(device).requires_grad_()
    teachers = logits(W, N, C, seed=1).to(device)
    with NoSync(device):
        output_loss(student, teachers, kind=kind, combine="max").backward()
    assert student.grad is not None


@pytest.mark.parametrize("kind", ["mse", "l1"])
@pytest.mark.parametrize(
    ("student", "teacher", "changes", "message"),
    [
        ((C,), (C,), {}, r"student: got shape \[6\]; allowed is \[any, any\]"),
        ((N, C), (N, C + 1), {}, r"teacher: got shape \[4, 7\]; allowed is \[4, 6\]"),
        ((N, C), (W, N, C + 1), {}, r"teacher: got shape \[3, 4, 7\]; allowed is \[any, 4, 6\]"),
        ((N, C), (0, N, C), {}, "teacher: got no witness; allowed is at least one"),
        ((N, C), (N, C), {"temperature": 0.0}, "temperature: got 0.0; allowed is a number greater than 0"),
        ((N, C), (N, C), {"temperature": math.nan}, "temperature: got nan"),
        ((N, C), (N, C), {"combine": "sum"}, "combine: got 'sum'; allowed is one of mean, max, min"),
        ((N, C), (N, C), {"direction": "foward"}, r"direction: got 'foward' \(did you mean 'forward'\?\)"),
        ((N, C), (N, C), {"kind": "mae"}, "kind: got 'mae'"),
    ],
)
def test_what_is_refused(kind: Any, student: Any, teacher: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        output_loss(logits(*student), logits(*teacher), **({"kind": kind} | changes))


@pytest.mark.parametrize("kind", OUTPUTS)
def test_tensors_that_do_not_go_together(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"teacher: got dtype torch\.int64"):
        output_loss(logits(N, C), logits(N, C).long(), kind=kind)
    with pytest.raises(ValueError, match="teacher: on meta; allowed is the device of student, cpu"):
        output_loss(logits(N, C), logits(N, C).to("meta"), kind=kind)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "ce"}, "kind: got 'ce'"),
        ({"direction": "backward"}, "direction: got 'backward'"),
        ({"temperature": 0.0}, "temperature: got 0"),
        ({"weight": -1.0}, "weight: got -1"),
    ],
)
def test_one_of_several_is_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OutputLoss(**changes)
