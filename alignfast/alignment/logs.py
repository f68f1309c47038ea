"""What a run says of its steps while it goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from alignfast.files import write_text

Entry = Mapping[str, Any]


class Log(Protocol):
    def begin(self, history: Sequence[Entry]) -> None:
        """A run begins, or goes on after the steps of `history`; whatever is there of later ones is gone."""

    def add(self, entries: Sequence[Entry], images_per_second: float) -> None:
        """More steps are done, at this rate."""

    def close(self) -> None:
        """No more are to come."""


class JsonLines:
    """A line of JSON for each step, in the file `path`."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def begin(self, history: Sequence[Entry]) -> None:
        write_text(self.path, _lines(history))

    def add(self, entries: Sequence[Entry], images_per_second: float) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_lines(entries))

    def close(self) -> None:
        pass


class TensorBoard:
    """Scalars of each step for TensorBoard, in `folder`.

    Raises:
        ModuleNotFoundError: tensorboard is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("tensorboard: not installed; pip install 'alignfast[tensorboard]'") from error
        self._folder, self._make = folder, SummaryWriter
        self._writer: Any = None

    def begin(self, history: Sequence[Entry]) -> None:
        # What an interrupted run wrote after its last snapshot is hidden from here on.
        self._writer = self._make(str(self._folder), purge_step=len(history) + 1)

    def add(self, entries: Sequence[Entry], images_per_second: float) -> None:
        for entry in entries:
            for name, value in entry.items():
                if name != "step" and value is not None:
                    self._writer.add_scalar(name, value, entry["step"])
        self._writer.add_scalar("images/s", images_per_second, entries[-1]["step"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _lines(entries: Sequence[Entry]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)
