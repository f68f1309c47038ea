"""Layers of frozen weights that keep for the backward pass only what an input gradient needs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.padding import get_same_padding, pad_same
from torch import Tensor, nn
from torch.autograd import Function

from alignfast.models.image_gradient import image_gradient

F = TypeVar("F", bound=Callable[..., Any])


def keep_less(module: nn.Module) -> None:
    """Exchange, in place, what keeps more than an input gradient needs, where what it is has no further behaviour.

    torch's convolution keeps its input, which only a gradient of its weights needs, and ReLU6 in place a copy of its
    input, though its output tells as much. The new layers have the old ones' types, names, weights and results.
    Subclasses, layers with hooks and padding other than by zeros are left alone.
    """
    exchange(module, KEEP_LESS, is_plain)


def exchange(
    module: nn.Module, kinds: Mapping[type[nn.Module], type[nn.Module]], wanted: Callable[[Any], bool]
) -> None:
    """Give, in place, the wanted parts of these very types the classes that stand for them."""
    for name, part in list(module.named_modules()):
        if name and (kind := kinds.get(type(part))) is not None and wanted(part):
            module.set_submodule(name, reclassed(kind, part), strict=True)


def signed(function: F) -> F:
    """The forward pass of a Function, with its signature beside it: torch binds every call's arguments to it, and it
    would be made anew each time, which takes twice as long as all else that is done for a small convolution."""
    vars(function)["__signature__"] = inspect.signature(function)
    return function


class _Convolution(Function):
    @staticmethod
    @signed
    def forward(
        images: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
    ) -> Tensor:
        return torch.conv2d(images, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        images, weight, _, *ctx.settings = inputs
        ctx.save_for_backward(weight)
        ctx.shape, ctx.layout = images.shape, images.stride()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.settings
        # Where the gradient is differentiated again, torch's own has a derivative.
        if groups == 1 and set(dilation) == {1} and not torch.is_grad_enabled():
            result = image_gradient(grad, weight, ctx.shape, stride, padding)
            if result is not None:
                return result, None, None, None, None, None, None
        # Asked for its shape and layout only, and pages that nobody touches take no memory.
        images = grad.new_empty_strided(ctx.shape, ctx.layout)
        (result, _, _) = torch.ops.aten.convolution_backward(
            grad, images, weight, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
        )
        return result, None, None, None, None, None, None


class _Clip(Function):
    """To [0, 6], in place."""

    @staticmethod
    @signed
    def forward(rows: Tensor) -> Tensor:
        return nn.functional.hardtanh_(rows, 0.0, 6.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.mark_dirty(inputs[0])
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return torch.ops.aten.hardtanh_backward(grad, ctx.saved_tensors[0], 0.0, 6.0)


class FrozenConv2d(nn.Conv2d):
    """A convolution whose weights require no gradient."""

    def forward(self, input: Tensor) -> Tensor:
        return _convolved(input, self, self.padding)


class FrozenConv2dSame(Conv2dSame):
    """The same behind TensorFlow's padding, which depends on the size of the input.

    Where it is alike on both sides, the convolution pads by itself. Where it is one more below or on the right, a
    depthwise convolution is given a kernel with one more zero above or on the left instead: both save a copy of the
    input. Others do more work for these zeros than a copy takes.
    """

    def forward(self, input: Tensor) -> Tensor:
        sizes = zip(input.shape[-2:], self.kernel_size, self.stride, self.dilation, strict=True)
        down, right = (get_same_padding(*each) for each in sizes)
        more = (right % 2, 0, down % 2, 0)
        if any(more) and not (self.groups == self.in_channels and self.dilation == (1, 1)):
            kernel, stride, dilation = (list(each) for each in (self.kernel_size, self.stride, self.dilation))
            return _convolved(pad_same(input, kernel, stride, dilation), self, (0, 0))
        weight = nn.functional.pad(self.weight, more) if any(more) else self.weight
        return _convolved(input, self, ((down + 1) // 2, (right + 1) // 2), weight)


class ReLU6InPlace(nn.ReLU6):
    def forward(self, input: Tensor) -> Tensor:
        return relu6_in_place(input)


KEEP_LESS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: FrozenConv2d,
    Conv2dSame: FrozenConv2dSame,
    nn.ReLU6: ReLU6InPlace,
}


def _convolved(images: Tensor, layer: nn.Conv2d, padding: Any, weight: Tensor | None = None) -> Tensor:
    weight = layer.weight if weight is None else weight
    return _applied(_Convolution, images, weight, layer.bias, layer.stride, padding, layer.dilation, layer.groups)


def relu6_in_place(rows: Tensor) -> Tensor:
    return _applied(_Clip, rows)


def _applied(function: type[Function], *arguments: Any) -> Tensor:
    result: Tensor = function.apply(*arguments)
    return result


def is_plain(part: nn.Module) -> bool:
    """Without hooks or further behaviour, its weights frozen and its padding, if any, of zeros."""
    if part._forward_hooks or part._forward_pre_hooks:
        return False
    if isinstance(part, nn.Conv2d):
        frozen = "weight" in part._parameters and not any(one.requires_grad for one in part.parameters())
        return frozen and part.padding_mode == "zeros" and isinstance(part.padding, tuple)
    return not isinstance(part, nn.ReLU6) or part.inplace


def reclassed(kind: type[nn.Module], part: nn.Module) -> Any:
    """The same object in all but its class: `kind` adds nothing to what it holds."""
    other = kind.__new__(kind)
    other.__dict__.update(part.__dict__)
    return other
