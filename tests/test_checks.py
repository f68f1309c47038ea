import math

import numpy as np
import pytest
import torch

from alignfast.checks import (
    check_choice,
    check_count,
    check_images,
    check_labels,
    check_number,
    check_shape,
    check_unit_range,
)

X = torch.full((2, 3, 4, 4), 0.5)
LABELS = torch.tensor([0, 3])


@pytest.mark.parametrize(
    ("value", "bounds"),
    [
        (0.0, {"low": 0.0}),
        (1, {"low": 0.0, "high": 1.0}),
        (5e-324, {"low": 0.0, "open_low": True}),
        (-1e308, {}),
        (np.float64(0.5), {"low": 0.0}),
    ],
)
def test_numbers_that_are_allowed(value, bounds):
    number = check_number("eps", value, **bounds)
    assert number == value
    assert type(number) is float


@pytest.mark.parametrize(
    ("value", "bounds", "message"),
    [
        (-0.1, {"low": 0.0}, "eps: got -0.1; allowed is a number of at least 0"),
        (0.0, {"low": 0.0, "open_low": True}, "eps: got 0.0; allowed is a number greater than 0"),
        (1.5, {"low": 0.0, "high": 1.0}, r"eps: got 1.5; allowed is a number in \[0, 1\]"),
        (0, {"low": 0.0, "high": 1.0, "open_low": True}, r"eps: got 0; allowed is a number in \(0, 1\]"),
        (2, {"high": 1.0}, r"eps: got 2; allowed is a number of at most 1"),
        (math.nan, {}, "eps: got nan; allowed is a finite number"),
        (math.inf, {"low": 0.0}, "eps: got inf; allowed is a number of at least 0"),
        (-math.inf, {}, "eps: got -inf; allowed is a finite number"),
        (True, {}, "eps: got True; allowed is a finite number"),
        ("8/255", {}, "eps: got '8/255'; allowed is a finite number"),
        (None, {}, "eps: got None"),
        (10**400, {}, "eps: got 1000"),
        (torch.tensor(0.5), {}, r"eps: got tensor\(0.5000\)"),
    ],
)
def test_numbers_that_are_not(value, bounds, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        check_number("eps", value, **bounds)


def test_counts():
    assert check_count("steps", 1) == 1
    assert check_count("steps", 0, low=0, high=0) == 0
    for value, bounds, message in [
        (0, {}, "steps: got 0; allowed is a whole number, at least 1"),
        (11, {"low": 2, "high": 10}, "steps: got 11; allowed is a whole number, 2 to 10"),
        (1.0, {}, "steps: got 1.0; allowed is a whole number"),
        (True, {}, "steps: got True"),
        ("3", {}, "steps: got '3'"),
        (None, {}, "steps: got None"),
    ]:
        with pytest.raises(ValueError, match=f"^{message}"):
            check_count("steps", value, **bounds)


def test_choices():
    assert check_choice("norm", "l2", ("linf", "l2")) == "l2"
    assert check_choice("norm", "l2", iter(("linf", "l2"))) == "l2"
    with pytest.raises(ValueError, match=r"^norm: got 'lnf' \(did you mean 'linf'\?\); allowed is one of linf, l2$"):
        check_choice("norm", "lnf", {"linf": 1, "l2": 2})
    with pytest.raises(ValueError, match=r"^norm: got 'xyz'; allowed is one of linf, l2$"):
        check_choice("norm", "xyz", ("linf", "l2"))
    with pytest.raises(ValueError, match=r"^norm: got None"):
        check_choice("norm", None, ("linf", "l2"))


def test_shapes():
    check_shape("grad", X.shape, (None, 3, None, 4))
    check_shape("grad", (), ())
    for expected, message in [
        ((None, 1, None, 4), r"grad: got shape \[2, 3, 4, 4\]; allowed is \[any, 1, any, 4\]"),
        ((2, 3, 4), r"grad: got shape \[2, 3, 4, 4\]; allowed is \[2, 3, 4\]"),
        ((), r"grad: got shape \[2, 3, 4, 4\]; allowed is \[\]"),
        ((0, 3, 4, 4), "grad: got shape"),
    ]:
        with pytest.raises(ValueError, match=f"^{message}$" if message.endswith("]") else message):
            check_shape("grad", X.shape, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_unit_range(dtype):
    check_unit_range("images", torch.tensor([0.0, 1.0], dtype=dtype))
    check_unit_range("images", torch.zeros(0, 3, 4, 4, dtype=dtype))
    check_unit_range("images", torch.tensor([0.5], dtype=dtype).requires_grad_())
    for values, message in [
        ([0.0, 255.0], r"images: values span \[0, 255\]; allowed is \[0, 1\] \(divide 8-bit images by 255"),
        ([-0.5, 1.0], r"images: values span \[-0.5, 1\]"),
        ([0.5, math.nan], "images: contains NaN; allowed are values in"),
        ([math.nan, math.inf], "images: contains NaN"),
        ([0.5, math.inf], r"images: values span \[0.5, inf\]"),
        ([0.0, 1.0078125], r"images: values span \[0, 1.008\]"),
    ]:
        with pytest.raises(ValueError, match=f"^{message}"):
            check_unit_range("images", torch.tensor(values, dtype=dtype))


def test_images():
    check_images("images", X)
    check_images("images", X[:0], (3, 4, 4))
    for images, size, message in [
        (X[0], (None, None, None), r"images: got shape \[3, 4, 4\]; allowed is \[any, any, any, any\]"),
        (X, (1, None, None), r"images: got shape \[2, 3, 4, 4\]; allowed is \[any, 1, any, any\]"),
        (X.byte(), (None, None, None), "images: got dtype torch.uint8; allowed is a floating-point tensor with values"),
        (X + 1, (None, None, None), r"images: values span \[1.5, 1.5\]"),
        (X * math.nan, (None, None, None), "images: contains NaN"),
    ]:
        with pytest.raises(ValueError, match=f"^{message}"):
            check_images("images", images, size)
    with pytest.raises(TypeError, match=r"^images: got ndarray; allowed is a torch.Tensor \[N, C, H, W\]"):
        check_images("images", X.numpy())


def test_labels():
    check_labels("labels", LABELS, 2, 4)
    check_labels("labels", LABELS, 2, None)
    check_labels("labels", LABELS[:0], 0, 4)
    for labels, classes, message in [
        (LABELS.int(), 4, "labels: got dtype torch.int32; allowed is torch.int64"),
        (LABELS[:1], 4, r"labels: got shape \[1\]; allowed is \[2\]"),
        (LABELS[:, None], 4, r"labels: got shape \[2, 1\]"),
        (LABELS, 3, r"labels: values span \[0, 3\]; allowed is \[0, 2\]$"),
        (LABELS - 1, 4, r"labels: values span \[-1, 2\]; allowed is \[0, 3\]$"),
        (LABELS - 1, None, r"labels: values span \[-1, 2\]; allowed is at least 0$"),
    ]:
        with pytest.raises(ValueError, match=f"^{message}"):
            check_labels("labels", labels, 2, classes)
    with pytest.raises(TypeError, match=r"^labels: got list; allowed is a torch.Tensor of int64"):
        check_labels("labels", [0, 3], 2, 4)
