"""What makes alignment help: one setting after another is changed, on CIFAR-10, and measured on networks never seen.

    python examples/alignment_study.py --data DIR --out DIR [--only PART ...] [--steps N] [--images N] [--seeds N ...]
    python examples/alignment_study.py --data DIR --out ANOTHER --only confirm --others --seeds 1 2 3

DIR is the folder of examples/cifar10_alignment.py. ResNet-56 is aligned; PGD on it is measured on ResNet-44, which no
setting has as a witness. A third witness and a small one are a ResNet-8 that is trained here first. What is measured is
kept in --out, one file a setting and seed, and a further call goes on from there; study.md has a row for every setting,
with the difference to the source as it was, on the same images, its 95 % bootstrap interval over images, and the least
and greatest difference among the seeds. The second call measures what did best in the first on images and seeds that
had no part in choosing it.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cifar10_alignment import MEAN, STD, ResNet, load_resnet
from torch import Tensor
from torch.nn.functional import cross_entropy

import alignfast as af
from alignfast.alignment.embeddings import EMBEDDINGS
from alignfast.data import augmented, load_dataset, loader, spread_indices
from alignfast.files import write_json, write_text
from alignfast.models.preparation import in_hardware

BATCH, CROP = 128, 0.9
# Small enough that the source as it was leaves room above it.
PGD = {"eps": 2 / 255, "alpha": 0.4 / 255, "steps": 10}
# Of the recipe that every setting changes in one way.
BASE: dict[str, Any] = {"lr": 0.02, "channels_last": True}
RESAMPLES = 4000


@dataclass(frozen=True)
class Setting:
    """part: the question that it belongs to. changes: of `AlignConfig`. witnesses: depths."""

    part: str
    changes: dict[str, Any] = field(default_factory=dict)
    witnesses: tuple[int, ...] = (20,)


SETTINGS: dict[str, Setting] = {
    "KL, one witness (ResNet-20)": Setting("base"),
    **{f"KL + {name}": Setting("embedding", {"embeddings": (EMBEDDINGS[name],)}) for name in EMBEDDINGS},
    "probabilities, MSE": Setting("loss", {"loss": "mse", "lambda_kd": 10.0}),
    "probabilities, L1": Setting("loss", {"loss": "l1", "lambda_kd": 10.0}),
    "reverse KL": Setting("loss", {"direction": "reverse"}),
    "witness ResNet-8": Setting("witness", witnesses=(8,)),
    "witness ResNet-32": Setting("witness", witnesses=(32,)),
    "ResNet-20 and 32": Setting("witnesses", witnesses=(20, 32)),
    "ResNet-8, 20 and 32": Setting("witnesses", witnesses=(8, 20, 32)),
    "ResNet-8, 20 and 32, max": Setting("witnesses", {"combine": "max"}, (8, 20, 32)),
    **{f"T = {t:g}": Setting("temperature", {"temperature": t}) for t in (1.0, 2.0, 10.0)},
    **{f"lr = {lr:g}": Setting("learning rate", {"lr": lr}) for lr in (0.001, 0.005, 0.05)},
    # At the base's rate the loss is not finite after four steps.
    "batch norm: freeze, lr = 0.002": Setting("batch norm", {"batch_norm": "freeze", "lr": 0.002}),
    "batch norm: recalibrate": Setting("batch norm", {"batch_norm": "recalibrate"}),
    "held by labels": Setting("clean accuracy", {"lambda_cls": 1.0}),
    "held by itself": Setting("clean accuracy", {"lambda_self": 0.5}),
    "float32": Setting("precision", {"precision": "fp32"}),
    "bfloat16": Setting("precision", {"precision": "bf16"}),
    "ResNet-20, T = 4": Setting("confirm"),
    "ResNet-20, T = 10": Setting("confirm", {"temperature": 10.0}),
    "ResNet-20 and 32, T = 4": Setting("confirm", witnesses=(20, 32)),
    "ResNet-20 and 32, T = 10": Setting("confirm", {"temperature": 10.0}, (20, 32)),
}


def main() -> None:
    parts = sorted({one.part for one in SETTINGS.values()})
    # Without the hardware bfloat16 is hundreds of times slower.
    fast = "bf16" if in_hardware(torch.bfloat16, torch.device("cpu")) else "fp32"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=parts, default=[part for part in parts if part != "confirm"])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--others", action="store_true", help="measure images that are not among those otherwise taken")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--precision", choices=["fp32", "bf16"], default=fast)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    test = photos(args.data, args.images, args.others)
    began = time.monotonic()
    source = load_resnet(args.data, 56)
    vanilla = kept(args.out / "vanilla.json", lambda: outcome(source, args.data, test, args.precision))
    rows = {"as it was": [vanilla]}
    for name, setting in SETTINGS.items():
        if setting.part not in args.only:
            continue
        rows[name] = []
        for seed in args.seeds:
            run = partial(measured, setting, args.data, args.steps, test, args.precision, seed)
            rows[name].append(kept(args.out / f"{name.replace(' ', '_')}.{seed}.json", run))
            print(f"{time.monotonic() - began:.0f} s {name}, seed {seed}", flush=True)
        write_text(args.out / "study.md", table(rows, vanilla))
    print((args.out / "study.md").read_text())


def photos(folder: Path, count: int, others: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Test images with labels and indices, spread over the set; with `others` as many of the rest."""
    dataset = load_dataset(folder / "test.npz", num_classes=10)
    chosen = spread_indices(len(dataset), count)
    if others:
        rest = sorted(set(range(len(dataset))) - set(chosen))
        chosen = [rest[place] for place in spread_indices(len(rest), count)]
    images, labels, indices = next(iter(loader(torch.utils.data.Subset(dataset, chosen), len(chosen))))
    return images, labels, indices


