from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.layers.attention import Attention
from timm.layers.mlp import GluMlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from alignfast.models import vit_block as ours
from alignfast.models.attention import use_packed_attention
from alignfast.models.classifier import as_classifier
from alignfast.models.preparation import prepare
from alignfast.models.vit_block import PartwiseBlock, use_partwise_blocks
from tests import cases
from tests.models.test_frozen import kept
from tests.models.test_packed_attention import assert_as_near, passes, tokens

pytestmark = pytest.mark.cpu_only

WIDTH, HEADS = 24, 3
aten = torch.ops.aten
BLOCKS: dict[str, Callable[[], Block]] = {
    "plain": partial(Block, WIDTH, HEADS),
    "biases": partial(Block, WIDTH, HEADS, qkv_bias=True),
    "no biases": partial(Block, WIDTH, HEADS, proj_bias=False),
    "scales": partial(Block, WIDTH, HEADS, qkv_bias=True, init_values=0.7),
    "scales without biases": partial(Block, WIDTH, HEADS, proj_bias=False, init_values=0.7),
    "drops": partial(Block, WIDTH, HEADS, drop_path=0.5, proj_drop=0.5, attn_drop=0.5),
    "norms of torch": partial(Block, WIDTH, HEADS, norm_layer=nn.LayerNorm),
    "norms without weights": partial(Block, WIDTH, HEADS, norm_layer=partial(nn.LayerNorm, elementwise_affine=False)),
    "another GELU": partial(Block, WIDTH, HEADS, act_layer=partial(nn.GELU, approximate="tanh")),
}


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of three images of seven tokens."""
    monkeypatch.setattr(ours, "MOST_TOKENS", 25)
    monkeypatch.setattr(ours, "FEWEST_TOKENS", 1)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images of each pass through an exchanged block's own functions."""
    calls: list[int] = []
    applied = ours._applied

    def counted(function: Any, x: Tensor, block: Any) -> Tensor:
        calls.append(len(x))
        return applied(function, x, block)

    monkeypatch.setattr(ours, "_applied", counted)
    return calls


def both(block: nn.Module | None = None, dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, nn.Sequential]:
    """The block with random weights, its attention exchanged, and the same as it is exchanged."""
    block = block or BLOCKS["biases"]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for one in block.parameters():
            one.data.normal_(0, 0.3 if one.ndim > 1 else 1)
    for part in block.modules():
        if isinstance(part, Attention):
            part.fused_attn = True
    plain = nn.Sequential(block.to(dtype).eval().requires_grad_(False))
    use_packed_attention(plain)
    partwise = copy.deepcopy(plain)
    use_partwise_blocks(partwise)
    return plain, partwise


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, 7), (3, 7), (4, 7), (7, 7), (2, 30)])
@pytest.mark.parametrize("name", BLOCKS)
def test_results_and_gradients_are_those_of_timm(
    name: str, shape: tuple[int, int], dtype: torch.dtype, served: list[int]
) -> None:
    plain, partwise = both(BLOCKS[name](), dtype)
    assert type(partwise[0]) is PartwiseBlock
    rows = tokens(*shape, dtype)
    for found, wanted in zip(passes(partwise, rows), passes(plain, rows), strict=True):
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        torch.testing.assert_close(found, wanted)
    assert served == [shape[0]] * 2


