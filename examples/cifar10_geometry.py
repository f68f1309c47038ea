"""What alignment does to the loss of a CIFAR-10 ResNet-56: one page with its geometry and its transfer.

    python examples/cifar10_geometry.py --data DIR --out DIR [--images N] [--seed N]

DATA is the folder of examples/cifar10_alignment.py. ResNet-56 is aligned to ResNet-20, and both are measured on test
images against the witness and against ResNet-32 and ResNet-44, which no training saw. --out gets the aligned weights,
report.html, the pictures, and all numbers as JSON and CSV; a further call with the same settings goes on from what is
there. Under 20 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from cifar10_alignment import PGD, load_resnet
from rich.console import Console
from torch import nn
from torch.utils.data import Subset

import alignfast as af
from alignfast.data import augmented, load_dataset, loader, spread_indices
from alignfast.evaluation.findings import geometry_sentences, summary_sentences
from alignfast.evaluation.outputs import write_results
from alignfast.files import claim_folder
from alignfast.geometry import GeometryConfig, GeometryResult, geometry
from alignfast.models import BitDepth, Defended, Jpeg

BATCH, TRAINED, CROP = 100, 128, 0.9
RECIPE = {"lr": 0.02, "steps": 200}
ATTACKS = {"pgd": PGD, "mi": {**PGD, "name": "mifgsm"}}
DEFENCES = {"JPEG 75": Jpeg(75), "4 bits": BitDepth(4)}
# Where transfer is not complete, so that sources can be told apart.
SMALL = {"eps": 2 / 255, "alpha": 0.5 / 255}


def aligned_model(folder: Path, kept: Path, seed: int) -> af.Classifier:
    """ResNet-56 aligned to ResNet-20, from an earlier call where there was one."""
    model = load_resnet(folder, 56)
    if kept.is_file():
        af.load_checkpoint(model, kept)
        return model.eval()
    train = augmented(load_dataset(folder / "train.npz", num_classes=10), (32, 32), scale=(CROP, 1.0), seed=seed)
    views = loader(train, TRAINED, shuffle=True, seed=seed, drop_last=True)
    config = af.AlignConfig(**RECIPE, seed=seed)
    aligned = af.align(model, load_resnet(folder, 20), views, config, progress=True).model
    af.save_checkpoint(aligned, kept, {"recipe": json.dumps({**RECIPE, "seed": seed})})
    return aligned.eval()


def measured_geometry(
    models: dict[str, nn.Module], others: dict[str, nn.Module], test: Subset, kept: Path, seed: int
) -> GeometryResult:
    """From an earlier call where there was one."""
    if kept.is_file():
        return GeometryResult.load(kept)
    result = geometry(models, loader(test, BATCH), GeometryConfig(seed=seed), others=others, progress=True)
    result.save(kept)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    run = {"example": "cifar10_geometry", "images": args.images, "seed": args.seed, **RECIPE}
    folder = claim_folder(args.out, run, resume=True)
    with af.keep_memory():
        models: dict[str, nn.Module] = {
            "vanilla": load_resnet(args.data, 56),
            "aligned": aligned_model(args.data, folder / "aligned.safetensors", args.seed),
        }
        others: dict[str, nn.Module] = {
            "resnet20 (witness)": load_resnet(args.data, 20),
            "resnet32": load_resnet(args.data, 32),
            "resnet44": load_resnet(args.data, 44),
        }
        defended = {
            f"{name} + {word}": Defended(others[name], [defence])
            for name in ("resnet32", "resnet44")
            for word, defence in DEFENCES.items()
        }
        dataset = load_dataset(args.data / "test.npz", num_classes=10)
        # The file is sorted by class, so a sample of all classes is spread over it.
        test = Subset(dataset, spread_indices(len(dataset), args.images))
        result = measured_geometry(models, others, test, folder / "geometry.json", args.seed)
        attacks = {
            f"{name} {budget}": {**attack, **numbers, "seed": args.seed}
            for budget, numbers in (("4/255", {}), ("2/255", SMALL))
            for name, attack in ATTACKS.items()
        }
        matrix = af.transfer_matrix(
            models,
            others | defended,
            attacks,
            loader(test, BATCH),
            parts=folder / "parts",
            images=folder / "adversarial",
            progress=True,
        )
    paths = write_results(matrix, folder, geometry=result, title="CIFAR-10 ResNet-56 aligned to ResNet-20")
    console = Console()
    for sentence in (*summary_sentences(matrix), *geometry_sentences(result)):
        console.out(sentence, highlight=False)
    console.out(f"written: {', '.join(map(str, paths))}", highlight=False)


if __name__ == "__main__":
    main()
