"""Batches: from a data set, or from whatever loader a user already has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from alignfast.checks import check_count, check_images
from alignfast.data.datasets import stack
from alignfast.data.views import stream_seed


class Batch(NamedTuple):
    """float images [N, C, H, W] in [0, 1], int64 labels [N], int64 data-set indices [N]."""

    images: Tensor
    labels: Tensor
    indices: Tensor


class Loader:
    """Batches of a data set, in an order that is a pure function of (seed, epoch); made by `loader`.

    Iterating twice gives the same batches; `set_epoch` gives another order and other training views.
    """

    def __init__(
        self, dataset: Any, batch_size: int, *, shuffle: bool, seed: int, workers: int, drop_last: bool
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self._shuffle = shuffle
        self._seed = seed
        self._epoch = 0
        self._workers = workers
        self._drop_last = drop_last

    def set_epoch(self, epoch: int) -> None:
        """Epoch of the order and, where the data set has a `set_epoch`, of its random views."""
        self._epoch = check_count("epoch", epoch, low=0)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        full, rest = divmod(len(self.dataset), self.batch_size)
        return full + bool(rest and not self._drop_last)

    def __iter__(self) -> Iterator[Batch]:
        return self.iterate()

    def iterate(self, start: int = 0) -> Iterator[Batch]:
        """The batches of this epoch from batch `start` on; the ones before are not read where that can be avoided."""
        check_count("start", start, low=0)
        if is_stream(self.dataset):
            return islice(self._streamed(), start, None)
        return self._indexed(self._order()[start:])

    def _order(self) -> list[list[int]]:
        count = len(self.dataset)
        if self._shuffle:
            generator = torch.Generator().manual_seed(stream_seed("order", self._seed, self._epoch))
            order = torch.randperm(count, generator=generator).tolist()
        else:
            order = list(range(count))
        batches = [order[at : at + self.batch_size] for at in range(0, count, self.batch_size)]
        return batches[: len(self)]

    def _indexed(self, order: list[list[int]]) -> Iterator[Batch]:
        if self._workers == 0:
            for indices in order:
                yield _collate([(index, self.dataset[index]) for index in indices])
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
        while chunk := list(islice(samples, self.batch_size)):
            if len(chunk) == self.batch_size or not self._drop_last:
                yield _collate(chunk)


def loader(
    dataset: Any,
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    workers: int = 0,
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
        for name, value in (("shuffle", shuffle), ("workers", workers)):
            if value:
                raise ValueError(f"{name}: got {value}; an iterable data set is read in its own order, by one process")
    return Loader(dataset, batch_size, shuffle=shuffle, seed=seed, workers=workers, drop_last=drop_last)


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


class _Failure(NamedTuple):
    """A worker's ValueError: raised by the DataLoader itself it would come as a page of traceback."""

    message: str


class _Fetch(Dataset[Any]):
    """Whole batches by their indices."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __getitem__(self, indices: list[int]) -> Batch | _Failure:
        try:
            return _collate([(index, self._dataset[index]) for index in indices])
        except ValueError as error:
            return _Failure(str(error))


def _unwrap(fetched: Batch | _Failure) -> Batch:
    if isinstance(fetched, _Failure):
        raise ValueError(fetched.message)
    return fetched


def _as_it_is(fetched: Any) -> Any:
    return fetched


def _collate(samples: Sequence[tuple[int, Any]]) -> Batch:
    parts = [_sample(position, sample) for position, sample in samples]
    return Batch(
        images=stack([(index, image) for image, _, index in parts]),
        labels=torch.tensor([label for _, label, _ in parts], dtype=torch.int64),
        indices=torch.tensor([index for _, _, index in parts], dtype=torch.int64),
    )


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
