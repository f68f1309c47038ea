"""Divergences of a batch in three passes: the sums of every row; the loss, and each row's share in its gradient; the
gradient. csrc/math/kl_div_with_logits.h has the arithmetic in words.

A row is one student's logits against one witness', of the first pass and of the second W * B there are.
"""

import math

import torch
import triton
import triton.language as tl

from alignfast.kernels.launch import Choice, alignment_of, blocks_of, for_classes, for_elements, launch
from alignfast.kernels.scalar import narrow, number, wide_dtype, widen
from alignfast.ops.kl_div_with_logits import _backward_fake, _check

DIRECTIONS = {"forward": 0, "reverse": 1, "symmetric": 2, "jsd": 3}
FORWARD, REVERSE, SYMMETRIC, JSD = (tl.constexpr(value) for value in DIRECTIONS.values())
COMBINES = {"mean": 0, "max": 1, "min": -1}

# Stands in for -inf, so that a masked class costs a large but finite divergence and a finite gradient.
LOWEST_LOGIT = tl.constexpr(-1e5)

# What is kept of a row, in float64.
ROW_NUMBERS = 7
LOSS, STUDENT_BOUND, TEACHER_BOUND, LOG_RATIO, Q, P, Q_MEAN = (tl.constexpr(i) for i in range(ROW_NUMBERS))

# Samples of the pass that combines rows, all of it in one program.
COMBINE = Choice(block=512, warps=4)


