"""How many rows go through the model together, so that what a pass keeps for its backward pass fits into memory."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

# Of the memory that is free when the first pass is over; and the least that is taken to be there.
SHARE_OF_FREE = 0.4
LEAST = 2**28
# Where Linux says how much a program may have, what it would give back from its caches included.
MEMORY = Path("/proc/meminfo")


@dataclass
class Chunks:
    """The chunks for images of one kind. rows: how many may go together, None until a pass was measured."""

    rows: int | None
    memory: int | None

    def most(self, each: int, wanted: int) -> int:
        """How many of `wanted` units of `each` rows go together: at least one, even if that is too large."""
        if self.rows is None:
            return 1
        return min(wanted, max(1, self.rows // max(each, 1)))

    @contextmanager
    def measuring(self, source: nn.Module, rows: Tensor, parts: int = 1) -> Iterator[None]:
        """Measures by the first pass through it, forward and backward, what a row keeps for its backward pass.

        parts: how many such sources later passes may go through at once.
        """
        if self.rows is not None:
            yield
            return
        weights = {_place(tensor) for tensor in (*source.parameters(), *source.buffers())}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            if _place(tensor) not in weights:
                kept[_place(tensor)] = tensor.untyped_storage().nbytes()
            # Not the tensor itself, which would refer to the graph that it is kept in.
            return tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            yield
        # The gradient of an activation is there beside it.
        of_a_row = max(1, 2 * parts * sum(kept.values()) // len(rows))
        self.rows = max(1, (self.memory or _budget(rows.device)) // of_a_row)


class ChunksByShape:
    """The chunks of one attack, by the shape, dtype and device of an image.

    A copy, as of an attack that is copied or pickled, begins without what was measured.
    """

    def __init__(self) -> None:
        self._chunks: dict[Hashable, Chunks] = {}

    def __reduce__(self) -> tuple[type[ChunksByShape], tuple[()]]:
        return ChunksByShape, ()

    def of(self, images: Tensor, max_batch: int | None, memory: int | None) -> Chunks:
        key = (images.shape[1:], images.dtype, images.device)
        return self._chunks.setdefault(key, Chunks(max_batch, memory))


def _place(tensor: Tensor) -> int:
    place: int = tensor.untyped_storage()._cdata
    return place


def _budget(device: torch.device) -> int:
    """Bytes. Asks the driver or the system, and does not wait for the device."""
    if device.type == "cuda" and torch.cuda.is_available():
        free = torch.cuda.mem_get_info(device)[0]
    elif device.type == "cpu" and MEMORY.is_file():
        lines = (line.split() for line in MEMORY.read_text(encoding="ascii").splitlines())
        free = next((1024 * int(words[1]) for words in lines if words[0] == "MemAvailable:"), 0)
    else:
        free = 0
    return max(LEAST, int(SHARE_OF_FREE * free))
