"""`alignfast transfer`, killed at random moments, after which no code of its own can run."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

from alignfast.models import save_checkpoint

ROOT = Path(__file__).parent.parent
MODEL, SIDE, CLASSES, COUNT, KILLS = "timm:test_resnet", 64, 3, 24, 10
KEPT = ("adversarial", "parts", "matrix.json", "config.json")


def materials(folder: Path) -> Path:
    """Photos, two networks, and a matrix file."""
    generator = np.random.default_rng(0)
    for index in range(COUNT):
        pixels = generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        path = folder / "photos" / str(index % CLASSES) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        path = folder / f"{seed}.safetensors"
        save_checkpoint(timm.create_model("test_resnet", num_classes=CLASSES), path)
        models.append({"model": MODEL, "checkpoint": str(path), "num_classes": CLASSES, "input_size": [3, SIDE, SIDE]})
    content = {
        "data": str(folder / "photos"),
        "sources": {"vanilla": models[0], "other": models[1]},
        "targets": {"t": models[1]},
        "attacks": {"di": {"name": "difgsm", "steps": 8}},
        "budgets": ["4/255", "8/255"],
        "defences": {"jpeg": {"name": "jpeg"}, "noise": {"name": "smoothing", "samples": 4}},
        "defend": "all",
        "qualified": True,
        "precision": "auto",
        "batch_size": 4,
    }
    (folder / "matrix.yaml").write_text(yaml.safe_dump(content))
    return folder / "matrix.yaml"


def started(config: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "alignfast", "transfer", "--config", str(config), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)


def finished(config: Path, out: Path) -> None:
    process = started(config, out)
    said = process.communicate()[1]
    assert process.returncode == 0, said


def contents(folder: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if name.startswith(KEPT)}


def files(folder: Path) -> int:
    return sum(len(names) for part in ("adversarial", "parts") for _, _, names in os.walk(folder / part))


def killed_at(config: Path, out: Path, count: int, delay: float) -> None:
    """Kill a run so many seconds after so many files have come to be."""
    process = started(config, out)
    while files(out) < count:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_matrix_that_is_killed_again_and_again(tmp_path: Path) -> None:
    """Files are those of a run that was left alone, byte for byte."""
    config, drawn = materials(tmp_path), random.Random(0)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finished(config, whole)
    # Forms may be as fast as each other, so a run that found its own could be another one.
    shutil.copytree(whole / "parts" / "forms", killed / "parts" / "forms")
    shutil.copy(whole / "config.json", killed)
    # The last outcomes come faster than a process can be told to end.
    for count in sorted(drawn.sample(range(1, files(whole) - 20), KILLS)):
        killed_at(config, killed, count, drawn.uniform(0, 0.1))
        assert not (killed / "matrix.json").exists()
    finished(config, killed)
    expected, found = contents(whole), contents(killed)
    assert found.keys() == expected.keys()
    for name, data in expected.items():
        assert found[name] == data, name
    assert not [path for path in killed.rglob("*") if path.name.startswith(".")]
