"""What a run leaves behind: the matrix as JSON, two pictures and the page that holds it all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from alignfast.evaluation.matrix_result import TransferMatrix
from alignfast.evaluation.plots import bars, heat_map, save_figure
from alignfast.evaluation.report import Section, write_report


def show(matrix: TransferMatrix, paths: Sequence[Path], console: Console) -> None:
    """Print the matrix and where it was written."""
    if console.is_terminal:
        console.print(matrix.table())
    else:
        # Text that is piped must not be folded at the width of a terminal that is not there.
        console.out(matrix.text(), highlight=False)
    console.out(f"written: {', '.join(map(str, paths))}", highlight=False)


def write_results(matrix: TransferMatrix, folder: Path, *, title: str, extra: Sequence[Section] = ()) -> list[Path]:
    """Write matrix.json, transfer.png, bars.png and report.html into `folder`, each whole or not at all."""
    paths = [folder / name for name in ("matrix.json", "transfer.png", "bars.png", "report.html")]
    matrix.save(paths[0])
    save_figure(heat_map(matrix), paths[1])
    save_figure(bars(matrix), paths[2])
    write_report(matrix, paths[3], title=title, extra=extra)
    return paths
