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
from torch import Tensor, nn

from alignfast.data import Batch, Loader, as_batches, loader
from alignfast.distributed import Ranks, current, gather, on_main
from alignfast.models import Classifier, prepare
from alignfast.models.preparation import Precision, Preparation


@dataclass(frozen=True)
class Shares:
    """Data dealt to the ranks batch by batch, whole, so that the outcome of an image does not depend on their number.

    own: the batches of this rank, `batches` of them. labels, indices: int64 [N] of all images, on the CPU. positions:
    by rank, where its images lie among all, int64 [n]. batch_size: images of the first batch.
    """

    own: Iterable[Any]
    batches: int
    labels: Tensor
    indices: Tensor
    positions: tuple[NDArray[np.int64], ...]
    batch_size: int

    @property
    def own_labels(self) -> Tensor:
        return self.labels[torch.from_numpy(self.positions[current().rank])]

    @property
    def digest(self) -> str:
        """SHA-256 over the labels and indices of all images."""
        return hashlib.sha256(self.labels.numpy().tobytes() + self.indices.numpy().tobytes()).hexdigest()

    def of_images(self, dataset: Any) -> Shares:
        """The shares of another data set with as many images in the same order, in batches as large as the first."""
        ranks = current()
        whole = loader(dataset, self.batch_size, ahead=True)
        own = whole if ranks.world == 1 else whole.deal(ranks.rank, ranks.world)
        return _dealt(own, torch.stack([self.labels, self.indices]).numpy(), self.even_sizes)

    @property
    def even_sizes(self) -> list[int]:
        """Of the batches of all ranks, where all are as large as the first."""
        return [len(part) for part in self.labels.split(self.batch_size)]

    @property
    def even_batches(self) -> int:
        """How many of those this rank has."""
        ranks = current()
        return len(self.even_sizes[ranks.rank :: ranks.world])

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
        by_rank = gather(_columns(own))
        turns = [by_rank[turn % ranks.world][turn // ranks.world] for turn in range(sum(map(len, by_rank)))]
    else:
        own = data if ranks.world == 1 else _Turns(data, ranks)
        turns = _columns(data)
        _check_equal(turns)
    sizes = [turn.shape[1] for turn in turns]
    if sum(sizes) == 0:
        raise ValueError("data: holds no image; allowed is a loader with at least one")
    return _dealt(own, np.concatenate(turns, axis=1), sizes)


def _dealt(own: Iterable[Any], columns: NDArray[np.int64], sizes: Sequence[int]) -> Shares:
    """columns: labels and indices of all images, [2, N]. sizes: of the batches of all ranks."""
    ranks = current()
    ends = np.cumsum(sizes)
    places = [np.arange(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    positions = tuple(_joined(places[rank :: ranks.world]) for rank in range(ranks.world))
    labels, indices = torch.from_numpy(columns)
    return Shares(own, len(sizes[ranks.rank :: ranks.world]), labels, indices, positions, max(1, sizes[0]))


def on_device(batch: Batch, model: nn.Module) -> Batch:
    """The batch on the device of the model's weights."""
    device = device_of(model)
    return Batch(*(tensor.to(device, non_blocking=True) for tensor in batch))


def device_of(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in model.parameters()), torch.device("cpu"))


def prepared_alike(
    model: Classifier, images: Tensor, precision: Precision | Preparation, *, compiled: bool = False
) -> Classifier:
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


def _columns(data: Iterable[Any]) -> list[NDArray[np.int64]]:
    """Labels and indices of each batch, [2, n]."""
    return [torch.stack([batch.labels.cpu(), batch.indices.cpu()]).numpy() for batch in as_batches(data)]


def _check_equal(turns: Sequence[NDArray[np.int64]]) -> None:
    seen = hashlib.sha256()
    for turn in turns:
        seen.update(turn.shape[1].to_bytes(8, "little") + turn.tobytes())
    if len(set(gather(seen.hexdigest()))) > 1:
        raise ValueError("data: differ between ranks; allowed are the same on all, which are dealt to ranks here")


def _joined(arrays: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate([np.empty(0, dtype=np.int64), *arrays])
