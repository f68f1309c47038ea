from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import relu
from torch.overrides import TorchFunctionMode

from alignfast.alignment.witnesses import Witnesses
from alignfast.models import Classifier, basic_block, minimal_filtering, prepare
from alignfast.models.basic_block import MOST_CHANNELS, BasicBlock, WholeBlock, blocks_of, use_block_kernel
from alignfast.models.minimal_filtering import FEWEST_TILES, use_minimal_filtering
from alignfast.surrogates import GhostDropout, GhostSkips, LinearBackward, SkipGradient, SmoothBackward, surrogate
from tests import cases
from tests.models.test_depthwise import gradient_in_attack
from tests.models.test_frozen import passes
from tests.models.test_minimal_filtering import served as served_by

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.skipif(not minimal_filtering.FUSED, reason="fused multiply-adds are computed in software"),
]


class Block(nn.Module):
    """Its two convolutions and two rectifiers, put together by `use`."""

    def __init__(self, use: Callable[[Any, Tensor], Any], channels: int = 16, middle: int = 20, **options: Any) -> None:
        super().__init__()
        self.use = use
        options = {"padding": 1, **options}
        self.first = nn.Conv2d(channels, middle, 3, **options)
        self.second = nn.Conv2d(middle, channels, 3, padding=1)
        self.one, self.other = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Any:
        return self.use(self, x)


def functional(one: Any, x: Tensor) -> Tensor:
    return relu(x + one.second(relu(one.first(x))))


def with_layers(one: Any, x: Tensor) -> Tensor:
    result: Tensor = one.other(one.second(one.one(one.first(x))) + x)
    return result


def in_place(one: Any, x: Tensor) -> Tensor:
    result = one.second(relu(one.first(x), inplace=True))
    result += x
    return relu(result, inplace=True)


BLOCKS = {use.__name__: use for use in (functional, with_layers, in_place)}


def changes_its_input(one: Any, x: Tensor) -> Tensor:
    x += one.second(relu(one.first(x)))
    return relu(x)


def without_a_rectifier(one: Any, x: Tensor) -> Tensor:
    return relu(x + one.second(one.first(x)))


def without_the_last(one: Any, x: Tensor) -> Tensor:
    return x + one.second(relu(one.first(x)))


def without_a_shortcut(one: Any, x: Tensor) -> Tensor:
    return relu(one.second(relu(one.first(x))))


def rectified_before(one: Any, x: Tensor) -> Tensor:
    return x + one.second(relu(one.first(relu(x))))


def with_another_shortcut(one: Any, x: Tensor) -> Tensor:
    between = relu(one.first(x))
    return relu(between[:, :16] + one.second(between))


def scaled(one: Any, x: Tensor) -> Tensor:
    return relu(torch.add(x, one.second(relu(one.first(x))), alpha=0.5))


def with_another_step(one: Any, x: Tensor) -> Tensor:
    return relu(x + 2 * one.second(relu(one.first(x))))


def the_second_first(one: Any, x: Tensor) -> Tensor:
    return relu(x + one.first(relu(one.second(x))))


def with_two_results(one: Any, x: Tensor) -> Any:
    return [functional(one, x)]


OTHERS = [
    changes_its_input,
    without_a_rectifier,
    without_the_last,
    without_a_shortcut,
    rectified_before,
    with_another_shortcut,
    scaled,
    with_another_step,
    with_two_results,
]


def features(dtype: torch.dtype = torch.float32, count: int = FEWEST_TILES, channels: int = 16) -> Tensor:
    return cases.channels_last(cases.normal((count, channels, 6, 7), 1, dtype))


served = partial(served_by, op=torch.ops.alignfast.basic_block)


def both(use: Callable[..., Any] = in_place, **options: Any) -> tuple[nn.Sequential, nn.Sequential]:
    """A block frozen and channels-last with minimal filtering, and the same by the kernel of blocks."""
    plain = nn.Sequential(Block(use, **options)).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    found = blocks_of(plain, lambda: plain(features(channels=plain[0].first.in_channels)))
    use_minimal_filtering(plain)
    whole = copy.deepcopy(plain)
    use_block_kernel(whole, found)
    return plain, whole


@pytest.mark.parametrize("name", BLOCKS)
def test_passes_are_those_of_the_layers(name: str) -> None:
    plain, whole = both(BLOCKS[name])
    x = features()
    with served(1):
        found = passes(whole, x)
    for one, other in zip(found, passes(plain, x), strict=True):
        assert torch.equal(one, other)
        assert one.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_found_however_they_are_written(name: str) -> None:
    parts = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Sequential(nn.Identity(), Block(BLOCKS[name])))
    found = blocks_of(parts, lambda: parts(torch.zeros(1, 3, 9, 9)))
    assert found == [BasicBlock("1.1", "first", "second")]


