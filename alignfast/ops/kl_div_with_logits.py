"""The alignment loss: a divergence between two sets of logits at a temperature."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from alignfast.checks import check_choice, check_number, check_shape
from alignfast.native import NATIVE_DEVICES
from alignfast.reference import kl_div_with_logits as reference

Direction = Literal["forward", "reverse", "symmetric", "jsd"]
Reduction = Literal["batchmean", "sum", "none"]
Combine = Literal["mean", "max", "min"]


def kl_div_with_logits(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 4.0,
    direction: Direction = "forward",
    reduction: Reduction = "batchmean",
    combine: Combine = "mean",
) -> Tensor:
    """Divergence of softmax(student / T) from softmax(teacher / T), times T^2 (Ma et al., ECCV 2024, output space).

    With p the teacher's and q the student's distribution: "forward" is KL(p || q), the paper's loss; "reverse" is
    KL(q || p); "symmetric" is their mean; "jsd" is (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2. Gradient flows
    to the student only. Logits below -1e5, -inf (masked classes) included, count as -1e5, so loss and gradient stay
    finite. On devices with a kernel the gradient is found along with the loss and cannot be differentiated again.

    Args:
        student: [B, C] logits, any floating dtype; computed in float32, or in float64 if given so.
        teacher: [B, C] logits, or [W, B, C] of W witnesses.
        temperature: T, greater than 0.
        reduction: "batchmean" divides the sum by B (0 for an empty batch), "sum", or "none" for one loss a sample.
        combine: over witnesses, per sample: "mean", "max" or "min".

    Returns:
        A scalar, or [B] for reduction "none"; float32, or float64 for float64 logits.

    Raises:
        ValueError: shapes, dtypes or devices that do not match, or an argument outside what is allowed.
    """
    arguments = (student, teacher.detach(), temperature, direction, reduction, combine)
    _check(*arguments)
    if student.device.type in NATIVE_DEVICES:
        with_gradient = student.requires_grad and torch.is_grad_enabled()
        loss: Tensor
        if with_gradient and not torch.compiler.is_compiling():
            loss = _Divergence.apply(*arguments, with_gradient)
        else:
            loss, _ = torch.ops.alignfast.kl_div_with_logits(*arguments, with_gradient)
        return loss
    return reference.kl_div_with_logits(*arguments)


def _check(student: Tensor, teacher: Tensor, temperature: float, direction: str, reduction: str, combine: str) -> None:
    check_shape("student", student.shape, (None, None))
    if teacher.ndim == 3:
        check_shape("teacher", teacher.shape, (None, *student.shape))
        if len(teacher) == 0:
            raise ValueError("teacher: got no witness; allowed is at least one")
    else:
        check_shape("teacher", teacher.shape, student.shape)
    for name, logits in (("student", student), ("teacher", teacher)):
        if not logits.is_floating_point():
            raise ValueError(f"{name}: got dtype {logits.dtype}; allowed is a floating-point tensor")
    if student.device != teacher.device:
        raise ValueError(f"teacher: on {teacher.device}; allowed is the device of student, {student.device}")
    check_number("temperature", temperature, low=0.0, open_low=True)
    check_choice("direction", direction, ("forward", "reverse", "symmetric", "jsd"))
    check_choice("reduction", reduction, ("batchmean", "sum", "none"))
    check_choice("combine", combine, ("mean", "max", "min"))


def _fake(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    direction: str,
    reduction: str,
    combine: str,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    _check(student, teacher, temperature, direction, reduction, combine)
    dtype = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    loss = student.new_empty(student.shape[:1] if reduction == "none" else (), dtype=dtype)
    return loss, student.new_empty(student.shape if with_gradient else 0, dtype=dtype)


def _backward_fake(grad: Tensor, gradient: Tensor, student: Tensor) -> Tensor:
    check_shape("student", student.shape, (None, None))
    check_shape("gradient", gradient.shape, student.shape)
    if grad.ndim:
        check_shape("grad", grad.shape, student.shape[:1])
    if grad.dtype != gradient.dtype:
        raise ValueError(f"grad: got dtype {grad.dtype}; allowed is that of gradient, {gradient.dtype}")
    return student.new_empty(student.shape)


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], inputs[0])


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    gradient, student = ctx.saved_tensors
    if gradient.ndim != student.ndim:
        raise RuntimeError("with_gradient: got False for a loss that is differentiated; allowed is True")
    return torch.ops.alignfast.kl_div_with_logits_backward(grad, gradient, student), *[None] * 6


class _Divergence(torch.autograd.Function):
    """What register_autograd makes of the op, at less than half the cost of a call, which small batches feel.

    Both ops are called below autograd, as register_autograd does, since their own autograd is in Python.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        loss: Tensor
        with torch._C._AutoDispatchBelowAutograd():
            loss, gradient = torch.ops.alignfast.kl_div_with_logits(*arguments)
        ctx.save_for_backward(gradient, arguments[0])
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Under create_graph the op's own autograd is wanted, for what it says about second derivatives.
        if torch.is_grad_enabled():
            return _backward(ctx, grad)
        with torch._C._AutoDispatchBelowAutograd():
            return _backward(ctx, grad)


def _refuse_second_derivative(*_: Any) -> None:
    raise RuntimeError("kl_div_with_logits: no second derivative; differentiate it once, without create_graph")


torch.library.register_fake("alignfast::kl_div_with_logits", _fake)
torch.library.register_autograd("alignfast::kl_div_with_logits", _backward, setup_context=_keep_gradient)
torch.library.register_fake("alignfast::kl_div_with_logits_backward", _backward_fake)
torch.library.register_autograd("alignfast::kl_div_with_logits_backward", _refuse_second_derivative)
