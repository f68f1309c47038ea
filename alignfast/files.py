"""Files that are whole or absent: temporary name first, then an atomic rename."""

from __future__ import annotations

import json
import os
import secrets
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
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(8)}{path.suffix}")
    # Created here and not by tempfile, as results are meant to be read by whoever the umask admits, and the umask
    # itself cannot be read without changing it for all threads.
    temporary.touch(exist_ok=False)
    try:
        yield temporary
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


def read_json(name: str, path: str | os.PathLike[str]) -> Any:
    """What NAME.json holds; ValueError that names it where it cannot be read or is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{name}: cannot read {path} ({error.strerror}); give a {name}.json") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: {path} is not JSON ({error}); give a {name}.json") from error


def check_unused(folder: str | os.PathLike[str]) -> None:
    """Refuse by ValueError what `claim_folder` would refuse without `resume`, as far as that can be told beforehand."""
    if _held(Path(folder)) - {RUN_FILE}:
        raise ValueError(f"out: {folder} already holds files; give a new or an empty folder")


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
    wanted = json.loads(json.dumps(run))
    if _held(folder):
        if not resume:
            check_unused(folder)
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


def _held(folder: Path) -> set[str]:
    """The names of what is in a folder, which need not be there."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out: {folder} is a file; give a folder")
    try:
        return {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    except OSError as error:
        raise ValueError(f"out: cannot read {folder} ({error.strerror}); give a writable folder") from error


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
