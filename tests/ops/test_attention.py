from itertools import product
from math import inf

import pytest
import torch

from alignfast.ops import attention
from alignfast.reference import attention as reference
from tests import cases
from tests.ops import checks

# It has kernels for the CPU alone.
pytestmark = pytest.mark.cpu_only

# [N, tokens, heads, width]: none, one, below, at and above the lanes, and the tiles and blocks of queries.
SHAPES = [
    (0, 3, 2, 4),
    (1, 1, 1, 1),
    (2, 2, 1, 3),
    (2, 7, 3, 8),
    (1, 15, 2, 15),
    (3, 16, 1, 16),
    (1, 17, 2, 17),
    (2, 33, 2, 64),
    (1, 64, 1, 32),
    (1, 65, 2, 33),
    (1, 130, 1, 48),
    (1, 197, 2, 64),
]
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES)
EVERY_DTYPE = pytest.mark.parametrize("dtype", cases.DTYPES)


def rows(shape, seed=0, dtype=torch.float64, scale=1.0):
    count, length, heads, width = shape
    return cases.normal((count, length, 3, heads, width), seed, dtype, scale)


def expected(packed):
    """By torch's own attention in float64."""
    queries, keys, values = packed.permute(2, 0, 3, 1, 4).unbind(0)
    made = torch.nn.functional.scaled_dot_product_attention(queries, keys, values)
    return made.transpose(1, 2).flatten(2)


def passes(compute, packed, incoming):
    leaf = packed.detach().requires_grad_()
    result = compute(leaf)
    return result.detach(), torch.autograd.grad(result, leaf, incoming.to(result.dtype))[0]


def check(packed, incoming):
    found = passes(attention, packed, incoming)
    wanted = passes(expected, packed.double(), incoming.double())
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == packed.dtype
        assert one.is_contiguous()
        half = packed.dtype in cases.HALF_DTYPES
        largest = other.abs().amax() if other.numel() else other.sum()
        cases.assert_near(one, other, ulps=0.6 if half else 512, scale=largest * (2**-8 if half else 1))


@EVERY_DTYPE
@EVERY_SHAPE
def test_it_is_the_attention_of_torch(shape, dtype):
    count, length, heads, width = shape
    incoming = cases.normal((count, length, heads * width), 1, dtype)
    check(rows(shape, 2, dtype), incoming)
    # Shares that are nearly those of a single token.
    check(rows(shape, 3, dtype, 6.0), incoming)


@pytest.mark.parametrize("length", range(1, 40))
def test_every_number_of_tokens(length):
    for width, dtype in product((16, 20), (torch.float64, torch.float32)):
        check(rows((2, length, 2, width), length, dtype), cases.normal((2, length, 2 * width), 4, dtype))


@pytest.mark.parametrize("layout", cases.MATRIX_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_layout_does_not_matter(layout, dtype):
    packed, incoming = rows((2, 9, 2, 16), 5, dtype), cases.normal((2, 9, 32), 6, dtype)
    wanted = passes(attention, packed, incoming)
    found = passes(attention, layout(packed), layout(incoming))
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_equal_keys_share_equally():
    packed = torch.zeros(1, 5, 3, 1, 2)
    packed[:, :, 2] = torch.arange(10.0).view(1, 5, 1, 2)
    assert torch.equal(attention(packed), torch.tensor([4.0, 5.0]).expand(1, 5, 2))


@EVERY_DTYPE
def test_large_products_leave_one_token(dtype):
    """Far beyond what exponentials can hold."""
    packed = torch.zeros(1, 3, 3, 1, 2, dtype=dtype)
    packed[0, :, 0, 0, 0] = packed[0, :, 1, 0, 0] = torch.tensor([200.0, -200.0, 100.0], dtype=dtype)
    packed[0, :, 2, 0] = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=dtype)
    result, grad = passes(attention, packed, torch.ones(1, 3, 2))
    assert torch.equal(result[0], torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]], dtype=dtype))
    assert grad.isfinite().all()
    assert torch.equal(grad[0, :, 2, 0, 0], torch.tensor([2.0, 1.0, 0.0], dtype=dtype))


@pytest.mark.parametrize("bad", [torch.nan, inf])
def test_what_is_not_a_number_stays_in_its_head_and_image(bad):
    packed = rows((3, 20, 3, 16), 7, torch.float32)
    clean = attention(packed)
    packed[1, 4, 1, 2, 3] = bad
    found = attention(packed).unflatten(-1, (3, 16))
    assert found[1, :, 2].isnan().any()
    touched = torch.zeros_like(found, dtype=torch.bool)
    touched[1, :, 2] = True
    assert torch.equal(found[~touched], clean.unflatten(-1, (3, 16))[~touched])


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 2, 2), (1, 5, 1, 3)])
def test_gradcheck(shape):
    packed = rows(shape, 8).requires_grad_()
    assert torch.autograd.gradcheck(attention, packed)
    assert torch.autograd.gradgradcheck(lambda leaf: attention(leaf) ** 2, packed)


