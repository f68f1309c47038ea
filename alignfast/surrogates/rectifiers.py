"""Surgery on ReLUs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from alignfast.checks import hint
from alignfast.draws import Draws
from alignfast.surrogates.structure import KNOWN_BLOCKS, conv_blocks
from alignfast.surrogates.surrogate import Surgery, removing

__all__ = ["LinearBackward"]

RELUS = (
    torch.relu,
    torch.relu_,
    torch.Tensor.relu,
    torch.Tensor.relu_,
    nn.functional.relu,
    nn.functional.relu_,
)


@dataclass(frozen=True)
class LinearBackward(Surgery):
    """LinBP (Guo et al., NeurIPS 2020, section 4): from `layer` on, ReLUs let every gradient through.

    In a network of residual blocks or dense layers those are the ReLUs between the first and the last convolution of
    a branch; what they let through too much is taken back by dividing, image by image, the branch's input gradient by
    its L2 norm and multiplying it by the norm that it has without linear ReLUs. In any other network those are the
    modules of type `nn.ReLU`, without a change of norms. The forward pass stays the same to the bit.

    Args:
        layer: name of the block or ReLU to begin with, or of a layer that contains it; None for the middle one, which
            in ResNet-50 is the paper's, "layer3.1".

    Raises:
        ValueError: in `check`, a model without such blocks and ReLUs, or without `layer`.
    """

    layer: str | None = None

    def check(self, module: nn.Module) -> None:
        _branches(module, self.layer)

    @contextmanager
    def operating(self, module: nn.Module, draws: Draws | None) -> Iterator[None]:
        with ExitStack() as stack:
            relus = stack.enter_context(_Relus())
            for branch in _branches(module, self.layer):
                stack.enter_context(branch.linear(relus))
            yield


@dataclass
class _Through:
    """One pass through a branch. linear: how its ReLUs take gradients back. usual: [B], norms of its input gradient
    where ReLUs are not linear, from when they are known until they are used."""

    linear: bool = True
    usual: list[Tensor] = field(default_factory=list)


class _Relus(TorchFunctionMode):
    """Replaces ReLUs, of whatever spelling, while a branch is passed through, which begins at `start` if normed."""

    def __init__(self) -> None:
        super().__init__()
        self.through: _Through | None = None
        self.start: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if self.through is not None and func in RELUS and args:
            return _Relu.apply(args[0], self.through)
        return func(*args, **(kwargs or {}))


class _Relu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, through: _Through) -> Tensor:
        result = x.relu()
        ctx.save_for_backward(result)
        ctx.through = through
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (result,) = ctx.saved_tensors
        return (grad if ctx.through.linear else grad * (result > 0)), None


@dataclass(frozen=True)
class _Branch:
    """From before the layer `first` to behind the layer `last`. normed: its input gradient keeps its norm."""

    name: str
    first: nn.Module
    last: nn.Module
    normed: bool

    @contextmanager
    def linear(self, relus: _Relus) -> Iterator[None]:
        def enter(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            relus.through, relus.start = _Through(), None
            if not (self.normed and inputs[0].requires_grad):
                return inputs
            # A tensor of the branch's own: what leads around the branch has a gradient of its own.
            relus.start = inputs[0].view_as(inputs[0])
            relus.start.register_hook(partial(_with_usual_norm, relus.through))
            return (relus.start, *inputs[1:])

        def leave(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            through, start = relus.through, relus.start
            relus.through = relus.start = None
            if through is None or start is None:
                return output
            # Of a copy, as a hook that knows its own tensor would never be freed.
            copy = output.clone()
            copy.register_hook(partial(_measure, through, output, start))
            return copy

        handles: list[Any] = [self.first.register_forward_pre_hook(enter), self.last.register_forward_hook(leave)]
        with removing(handles):
            yield


def _branches(module: nn.Module, layer: str | None) -> list[_Branch]:
    branches = [_Branch(block.name, block.first, block.last, True) for block in conv_blocks(module)]
    if not branches:
        relus = [(name, part) for name, part in module.named_modules() if isinstance(part, nn.ReLU)]
        branches = [_Branch(name, relu, relu, False) for name, relu in relus]
    if not branches:
        raise ValueError(
            f"source: {type(module).__name__} has no ReLU that is known; allowed are modules of type ReLU, "
            f"and {KNOWN_BLOCKS}"
        )
    if layer is None:
        return branches[len(branches) // 2 :]
    names = [branch.name for branch in branches]
    for place, name in enumerate(names):
        if f"{name}.".startswith(f"{layer}."):
            return branches[place:]
    raise ValueError(f"layer: got {layer!r}{hint(layer, names)}; allowed are {', '.join(names)}")


def _measure(through: _Through, output: Tensor, start: Tensor, grad: Tensor) -> None:
    """The norm that the gradient at `start` would have, found before the backward pass goes on."""
    through.linear = False
    (usual,) = torch.autograd.grad(output, start, grad, retain_graph=True)
    through.linear = True
    through.usual.append(_norms(usual))


def _with_usual_norm(through: _Through, grad: Tensor) -> Tensor:
    # Nothing is known while it is measured, or where a layer within the branch is what the gradient comes from.
    if not through.linear or not through.usual:
        return grad
    tiny = torch.finfo(grad.dtype).tiny
    factors = through.usual.pop() / _norms(grad).clamp(min=tiny)
    return grad * factors.reshape(-1, *[1] * (grad.ndim - 1))


def _norms(grad: Tensor) -> Tensor:
    """[B]"""
    norms: Tensor = grad.flatten(1).norm(dim=1)
    return norms
