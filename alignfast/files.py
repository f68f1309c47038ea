"""Files that are whole or absent: temporary name first, then an atomic rename."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

RUN_FILE = "config.json"


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, remove it on any failure.

    The temporary file lies in the same folder, so the rename is atomic, and keeps the suffix of `path`, so that
    writers which choose a format by suffix work.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp creates 0600; results are meant to be read by whoever the umask admits.
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: object) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=False) + "\n")


def claim_folder(folder: str | os.PathLike[str], run: Mapping[str, Any], *, resume: bool = False) -> Path:
    """Make `folder` the output of one run and write what it was run with to `config.json` in it.

    A folder that does not exist or is empty is taken, and so is one that holds nothing but the `config.json` of the
    same run, which stopped before it had a result. Any other is refused, unless `resume` is true and its `config.json`
    equals `run`.

    Raises:
        ValueError: the folder is in use by another run, is a file, or cannot be read or written; nothing
            is changed then.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out: {folder} is a file; give a folder")
    wanted = json.loads(json.dumps(run))
    try:
        held = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    except OSError as error:
        raise ValueError(f"out: cannot read {folder} ({error.strerror}); give a writable folder") from error
    if held:
        if not resume and held != {RUN_FILE}:
            raise ValueError(f"out: {folder} already holds files; give a new or an empty folder")
        there = read_run(folder)
        if there != wanted:
            what = differences(there, wanted) if isinstance(there, dict) else f"no {RUN_FILE} that can be read"
            raise ValueError(
                f"out: {folder} holds the results of a different run ({what}); give a new or an empty folder"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RUN_FILE, wanted)
    except OSError as error:
        raise ValueError(f"out: cannot write to {folder} ({error.strerror}); give a writable folder") from error
    return folder


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What differs between the settings of two runs, as "name: a there, b here"; empty if nothing does."""
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    return "; ".join(f"{name}: {there.get(name)!r} there, {here.get(name)!r} here" for name in names)


def read_run(folder: Path) -> Any:
    """What the run in `folder` was started with, or None where that cannot be told."""
    try:
        return json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