def kl_div_with_logits(student, teacher, temperature, direction, reduction, combine, with_gradient):
    """Loss and gradient, as torch.ops.alignfast.kl_div_with_logits."""
    _check(student, teacher, temperature, direction, reduction, combine)
    wide, value = wide_dtype(student.dtype, teacher.dtype)
    samples, classes = student.shape
    witnesses = len(teacher) if teacher.ndim == 3 else 1
    loss = student.new_empty(samples if reduction == "none" else (), dtype=wide)
    gradient = student.new_empty((samples, classes) if with_gradient else 0, dtype=wide)
    if student.numel() == 0:
        return loss.zero_(), gradient
    teacher = teacher if teacher.ndim == 3 else teacher[None]
    alignment = alignment_of(classes, student.stride(0), *teacher.stride()[:2])
    units = {
        "student_strides": (student.stride(0) // alignment, student.stride(1)),
        "teacher_strides": (teacher.stride(0) // alignment, teacher.stride(1) // alignment, teacher.stride(2)),
        "classes": classes // alignment,
    }
    choice = for_classes(classes, loss.element_size())
    logits = (student, units["student_strides"], teacher, units["teacher_strides"], units["classes"])
    constants = {
        "DIRECTION": DIRECTIONS[direction],
        "ALIGNMENT": alignment,
        "BLOCK": choice.block,
        "WIDE": value,
    }
    rows = student.new_empty((ROW_NUMBERS, witnesses * samples), dtype=torch.float64)
    shares = student.new_empty((witnesses, samples), dtype=torch.float64)
    launch(_divergences_kernel, student, witnesses * samples, choice, *logits, rows, samples, temperature, **constants)
    launch(
        _combine_kernel,
        student,
        1,
        COMBINE,
        rows,
        shares,
        loss,
        samples,
        witnesses,
        1 / samples if reduction == "batchmean" else 1.0,
        COMBINE=COMBINES[combine],
        REDUCED=reduction != "none",
        BLOCK=COMBINE.block,
    )
    if with_gradient:
        blocks = blocks_of(choice.block, classes)
        counts = (samples, witnesses, blocks)
        launch(
            _gradient_kernel,
            student,
            samples * blocks,
            choice,
            *logits,
            rows,
            shares,
            gradient,
            counts,
            temperature,
            **constants,
        )
    return loss, gradient


def kl_div_with_logits_backward(grad, gradient, student):
    """The gradient times what comes in, as torch.ops.alignfast.kl_div_with_logits_backward."""
    result = _backward_fake(grad, gradient, student)
    if not gradient.is_contiguous():
        raise ValueError("gradient: got a tensor that is not contiguous; allowed is a contiguous one")
    if result.numel() == 0:
        return result
    elements = result.numel()
    choice = for_elements(gradient.element_size())
    stride = grad.stride(0) if grad.ndim else 0
    launch(
        _backward_kernel,
        gradient,
        blocks_of(choice.block, elements),
        choice,
        grad,
        gradient,
        result,
        stride,
        student.shape[1],
        elements,
        PER_ROW=stride != 0,
        BLOCK=choice.block,
    )
    return result


@triton.jit
def _polynomial(x, COEFFICIENTS: tl.constexpr, COUNT: tl.constexpr):
    """Of COUNT coefficients, the highest first."""
    total = tl.full(x.shape, COEFFICIENTS[0], x.dtype)
    for i in tl.static_range(1, COUNT):
        total = total * x + tl.full((), COEFFICIENTS[i], x.dtype)
    return total


def _constants(*numbers):
    """Hexadecimal, from the lowest power to the highest."""
    return tl.constexpr(tuple(float.fromhex(number) for number in reversed(numbers)))


# (2^f - 1) / f for |f| <= 1/2, and (atanh(v) / v - 1) / v^2 of v^2 for |v| <= 1/3, as in csrc/math/exp.h.
EXP2M1_FLOAT32 = _constants(
    "0x1.62e430p-1", "0x1.ebfbdcp-3", "0x1.c6aee8p-5", "0x1.3b2d4cp-7", "0x1.5f3e52p-10", "0x1.41fbbcp-13"
)
EXP2M1_FLOAT64 = tl.constexpr(tuple(math.log(2) ** n / math.factorial(n) for n in range(14, 0, -1)))
ATANH_FLOAT32 = _constants("0x1.555558p-2", "0x1.9996a8p-3", "0x1.250972p-3", "0x1.b6d6a4p-4", "0x1.f1aee4p-4")
ATANH_FLOAT64 = tl.constexpr(tuple(1 / n for n in range(33, 2, -2)))
LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _expm1_below_zero(x):
    """e^x - 1 for x <= 0."""
    doublings = x * tl.full((), LOG2_E, x.dtype)
    whole = tl.floor(doublings + tl.full((), 0.5, x.dtype))
    f = doublings - whole
    if x.dtype == tl.float64:
        ratio = _polynomial(f, EXP2M1_FLOAT64, 14)
    else:
        ratio = _polynomial(f, EXP2M1_FLOAT32, 6)
    power = tl.exp2(whole)
    found = power * (f * ratio) + (power - 1)
    # Where the power is zero the rest may be a product of zero and infinity.
    return tl.where(doublings < -125, tl.full((), -1.0, x.dtype), found)


@triton.jit
def _log_of_two_over_one_plus_exp(x):
    """log(2 / (1 + e^x)) for x <= 0, which is 2 atanh((1 - e^x) / (3 + e^x))."""
    change = _expm1_below_zero(x)
    v = -change / (4 + change)
    z = v * v
    if x.dtype == tl.float64:
        ratio = _polynomial(z, ATANH_FLOAT64, 16)
    else:
        ratio = _polynomial(z, ATANH_FLOAT32, 5)
    return 2 * (v + v * (z * ratio))


@triton.jit
def _logs_to_mixture(log_ratio):
    """log(p / m) and log(q / m) with m = (p + q) / 2, of log(p / q)."""
    size = tl.abs(log_ratio)
    larger = _log_of_two_over_one_plus_exp(-size)
    return larger - tl.where(log_ratio < 0, size, 0.0), larger - tl.where(log_ratio > 0, size, 0.0)


@triton.jit
def _logits(row, index, stride, classes, WIDE: tl.constexpr):
    return widen(tl.load(row + index * stride, mask=index < classes, other=LOWEST_LOGIT), WIDE)


@triton.jit
def _raised(logits):
    return tl.where(logits < LOWEST_LOGIT, LOWEST_LOGIT, logits)


@triton.jit
def _terms(student, teacher, student_bound, teacher_bound, temperature, inside, WIDE: tl.constexpr):
    """Weights of q and of p before they are divided by their sums, and the difference of logits."""
    doublings = (tl.full((), LOG2_E, tl.float64) / number(temperature, tl.float64)).to(WIDE)
    a = _raised(student) - student_bound
    b = _raised(teacher) - teacher_bound
    weight_q = tl.where(inside, tl.exp2(a * doublings), 0.0)
    weight_p = tl.where(inside, tl.exp2(b * doublings), 0.0)
    return weight_q, weight_p, b - a


@triton.jit
def _log_of_ratio(delta, temperature, log_ratio, WIDE: tl.constexpr):
    return delta * (1.0 / number(temperature, tl.float64)).to(WIDE) - log_ratio.to(WIDE)


@triton.jit
def _divergences_kernel(
    student,
    student_strides,
    teacher,
    teacher_strides,
    class_units,
    rows,
    samples,
    temperature: tl.float64,
    DIRECTION: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The loss of a row, and what its gradient is made of."""
    row = tl.program_id(0).to(tl.int64)
    sample = row % samples
    classes = class_units * ALIGNMENT
    student += sample * student_strides[0] * ALIGNMENT
    teacher += (row // samples * teacher_strides[0] + sample * teacher_strides[1]) * ALIGNMENT
    lane = tl.arange(0, BLOCK)

    highest_student = tl.full((BLOCK,), LOWEST_LOGIT, WIDE)
    highest_teacher = tl.full((BLOCK,), LOWEST_LOGIT, WIDE)
    for start in range(0, classes, BLOCK):
        index = start + lane
        a = _logits(student, index, student_strides[1], classes, WIDE)
        b = _logits(teacher, index, teacher_strides[2], classes, WIDE)
        highest_student = tl.where(a > highest_student, a, highest_student)
        highest_teacher = tl.where(b > highest_teacher, b, highest_teacher)
    student_bound = tl.max(highest_student)
    teacher_bound = tl.max(highest_teacher)

    q = tl.zeros((BLOCK,), WIDE)
    p = tl.zeros((BLOCK,), WIDE)
    q_logs = tl.zeros((BLOCK,), WIDE)
    p_logs = tl.zeros((BLOCK,), WIDE)
    for start in range(0, classes, BLOCK):
        index = start + lane
        a = _logits(student, index, student_strides[1], classes, WIDE)
        b = _logits(teacher, index, teacher_strides[2], classes, WIDE)
        weight_q, weight_p, delta = _terms(a, b, student_bound, teacher_bound, temperature, index < classes, WIDE)
        q += weight_q
        p += weight_p
        if DIRECTION == REVERSE or DIRECTION == SYMMETRIC:
            q_logs += weight_q * delta
        if DIRECTION == FORWARD or DIRECTION == SYMMETRIC:
            p_logs += weight_p * delta
    q_sum = tl.sum(q).to(tl.float64)
    p_sum = tl.sum(p).to(tl.float64)
    log_ratio = tl.log(p_sum / q_sum)

    if DIRECTION == JSD:
        for start in range(0, classes, BLOCK):
            index = start + lane
            a = _logits(student, index, student_strides[1], classes, WIDE)
            b = _logits(teacher, index, teacher_strides[2], classes, WIDE)
            weight_q, weight_p, delta = _terms(a, b, student_bound, teacher_bound, temperature, index < classes, WIDE)
            log_p, log_q = _logs_to_mixture(_log_of_ratio(delta, temperature, log_ratio, WIDE))
            q_logs += weight_q * log_q
            p_logs += weight_p * log_p

    t = number(temperature, tl.float64)
    in_q = tl.sum(q_logs).to(tl.float64) / q_sum
    in_p = tl.sum(p_logs).to(tl.float64) / p_sum
    if DIRECTION == FORWARD:
        loss = t * (in_p - t * log_ratio)
    elif DIRECTION == REVERSE:
        loss = t * (t * log_ratio - in_q)
    elif DIRECTION == SYMMETRIC:
        loss = 0.5 * t * (in_p - in_q)
    else:
        loss = 0.5 * t * t * (in_p + in_q)
    # Never negative but by rounding.
    loss = tl.where(loss < 0, 0.0, loss)

    count = tl.num_programs(0).to(tl.int64)
    place = rows + row
    tl.store(place + LOSS * count, loss)
    tl.store(place + STUDENT_BOUND * count, student_bound.to(tl.float64))
    tl.store(place + TEACHER_BOUND * count, teacher_bound.to(tl.float64))
    tl.store(place + LOG_RATIO * count, log_ratio)
    tl.store(place + Q * count, q_sum)
    tl.store(place + P * count, p_sum)
    tl.store(place + Q_MEAN * count, in_q)


@triton.jit
def _combine_kernel(
    losses,
    shares,
    loss,
    samples,
    witnesses,
    weight: tl.float64,
    COMBINE: tl.constexpr,
    REDUCED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Combines the witnesses of every sample; those that tie for largest or smallest share its gradient evenly."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, samples, BLOCK):
        sample = (start + tl.arange(0, BLOCK)).to(tl.int64)
        inside = sample < samples
        best = tl.load(losses + sample, mask=inside, other=0.0)
        ties = tl.full((BLOCK,), 1.0, tl.float64)
        for witness in range(1, witnesses):
            found = tl.load(losses + tl.cast(witness, tl.int64) * samples + sample, mask=inside, other=0.0)
            if COMBINE == 0:
                best += found
                ties += 1
            else:
                # NaN wins over all numbers, as it does in torch.amax.
                better = (COMBINE * found > COMBINE * best) | ((found != found) & (best == best))
                same = (found == best) | ((found != found) & (best != best))
                ties = tl.where(better, 1.0, tl.where(same, ties + 1, ties))
                best = tl.where(better, found, best)
        for witness in range(witnesses):
            place = tl.cast(witness, tl.int64) * samples + sample
            share = number(weight, tl.float64) / ties
            if COMBINE != 0:
                found = tl.load(losses + place, mask=inside, other=0.0)
                share = tl.where((found == best) | ((found != found) & (best != best)), share, 0.0)
            tl.store(shares + place, share, mask=inside)
        if COMBINE == 0:
            best = best / ties
        if REDUCED:
            total += tl.where(inside, best, 0.0)
        else:
            tl.store(loss + sample, best.to(loss.dtype.element_ty), mask=inside)
    if REDUCED:
        tl.store(loss, (number(weight, tl.float64) * tl.sum(total)).to(loss.dtype.element_ty))


@triton.jit
def _gradient_kernel(
    student,
    student_strides,
    teacher,
    teacher_strides,
    class_units,
    rows,
    shares,
    gradient,
    counts,
    temperature: tl.float64,
    DIRECTION: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A block of classes of a sample's gradient."""
    samples, witnesses, blocks = counts
    classes = class_units * ALIGNMENT
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    index = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = index < classes
    count = tl.cast(samples, tl.int64) * witnesses
    t = number(temperature, tl.float64)
    a = _logits(student + sample * student_strides[0] * ALIGNMENT, index, student_strides[1], classes, WIDE)
    total = tl.zeros((BLOCK,), WIDE)
    for witness in range(witnesses):
        row = tl.cast(witness, tl.int64) * samples + sample
        share = tl.load(shares + row)
        if share != 0:
            start = (
                teacher + (witness * tl.cast(teacher_strides[0], tl.int64) + sample * teacher_strides[1]) * ALIGNMENT
            )
            b = _logits(start, index, teacher_strides[2], classes, WIDE)
            place = rows + row
            student_bound = tl.load(place + STUDENT_BOUND * count).to(WIDE)
            teacher_bound = tl.load(place + TEACHER_BOUND * count).to(WIDE)
            q_sum = tl.load(place + Q * count)
            weight_q, weight_p, log = _terms(a, b, student_bound, teacher_bound, temperature, inside, WIDE)
            if DIRECTION == JSD:
                log_ratio = tl.load(place + LOG_RATIO * count)
                _, log = _logs_to_mixture(_log_of_ratio(log, temperature, log_ratio, WIDE))
            if DIRECTION == SYMMETRIC:
                share = 0.5 * share
            log_factor = share
            if DIRECTION == JSD:
                log_factor = -0.5 * share * t
            if DIRECTION == FORWARD or DIRECTION == SYMMETRIC:
                towards_p = weight_p * (share * t / tl.load(place + P * count)).to(WIDE)
                total += weight_q * (share * t / q_sum).to(WIDE) - towards_p
            if DIRECTION != FORWARD:
                mean = tl.load(place + Q_MEAN * count).to(WIDE)
                total += weight_q * ((log_factor / q_sum).to(WIDE) * (mean - log))
    # Logits that count as the lowest have no gradient.
    total = tl.where(a < LOWEST_LOGIT, 0.0, total)
    tl.store(gradient + sample * classes + index, total, mask=inside)


@triton.jit
def _backward_kernel(grad, gradient, result, stride, classes, elements, PER_ROW: tl.constexpr, BLOCK: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < elements
    value = tl.load(gradient + element, mask=inside, other=0.0)
    if PER_ROW:
        factor = tl.load(grad + element // classes * stride, mask=inside, other=0.0)
    else:
        factor = tl.load(grad)
    tl.store(result + element, narrow(value * factor, result.dtype.element_ty), mask=inside)