@pytest.mark.parametrize("name", ["biases", "scales"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_float64_as_that_of_timm(dtype: torch.dtype, name: str, served: list[int]) -> None:
    plain, partwise = both(BLOCKS[name](), dtype)
    assert_as_near(partwise, plain, tokens(6, 50, dtype))
    assert served == [6] * 4


class Sizes(TorchDispatchMode):
    """Of what GELUs are given."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.seen: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten.gelu.out, aten.gelu_backward.grad_input):
            self.seen.append(len(args[0]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("images", "parts"), [(3, [3]), (4, [2, 2]), (7, [3, 3, 1]), (10, [3, 3, 3, 1])])
def test_parts_are_of_nearly_as_many_images(images: int, parts: list[int]) -> None:
    _, partwise = both()
    with Sizes() as sizes:
        passes(partwise, tokens(images))
    assert sizes.seen == parts * 2


def test_one_image_is_never_split() -> None:
    _, partwise = both()
    with Sizes() as sizes:
        passes(partwise, tokens(2, 30))
    assert sizes.seen == [1] * 4


def test_it_keeps_no_more_for_the_backward_pass() -> None:
    plain, partwise = both()
    assert 0 < kept(partwise, tokens(7)) <= kept(plain, tokens(7))


def test_a_graph_may_be_used_twice() -> None:
    _, partwise = both()
    leaf = tokens(5).requires_grad_()
    result = partwise(leaf).pow(2).sum()
    first = torch.autograd.grad(result, leaf, retain_graph=True)
    assert torch.equal(*first, *torch.autograd.grad(result, leaf))


def test_gaps_in_tokens_and_gradients(served: list[int]) -> None:
    plain, partwise = both(dtype=torch.float64)
    leaves = [tokens(5, 14, torch.float64).requires_grad_() for _ in range(2)]
    # The gradient of a mean over tokens has strides of 0.
    found, wanted = (
        torch.autograd.grad(module(leaf[:, ::2]).mean(1).pow(2).sum(), leaf)[0]
        for module, leaf in zip((partwise, plain), leaves, strict=True)
    )
    torch.testing.assert_close(found, wanted)
    assert served == [5, 5]


def hooked(name: str) -> Callable[[PartwiseBlock], Any]:
    return lambda block: block.get_submodule(name).register_forward_hook(lambda *given: None)


def exchanged(name: str, part: nn.Module) -> Callable[[PartwiseBlock], Any]:
    return lambda block: block.set_submodule(name, part.eval().requires_grad_(False))


def to_train(name: str) -> Callable[[PartwiseBlock], Any]:
    return lambda block: block.get_parameter(name).requires_grad_()


class Other(nn.Linear):
    pass


CHANGES: dict[str, Callable[[PartwiseBlock], Any]] = {
    **{f"a hook on {name}": hooked(name) for name, _ in BLOCKS["drops"]().named_modules() if name},
    "a hook on the block": lambda block: block.register_full_backward_hook(lambda *given: None),
    "training": lambda block: block.train(),
    "training of a part": lambda block: block.mlp.drop1.train(),
    "a weight to train": to_train("mlp.fc1.weight"),
    "a bias to train": to_train("norm2.bias"),
    "another layer": exchanged("attn.proj", Other(WIDTH, WIDTH)),
    "another perceptron": exchanged("mlp", GluMlp(WIDTH, 4 * WIDTH)),
    "another function": exchanged("mlp.act", nn.ReLU()),
    "a norm inside": exchanged("mlp.norm", nn.LayerNorm(4 * WIDTH)),
    "plain attention": lambda block: setattr(block.attn, "fused_attn", False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_changed_since_is_left_to_timm(name: str, served: list[int]) -> None:
    _, partwise = both(Block(WIDTH, HEADS, qkv_bias=True))
    passes(partwise, tokens())
    assert len(served) == 2
    CHANGES[name](partwise[0])
    passes(partwise, tokens())
    assert len(served) == 2


def test_weights_of_another_dtype_are_refused_as_by_timm(served: list[int]) -> None:
    plain, partwise = both()
    for module in (plain, partwise):
        module[0].mlp.fc1.bfloat16()
        with pytest.raises(RuntimeError, match="dtype"):
            passes(module, tokens())
    assert served == []


def test_masks_are_left_to_timm(served: list[int]) -> None:
    plain, partwise = both()
    mask = torch.tril(torch.ones(7, 7, dtype=torch.bool))
    for options in ({"attn_mask": mask}, {"is_causal": True}):
        found, wanted = (passes(partial(module[0], **options), tokens()) for module in (partwise, plain))
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one, other)
    assert served == []


def test_passes_without_a_gradient_are_left_to_timm(served: list[int]) -> None:
    plain, partwise = both()
    assert torch.equal(partwise(tokens()), plain(tokens()))
    with torch.no_grad():
        assert torch.equal(partwise(tokens().requires_grad_()), plain(tokens()))
    assert served == []


def test_few_tokens_none_and_autocast_are_left_to_timm(served: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    _, partwise = both()
    assert partwise(tokens(0).requires_grad_()).shape == (0, 7, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        passes(partwise, tokens())
    monkeypatch.setattr(ours, "FEWEST_TOKENS", 15)
    passes(partwise, tokens(2))
    assert served == []
    passes(partwise, tokens(3))
    assert served == [3, 3]


class Doubled(TorchFunctionMode):
    """Gives GELU another meaning, as surgeries do with rectifiers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return 2 * result if func is nn.functional.gelu else result


def test_functions_may_be_given_another_meaning(served: list[int]) -> None:
    plain, partwise = both()
    with Doubled():
        wanted = passes(plain, tokens())
        found = passes(partwise, tokens())
    assert torch.equal(found[0], wanted[0])
    assert not torch.allclose(found[0], plain(tokens()))
    assert served == []


def test_subclasses_and_blocks_with_hooks_stay() -> None:
    class OtherBlock(Block):
        pass

    assert type(both(OtherBlock(WIDTH, HEADS))[1][0]) is OtherBlock
    block = BLOCKS["plain"]()
    block.register_forward_hook(lambda *given: None)
    assert type(both(block)[1][0]) is Block


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_do_the_same(copied: Callable[[nn.Module], nn.Module], served: list[int]) -> None:
    _, partwise = both()
    for one, other in zip(passes(copied(partwise), tokens()), passes(partwise, tokens()), strict=True):
        assert torch.equal(one, other)
    assert len(served) == 4


@pytest.mark.parametrize("name", ["biases", "scales"])
def test_second_derivatives(name: str, served: list[int]) -> None:
    plain, partwise = both(BLOCKS[name](), torch.float64)
    passed: list[tuple[Tensor, Tensor]] = []
    for module in (plain, partwise):
        leaf = tokens(4, dtype=torch.float64).requires_grad_()
        (first,) = torch.autograd.grad((module(leaf) + leaf).pow(3).sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), leaf)
        passed.append((first.detach(), second))
    for found, wanted in zip(*passed, strict=True):
        torch.testing.assert_close(found, wanted)
    assert served == [4, 4]


def test_gradgradcheck() -> None:
    _, partwise = both(dtype=torch.float64)
    leaf = cases.normal((2, 3, WIDTH), 3, torch.float64).requires_grad_()
    assert gradcheck(partwise, leaf, fast_mode=True)
    assert gradgradcheck(partwise, leaf, fast_mode=True)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit3_small_patch16_224"])
def test_a_prepared_transformer_is_served(name: str, served: list[int]) -> None:
    model = timm.create_model(name, num_classes=10, depth=2, img_size=32).eval()
    images = cases.random((3, 3, 32, 32), 4, torch.float32)
    prepared = prepare(model, images, "fp32")
    # One image is shown.
    assert served == [1] * 4
    leaves = [images.clone().requires_grad_() for _ in range(2)]
    found, wanted = (
        torch.autograd.grad(one.logits(leaf)[:, 0].sum(), leaf)[0]
        for one, leaf in zip((prepared, as_classifier(model)), leaves, strict=True)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert served == [1] * 4 + [3] * 4
