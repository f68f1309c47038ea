"""Surgery on ReLUs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import fold, max_pool2d, pad, unfold
from torch.overrides import TorchFunctionMode

from alignfast.checks import check_number, hint
from alignfast.draws import Draws
from alignfast.surrogates.structure import KNOWN_BLOCKS, conv_blocks
from alignfast.surrogates.surrogate import Surgery, removing

__all__ = ["LinearBackward", "SmoothBackward"]

Size = int | tuple[int, int]

RELUS = (
    torch.relu,
    torch.relu_,
    torch.Tensor.relu,
    torch.Tensor.relu_,
    nn.functional.relu,
    nn.functional.relu_,
)
POOLS = (nn.functional.max_pool2d, torch.max_pool2d)


@dataclass(frozen=True)
class LinearBackward(Surgery):
    """LinBP (Guo et al., NeurIPS 2020): from `layer` on, ReLUs let every gradient through.

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

    replaces = "ReLUs"
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


@dataclass(frozen=True)
class SmoothBackward(Surgery):
    """BPA (Wang et al., NeurIPS 2023): derivatives of ReLUs and max-pooling that let more through.

    From `layer` on a ReLU has the derivative of SiLU, sigma(x) (1 + x (1 - sigma(x))); max-pooling everywhere has, over
    each of its windows, softmax(temperature x). The forward pass stays the same to the bit. `layer` is a residual
    block or dense layer, all of whose ReLUs count, or a module of type `nn.ReLU` in a network without such blocks.
    Padding has no share of the softmax (in the authors' code and TransferAttack's it counts as zeros). Pooling with
    `ceil_mode` or `return_indices` stays as it is.

    Args:
        layer: as in `LinearBackward`; the paper has the second block of the third stage in ResNet-50.
        temperature: above 0; 10 for ResNets, where the authors' code has 1 for VGG.

    Raises:
        ValueError: temperature out of its range; in `check`, as `LinearBackward`.
    """

    replaces = "ReLUs"
    layer: str | None = None
    temperature: float = 10.0

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, low=0.0, open_low=True)

    def check(self, module: nn.Module) -> None:
        _from_layer(module, self.layer)

    @contextmanager
    def operating(self, module: nn.Module, draws: Draws | None) -> Iterator[None]:
        with _Smooth(self.temperature) as smooth, ExitStack() as stack:
            for name in _from_layer(module, self.layer):
                stack.enter_context(smooth.within(module.get_submodule(name)))
            yield


class _Smooth(TorchFunctionMode):
    """Replaces max-pooling, and ReLUs while a module that is listed runs."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.within_one = False

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if self.within_one and func in RELUS and args:
            return _SmoothRelu.apply(args[0])
        plain = len(args) < 6 and not (options.get("ceil_mode") or options.get("return_indices"))
        if func in POOLS and plain:
            return self._pool(*args, **options)
        return func(*args, **options)

    @contextmanager
    def within(self, module: nn.Module) -> Iterator[None]:
        def enter(module: nn.Module, inputs: Any) -> None:
            self.within_one = True

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            self.within_one = False

        with removing([module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]):
            yield

    def _pool(
        self,
        x: Tensor,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        dilation: Size = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Any:
        stride = kernel_size if stride is None else stride
        return _SmoothPool.apply(x, self.temperature, (kernel_size, stride, padding, dilation))


class _SmoothRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.relu()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        share = x.sigmoid()
        result: Tensor = grad * share * (1 + x * (1 - share))
        return result


class _SmoothPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, temperature: float, how: tuple[Size, Size, Size, Size]) -> Tensor:
        kernel, stride, padding, dilation = how
        ctx.save_for_backward(x)
        ctx.temperature, ctx.how = temperature, how
        return max_pool2d(x, kernel, stride, padding, dilation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,), (kernel, stride, padding, dilation) = ctx.saved_tensors, ctx.how
        down, across = (padding, padding) if isinstance(padding, int) else padding
        padded = pad(x, (across, across, down, down), value=-math.inf)
        # [B, C, places of a window, windows]
        windows = unfold(padded, kernel, dilation, 0, stride).unflatten(1, (x.shape[1], -1))
        shares = (ctx.temperature * windows).softmax(2) * grad.flatten(2)[:, :, None]
        result = fold(shares.flatten(1, 2), padded.shape[2:], kernel, dilation, 0, stride)
        return result[..., down : down + x.shape[2], across : across + x.shape[3]], None, None


def _from_layer(module: nn.Module, layer: str | None) -> list[str]:
    """Names of the blocks, or of the ReLUs in a network without any, from `layer` on."""
    names = [block.name for block in conv_blocks(module)]
    names = names or [name for name, part in module.named_modules() if isinstance(part, nn.ReLU)]
    if not names:
        raise ValueError(
            f"source: {type(module).__name__} has no ReLU that is known; allowed are modules of type ReLU, and "
            f"{KNOWN_BLOCKS}"
        )
    if layer is None:
        return names[len(names) // 2 :]
    for place, name in enumerate(names):
        if f"{name}.".startswith(f"{layer}."):
            return names[place:]
    raise ValueError(f"layer: got {layer!r}{hint(layer, names)}; allowed are {', '.join(names)}")


def _branches(module: nn.Module, layer: str | None) -> list[_Branch]:
    blocks = {block.name: block for block in conv_blocks(module)}
    relus = {name: module.get_submodule(name) for name in _from_layer(module, layer)}
    return [
        _Branch(blocks[name].first, blocks[name].last, True) if name in blocks else _Branch(relu, relu, False)
        for name, relu in relus.items()
    ]


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
