"""`alignfast report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from alignfast.commands.options import text_of
from alignfast.evaluation import TransferMatrix
from alignfast.evaluation.findings import geometry_sentences, summary_sentences
from alignfast.evaluation.outputs import show_paths, write_results
from alignfast.evaluation.report import check_content
from alignfast.files import claim_folder
from alignfast.geometry.result import GeometryResult
from alignfast.versions import package_versions

TITLES = {
    (True, False): "Transfer of adversarial examples",
    (False, True): "Geometry of losses",
    (True, True): "Transfer of adversarial examples and geometry of losses",
}


def report_command(
    out: Annotated[Path, typer.Option(help="A new or empty folder, or that of the same report, to write it anew.")],
    transfer: Annotated[Path | None, typer.Option(help="A folder with matrix.json.")] = None,
    geometry: Annotated[Path | None, typer.Option(help="A folder with geometry.json.")] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
) -> None:
    """One page about measured transfer, a measured geometry or both: report.html, pictures, JSON and CSV."""
    if transfer is None and geometry is None:
        raise ValueError("transfer, geometry: got neither; allowed is one of them or both")
    matrix = None if transfer is None else TransferMatrix.load(_file_in("transfer", transfer, "matrix.json"))
    result = None if geometry is None else GeometryResult.load(_file_in("geometry", geometry, "geometry.json"))
    check_content(matrix, result)
    title = title or TITLES[matrix is not None, result is not None]
    run_with = {"command": "report", "transfer": text_of(transfer), "geometry": text_of(geometry), "title": title}
    folder = claim_folder(out, run_with | {"versions": package_versions()}, resume=True)
    paths = write_results(matrix, folder, geometry=result, title=title)
    console = Console()
    for sentence in [*(summary_sentences(matrix) if matrix else ()), *(geometry_sentences(result) if result else ())]:
        console.out(sentence, highlight=False)
    show_paths(paths, console)


def _file_in(name: str, folder: Path, file: str) -> Path:
    if not (folder / file).is_file():
        raise FileNotFoundError(f"{name}: got {folder}; allowed is a folder with {file}")
    return folder / file
