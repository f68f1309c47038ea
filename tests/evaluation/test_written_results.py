from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from alignfast.evaluation.matrix_result import TransferMatrix
from alignfast.evaluation.outputs import write_results
from alignfast.geometry.result import GeometryResult
from tests.evaluation.matrices import build
from tests.geometry.results import build as geometry_of


def test_a_matrix_leaves_its_numbers_pictures_and_page(tmp_path: Path) -> None:
    matrix = build({"aligned": 0.1})
    paths = write_results(matrix, tmp_path, title="x")
    assert [path.name for path in paths] == ["matrix.json", "matrix.csv", "transfer.png", "bars.png", "report.html"]
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    assert TransferMatrix.load(paths[0]) == matrix
    assert len(paths[1].read_text(encoding="utf-8").splitlines()) == 1 + len(matrix.cells)
    page = paths[-1].read_text(encoding="utf-8")
    assert "matrix.json, matrix.csv, transfer.png, bars.png" in page


def test_a_geometry_leaves_its_own(tmp_path: Path) -> None:
    geometry = geometry_of(points=("clean",), images=1, n=12)
    paths = write_results(None, tmp_path, geometry=geometry, title="x")
    names = [path.name for path in paths]
    assert names[:2] == ["geometry.json", "geometry.csv"]
    assert {"geometry-curvature.png", "geometry-surfaces.png", "geometry-examples.png"} < set(names)
    assert names[-1] == "report.html"
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    assert GeometryResult.load(paths[0]).estimates == geometry.estimates
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths if path.suffix == ".png")


def test_nothing_is_written_where_there_is_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got no estimates"):
        write_results(build({}), tmp_path, geometry=replace(geometry_of(n=4), estimates=()), title="x")
    assert list(tmp_path.iterdir()) == []
