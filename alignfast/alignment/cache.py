"""Logits of witnesses on disk, for several passes over the same views."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import torch
from torch import Tensor

from alignfast.checks import check_count
from alignfast.files import write_json
from alignfast.models import Classifier, fingerprint

# Rows between two writes that wait for the disk; a kill loses no more than these.
ROWS_BETWEEN_FLUSHES = 4096


def witness_key(models: Sequence[Classifier], dataset: str, seed: int, precision: str) -> str:
    """32 hexadecimal digits that name the logits of witnesses.

    They change with the weights, normalisation, input size and order of the witnesses and with the other arguments.

    Args:
        models: the witnesses as they were loaded.
        dataset: says which data set and which views of it, such as the hash of its files with size and crop.
        seed: of the views.
        precision: in which the witnesses compute.
    """
    witnesses = [[fingerprint(model), model.input_size] for model in models]
    text = json.dumps({"witnesses": witnesses, "dataset": dataset, "seed": seed, "precision": precision})
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class WitnessCache:
    """Logits [W, C] of up to `count` images by data-set index, in a folder: float32, memory-mapped.

    A row counts once it has reached the disk, so a run may be killed at any moment and another go on with the same
    folder. One process writes to a file at a time; several processes have a rank, and files, each.

    Args:
        folder: made if it is not there.
        key: of what the logits are, see `witness_key`.
        count: images of the data set. shape: (W, C), witnesses and classes.
        rank: number of this process, at least 0.

    Raises:
        ValueError: files of another key, count or shape, torn files, files that another process writes to, or a folder
            that cannot be written to or has no room for count * W * C * 4 bytes.
    """

    def __init__(
        self, folder: str | os.PathLike[str], key: str, count: int, shape: tuple[int, int], rank: int = 0
    ) -> None:
        check_count("count", count)
        for size in shape:
            check_count("shape", size)
        check_count("rank", rank, low=0)
        self.count, self.shape = count, (shape[0], shape[1])
        self._description = {"key": key, "count": count, "shape": list(self.shape)}
        self._stem = Path(folder) / f"witnesses-{rank}"
        with _explained(folder):
            self._stem.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self._path("lock"))
        try:
            with _explained(folder):
                self._make_or_check()
                self._rows: Any = np.memmap(self._path("logits"), np.float32, "r+", shape=(count, *self.shape))
                self._flags: Any = np.memmap(self._path("rows"), np.uint8, "r+", shape=(count,))
            if self._flags.max() > 1:
                raise ValueError(f"cache: {self._path('rows')} is torn, it holds other bytes than 0 and 1; remove it")
        except BaseException:
            self._lock.close()
            raise
        self._there = self._flags.astype(bool)
        self._pending: list[Any] = []

    def __len__(self) -> int:
        """Rows that are there."""
        return int(self._there.sum())

    def has(self, indices: Tensor) -> bool:
        """Whether the rows of all data-set indices int64 [N] are there."""
        return bool(self._there[self._checked(indices)].all())

    def read(self, indices: Tensor) -> Tensor:
        """float32 [W, N, C] on the CPU; KeyError where a row is not there."""
        places = self._checked(indices)
        if not self._there[places].all():
            missing = places[~self._there[places]]
            raise KeyError(f"indices: {missing[:3].tolist()} are not in the cache")
        return torch.from_numpy(np.ascontiguousarray(self._rows[places].swapaxes(0, 1)))

    def store(self, indices: Tensor, logits: Tensor) -> None:
        """Add the rows of `logits` [W, N, C] that are not there; those that are there stay."""
        places = self._checked(indices)
        wanted = (self.shape[0], len(places), self.shape[1])
        if tuple(logits.shape) != wanted:
            raise ValueError(f"logits: got shape {list(logits.shape)}; allowed is {list(wanted)}")
        places, first = np.unique(places, return_index=True)
        fresh = ~self._there[places]
        rows = logits.detach().to("cpu", torch.float32).numpy().swapaxes(0, 1)
        self._rows[places[fresh]] = rows[first[fresh]]
        self._there[places[fresh]] = True
        self._pending.append(places[fresh])
        if sum(map(len, self._pending)) >= ROWS_BETWEEN_FLUSHES:
            self.flush()

    def flush(self) -> None:
        """Wait until all rows are on disk, and mark them there."""
        if not any(map(len, self._pending)):
            return
        self._rows.flush()
        self._flags[np.concatenate(self._pending)] = 1
        self._flags.flush()
        self._pending.clear()

    def close(self) -> None:
        """Flush, and let another process have the files."""
        if not self._lock.closed:
            self.flush()
            self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _path(self, suffix: str) -> Path:
        return self._stem.with_suffix(f".{suffix}")

    def _checked(self, indices: Tensor) -> Any:
        if self._lock.closed:
            raise ValueError("cache: is closed")
        places = indices.detach().cpu().numpy()
        if len(places) and not 0 <= places.min() <= places.max() < self.count:
            raise ValueError(
                f"indices: values span [{places.min()}, {places.max()}]; allowed is [0, {self.count - 1}], the rows of "
                "the cache"
            )
        return places

    def _make_or_check(self) -> None:
        sizes = {"logits": self.count * self.shape[0] * self.shape[1] * 4, "rows": self.count}
        if not self._path("json").exists():
            for suffix, size in sizes.items():
                _allocate(self._path(suffix), size)
            # Last: files without a description are no cache yet, and made anew.
            write_json(self._path("json"), self._description)
            return
        held = self._held()
        differing = [name for name, value in self._description.items() if held.get(name) != value]
        if differing:
            told = ", ".join(f"{name} {held.get(name)} instead of {self._description[name]}" for name in differing)
            raise ValueError(f"cache: {self._path('json')} describes another one: {told}; give another folder")
        for suffix, size in sizes.items():
            path = self._path(suffix)
            got = path.stat().st_size if path.exists() else None
            if got != size:
                is_there = "missing" if got is None else f"torn, with {got} bytes instead of {size}"
                raise ValueError(f"cache: {path} is {is_there}; remove {self._path('json')} to begin anew")

    def _held(self) -> dict[str, Any]:
        path = self._path("json")
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            held = None
        if not isinstance(held, dict):
            raise ValueError(f"cache: {path} is torn, it describes no cache; remove it to begin anew")
        return held


def _allocate(path: Path, size: int) -> None:
    """A file of zeros. A write to a mapped file for which the disk has no room would kill the process."""
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)


def _locked(path: Path) -> BinaryIO:
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"cache: {path} is held by another process; give another folder or rank") from None
    return file


@contextmanager
def _explained(folder: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place = os.fspath(folder)
        raise ValueError(f"cache: cannot write to {place} ({error.strerror}); give another folder") from error
