"""What the kernels share per element, as csrc/math/scalar.h has it for the others."""

import torch
import triton
import triton.language as tl


def wide_dtype(*dtypes):
    """What values of these dtypes are computed in, for torch and for Triton."""
    return (torch.float64, tl.float64) if torch.float64 in dtypes else (torch.float32, tl.float32)


@triton.jit
def widen(x, WIDE: tl.constexpr):
    # By way of float32, as the conversion of bfloat16 to float64 does not exist everywhere.
    if x.dtype == tl.float64:
        return x.to(WIDE)
    return x.to(tl.float32).to(WIDE)


@triton.jit
def narrow(x, T: tl.constexpr):
    """To the nearest value of T, ties to even."""
    if tl.float64 == T:
        return x.to(tl.float64)
    return x.to(tl.float32).to(T)


@triton.jit
def rounded_to(x, T: tl.constexpr):
    """The nearest value of T, still wide."""
    return widen(narrow(x, T), x.dtype)


@triton.jit
def number(value, WIDE: tl.constexpr):
    """A number that was passed as float64."""
    return tl.full((), value, tl.float64).to(WIDE)


@triton.jit
def divide(a, b):
    """Rounded to nearest, which `/` is for float64 alone."""
    if a.dtype == tl.float64:
        return a / b
    return tl.div_rn(a, b)


@triton.jit
def clamped(x, low, high):
    """Like torch.clamp, NaN stays NaN."""
    raised = tl.where(x < low, low, x)
    return tl.where(raised > high, high, raised)


@triton.jit
def flat_offset(pixel, width, stride_h, stride_w, FLAT: tl.constexpr):
    """Of a pixel of a plane; FLAT is for planes whose rows follow one another as pixels of a row do."""
    if FLAT:
        return pixel * stride_w
    return pixel // width * stride_h + pixel % width * stride_w


def is_flat(images):
    return images.shape[2] <= 1 or images.shape[3] == 0 or images.stride(2) == images.shape[3] * images.stride(3)
