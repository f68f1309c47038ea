"""What a run leaves behind: the numbers as JSON and CSV, pictures, and the page that holds it all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from alignfast.evaluation.matrix_result import TransferMatrix
from alignfast.evaluation.plots import bars, heat_map, save_figure
from alignfast.evaluation.report import Section, check_content, report_styles, write_report
from alignfast.geometry.pictures import draw
from alignfast.geometry.result import GeometryResult


def show(matrix: TransferMatrix, paths: Sequence[Path], console: Console) -> None:
    """Print the matrix and where it was written."""
    if console.is_terminal:
        console.print(matrix.table())
    else:
        # Text that is piped must not be folded at the width of a terminal that is not there.
        console.out(matrix.text(), highlight=False)
    show_paths(paths, console)


def show_paths(paths: Sequence[Path], console: Console) -> None:
    """Print what was written."""
    console.out(f"written: {', '.join(map(str, paths))}", highlight=False)


def write_results(
    matrix: TransferMatrix | None,
    folder: Path,
    *,
    geometry: GeometryResult | None = None,
    title: str,
    extra: Sequence[Section] = (),
) -> list[Path]:
    """Write what there is of a matrix and a geometry into `folder`, each file whole or not at all.

    Of a matrix: matrix.json, matrix.csv, transfer.png and bars.png. Of a geometry: geometry.json, geometry.csv and a
    geometry-NAME.png for each picture of `alignfast.geometry.pictures.draw`. Last report.html, about both.

    Returns:
        the files in the order in which they were written.

    Raises:
        ValueError: neither of the two, a matrix without cells, or a geometry without estimates; nothing is written.
    """
    check_content(matrix, geometry)
    styles = report_styles(matrix, geometry)
    data: list[Path] = []
    pictures: list[Path] = []
    if matrix is not None:
        data += [folder / "matrix.json", folder / "matrix.csv"]
        pictures += [folder / "transfer.png", folder / "bars.png"]
        matrix.save(data[0])
        matrix.save_csv(data[1])
        save_figure(heat_map(matrix), pictures[0])
        save_figure(bars(matrix, styles=styles), pictures[1])
    if geometry is not None:
        data += [folder / "geometry.json", folder / "geometry.csv"]
        geometry.save(data[-2])
        geometry.save_csv(data[-1])
        for drawing in draw(geometry, styles):
            pictures.append(folder / f"geometry-{drawing.name}.png")
            save_figure(drawing.figure, pictures[-1])
    page = folder / "report.html"
    names = [path.name for path in [*data, *pictures]]
    write_report(matrix, page, geometry=geometry, title=title, extra=extra, beside=names)
    return [*data, *pictures, page]