@pytest.mark.parametrize("use", OTHERS, ids=lambda use: use.__name__)
def test_what_computes_something_else_is_left_alone(use: Callable[..., Any]) -> None:
    parts = nn.Sequential(Block(use))
    assert blocks_of(parts, lambda: parts(features())) == []


def test_the_order_is_that_of_computing() -> None:
    """Whatever the order of the names."""
    parts = nn.Sequential(Block(the_second_first, 20, 20))
    assert blocks_of(parts, lambda: parts(features(channels=20))) == []


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2},
        {"padding": 0},
        {"channels": 15},
        {"middle": MOST_CHANNELS + 1},
        {"channels": MOST_CHANNELS + 1},
        {"dilation": 2, "padding": 2},
    ],
    ids=str,
)
def test_other_layers_are_left_alone(options: dict[str, Any]) -> None:
    parts = nn.Sequential(Block(without_a_shortcut if "stride" in options else functional, **options))
    channels = options.get("channels", 16)

    def run() -> None:
        # Where sizes differ the sum fails, which is no matter of what is found.
        parts(features(channels=channels))

    try:
        assert blocks_of(parts, run) == []
    except RuntimeError:
        assert options == {"padding": 0}


def test_what_is_not_always_a_block_is_left_alone() -> None:
    def depends(one: Any, x: Tensor) -> Tensor:
        return functional(one, x) if x.shape[-1] < 8 else without_a_shortcut(one, x)

    parts = nn.Sequential(Block(depends))

    def run() -> None:
        parts(features())
        parts(torch.cat([features(), features()], dim=-1))

    assert blocks_of(parts, run) == []
    assert blocks_of(parts, lambda: parts(features())) != []


def test_a_block_of_two_names_is_left_alone() -> None:
    block = Block(functional)
    parts = nn.Sequential(block, block)
    assert blocks_of(parts, lambda: parts(features())) == []


def test_layers_to_train_or_with_hooks_are_left() -> None:
    parts = nn.Sequential(*(Block(functional) for _ in range(3))).eval().requires_grad_(False)
    blocks = blocks_of(parts, lambda: parts(features()))
    assert len(blocks) == 3
    parts[0].first.register_forward_hook(lambda *given: None)
    parts[1].second.requires_grad_(True)
    use_block_kernel(parts, blocks)
    assert [isinstance(part, WholeBlock) for part in parts] == [False, False, True]


def test_the_block_stays_what_it_is() -> None:
    plain, whole = both()
    assert isinstance(whole[0], Block)
    assert list(whole.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in whole.named_modules()] == [name for name, _ in plain.named_modules()]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_are_whole(copied: Callable[[nn.Module], nn.Module]) -> None:
    plain, whole = both()
    other = copied(whole)
    assert type(other[0]) is type(whole[0])
    with torch.no_grad():
        other[0].first.weight.mul_(2)
        plain_too = copy.deepcopy(plain)
        plain_too[0].first.weight.mul_(2)
        with served(2):
            assert torch.equal(other(features()), plain_too(features()))
            assert torch.equal(whole(features()), plain(features()))


def test_bits_are_all_that_is_kept() -> None:
    _, whole = both()
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        whole(features().requires_grad_())
    block = whole[0]
    weights = {block.first.weight.data_ptr(), block.second.weight.data_ptr()}
    assert {one.data_ptr() for one in found if one.is_floating_point()} == weights
    assert sum(one.nbytes for one in found if not one.is_floating_point()) == features()[:, 0].numel() * (1 + 2) * 2


