"""A CUDA graph's stand-in on the CPU: operations on fixed memory, replayed without the Python code that led to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    """Records every operation with the very tensors that it reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Sequence[Any], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                # A view, or what was changed in place, is where it was.
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Taping:
    """Captures by a tape after a warm-up, and counts. steps: what was captured, on which buffers."""

    def __init__(self) -> None:
        self.steps: list[Any] = []
        self.replays: list[int] = []

    def __call__(self, step: Callable[[], None], device: torch.device) -> Callable[[], None]:
        tape, number = Tape(), len(self.steps)
        self.steps.append(step)
        step()
        with tape:
            step()

        def replay() -> None:
            self.replays.append(number)
            tape.replay()

        return replay
