"""Batches: from a data set, or from whatever loader a user already has."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice, pairwise
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from alignfast.checks import check_count, check_images
from alignfast.data.datasets import stack
from alignfast.data.images import THREADS
from alignfast.data.views import stream_seed

T = TypeVar("T")


class Batch(NamedTuple):
    """float images [N, C, H, W] in [0, 1], int64 labels [N], int64 data-set indices [N]."""

    images: Tensor
    labels: Tensor
    indices: Tensor

    def filled(self, count: int) -> Batch:
        """At least `count` images, of which those beyond the batch's own are its first one again."""
        missing = max(0, count - len(self.images))
        return Batch(*(torch.cat([rows, rows[:1].expand(missing, *rows.shape[1:])]) for rows in self))


class Loader:
    """Batches of a data set, in an order that is a pure function of (seed, epoch); made by `loader`.

    Iterating twice gives the same batches; `set_epoch` gives another order and other training views. Among several
    processes batches are divided by `shard` or `deal`, and `batch_size` stays that of all ranks together.
    """

    def __init__(
        self, dataset: Any, batch_size: int, *, shuffle: bool, seed: int, workers: int, ahead: bool, drop_last: bool
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self._shuffle = shuffle
        self._seed = seed
        self._epoch = 0
        self._workers = workers
        self._ahead = ahead
        self._drop_last = drop_last
        self._rank, self._world, self._whole = 0, 1, False

    def shard(self, rank: int, world: int) -> Loader:
        """Of every batch the part of this rank, for training: a loader of its own over the same data set.

        All ranks have as many batches. Parts of a batch are contiguous, disjoint and cover it in the order of the
        ranks, and their sizes differ by at most one. A batch of fewer images than ranks has empty parts: images
        [0, C, H, W], so that every rank takes part in every step. An iterable is read by every rank as a whole; its
        samples go to ranks by position, so it must be the same on all.

        Raises:
            ValueError: `rank` outside [0, world), or a loader that is a rank's already.
        """
        return self._divided(rank, world, whole=False)

    def deal(self, rank: int, world: int) -> Loader:
        """Every `world`-th batch from batch `rank` on, whole, for evaluation: what is computed of a batch is then the
        same to the last bit whatever the number of ranks, of which some may have no batch. `iterate(start)` counts
        this rank's batches; raises as `shard`.
        """
        return self._divided(rank, world, whole=True)

    def _divided(self, rank: int, world: int, *, whole: bool) -> Loader:
        check_count("world", world)
        check_count("rank", rank, low=0, high=world - 1)
        if self._world > 1:
            raise ValueError(f"loader: is that of rank {self._rank} of {self._world}; allowed is one of the whole data")
        divided = copy.copy(self)
        divided._rank, divided._world, divided._whole = rank, world, whole
        return divided

    @property
    def settings(self) -> dict[str, Any]:
        """What decides which images are in which batch, but for the rank; images: None where they cannot be told."""
        return {
            "images": None if is_stream(self.dataset) else len(self.dataset),
            "batch_size": self.batch_size,
            "shuffle": self._shuffle,
            "seed": self._seed,
            "drop_last": self._drop_last,
        }

    @property
    def images(self) -> int:
        """Images in one pass over this loader, of an indexable data set: those of this rank alone."""
        return sum(0 if part.empty else len(part.items) for part in self._order())

    def set_epoch(self, epoch: int) -> None:
        """Epoch of the order and, where the data set has a `set_epoch`, of its random views."""
        self._epoch = check_count("epoch", epoch, low=0)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        count = self._batches()
        return len(range(self._rank, count, self._world)) if self._whole else count

    def __iter__(self) -> Iterator[Batch]:
        return self.iterate()

    def iterate(self, start: int = 0) -> Iterator[Batch]:
        """The batches of this epoch from batch `start` on; the ones before are not read where that can be avoided."""
        check_count("start", start, low=0)
        if is_stream(self.dataset):
            return islice(self._streamed(), start, None)
        return self._indexed(self._order()[start:])

    def _batches(self) -> int:
        full, rest = divmod(len(self.dataset), self.batch_size)
        return full + bool(rest and not self._drop_last)

    def _order(self) -> list[_Part[int]]:
        count = len(self.dataset)
        if self._shuffle:
            generator = torch.Generator().manual_seed(stream_seed("order", self._seed, self._epoch))
            order = torch.randperm(count, generator=generator).tolist()
        else:
            order = list(range(count))
        batches = [order[at : at + self.batch_size] for at in range(0, count, self.batch_size)]
        return list(self._parts(batches[: self._batches()]))

    def _parts(self, batches: Iterable[list[T]]) -> Iterator[_Part[T]]:
        if self._whole:
            return (_Part(batch) for batch in islice(batches, self._rank, None, self._world))
        return (_part(batch, self._rank, self._world) for batch in batches)

    def _indexed(self, order: list[_Part[int]]) -> Iterator[Batch]:
        if self._workers == 0:
            yield from _ahead(self.dataset, order) if self._ahead else (_read(self.dataset, part) for part in order)
            return
        # A generator of its own: a DataLoader takes its workers' base seed from the global one otherwise.
        batches: DataLoader[Any] = DataLoader(
            _Fetch(self.dataset),
            batch_size=None,
            sampler=order,
            num_workers=self._workers,
            collate_fn=_as_it_is,
            generator=torch.Generator().manual_seed(self._seed),
        )
        yield from map(_unwrap, batches)

    def _streamed(self) -> Iterator[Batch]:
        samples = enumerate(self.dataset)
        chunks = iter(lambda: list(islice(samples, self.batch_size)), [])
        kept = (chunk for chunk in chunks if len(chunk) == self.batch_size or not self._drop_last)
        yield from map(_collate, self._parts(kept))


def loader(
    dataset: Any,
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    workers: int = 0,
    ahead: bool = False,
    drop_last: bool = False,
) -> Loader:
    """Batches of `dataset`, with the data-set index of every image.

    Args:
        dataset: of samples (image, label) or (image, label, index), the image float [C, H, W] in [0, 1]. Indexable
            (`__len__` and `__getitem__`), or an iterable of samples, which is read in its own order by one process
            and numbered from 0 where it gives no index.
        batch_size: at least 1; the last batch may be smaller.
        shuffle: a new order for every epoch; not for an iterable.
        seed: of the order, at least 0.
        workers: processes that read; 0 reads in this one. Batches are the same either way.
        ahead: without workers, threads read the next batch while the last one is in use. For an indexable data set
            that threads may read at the same time, as those of `load_dataset` without a `transform`.
        drop_last: leave out a smaller last batch.

    Raises:
        ValueError: bad arguments here; an unreadable image or images of several sizes while iterating.
    """
    check_count("batch_size", batch_size)
    check_count("seed", seed, low=0)
    check_count("workers", workers, low=0)
    if is_stream(dataset):
        if not isinstance(dataset, Iterable):
            raise ValueError(f"dataset: got {type(dataset).__name__}; allowed is an indexable or iterable data set")
        for name, value in (("shuffle", shuffle), ("workers", workers), ("ahead", ahead)):
            if value:
                raise ValueError(f"{name}: got {value}; an iterable data set is read in its own order, by one process")
    return Loader(dataset, batch_size, shuffle=shuffle, seed=seed, workers=workers, ahead=ahead, drop_last=drop_last)


def as_batches(batches: Iterable[Any]) -> Iterator[Batch]:
    """Each of a user's batches, (images, labels) or (images, labels, indices), as a `Batch`.

    Where indices are missing, positions in the order of arrival are given: right for a loader that does not shuffle.
    Integer labels and indices of any width become int64. The range of the values is checked on the first batch only.

    Raises:
        ValueError: not iterable, or a batch of another form; the message names the batch.
    """
    if not isinstance(batches, Iterable):
        raise ValueError(f"loader: got {type(batches).__name__}; allowed is an iterable of (images, labels[, indices])")
    return _batches(batches)


def spread_indices(length: int, count: int) -> list[int]:
    """Up to `count` of `length` indices, evenly spread, because a data set is often sorted by class."""
    count = min(count, length)
    return [position * length // count for position in range(count)]


def is_stream(dataset: Any) -> bool:
    """Whether a data set can only be read from its beginning."""
    return isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"))


class _Part(NamedTuple, Generic[T]):
    """What a rank has of a batch. `empty`: no image, and `items` is one of another rank's, for the images' shape."""

    items: list[T]
    empty: bool = False


def _part(batch: list[T], rank: int, world: int) -> _Part[T]:
    low, high = len(batch) * rank // world, len(batch) * (rank + 1) // world
    return _Part(batch[low:high]) if low < high else _Part(batch[:1], empty=True)


class _Failure(NamedTuple):
    """A worker's ValueError: raised by the DataLoader itself it would come as a page of traceback."""

    message: str


class _Fetch(Dataset[Any]):
    """Whole batches by their parts."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __getitem__(self, part: _Part[int]) -> Batch | _Failure:
        try:
            return _read(self._dataset, part)
        except ValueError as error:
            return _Failure(str(error))


def _unwrap(fetched: Batch | _Failure) -> Batch:
    if isinstance(fetched, _Failure):
        raise ValueError(fetched.message)
    return fetched


def _as_it_is(fetched: Any) -> Any:
    return fetched


def _read(dataset: Any, part: _Part[int]) -> Batch:
    return _collate(_Part([(index, dataset[index]) for index in part.items], part.empty))


def _ahead(dataset: Any, order: list[_Part[int]]) -> Iterator[Batch]:
    pool = ThreadPoolExecutor(THREADS)
    begun = (
        _Part([(index, pool.submit(dataset.__getitem__, index)) for index in part.items], part.empty) for part in order
    )
    try:
        # Each pair is given when its second is begun, and the last batch has one to be given with.
        for part, _ in pairwise(chain(begun, [_Part([])])):
            yield _collate(_Part([(index, sample.result()) for index, sample in part.items], part.empty))
    finally:
        pool.shutdown(cancel_futures=True)


def _collate(part: _Part[tuple[int, Any]]) -> Batch:
    samples = [_sample(position, sample) for position, sample in part.items]
    batch = Batch(
        images=stack([(index, image) for image, _, index in samples]),
        labels=torch.tensor([label for _, label, _ in samples], dtype=torch.int64),
        indices=torch.tensor([index for _, _, index in samples], dtype=torch.int64),
    )
    return Batch(*(tensor[:0] for tensor in batch)) if part.empty else batch


def _sample(position: int, sample: Any) -> tuple[Tensor, int, int]:
    if not isinstance(sample, (tuple, list)) or len(sample) not in {2, 3} or not isinstance(sample[0], Tensor):
        raise ValueError(
            f"dataset: sample {position} is {_form(sample)}; allowed is (image, label) or (image, label, index) "
            "with a torch.Tensor as image"
        )
    image, label, index = (*sample, position)[:3]
    if not image.is_floating_point():
        raise ValueError(
            f"dataset: image {position} is {image.dtype}; allowed is floating-point, with values in [0, 1]"
        )
    return image, int(label), int(index)


def _batches(batches: Iterable[Any]) -> Iterator[Batch]:
    seen = 0
    for number, batch in enumerate(batches):
        converted = _batch(number, batch, seen)
        if number == 0:
            check_images("loader: images of batch 0", converted.images)
        seen += len(converted.images)
        yield converted


def _batch(number: int, batch: Any, seen: int) -> Batch:
    if not isinstance(batch, (tuple, list)) or len(batch) not in {2, 3}:
        raise ValueError(
            f"loader: batch {number} is {_form(batch)}; allowed is (images, labels) or (images, labels, indices)"
        )
    images, labels = batch[:2]
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"loader: images of batch {number} are {_form(images)}; allowed is a floating-point torch.Tensor "
            "[N, C, H, W] in [0, 1]"
        )
    count = len(images)
    indices = batch[2] if len(batch) == 3 else torch.arange(seen, seen + count)
    return Batch(images, _integers("labels", number, labels, count), _integers("indices", number, indices, count))


def _integers(name: str, number: int, values: Any, count: int) -> Tensor:
    whole = isinstance(values, Tensor) and not (values.is_floating_point() or values.is_complex())
    if not whole or values.dtype == torch.bool or values.shape != (count,):
        raise ValueError(
            f"loader: {name} of batch {number} are {_form(values)}; allowed is an integer torch.Tensor [{count}]"
        )
    converted: Tensor = values.to(torch.int64)
    return converted


def _form(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"of type {type(value).__name__}"
