"""A source with surgery: the same model, and hooks on its layers while a pass runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from alignfast.draws import Draws
from alignfast.models import Classifier, Ensemble, as_classifier
from alignfast.models.classifier import Render

# What `nn.Module` keeps of parameters, buffers and children.
TABLES = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules")

# A layer's part of the seed: odd, so that layers differ, and far from small numbers, so that seeds do.
STRIDE = 0x9E3779B97F4A7C15


class Surgery(ABC):
    """A change of a model's passes. Subclasses are frozen dataclasses that hold numbers.

    replaces: what of the model it puts something else for, which no second surgery can do as well; None for nothing.
    """

    replaces: ClassVar[str | None] = None

    @abstractmethod
    def check(self, module: nn.Module) -> None:
        """Refuse with a ValueError a module in which there is nothing to operate on."""

    @abstractmethod
    def operating(self, module: nn.Module, draws: Draws | None) -> AbstractContextManager[None]:
        """The change, from the beginning of a forward pass to its end.

        draws: of the rows of the pass, in the source's slot; None outside an attack, where nothing is random.
        """


class Surrogate(Classifier):
    """`source` with surgeries: every pass through it runs under their hooks, and nothing remains of them afterwards.

    Parameters, buffers and layers are those of `source`, under the same names: moving or loading the one moves or
    loads the other, and a fingerprint is the same for both.
    """

    def __init__(self, source: Classifier, surgeries: tuple[Surgery, ...]) -> None:
        nn.Module.__init__(self)
        for table in TABLES:
            self.__dict__[table] = source.__dict__[table]
        self.training = source.training
        self.num_classes, self.input_size = source.num_classes, source.input_size
        self.dtype, self.memory_format = source.dtype, source.memory_format
        self.surgeries = surgeries
        # Not as a child, whose weights would be listed a second time.
        self.__dict__["_source"] = source

    @property
    def source(self) -> Classifier:
        """The model without surgery."""
        source: Classifier = self.__dict__["_source"]
        return source

    def compute_in(self, dtype: torch.dtype) -> None:
        self.source.compute_in(dtype)
        self.dtype = dtype

    def logits_of(self, render: Render, draws: Draws | None = None) -> Tensor:
        with ExitStack() as stack:
            # Hooks go before those that are there: the first surgery then changes an output first.
            for surgery in reversed(self.surgeries):
                stack.enter_context(surgery.operating(self.module, draws))
            return self.source.logits_of(render, draws)


def surrogate(source: nn.Module, surgery: Surgery) -> Classifier:
    """`source` with `surgery`, besides any that it has; of an ensemble, every member.

    Raises:
        ValueError: a model in which there is nothing to operate on, one whose forward pass is repeated in its backward
            pass, or one that has had surgery of this kind, or one that replaces the same.
    """
    source = as_classifier(source)
    if isinstance(source, Ensemble):
        return Ensemble([surrogate(member, surgery) for member in source.members], source.combine)
    done = source.surgeries if isinstance(source, Surrogate) else ()
    kind = type(surgery).__name__
    for other in done:
        if type(other) is type(surgery):
            raise ValueError(f"source: has had {kind} already; allowed is each kind of surgery once")
        if surgery.replaces is not None and other.replaces == surgery.replaces:
            raise ValueError(
                f"source: {type(other).__name__} has replaced its {surgery.replaces}; allowed with {kind} is a source "
                "without it"
            )
    for name, module in source.module.named_modules():
        # What is computed again in the backward pass runs without the hooks.
        if getattr(module, "grad_checkpointing", False) or getattr(module, "memory_efficient", False):
            raise ValueError(
                f"source: {name or type(module).__name__} checkpoints its gradients; allowed with {kind} is a model "
                "that keeps what its backward pass needs"
            )
    surgery.check(source.module)
    inner = source.source if isinstance(source, Surrogate) else source
    return Surrogate(inner, (*done, surgery))


def of_layer(draws: Draws, number: int) -> Draws:
    """Draws of the layer with this number, from 1: a slot has fewer purposes than a network has layers."""
    return replace(draws, seed=(draws.seed + number * STRIDE) % 2**64)


@contextmanager
def on_outputs(modules: Iterable[nn.Module], change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """`change` on what each module gives, or on the first of what it gives; None leaves it as it is."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return change(output)
        changed = change(output[0])
        return None if changed is None else (changed, *output[1:])

    # Before any that watch a layer's features: they should see what the next layer does.
    with removing([module.register_forward_hook(hook, prepend=True) for module in modules]):
        yield


@contextmanager
def on_gradients(modules: Iterable[nn.Module], change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """`change` on the gradient of the output of each module; the forward pass stays the same to the bit."""

    def attach(output: Tensor) -> None:
        # A hook of the tensor and no operation after it, so that the model may change the tensor in place.
        if output.requires_grad:
            output.register_hook(change)

    with on_outputs(modules, attach):
        yield


@contextmanager
def removing(handles: Iterable[Any]) -> Iterator[None]:
    """Remove the hooks at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
