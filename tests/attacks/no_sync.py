"""What may not happen in a step of an attack, seen by a dispatch mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class NoSync(TorchDispatchMode):
    """Refuses what makes the host wait for `device` and what a CUDA graph cannot hold.

    That is: values or shapes that the host reads from a tensor, tensors made from Python's data, which are copied from
    the host, and tensors on any other device.
    """

    def __init__(self, device: str | torch.device) -> None:
        super().__init__()
        self.device = torch.device(device)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, options = func.overloadpacket.__name__, kwargs or {}
        # Indexing may read or not, according to what it is given.
        indexing = name.startswith(("index", "_index", "_unsafe_index"))
        masked = indexing and any(leaf.dtype in (torch.bool, torch.uint8) for leaf in tensors(args[1:2]))
        reading = not indexing and READING & set(func.tags) and options.get("output_size") is None
        assert not masked, f"{name} with a mask waits for the device"
        assert not reading, f"{name} waits for the device"
        assert not name.startswith("lift_fresh"), f"{name} copies from the host"
        result = func(*args, **options)
        elsewhere = {str(leaf.device) for leaf in tensors((args, options, result))} - {str(self.device)}
        assert not elsewhere, f"{name} on {elsewhere}, not on {self.device}"
        return result


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
