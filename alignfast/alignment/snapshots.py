"""The state of a run on disk, so that an interrupted one goes on where it was."""

from __future__ import annotations

import hashlib
import io
import os
import re
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alignfast.checks import check_count, check_number
from alignfast.distributed import on_main
from alignfast.files import differences, replacing

NAME = re.compile(r"step-(\d{9})\.pt")
# A snapshot begins with this and the SHA-256 of all that follows, so that a torn one is known as such.
MAGIC = b"alignfast snapshot 1\n"
DIGEST = hashlib.sha256().digest_size


@dataclass(frozen=True)
class Snapshots:
    """Where and how often a run writes its state.

    Args:
        folder: of nothing else; made when the first is written.
        every: steps from one to the next; None for none by their number.
        minutes: time from one to the next; None for none by the clock.
        keep: how many of the last are kept, at least 1. A torn one is passed over when a run goes on, hence 2.

    Raises:
        ValueError: a number outside its range, or neither every nor minutes.
    """

    folder: str | os.PathLike[str]
    every: int | None = 500
    minutes: float | None = None
    keep: int = 2

    def __post_init__(self) -> None:
        if self.every is not None:
            check_count("every", self.every)
        if self.minutes is not None:
            check_number("minutes", self.minutes, low=0.0, open_low=True)
        if self.every is None and self.minutes is None:
            raise ValueError("every, minutes: got None for both; allowed is at least one of them")
        check_count("keep", self.keep)

    def due(self, step: int) -> bool:
        """Whether one is to be written after this step, by its number."""
        return self.every is not None and step % self.every == 0

    def overdue(self, written: float) -> bool:
        """Whether one is to be written by the clock, the last having been written at `written` of time.monotonic."""
        return self.minutes is not None and time.monotonic() - written >= 60 * self.minutes

    def write(self, step: int, state: Mapping[str, Any]) -> None:
        """Write the state after `step`, whole or not at all, and remove all but the last few."""
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        content = buffer.getbuffer()
        folder = Path(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / f"step-{step:09d}.pt") as temporary, temporary.open("wb") as file:
            file.write(MAGIC)
            file.write(hashlib.sha256(content).digest())
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        for path in list(self._newest_first())[self.keep :]:
            path.unlink(missing_ok=True)

    def latest(self, run: Mapping[str, Any]) -> dict[str, Any] | None:
        """The newest state that is whole, the same on all ranks; None where there is none.

        A torn file is passed over with a warning that names it and the reason.

        Raises:
            ValueError: the state of another run, that is, with another `run` in it, naming what differs.
        """
        whole: list[dict[str, Any]] = []
        path = on_main(lambda: self._newest_whole(whole))
        if path is None:
            return None
        # The other ranks read for themselves what rank 0 has read and chosen.
        state = whole[0] if whole else read_snapshot(path)
        differing = differences(state.get("run", {}), run)
        if differing:
            raise ValueError(f"resume: {path} is of another run ({differing}); allowed is the run that wrote it")
        return state

    def _newest_whole(self, whole: list[dict[str, Any]]) -> Path | None:
        """Where it is; its state is added to `whole`."""
        for path in Path(self.folder).glob(".step-*.pt"):
            # Left by a process that was killed while it wrote.
            path.unlink(missing_ok=True)
        for path in self._newest_first():
            try:
                whole.append(read_snapshot(path))
            except ValueError as error:
                warnings.warn(f"{error}; the one before it is taken", stacklevel=2)
            else:
                return path
        return None

    def _newest_first(self) -> Iterator[Path]:
        folder = Path(self.folder)
        found = [path for path in folder.iterdir() if NAME.fullmatch(path.name)] if folder.is_dir() else []
        yield from sorted(found, reverse=True)


def read_snapshot(path: Path) -> dict[str, Any]:
    """The state in `path`, on the CPU. Raises ValueError where it is torn or no snapshot."""
    content = path.read_bytes()
    head = len(MAGIC) + DIGEST
    if not content.startswith(MAGIC) or len(content) < head:
        raise ValueError(f"snapshot: {path} is not one, or torn at its beginning")
    if hashlib.sha256(memoryview(content)[head:]).digest() != content[len(MAGIC) : head]:
        raise ValueError(f"snapshot: {path} is torn: its bytes do not have the sum that was written with them")
    state: dict[str, Any] = torch.load(io.BytesIO(content[head:]), map_location="cpu", weights_only=True)
    return state
