from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from timm.layers.attention import Attention
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

from alignfast.models import attention as ours
from alignfast.models.attention import PackedAttention, use_packed_attention
from tests import cases
from tests.models.test_frozen import kept

pytestmark = pytest.mark.cpu_only

WIDTH, HEADS = 24, 3


def both(layer: nn.Module | None = None, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """The layer as it is, and the same as it is exchanged."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = layer or Attention(WIDTH, HEADS, qkv_bias=True)
    layer.fused_attn = True
    plain = nn.Sequential(layer.to(dtype).eval().requires_grad_(False))
    packed = copy.deepcopy(plain)
    use_packed_attention(packed)
    return plain, packed


def tokens(count: int = 2, length: int = 7, dtype: torch.dtype = torch.float32) -> Tensor:
    return cases.normal((count, length, WIDTH), 1, dtype)


def passes(module: Callable[[Tensor], Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
    leaf = rows.clone().requires_grad_()
    result = module(leaf * 1)
    (grad,) = torch.autograd.grad((result.double() * torch.linspace(-1, 1, result.shape[-1])).sum(), leaf)
    return result.detach(), grad


def assert_as_near(module: nn.Module, plain: nn.Module, rows: Tensor) -> None:
    """In half precision, results and gradients are of that dtype and as near to float64 as the plain module's."""
    wanted = passes(copy.deepcopy(plain).double(), rows.double())
    errors = [
        [
            float((one.double() - other).norm() / other.norm())
            for one, other in zip(passes(each, rows), wanted, strict=True)
        ]
        for each in (module, plain)
    ]
    for found, theirs in zip(*errors, strict=True):
        assert found < 1.3 * theirs < 0.1
    assert passes(module, rows)[0].dtype == rows.dtype


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each pass through the exchanged layers' own attention."""
    calls: list[int] = []
    attention = ours.attention

    def counted(packed: Tensor) -> Tensor:
        calls.append(1)
        return attention(packed)

    monkeypatch.setattr(ours, "attention", counted)
    return calls


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (3, 33), (1, 600)])
def test_results_and_gradients_are_those_of_timm(shape: tuple[int, int], dtype: torch.dtype, served: list[int]) -> None:
    plain, packed = both(dtype=dtype)
    assert type(packed[0]) is PackedAttention
    rows = tokens(*shape, dtype)
    for found, wanted in zip(passes(packed, rows), passes(plain, rows), strict=True):
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        torch.testing.assert_close(found, wanted)
    assert len(served) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_float64_as_that_of_timm(dtype: torch.dtype) -> None:
    plain, packed = both(dtype=dtype)
    assert_as_near(packed, plain, tokens(4, 50, dtype))


def test_it_keeps_no_more_for_the_backward_pass() -> None:
    plain, packed = both()
    assert 0 < kept(packed, tokens()) <= kept(plain, tokens())


def straight(layer: Any, rows: Tensor, **options: bool) -> Tensor:
    result: Tensor = layer(rows, **options)
    return result


def a_mask(layer: Any, rows: Tensor) -> Tensor:
    result: Tensor = layer(rows, attn_mask=torch.tril(torch.ones(7, 7, dtype=torch.bool)))
    return result


# The layer, and how it is called.
MORE: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor]]] = {
    "norms of queries and keys": (partial(Attention, WIDTH, HEADS, qk_norm=True, norm_layer=nn.LayerNorm), straight),
    "a norm before the projection": (
        partial(Attention, WIDTH, HEADS, scale_norm=True, norm_layer=nn.LayerNorm),
        straight,
    ),
    "a gate": (partial(Attention, WIDTH, HEADS, gated=True), straight),
    "a mask": (partial(Attention, WIDTH, HEADS, qkv_bias=True), a_mask),
    "no sight ahead": (partial(Attention, WIDTH, HEADS, qkv_bias=True), partial(straight, is_causal=True)),
}


@pytest.mark.parametrize("name", MORE)
def test_what_has_more_in_it_is_left_to_timm(name: str, served: list[int]) -> None:
    make, call = MORE[name]
    plain, packed = (partial(call, module[0]) for module in both(make()))
    for found, wanted in zip(passes(packed, tokens()), passes(plain, tokens()), strict=True):
        assert torch.equal(found, wanted)
    assert served == []


def test_plain_attention_and_training_are_left_to_timm(served: list[int]) -> None:
    plain, packed = both()
    packed[0].fused_attn = False
    torch.testing.assert_close(packed(tokens()), plain(tokens()))
    packed[0].fused_attn = True
    packed.train()
    assert torch.equal(packed(tokens()), plain(tokens()))
    packed.eval()
    assert packed(tokens(0)).shape == (0, 7, WIDTH)
    assert served == []


@pytest.mark.parametrize("name", ["q_norm", "k_norm", "norm"])
def test_hooks_between_see_what_they_see_in_timm(name: str, served: list[int]) -> None:
    seen: list[Tensor] = []
    for module in both():
        module[0].get_submodule(name).register_forward_hook(lambda part, given, result: seen.append(result.clone()))
        module(tokens())
    assert torch.equal(*seen)
    assert served == []


@pytest.mark.parametrize("name", ["qkv", "proj", "proj_drop"])
def test_hooks_on_the_projections_see_what_they_see_in_timm(name: str, served: list[int]) -> None:
    seen: list[Tensor] = []
    for module in both():
        module[0].get_submodule(name).register_forward_hook(lambda part, given, result: seen.append(result.clone()))
        module(tokens())
    torch.testing.assert_close(*seen)
    assert len(served) == 1


def test_layers_with_hooks_and_subclasses_stay() -> None:
    class Other(Attention):
        pass

    assert type(both(Other(WIDTH, HEADS))[1][0]) is Other
    layer = Attention(WIDTH, HEADS)
    layer.register_forward_hook(lambda *given: None)
    assert type(both(layer)[1][0]) is Attention


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_second_derivatives_are_those_of_plain_products(dtype: torch.dtype, served: list[int]) -> None:
    """Which torch's fused kernels do not have."""
    plain, packed = both(dtype=dtype)
    plain[0].fused_attn = False
    passed: list[tuple[Tensor, Tensor]] = []
    for module in (plain, packed):
        leaf = tokens(dtype=dtype).requires_grad_()
        (first,) = torch.autograd.grad((module(leaf) + leaf).pow(3).sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), leaf)
        passed.append((first.detach(), second))
    tolerance = 1e-10 if dtype == torch.float64 else 0.05
    for found, wanted in zip(*passed, strict=True):
        assert found.dtype == dtype
        assert float((found - wanted).norm() / wanted.norm()) < tolerance
    assert len(served) == 1


def test_gradgradcheck() -> None:
    _, packed = both(dtype=torch.float64)
    leaf = tokens(1, 3, torch.float64).requires_grad_()
    assert gradcheck(packed, leaf)
    assert gradgradcheck(packed, leaf)


def test_other_kernels_may_be_asked_for(served: list[int]) -> None:
    plain, packed = both()
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.equal(packed(tokens()), plain(tokens()))
    assert served == []


@pytest.mark.slow
def test_it_compiles() -> None:
    plain, packed = both()
    compiled = torch.compile(packed, dynamic=False)
    for found, wanted in zip(passes(compiled, tokens()), passes(plain, tokens()), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