def kept(path: Path, make: Any) -> dict[str, Any]:
    if not path.exists():
        write_json(path, make())
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def measured(
    setting: Setting, folder: Path, steps: int, test: tuple[Tensor, Tensor, Tensor], precision: str, seed: int
) -> dict[str, Any]:
    train = augmented(load_dataset(folder / "train.npz", num_classes=10), (32, 32), scale=(CROP, 1.0), seed=seed)
    views = loader(train, BATCH, shuffle=True, seed=seed, drop_last=True)
    witnesses = [small(folder) if depth == 8 else load_resnet(folder, depth) for depth in setting.witnesses]
    config = af.AlignConfig(**{**BASE, "precision": precision, **setting.changes}, steps=steps, seed=seed)
    began = time.monotonic()
    model = af.align(load_resnet(folder, 56), witnesses, views, config).model
    return {"seconds": time.monotonic() - began, **outcome(model, folder, test, precision)}


def outcome(model: af.Classifier, folder: Path, test: tuple[Tensor, Tensor, Tensor], precision: str) -> dict[str, Any]:
    """Clean accuracy, and which images fool the model itself and ResNet-44."""
    images, labels, indices = test
    source = af.prepare(model, images[:8], precision)
    adv = af.attacks.PGD(source, **PGD, max_batch=BATCH)(images, labels, indices=indices)
    with torch.no_grad():
        clean = float((model(images).argmax(1) == labels).float().mean())
        wrong = [(one(adv).argmax(1) != labels).int().tolist() for one in (model, load_resnet(folder, 44))]
    return {"clean": clean, "white box": wrong[0], "target": wrong[1]}


def small(folder: Path) -> af.Classifier:
    """A ResNet-8, trained on the training images in the same way every time."""
    model = af.Classifier(ResNet(1), MEAN, STD, num_classes=10, input_size=(3, 32, 32))
    with torch.random.fork_rng():
        torch.manual_seed(8)
        for layer in model.modules():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
    train = augmented(load_dataset(folder / "train.npz", num_classes=10), (32, 32), scale=(0.6, 1.0), seed=8)
    batches = loader(train, BATCH, shuffle=True, seed=8, drop_last=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.2, momentum=0.9, nesterov=True, weight_decay=5e-4)
    epochs = 8
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches))
    model.train()
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        for images, labels, _ in batches:
            optimizer.zero_grad()
            cross_entropy(model.logits(images), labels).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def table(rows: dict[str, list[dict[str, Any]]], vanilla: dict[str, Any]) -> str:
    titles = ["setting", "error of ResNet-44", "difference", "of the seeds", "white box", "clean accuracy", "seconds"]
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)]]
    draws = np.random.default_rng(0).integers(0, len(vanilla["target"]), (RESAMPLES, len(vanilla["target"])))
    for name, seeds in rows.items():
        wrong = np.array([row["target"] for row in seeds])
        apart = 100 * (wrong - np.array(vanilla["target"]))
        low, high = np.percentile(apart.mean(0)[draws].mean(1), (2.5, 97.5))
        each = apart.mean(1)
        cells = [name, f"{100 * wrong.mean():.1f}", f"{apart.mean():+.1f} ({low:+.1f} to {high:+.1f})"]
        cells.append(f"{each.min():+.1f} to {each.max():+.1f}" if len(seeds) > 1 else "")
        cells += [f"{100 * np.mean([row[key] for row in seeds]):.1f}" for key in ("white box", "clean")]
        lines.append([*cells, f"{np.median([row['seconds'] for row in seeds]):.0f}" if "seconds" in seeds[0] else ""])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    main()
