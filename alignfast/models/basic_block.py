"""Basic blocks of frozen residual networks by the package's own kernel, which does all of a block at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import has_torch_function
from torch.utils._python_dispatch import TorchDispatchMode

from alignfast.models.classifier import evaluating
from alignfast.models.dataflow import Unseen, hooked, paths_of
from alignfast.models.frozen import is_plain, reclassed
from alignfast.models.minimal_filtering import FUSED, is_minimal, is_served
from alignfast.ops.basic_block import basic_block

aten = torch.ops.aten
RELU = (aten.relu.default, aten.relu_.default)
# Of more channels the transformed weights, read again for every few images, do not stay in the second cache.
MOST_CHANNELS = 64
# Classes of blocks that the kernel does, by what they were.
_KINDS: dict[type[nn.Module], Any] = {}


@dataclass(frozen=True)
class BasicBlock:
    """Name of a part that computes relu(x + second(relu(first(x)))), and names of its convolutions in it."""

    name: str
    first: str
    second: str


def blocks_of(module: nn.Module, run: Callable[[], Any]) -> list[BasicBlock]:
    """The basic blocks without further layers, as the operations of one pass show, whatever they are written with.

    Args:
        module: names are those in it; not changed.
        run: passes through it.
    """
    paths = paths_of(module)
    pairs = {part: pair for part in paths if len(paths[part]) == 1 and (pair := _convolutions(part)) is not None}
    if not pairs:
        return []
    are_basic: dict[nn.Module, bool] = {}
    steps = _Steps()

    def enter(part: nn.Module, inputs: Any, named: Any) -> None:
        steps.begin(part)

    def leave(part: nn.Module, inputs: Any, output: Any) -> None:
        found = _is_basic(pairs[part], inputs, steps.end(part), output)
        are_basic[part] = are_basic.get(part, True) and found

    with evaluating(module), torch.no_grad(), hooked(pairs, enter, leave), steps:
        run()
    basic = [part for part, always in are_basic.items() if always]
    # Not what only holds another one.
    blocks = [part for part in basic if not any(one in basic and one is not part for one in part.modules())]
    return [BasicBlock(paths[part][0], *(_name_in(part, layer) for layer in pairs[part])) for part in blocks]


def use_block_kernel(module: nn.Module, blocks: Sequence[BasicBlock]) -> None:
    """Exchange, in place, basic blocks for those that the kernel does as long as nothing looks into them.

    Behind all other exchanges. Not where fused multiply-adds are computed in software.
    """
    if not FUSED:
        return
    for block in blocks:
        part = module.get_submodule(block.name)
        first, second = (part.get_submodule(name) for name in (block.first, block.second))
        if is_minimal(first) and is_minimal(second) and is_plain(first) and is_plain(second):
            whole = reclassed(_kind_of(type(part)), part)
            module.set_submodule(block.name, whole, strict=True)
            whole.whole = Whole(first, second, _inside(part))


class Whole:
    """The convolutions of a basic block, and all parts in it, which may look at what lies between them."""

    def __init__(self, first: nn.Conv2d, second: nn.Conv2d, inside: tuple[nn.Module, ...]) -> None:
        self._first, self._second, self._inside, self._unseen = first, second, inside, Unseen(inside)

    def serves(self, images: Tensor, block: nn.Module) -> bool:
        """Whether the kernel is faster than the layers of the block, and computes what they would."""
        weights = (self._first.weight, self._first.bias, self._second.weight, self._second.bias)
        return (
            is_served(images, (1, 1))
            # A thread takes whole images.
            and len(images) >= torch.get_num_threads()
            # Which gives functions, such as rectifiers, another meaning.
            and not has_torch_function((images,))
            and bool(self._unseen)
            and _inside(block) == self._inside
            and not any(part.training for part in (block, *self._inside))
            and not any(weight is not None and weight.requires_grad for weight in weights)
        )

    def __call__(self, images: Tensor) -> Tensor:
        first, second = self._first, self._second
        return basic_block(images, first.weight, first.bias, second.weight, second.bias)


class WholeBlock:
    """Mixed into the class of a basic block."""

    whole: Whole

    def forward(self, *inputs: Any, **named: Any) -> Any:
        block: Any = self
        if not named and len(inputs) == 1 and self.whole.serves(inputs[0], block):
            return self.whole(inputs[0])
        # Of the block that it is mixed into.
        return super().forward(*inputs, **named)  # type: ignore[misc]

    def __reduce__(self) -> Any:
        return _empty, (type(self).__mro__[2],), self.__dict__


class _Steps(TorchDispatchMode):
    """The operations inside of parts, each with what it was given and what it returned."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self._open: dict[nn.Module, list[tuple[Any, Any, Any]]] = {}

    def begin(self, part: nn.Module) -> None:
        self._open[part] = []

    def end(self, part: nn.Module) -> list[tuple[Any, Any, Any]]:
        return self._open.pop(part)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for steps in self._open.values():
            steps.append((func, (args, kwargs or {}), result))
        return result


def _convolutions(part: nn.Module) -> tuple[nn.Conv2d, nn.Conv2d] | None:
    """The only two of a part, if the kernel is for them and the part's class is its own."""
    layers = [layer for layer in part.modules() if isinstance(layer, nn.modules.conv._ConvNd)]
    minimal = [layer for layer in layers if is_minimal(layer) and layer.padding == (1, 1)]
    if len(layers) != 2 or len(minimal) != 2 or part in minimal or type(part).__new__ is not object.__new__:
        return None
    first, second = minimal
    most = max(first.in_channels, first.out_channels)
    return (first, second) if most <= MOST_CHANNELS else None


def _is_basic(layers: tuple[nn.Conv2d, nn.Conv2d], inputs: Any, steps: Any, output: Any) -> bool:
    if len(steps) != 5 or len(inputs) != 1:
        return False
    (x,) = inputs
    one, rectified, other, added, last = steps
    return (
        _is_convolution(one, layers[0], x)
        and _is_relu(rectified, one[2])
        and _is_convolution(other, layers[1], rectified[2])
        and _is_sum(added, other[2], x)
        and _is_relu(last, added[2])
        and last[2] is output
    )


def _is_convolution(step: Any, layer: nn.Conv2d, x: Tensor) -> bool:
    func, (args, _), _ = step
    return func is aten.convolution.default and all(
        given is wanted for given, wanted in zip(args, (x, layer.weight, layer.bias), strict=False)
    )


def _is_relu(step: Any, x: Tensor) -> bool:
    func, (args, _), _ = step
    return func in RELU and args[0] is x


def _is_sum(step: Any, x: Tensor, other: Tensor) -> bool:
    """Of both, in either order, which does not change the other in place."""
    func, (args, named), _ = step
    pair = [id(value) for value in args]
    if func is aten.add_.Tensor:
        return pair == [id(x), id(other)] and not named
    return func is aten.add.Tensor and not named and sorted(pair) == sorted([id(x), id(other)])


def _inside(part: nn.Module) -> tuple[nn.Module, ...]:
    return tuple(part.modules())[1:]


def _name_in(part: nn.Module, layer: nn.Module) -> str:
    names: list[str] = [name for name, one in part.named_modules() if one is layer]
    return names[0]


def _kind_of(kind: type[nn.Module]) -> Any:
    """The same one each time, so that copies are of the same class."""
    if kind not in _KINDS:
        _KINDS[kind] = type(f"Whole{kind.__name__}", (WholeBlock, kind), {})
    return _KINDS[kind]


def _empty(kind: type[nn.Module]) -> Any:
    made = _kind_of(kind)
    return made.__new__(made)
