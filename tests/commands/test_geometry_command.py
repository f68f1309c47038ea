"""`alignfast geometry`: from models and photos to numbers and a page."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import alignfast as af
from alignfast import cli
from alignfast.data import load_dataset, loader
from alignfast.geometry import GeometryConfig, GeometryResult, geometry

MODEL, SIDE, CLASSES = "timm:test_resnet", 160, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints, a third one of another seed, and four photos."""
    place = tmp_path_factory.mktemp("geometry")
    for seed, name in enumerate(("a", "b", "other")):
        torch.manual_seed(seed)
        af.save_checkpoint(timm.create_model("test_resnet", num_classes=CLASSES), place / f"{name}.safetensors")
    (place / "photos" / "images").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for index in range(4):
        pixels = generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / "photos" / "images" / f"{index}.png")
    rows = "".join(f"{index}.png,{index % CLASSES}\n" for index in range(4))
    (place / "photos" / "labels.csv").write_text("filename,label\n" + rows)
    return place


def command(folder: Path, out: Path, *more: str) -> list[str]:
    models = [f"vanilla={MODEL}@{folder / 'a.safetensors'}", f"aligned={MODEL}@{folder / 'b.safetensors'}"]
    others = [f"other={MODEL}@{folder / 'other.safetensors'}"]
    start = ["geometry", "--models", *models, "--others", *others, "--num-classes", str(CLASSES)]
    where = ["--data", str(folder / "photos"), "--out", str(out)]
    return [*start, *where, "--steps", "1,2", "--lanczos", "3", "--surfaces", "0", "--limit", "3", *more]


def test_what_python_measures(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "geo"
    assert cli.run(command(folder, out, "--measure", "loss", "--measure", "curvature", "--eps", "8/255")) == 0
    assert f"{out / 'report.html'}" in capsys.readouterr().out
    found = GeometryResult.load(out / "geometry.json")
    models = {
        name: af.load_model(MODEL, checkpoint=folder / f"{name}.safetensors", num_classes=CLASSES)
        for name in ("a", "b", "other")
    }
    photos = load_dataset(folder / "photos", image_size=(SIDE, SIDE), num_classes=CLASSES)
    images = loader(torch.utils.data.Subset(photos, found.indices.tolist()), 16)
    config = GeometryConfig(eps=8 / 255, steps=(1, 2), lanczos=3, measures=("loss", "curvature"), surfaces=0)
    pair = {"vanilla": models["a"], "aligned": models["b"]}
    wanted = geometry(pair, images, config, others={"other": models["other"]})
    assert [(row.model, row.other, row.point, row.measure) for row in found.rows] == [
        (row.model, row.other, row.point, row.measure) for row in wanted.rows
    ]
    for one, other in zip(found.rows, wanted.rows, strict=True):
        np.testing.assert_allclose(one.values, other.values, rtol=1e-3, atol=1e-5)
    assert len(found.indices) == 3
    run = json.loads((out / "config.json").read_text())
    assert run["models"]["vanilla"].startswith(MODEL)
    assert run["eps"] == pytest.approx(8 / 255)
    assert set(run["fingerprints"]["others"]) == {"other"}
    assert {"geometry.csv", "report.html", "geometry-curvature.png"} <= {path.name for path in out.iterdir()}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--eps", "four"], "eps: got 'four'; allowed is a number or a fraction"),
        (["--steps", "2,x"], "steps: got '2,x'; allowed are whole numbers such as 10,20"),
        (["--steps", "5,2"], "rising"),
        (["--attack", "pgdd"], "attack.name: got 'pgdd'"),
        (["--attack", "admix"], "mixes in other images"),
        (["--measure", "curvatur"], "unknown measure 'curvatur' (did you mean 'curvature'?)"),
        (["--baseline", "vanila"], "baseline: got 'vanila' (did you mean 'vanilla'?)"),
        (["--second-derivatives", "some"], "second_derivatives: got 'some'"),
        (["--others", "x=timm:nothing_of_that_name"], "nothing_of_that_name"),
    ],
)
def test_bad_input(
    more: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "geo"
    assert cli.run(command(folder, out, *more)) == 2
    line = capsys.readouterr().err
    assert line.startswith("alignfast: ")
    assert message in line
    assert not out.exists()


def test_another_run_is_left_alone(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "geo").mkdir()
    (tmp_path / "geo" / "notes.txt").write_text("mine")
    assert cli.run(command(folder, tmp_path / "geo")) == 2
    assert "already holds files" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "geo").iterdir()] == ["notes.txt"]
