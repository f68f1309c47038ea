"""Checks at the border: one clear error that names the argument, what was given and what is allowed."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def check_number(
    name: str, value: float, *, low: float = -math.inf, high: float = math.inf, open_low: bool = False
) -> float:
    """A finite real number in [low, high], or in (low, high] with `open_low`; else ValueError."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if not number or value < low or value > high or (open_low and value == low):
        raise ValueError(f"{name}: got {value!r}; allowed is {_interval(low, high, open_low)}")
    return float(value)


def check_count(name: str, value: int, *, low: int = 1, high: int | None = None) -> int:
    """An integer in [low, high]; else ValueError."""
    integer = isinstance(value, int) and not isinstance(value, bool)
    if not integer or value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"{low} to {high}"
        raise ValueError(f"{name}: got {value!r}; allowed is a whole number, {bounds}")
    return value


def check_choice(name: str, value: str, allowed: Iterable[str]) -> str:
    """One of `allowed`; else ValueError with the nearest spelling."""
    options = list(allowed)
    if value not in options:
        raise ValueError(f"{name}: got {value!r}{hint(value, options)}; allowed is one of {', '.join(options)}")
    return value


def check_known(name: str, kind: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    """Every one of `given` is among `allowed`; else ValueError about the `kind` of thing, with the nearest spelling."""
    options = list(allowed)
    for item in given:
        if item not in options:
            raise ValueError(
                f"{name}: got unknown {kind} {item!r}{hint(item, options)}; allowed are {', '.join(options)}"
            )


def check_shape(name: str, shape: Sequence[int], expected: Sequence[int | None]) -> None:
    """`shape` has the rank of `expected` and its sizes, where None stands for any size; else ValueError."""
    if len(shape) != len(expected) or any(e is not None and s != e for s, e in zip(shape, expected, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in expected)
        raise ValueError(f"{name}: got shape {list(shape)}; allowed is [{wanted}]")


def check_unit_range(name: str, images: Tensor) -> None:
    """All of `images` in [0, 1] and not NaN; else ValueError. Waits for the device."""
    if images.numel() == 0:
        return
    low, high = (float(bound) for bound in torch.aminmax(images.detach()))
    if math.isnan(low) or math.isnan(high):
        raise ValueError(f"{name}: contains NaN; allowed are values in [0, 1]")
    if low < 0.0 or high > 1.0:
        raise ValueError(
            f"{name}: values span [{low:.4g}, {high:.4g}]; allowed is [0, 1] "
            "(divide 8-bit images by 255, and leave normalisation to the model)"
        )


def check_images(name: str, images: Tensor, size: Sequence[int | None] = (None, None, None)) -> None:
    """Floating-point images [N, C, H, W] in [0, 1], with (C, H, W) as in `size`; else TypeError or ValueError."""
    if not isinstance(images, Tensor):
        raise TypeError(f"{name}: got {type(images).__name__}; allowed is a torch.Tensor [N, C, H, W]")
    if not images.is_floating_point():
        raise ValueError(f"{name}: got dtype {images.dtype}; allowed is a floating-point tensor with values in [0, 1]")
    check_shape(name, images.shape, (None, *size))
    check_unit_range(name, images)


def check_labels(name: str, labels: Tensor, count: int, num_classes: int | None) -> None:
    """int64 labels [count] in [0, num_classes); else TypeError or ValueError."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name}: got {type(labels).__name__}; allowed is a torch.Tensor of int64 [N]")
    if labels.dtype != torch.int64:
        raise ValueError(f"{name}: got dtype {labels.dtype}; allowed is torch.int64")
    check_shape(name, labels.shape, (count,))
    if labels.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(labels))
    if low < 0 or (num_classes is not None and high >= num_classes):
        allowed = "at least 0" if num_classes is None else f"[0, {num_classes - 1}]"
        raise ValueError(f"{name}: values span [{low}, {high}]; allowed is {allowed}")


def hint(value: object, options: Sequence[str]) -> str:
    """The nearest spelling among `options`, as words to put behind what was given; empty if none is near."""
    near = difflib.get_close_matches(str(value), options, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _interval(low: float, high: float, open_low: bool) -> str:
    if low == -math.inf and high == math.inf:
        return "a finite number"
    if high == math.inf:
        return f"a number {'greater than' if open_low else 'of at least'} {low:g}"
    if low == -math.inf:
        return f"a number of at most {high:g}"
    return f"a number in {'(' if open_low else '['}{low:g}, {high:g}]"


def check_device(name: str) -> torch.device:
    """The CPU, or a CUDA device that is there; else ValueError."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: got {name!r}; allowed is cpu, cuda or cuda:N") from None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= count):
        raise ValueError(f"device: got {name!r}; allowed here is cpu{', cuda' if count else ' (no CUDA device found)'}")
    return device
