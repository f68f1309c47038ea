"""Which images each rank attacks and measures, by a source prepared alike, and the outcomes of all of them together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alignfast.data import Batch, Loader, as_batches
from alignfast.distributed import Ranks, current, gather, on_main
from alignfast.models import Classifier, prepare
from alignfast.models.preparation import Precision, Preparation


@dataclass(frozen=True)
class Shares:
    """Data dealt to the ranks batch by batch, whole, so that the outcome of an image does not depend on their number.

    own: the batches of this rank, `batches` of them. labels: int64 [N] of all images, on the CPU. positions: by rank,
    where its images lie among all, int64 [n].
    """

    own: Iterable[Any]
    batches: int
    labels: Tensor
    positions: tuple[NDArray[np.int64], ...]

    @property
    def own_labels(self) -> Tensor:
        return self.labels[torch.from_numpy(self.positions[current().rank])]

    def merge(self, flags: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """[judges, n] of each rank as [judges, N] on every rank; waits for all ranks."""
        merged = np.zeros((len(flags), len(self.labels)), dtype=np.bool_)
        for positions, part in zip(self.positions, gather(flags), strict=True):
            merged[:, positions] = part
        return merged


def shares_of(data: Iterable[Any]) -> Shares:
    """Deal `data`, which is the same on every rank and still whole, to the ranks.

    A `Loader` reads this rank's images alone; any other iterable is read as a whole by every rank.

    Raises:
        ValueError: no image on any rank, or data that differ between ranks or are divided already.
    """
    ranks = current()
    if isinstance(data, Loader) and ranks.world > 1:
        own: Iterable[Any] = data.deal(ranks.rank, ranks.world)
        by_rank = gather(_labels(own))
        turns = [by_rank[turn % ranks.world][turn // ranks.world] for turn in range(sum(map(len, by_rank)))]
    else:
        own = data if ranks.world == 1 else _Turns(data, ranks)
        turns = _labels(data)
        _check_equal(turns)
    if sum(map(len, turns)) == 0:
        raise ValueError("data: holds no image; allowed is a loader with at least one")
    ends = np.cumsum([len(labels) for labels in turns])
    places = [np.arange(end - len(labels), end) for labels, end in zip(turns, ends, strict=True)]
    positions = tuple(_joined(places[rank :: ranks.world]) for rank in range(ranks.world))
    batches = len(turns[ranks.rank :: ranks.world])
    return Shares(own, batches, torch.from_numpy(_joined(turns)), positions)


def prepared_alike(model: Classifier, images: Tensor, precision: Precision, *, compiled: bool = False) -> Classifier:
    """`prepare` with an example that all ranks have, in the form that rank 0 finds where the precision is "auto"."""
    found: Precision | Preparation | None = precision
    if precision == "auto" and current().world > 1:
        found = on_main(lambda: prepare(model, images, "auto", compiled=compiled).preparation)
    assert found is not None
    return prepare(model, images, found, compiled=compiled)


def form_of(prepared: Classifier) -> str:
    """How the passes of a prepared model are computed; of an ensemble, those of each member."""
    return "; ".join(str(one.preparation.form) for one in prepared.members if one.preparation is not None)


@dataclass(frozen=True)
class _Turns:
    """Every `world`-th batch, with the indices that it has among all."""

    data: Iterable[Any]
    ranks: Ranks

    def __iter__(self) -> Iterator[Batch]:
        return islice(as_batches(self.data), self.ranks.rank, None, self.ranks.world)


def _labels(data: Iterable[Any]) -> list[NDArray[np.int64]]:
    return [batch.labels.cpu().numpy() for batch in as_batches(data)]


def _check_equal(turns: Sequence[NDArray[np.int64]]) -> None:
    seen = hashlib.sha256()
    for labels in turns:
        seen.update(len(labels).to_bytes(8, "little") + labels.tobytes())
    if len(set(gather(seen.hexdigest()))) > 1:
        raise ValueError("data: differ between ranks; allowed are the same on all, which are dealt to ranks here")


def _joined(arrays: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate([np.empty(0, dtype=np.int64), *arrays])