def test_the_gradient_is_the_same_where_it_is_differentiated_again():
    packed, incoming = rows((2, 9, 2, 8), 9).requires_grad_(), cases.normal((2, 9, 16), 10)
    once, again = (
        torch.autograd.grad(attention(packed), packed, incoming, create_graph=create)[0] for create in (False, True)
    )
    assert again.requires_grad
    torch.testing.assert_close(once, again)


def test_two_numbers_a_query_are_kept():
    found = []
    packed = rows((2, 7, 3, 8), 11, torch.float32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: found.append(tensor) or tensor, lambda tensor: tensor):
        attention(packed)
    assert [list(tensor.shape) for tensor in found] == [[2, 7, 3, 3, 8], [2, 3, 7, 2]]
    assert found[0].data_ptr() == packed.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_nothing(dtype):
    packed, incoming = rows((3, 70, 5, 24), 12, dtype), cases.normal((3, 70, 120), 13, dtype)
    checks.same_on_any_thread_count(lambda: passes(attention, packed, incoming))


def operands(dtype=torch.float32):
    packed, grad = rows((2, 7, 3, 8), 14, dtype), cases.normal((2, 7, 24), 15, dtype)
    return {
        "attention": [packed],
        "attention_backward": [grad, packed, torch.ops.alignfast.attention(packed)[1]],
    }


@pytest.mark.parametrize("name", list(operands()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator(name, dtype):
    arguments = operands(dtype)[name]
    if name == "attention":
        arguments[0].requires_grad_()
    checks.operator(name, *arguments)


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (torch.zeros(2, 7, 3, 8), r"packed: got shape \[2, 7, 3, 8\]"),
        (torch.zeros(2, 7, 2, 3, 8), r"packed: got shape .*; allowed is \[any, any, 3, any, any\]"),
        (torch.zeros(2, 7, 3, 3, 8).long(), "packed: got dtype torch.int64"),
    ],
)
def test_bad_input_is_refused(packed, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        attention(packed)


OF_PACKED = [
    (torch.zeros(2, 7, 2, 3, 8), "packed: got shape"),
    (torch.zeros(2, 7, 3, 3, 8).long(), "packed: got dtype int64"),
    (torch.zeros(2, 7, 3, 8, 3).mT, "packed: not in contiguous memory; allowed is that alone"),
]
REFUSED = [
    *(("attention", 0, *bad) for bad in OF_PACKED),
    *(("attention_backward", 1, *bad) for bad in OF_PACKED),
    ("attention_backward", 0, torch.zeros(2, 7, 23), r"grad: got shape \[2, 7, 23\]; allowed is \[2, 7, 24\]"),
    ("attention_backward", 0, torch.zeros(2, 7, 24).double(), "grad: got dtype float64; allowed is float32"),
    ("attention_backward", 0, torch.zeros(2, 24, 7).mT, "grad: not in contiguous memory"),
    ("attention_backward", 2, torch.zeros(2, 3, 7), "sums: got shape"),
    ("attention_backward", 2, torch.zeros(2, 3, 7, 2).double(), "sums: got dtype float64; allowed is float32"),
    ("attention_backward", 2, torch.zeros(2, 3, 2, 7).mT, "sums: not in contiguous memory"),
]


@pytest.mark.parametrize(("name", "at", "argument", "message"), REFUSED)
def test_the_operator_and_its_fake_refuse(name, at, argument, message):
    arguments = operands()[name]
    arguments[at] = argument
    checks.refusal(name, tuple(arguments), message)


def test_it_compiles_whole():
    checks.compiles_whole(
        lambda packed: attention(packed * 2).sin(), rows((2, 5, 2, 8), 16, torch.float32).requires_grad_()
    )


def test_plain_products_serve_other_devices():
    result = attention(torch.empty(2, 7, 3, 3, 8, device="meta"))
    assert (result.device.type, list(result.shape)) == ("meta", [2, 7, 24])


@EVERY_SHAPE
def test_the_reference_is_the_same(shape):
    packed, incoming = rows(shape, 17), cases.normal((shape[0], shape[1], shape[2] * shape[3]), 18)
    wanted = passes(expected, packed, incoming)
    torch.testing.assert_close(passes(reference.attention, packed, incoming), wanted)
    torch.testing.assert_close(reference.attention_backward(incoming, packed), wanted[1])
