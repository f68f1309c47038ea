"""Which part of a model takes what another one returned, seen in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

from alignfast.models.classifier import evaluating


@dataclass(frozen=True)
class Followed:
    """shape: of what went from the layer to its follower.

    seen_by: the parts that gave it or were given it, these two among them; where the layer changes its input in place,
    which is the same tensor, also those that had it before. shared: whether the follower ran more than once or has
    more than one name.
    """

    layer: nn.Module
    follower: nn.Module
    shape: torch.Size
    seen_by: tuple[nn.Module, ...]
    shared: bool


def followed(
    module: nn.Module,
    run: Callable[[], Any],
    is_layer: Callable[[nn.Module], bool],
    is_follower: Callable[[nn.Module], bool],
) -> list[Followed]:
    """Each layer that ran exactly once and whose result went into one follower, unchanged and nowhere else.

    A layer that changes its input in place counts if nothing else had used that before, of which there may be views.

    Args:
        module: searched for layers and followers.
        run: passes through it; in evaluation mode and without a gradient.
        is_layer: whether a part is one that is asked about.
        is_follower: whether it is one that may follow.
    """
    paths = paths_of(module)
    layers = {part: _Watched() for part in paths if is_layer(part)}
    followers = {part: 0 for part in paths if is_follower(part)}
    uses = _Uses()

    def enter(part: nn.Module, inputs: Any, named: Any) -> None:
        uses.see(part, (inputs, named))
        if part in layers:
            layers[part].given_views = any(map(uses.may_have_views, tree_iter((inputs, named))))
        if part in followers:
            followers[part] += 1
            uses.entered = inputs[0] if inputs else None
            if uses.entered is not None and uses.entered in uses.returned:
                uses.returned[uses.entered].followers.append(part)

    def leave(part: nn.Module, inputs: Any, output: Any) -> None:
        if part in followers:
            # What is changed in place is the follower's result from now on.
            if output is uses.entered and output in uses.returned and part in uses.returned[output].followers:
                del uses.returned[output], uses.seen[output]
            uses.entered = None
        in_place = isinstance(output, Tensor) and part in uses.seen.get(output, ())
        uses.see(part, output)
        if part in layers:
            layers[part].calls += 1
            if isinstance(output, Tensor):
                layers[part].shape, layers[part].seen_by = output.shape, uses.seen[output]
                layers[part].used_elsewhere = in_place and layers[part].given_views
                uses.returned[output] = layers[part]

    with evaluating(module), torch.no_grad(), hooked(paths, enter, leave), uses:
        result = run()
        # What is still there was returned or put somewhere.
        for watched in uses.returned.values():
            watched.used_elsewhere = True
        del result
    return [
        Followed(
            layer,
            follower,
            watched.shape,
            tuple(watched.seen_by),
            shared=max(followers[follower], len(paths[follower])) > 1,
        )
        for layer, watched in layers.items()
        if watched.shape is not None and watched.calls == len(watched.followers) == 1 and not watched.used_elsewhere
        for follower in watched.followers
    ]


def changed_in_place(module: nn.Module, run: Callable[[], Any], is_part: Callable[[nn.Module], bool]) -> set[nn.Module]:
    """The parts of which something else changes the input or the result in place when they are done.

    Args:
        module, run, is_part: as in `followed`.
    """
    left: list[tuple[nn.Module, Tensor, int]] = []

    def leave(part: nn.Module, inputs: Any, output: Any) -> None:
        values = [value for value in tree_iter((inputs, output)) if isinstance(value, Tensor)]
        left.extend((part, value, value._version) for value in values)

    parts = [part for part in module.modules() if is_part(part)]
    with evaluating(module), torch.no_grad(), hooked(parts, lambda *given: None, leave):
        run()
    return {part for part, value, version in left if value._version != version}


def paths_of(module: nn.Module) -> dict[nn.Module, list[str]]:
    """Every name of every part."""
    paths: dict[nn.Module, list[str]] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        paths.setdefault(part, []).append(name)
    return paths


class Unseen:
    """Whether what goes from a layer to its follower may be another tensor, since no hook looks at it."""

    def __init__(self, seen_by: Iterable[nn.Module]) -> None:
        self.seen_by = tuple(seen_by)

    def __bool__(self) -> bool:
        return not any(has_hooks(part) for part in self.seen_by)


def has_hooks(part: nn.Module) -> bool:
    """They may read or change what goes in, what comes out, and the gradients of both."""
    return bool(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks)


class _Watched:
    """What is seen of a layer and of what it returned."""

    def __init__(self) -> None:
        self.calls = 0
        self.shape: torch.Size | None = None
        self.followers: list[nn.Module] = []
        self.seen_by: dict[nn.Module, None] = {}
        self.given_views = False
        self.used_elsewhere = False


class _Uses(TorchDispatchMode):
    """Sees every operation, above all on what the watched layers returned.

    returned: by layers. seen: by which parts. given: to operations.
    """

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        # Weak, so that the pass needs no more memory than any other.
        self.returned = WeakIdKeyDictionary()
        self.seen = WeakIdKeyDictionary()
        self.given = WeakIdKeyDictionary()
        self.entered: Tensor | None = None

    def see(self, part: nn.Module, values: Any) -> None:
        for value in tree_iter(values):
            if isinstance(value, Tensor):
                self.seen.setdefault(value, {})[part] = None

    def may_have_views(self, value: Any) -> bool:
        return isinstance(value, Tensor) and (value._is_view() or value in self.given)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_iter((args, kwargs)):
            if isinstance(value, Tensor):
                self.given[value] = None
                if value is not self.entered and value in self.returned:
                    self.returned[value].used_elsewhere = True
        return func(*args, **(kwargs or {}))


@contextmanager
def hooked(parts: Iterable[nn.Module], enter: Callable[..., None], leave: Callable[..., None]) -> Iterator[None]:
    """enter(part, inputs, named inputs) and leave(part, inputs, output) are called around each pass of a part."""
    # Those of TorchScript refuse hooks.
    open_parts = [part for part in parts if not isinstance(part, torch.jit.ScriptModule)]
    handles = [part.register_forward_pre_hook(enter, with_kwargs=True) for part in open_parts]
    handles += [part.register_forward_hook(leave) for part in open_parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