HOOKS: dict[str, Callable[[nn.Module, Callable[..., None]], Any]] = {
    "forward": lambda part, hook: part.register_forward_hook(hook),
    "before": lambda part, hook: part.register_forward_pre_hook(hook),
    "backward": lambda part, hook: part.register_full_backward_hook(hook),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("inside", ["first", "one", "second", "other"])
def test_hooks_see_what_lies_inside(inside: str, kind: str) -> None:
    plain, whole = both(with_layers)
    seen: dict[str, list[Tensor]] = {"plain": [], "whole": []}

    def hook(name: str) -> Callable[..., None]:
        def see(part: nn.Module, *given: Any) -> None:
            seen[name].extend(one for one in torch.utils._pytree.tree_leaves(given) if isinstance(one, Tensor))

        return see

    handles = []
    for name, module in (("plain", plain), ("whole", whole)):
        handles.append(HOOKS[kind](module[0].get_submodule(inside), hook(name)))
        with served(0):
            leaf = features().requires_grad_()
            module(leaf * 1).sum().backward()
    assert len(seen["plain"]) == len(seen["whole"]) > 0
    assert all(torch.equal(one, other) for one, other in zip(seen["plain"], seen["whole"], strict=True))
    for handle in handles:
        handle.remove()
    with served(1):
        whole(features())


def test_a_part_that_is_exchanged_later_counts() -> None:
    plain, whole = both(with_layers)
    for module in (plain, whole):
        module[0].one = nn.Softplus()
    with served(0):
        assert torch.equal(whole(features()), plain(features()))


class Doubled(TorchFunctionMode):
    """Makes something else of rectifiers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return 2 * result if func is relu else result


def test_functions_may_be_given_another_meaning() -> None:
    plain, whole = both(functional)
    with served(0), Doubled():
        assert torch.equal(whole(features()), plain(features()))


def test_hooks_around_a_block_change_nothing() -> None:
    plain, whole = both()
    seen = []
    whole[0].register_forward_hook(lambda part, given, output: seen.append(output))
    with served(1):
        result = whole(features())
    assert torch.equal(result, plain(features()))
    assert seen[0] is result


def test_layers_serve_where_the_kernel_is_no_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, whole = both()
    x = features()
    few = x[: FEWEST_TILES // 4 - 1]
    with served(0):
        for given in (few, x.contiguous(), x[:0]):
            assert torch.equal(whole(given), plain(given))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(whole(x), plain(x))
        with monkeypatch.context() as patch:
            patch.setattr(torch, "get_num_threads", lambda: len(x) + 1)
            assert torch.equal(whole(x), plain(x))
        assert torch.equal(whole.train()(x), plain(x))
        whole.eval()[0].one.train()
        assert torch.equal(whole(x), plain(x))
        whole.eval()[0].second.weight.requires_grad_()
        assert whole(x).requires_grad
        whole[0].second.weight.requires_grad_(False)
        assert torch.equal(copy.deepcopy(whole).bfloat16()(x.bfloat16()), copy.deepcopy(plain).bfloat16()(x.bfloat16()))
    with served(1):
        assert torch.equal(whole(x), plain(x))


def test_without_fused_multiply_adds_it_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(basic_block, "FUSED", False)
    _, whole = both()
    assert not isinstance(whole[0], WholeBlock)


def network(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "torchvision":
            return pytest.importorskip("torchvision").models.resnet18(num_classes=10).eval()
        made: nn.Module = timm.create_model("resnet18", num_classes=10).eval()
        return made


def images() -> Tensor:
    return cases.random((4, 3, 64, 64), 2, torch.float32)


@pytest.mark.parametrize("name", ["timm", "torchvision"])
def test_a_prepared_network_has_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(name)
    prepared = prepare(model, images(), "fp32")
    assert [name for name, part in prepared.named_modules() if isinstance(part, WholeBlock)] == [
        "module.layer1.0",
        "module.layer1.1",
    ]

    def gradient(module: nn.Module) -> tuple[Tensor, Tensor]:
        leaf = images().requires_grad_()
        logits = module(leaf)
        return logits, torch.autograd.grad(logits.pow(2).sum(), leaf)[0]

    with served(2):
        found = gradient(prepared)
    monkeypatch.setattr(basic_block, "FUSED", False)
    for one, other in zip(found, gradient(prepare(model, images(), "fp32")), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "surgery", [SkipGradient(0.3), GhostSkips(0.4), GhostDropout(0.3), LinearBackward(), SmoothBackward()], ids=str
)
def test_surgery(surgery: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network("timm"), images()
    whole = prepare(model, x, "fp32")
    assert any(isinstance(part, WholeBlock) for part in whole.modules())
    ours = gradient_in_attack(surrogate(whole, surgery), x)
    monkeypatch.setattr(basic_block, "FUSED", False)
    wanted = gradient_in_attack(surrogate(prepare(model, x, "fp32"), surgery), x)
    assert all(torch.equal(one, other) for one, other in zip(ours, wanted, strict=True))


def test_forms_that_do_without() -> None:
    model = network("timm")
    with served(0):
        prepare(model, images(), "bf16")(images())


def test_a_compiled_form_keeps_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "compile", lambda *given, **named: None)
    compiled = prepare(network("timm"), images(), "fp32", compiled=True)
    assert not any(isinstance(part, WholeBlock) for part in compiled.modules())


def test_witnesses() -> None:
    witnesses = Witnesses([Classifier(network("timm"))], example=images())
    with served(2):
        witnesses.logits(images())
