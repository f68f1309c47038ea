"""Batch after batch, over as many passes as it takes, from any position on."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignfast.data import Batch, Loader, as_batches


class Stream:
    """The batches of `loader`, pass after pass, for ever; stops where a pass is empty.

    The loader's `set_epoch`, where it has one, is called before every pass. epoch, batch: of the next batch.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self._loader = loader
        self.epoch = 0
        self.batch = 0
        # Of the global generators when the pass began, from which a loader may have drawn its order.
        self._begun = generators()

    def position(self) -> dict[str, Any]:
        """Where the stream is, with the global generators as they are now."""
        return {"epoch": self.epoch, "batch": self.batch, "begun": self._begun, "now": generators()}

    def go_to(self, position: Mapping[str, Any]) -> Iterator[Batch]:
        """The batches from that position on; the global generators are then as they were there.

        What an `alignfast` loader has given before is not read again; of any other, whose pass begins with the global
        generators as they were, it is read and dropped.
        """
        self.epoch, self.batch, self._begun = position["epoch"], position["batch"], position["begun"]
        return self._resumed(position["now"])

    def __iter__(self) -> Iterator[Batch]:
        while True:
            self._begun = generators()
            empty = True
            for batch in self._pass(0):
                empty = False
                yield batch
            if empty:
                return

    def _resumed(self, now: Mapping[str, Any]) -> Iterator[Batch]:
        set_generators(self._begun)
        rest = self._pass(self.batch)
        first = next(rest, None)
        set_generators(now)
        if first is not None:
            yield first
        yield from rest
        yield from self

    def _pass(self, start: int) -> Iterator[Batch]:
        if hasattr(self._loader, "set_epoch"):
            self._loader.set_epoch(self.epoch)
        self.batch = start
        if isinstance(self._loader, Loader):
            batches = as_batches(self._loader.iterate(start))
        else:
            batches = islice(as_batches(self._loader), start, None)
        for batch in batches:
            self.batch += 1
            yield batch
        self.epoch += 1
        self.batch = 0


def generators() -> dict[str, Any]:
    """The states of the global generators of torch, Python and NumPy, as a snapshot can hold them.

    Of NumPy the legacy one, which ruff warns of: it is what data sets and models of users draw from.
    """
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
    }


def set_generators(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
    version, inner, normal = states["python"]
    random.setstate((version, tuple(inner), normal))
    kind, keys, *rest = states["numpy"]
    keys = keys.numpy() if isinstance(keys, Tensor) else keys
    np.random.set_state((kind, keys.astype(np.uint32), *rest))  # noqa: NPY002


@contextmanager
def keeping_generators(devices: Sequence[int]) -> Iterator[None]:
    """Put the global generators of torch, also of these CUDA devices, of Python and of NumPy back as they were."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
