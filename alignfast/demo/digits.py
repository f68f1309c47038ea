"""The default demonstration: scikit-learn's digits, four small networks, three seeds."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import alignfast
from alignfast.alignment import AlignConfig
from alignfast.attacks import create
from alignfast.data import Loader, loader
from alignfast.demo.pictures import examples
from alignfast.evaluation import TransferMatrix, transfer_matrix
from alignfast.evaluation.outputs import show, write_results
from alignfast.evaluation.pooling import pool
from alignfast.evaluation.report import Section
from alignfast.models import Classifier
from alignfast.progress import progress

SEEDS = (0, 1, 2)
TRAIN_IMAGES = 1197
EPOCHS, BATCH_SIZE = 15, 64
EPS, ALPHA, STEPS = 0.15, 0.015, 20
ATTACKS = {"PGD": "pgd", "MI": "mifgsm", "DI": "difgsm"}
ALIGN = AlignConfig(lr=0.03, epochs=10, clip_norm=1.0, batch_norm="freeze")
SHOWN = 8
PARTS = 6

Split = tuple[Tensor, Tensor]


def settings() -> dict[str, Any]:
    """What the demonstration runs with."""
    return {
        "preset": "digits",
        "data": "scikit-learn digits, 1,797 images of 8 x 8 pixels",
        "seeds": list(SEEDS),
        "source": "4 convolutions with batch norm",
        "witness": "2 convolutions with batch norm",
        "targets": {"mlp": "2-layer perceptron", "cnn": "3 convolutions without batch norm"},
        "training": {"images": TRAIN_IMAGES, "epochs": EPOCHS, "batch_size": BATCH_SIZE},
        "alignment": asdict(ALIGN) | {"batch_size": BATCH_SIZE},
        "attacks": _attacks(),
    }


def _attacks() -> dict[str, dict[str, Any]]:
    return {label: {"name": name, "eps": EPS, "alpha": ALPHA, "steps": STEPS} for label, name in ATTACKS.items()}


def run(out: Path, console: Console) -> TransferMatrix:
    """Train, align, attack and report into `out`; returns the matrix pooled over the seeds."""
    began = time.monotonic()
    with progress("digits", PARTS * len(SEEDS), "parts", shown=not console.quiet) as advance:
        runs = [_one_seed(seed, advance) for seed in SEEDS]
    matrices = [matrix for matrix, _ in runs]
    matrix = pool(matrices)
    extra = [runs[0][1], _by_seed(matrices), Section("Settings of the demonstration", facts=settings())]
    paths = write_results(matrix, out, title="Transfer before and after alignment: digits", extra=extra)
    show(matrix, paths, console)
    console.out(f"{len(SEEDS)} seeds in {time.monotonic() - began:.0f} s", highlight=False)
    return matrix


def _one_seed(seed: int, advance: Any) -> tuple[TransferMatrix, Section]:
    train, test = _split(seed)
    models: dict[str, Classifier] = {}
    for number, (name, network) in enumerate(_networks().items()):
        models[name] = _trained(network, train, seed=10 * seed + number)
        advance(1, f"seed {seed}: trained the {name}")
    views = loader(TensorDataset(*train), BATCH_SIZE, shuffle=True, seed=seed)
    config = AlignConfig(**asdict(ALIGN) | {"seed": seed})
    aligned = alignfast.align(models["source"], models["witness"], views, config).model
    advance(1, f"seed {seed}: aligned the source")
    sources = {"vanilla": models["source"], "aligned": aligned}
    targets = {name: models[name] for name in ("mlp", "cnn")}
    attacks = {label: attack | {"seed": seed} for label, attack in _attacks().items()}
    data: Loader = loader(TensorDataset(*test), len(test[0]))
    matrix = transfer_matrix(sources, targets, attacks, data)
    advance(1, f"seed {seed}: attacked {len(test[0])} images")
    return matrix, _pictures(sources, models["cnn"], test)


def _split(seed: int) -> tuple[Split, Split]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # Eight-bit levels, as images have that are written and read.
    images = (torch.tensor(digits.images / 16, dtype=torch.float32)[:, None] * 255).round() / 255
    labels = torch.tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, test = order[:TRAIN_IMAGES], order[TRAIN_IMAGES:]
    return (images[train], labels[train]), (images[test], labels[test])


def _networks() -> dict[str, Any]:
    return {
        "source": lambda: _convolutions((32, 32, 64, 64), batch_norm=True),
        "witness": lambda: _convolutions((16, 32), batch_norm=True),
        "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
        "cnn": lambda: _convolutions((24, 24, 48), batch_norm=False),
    }


def _convolutions(widths: tuple[int, ...], *, batch_norm: bool) -> nn.Module:
    """3 x 3 convolutions, halved in size after every second one, and a linear layer over 2 x 2 means."""
    layers: list[nn.Module] = []
    previous = 1
    for number, width in enumerate(widths, 1):
        layers += [nn.Conv2d(previous, width, 3, padding=1), nn.BatchNorm2d(width)][: 2 if batch_norm else 1]
        layers += [nn.ReLU(), nn.MaxPool2d(2)][: 1 if number % 2 else 2]
        previous = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * previous, 10))


def _trained(network: Any, train: Split, seed: int) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = network()
        batches = loader(TensorDataset(*train), BATCH_SIZE, shuffle=True, seed=seed, drop_last=True)
        optimizer = torch.optim.AdamW(module.parameters(), 4e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=EPOCHS * len(batches))
        for epoch in range(EPOCHS):
            batches.set_epoch(epoch)
            for images, labels, _ in batches:
                optimizer.zero_grad()
                cross_entropy(module(images), labels).backward()
                optimizer.step()
                schedule.step()
    return Classifier(module, num_classes=10, input_size=(1, 8, 8)).eval()


def _pictures(sources: dict[str, Classifier], target: Classifier, test: Split) -> Section:
    images, labels = test[0][:SHOWN], test[1][:SHOWN]
    rows = {}
    for name, source in sources.items():
        adversarial = create(source=source, **_attacks()["MI"])(images, labels)
        rows[name] = (adversarial, _said(target, adversarial))
    picture = examples(images, _said(target, images), rows, EPS)
    return Section(
        "What the attack does",
        "MI-FGSM on the first test images of seed 0. The target is the network with 3 convolutions.",
        pictures=[picture],
    )


@torch.no_grad()
def _said(model: Classifier, images: Tensor) -> list[str]:
    return [str(int(label)) for label in model.logits(images).argmax(1)]


def _by_seed(matrices: list[TransferMatrix]) -> Section:
    rows = [
        [seed, comparison.attack, comparison.target, *_points(matrix, comparison.attack, comparison.target)]
        for seed, matrix in zip(SEEDS, matrices, strict=True)
        for comparison in matrix.comparisons
    ]
    text = "Error rate in %, seed by seed. Each seed trains all four networks and splits the images anew."
    return Section("By seed", text, header=("seed", "attack", "target", "vanilla", "aligned"), rows=rows)


def _points(matrix: TransferMatrix, attack: str, target: str) -> tuple[str, str]:
    vanilla, aligned = (float(matrix.error(source, attack, target)) for source in ("vanilla", "aligned"))
    return f"{100 * vanilla:.1f}", f"{100 * aligned:.1f}"
