"""Files of runs: read, and kept one beside the other in a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# UTC, so that names sort by time.
STAMP = "%Y%m%dT%H%M%S%fZ"
# What a report has; one of an earlier release may lack the parts that came later.
LATER: dict[str, Any] = {"limits": None, "skipped": {}, "memory": []}
LATER_OF_CASES: dict[str, Any] = {"of_gemm": None, "limit": "", "expected": {}, "of_peak": None, "fits_l2": False}


def read_report(path: Path, argument: str) -> dict[str, Any]:
    """What --json or --history wrote.

    Raises:
        ValueError: about `argument`, where it cannot be read or no run wrote it.
    """
    try:
        report: dict[str, Any] = LATER | json.loads(path.read_text(encoding="utf-8"))
        report["cases"] = [LATER_OF_CASES | case for case in report["cases"]]
        seconds_of(report)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{argument}: cannot use {path} ({reason}); allowed is a file that --json wrote") from error
    return report


def seconds_of(report: Mapping[str, Any]) -> dict[str, float]:
    """What ours took, by the name of the case."""
    return {case["name"]: float(case["seconds"]["ours"]["median"]) for case in report["cases"] if case["seconds"]}


def check_new(argument: str, path: Path) -> None:
    """Before many minutes of measuring, not after them."""
    if path.exists():
        raise ValueError(f"{argument}: {path} exists; give a new file")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{argument}: cannot write to {path.parent}; give a file in a writable folder")


def make_folder(argument: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{argument}: cannot make {folder} ({error.strerror}); give a writable folder") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{argument}: cannot write to {folder}; give a writable folder")


def newest(folder: Path) -> Path | None:
    """The latest run that was kept there."""
    return max(folder.glob("*Z.json"), default=None)


def dated(folder: Path) -> Path:
    """A file for a run that ends now, after all that are there."""
    return folder / f"{datetime.now(UTC).strftime(STAMP)}.json"
