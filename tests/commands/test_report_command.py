from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignfast.commands.report import report_command
from alignfast.evaluation.matrix_result import TransferMatrix
from alignfast.geometry.result import GeometryResult
from tests.evaluation.matrices import build
from tests.geometry.results import build as geometry_of

GEOMETRY = geometry_of(others=(), points=("clean",), images=0, n=12)


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    for name in ("transfer", "geometry"):
        (tmp_path / name).mkdir()
    build({"aligned": 0.1}, n=60).save(tmp_path / "transfer" / "matrix.json")
    GEOMETRY.save(tmp_path / "geometry" / "geometry.json")
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_both_are_read_and_reported(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = inputs / "out"
    report_command(out, transfer=inputs / "transfer", geometry=inputs / "geometry")
    assert TransferMatrix.load(out / "matrix.json").to_dict() == build({"aligned": 0.1}, n=60).to_dict()
    assert GeometryResult.load(out / "geometry.json").to_dict() == GEOMETRY.to_dict()
    assert {"matrix.csv", "geometry.csv", "transfer.png", "geometry-curvature.png"} < {p.name for p in out.iterdir()}
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<h1>Transfer of adversarial examples and geometry of losses</h1>" in page
    said = capsys.readouterr().out
    assert "aligned raises the error rate of the targets" in said
    assert "aligned against vanilla at the clean image" in said
    assert f"{out / 'report.html'}" in said
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["transfer"] == str(inputs / "transfer")


@pytest.mark.parametrize(("name", "title"), [("transfer", "Transfer of"), ("geometry", "Geometry of losses")])
def test_one_of_the_two_is_enough(inputs: Path, name: str, title: str) -> None:
    report_command(inputs / "out", **{name: inputs / name})
    assert f"<h1>{title}" in (inputs / "out" / "report.html").read_text(encoding="utf-8")


def test_the_same_report_is_written_anew(inputs: Path) -> None:
    out = inputs / "out"
    report_command(out, transfer=inputs / "transfer")
    first = contents(out)
    build({"aligned": -0.1}, n=60).save(inputs / "transfer" / "matrix.json")
    report_command(out, transfer=inputs / "transfer")
    assert contents(out).keys() == first.keys()
    assert b"aligned lowers" in contents(out)["report.html"]


def test_a_folder_of_another_run_is_refused_and_left_alone(inputs: Path) -> None:
    out = inputs / "out"
    report_command(out, transfer=inputs / "transfer")
    before = contents(out)
    with pytest.raises(ValueError, match=r"out: .*different run"):
        report_command(out, geometry=inputs / "geometry")
    assert contents(out) == before
    inside = contents(inputs / "transfer")
    with pytest.raises(ValueError, match=r"out: .*different run"):
        report_command(inputs / "transfer", transfer=inputs / "transfer")
    assert contents(inputs / "transfer") == inside


def test_bad_input_is_refused_before_anything_is_written(inputs: Path) -> None:
    out = inputs / "out"
    with pytest.raises(ValueError, match="transfer, geometry: got neither"):
        report_command(out)
    with pytest.raises(FileNotFoundError, match=r"geometry: got .*transfer; allowed is a folder with geometry\.json"):
        report_command(out, geometry=inputs / "transfer")
    (inputs / "transfer" / "matrix.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"matrix: .* is not a transfer matrix"):
        report_command(out, transfer=inputs / "transfer")
    TransferMatrix(()).save(inputs / "transfer" / "matrix.json")
    with pytest.raises(ValueError, match="matrix: got no cells"):
        report_command(out, transfer=inputs / "transfer")
    assert not out.exists()
