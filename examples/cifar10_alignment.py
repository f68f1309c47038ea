"""Align a CIFAR-10 ResNet-56 to a ResNet-20 and measure PGD transfer to ResNet-32 and ResNet-44.

    python examples/cifar10_alignment.py --data DIR [--out DIR] [--seeds N]

DIR holds `train.npz` and `test.npz` (`images` uint8 [N, 32, 32, 3], `labels` int64 [N]) and the checkpoints
`resnet{20,32,44,56}-*.th` of akamaster/pytorch_resnet_cifar10.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import pad

import alignfast as af
from alignfast.data import augmented, load_dataset, loader, spread_indices
from alignfast.evaluation import TransferMatrix

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PGD = {"name": "pgd", "eps": 4 / 255, "alpha": 1 / 255, "steps": 20}


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut without parameters (option A of He et al., CVPR 2016)."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.stride = 1 if width_in == width else 2
        self.extra = (width - width_in) // 2
        self.conv1 = nn.Conv2d(width_in, width, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        shortcut = pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra, self.extra))
        return (y + shortcut).relu()


class ResNet(nn.Module):
    """ResNet-(6 n + 2) for 32 x 32 images."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = (16, 16, 32, 64)
        for stage in (1, 2, 3):
            first = Block(widths[stage - 1], widths[stage])
            rest = [Block(widths[stage], widths[stage]) for _ in range(blocks - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(first, *rest))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def load_resnet(folder: Path, depth: int) -> af.Classifier:
    found = sorted(folder.glob(f"resnet{depth}-*.th"))
    if not found:
        raise FileNotFoundError(f"data: {folder} holds no resnet{depth}-*.th")
    model = af.Classifier(ResNet((depth - 2) // 6), MEAN, STD, num_classes=10, input_size=(3, 32, 32))
    af.load_checkpoint(model, found[0])
    return model.eval()


def measure(
    folder: Path, seed: int, steps: int, lr: float, images: int, crop: float
) -> tuple[TransferMatrix, af.Classifier]:
    source, witness = load_resnet(folder, 56), load_resnet(folder, 20)
    data = load_dataset(folder / "train.npz", num_classes=10)
    train = augmented(data, (32, 32), scale=(crop, 1.0), seed=seed)
    config = af.AlignConfig(lr=lr, steps=steps, seed=seed)
    views = loader(train, 128, shuffle=True, seed=seed, drop_last=True)
    aligned = af.align(source, witness, views, config, progress=True).model
    dataset = load_dataset(folder / "test.npz", num_classes=10)
    # The file is sorted by class, so a sample of all classes is spread over it.
    test = torch.utils.data.Subset(dataset, spread_indices(len(dataset), images))
    matrix = af.transfer_matrix(
        {"vanilla": source, "aligned": aligned},
        {"resnet32": load_resnet(folder, 32), "resnet44": load_resnet(folder, 44), "resnet20 (witness)": witness},
        {"pgd": PGD | {"seed": seed}},
        loader(test, 100),
        progress=True,
    )
    return matrix, aligned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--crop", type=float, default=0.9, help="least area of the random crops")
    args = parser.parse_args()
    for seed in range(args.seeds):
        matrix, aligned = measure(args.data, seed, args.steps, args.lr, args.images, args.crop)
        Console().print(matrix.table())
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            matrix.save(args.out / f"matrix-{seed}.json")
            af.save_checkpoint(
                aligned, args.out / f"aligned-{seed}.safetensors", {"args": json.dumps(vars(args), default=str)}
            )


if __name__ == "__main__":
    main()
