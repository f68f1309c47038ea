"""Kill an alignment at random moments, go on each time, and compare it with one that was left alone.

    python examples/interrupted_runs.py [--kills N] [--seed S] [--out DIR]

Two small networks of random weights, one aligned to the other on random images by `alignfast align`, so that nothing
is needed but the package. The process is killed with SIGKILL, after which no code of its own can run. In the end the
weights and the history must equal those of the run that was left alone, byte for byte, and no other file may have
changed; the exit code is 1 if not.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch

from alignfast.models import save_checkpoint

MODEL, CLASSES, SIDE, COUNT = "timm:test_resnet", 4, 160, 48
RESULTS = ("aligned.safetensors", "history.jsonl", "clean.json", "config.json")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = args.out or Path(made)
        return compare(folder, args.kills, args.epochs, random.Random(args.seed))


def compare(folder: Path, kills: int, epochs: int, drawn: random.Random) -> int:
    materials(folder)
    before = {path: digest(path) for path in folder.iterdir()}
    began = time.monotonic()
    if started(folder, "whole", epochs).wait() != 0:
        raise SystemExit("the run that was left alone failed")
    length = time.monotonic() - began
    print(f"left alone: {length:.1f} s")
    killed = 0
    while killed < kills:
        process = started(folder, "killed", epochs)
        # From before its first step to beyond its last.
        moment = drawn.uniform(0.1, 1.1) * length
        try:
            process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        killed += 1
        found = sorted(path.name for path in (folder / "killed" / "snapshots").glob("step-*"))
        print(f"{killed}: killed after {moment:.1f} s, snapshots {', '.join(found) or 'none'}", flush=True)
        if process.returncode == 0 and outcome(folder) is not None:
            # A run that had ended begins anew, so that every kill meets one that goes on.
            if not equal(folder):
                return 1
            for path in sorted((folder / "killed").rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
    if started(folder, "killed", epochs).wait() != 0:
        print("the run that was killed did not go on")
        return 1
    if {path: digest(path) for path in before} != before:
        print("other files have changed")
        return 1
    return 0 if equal(folder) else 1


def materials(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, seed in (("source", 0), ("witness", 1)):
        torch.manual_seed(seed)
        save_checkpoint(timm.create_model("test_resnet", num_classes=CLASSES), folder / f"{name}.safetensors")
    images = np.random.default_rng(0).integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8)
    np.savez(folder / "data.npz", images=images, labels=np.arange(COUNT) % CLASSES)


def started(folder: Path, out: str, epochs: int) -> subprocess.Popen[bytes]:
    options = ["--source-checkpoint", "source.safetensors", "--witness-checkpoint", "witness.safetensors"]
    options += ["--data", "data.npz", "--out", out, "--num-classes", str(CLASSES), "--batch-size", "8", "--lr", "0.01"]
    options += ["--epochs", str(epochs), "--checkpoint-every", "3", "--resume"]
    command = [sys.executable, "-m", "alignfast", "align", "--source", MODEL, "--witness", MODEL, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def outcome(folder: Path) -> Path | None:
    path = folder / "killed" / "aligned.safetensors"
    return path if path.exists() else None


def equal(folder: Path) -> bool:
    differing = [name for name in RESULTS if digest(folder / "whole" / name) != digest(folder / "killed" / name)]
    leftover = [path.name for path in (folder / "killed").iterdir() if path.name.startswith(".")]
    print("equal to the run that was left alone" if not differing else f"different: {', '.join(differing)}")
    if leftover:
        print(f"left behind: {', '.join(leftover)}")
    return not differing


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


if __name__ == "__main__":
    sys.exit(main())
