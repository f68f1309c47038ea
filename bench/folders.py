"""Reading and writing folders of images beside the loops that people write with torchvision and Pillow."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor, to_pil_image, to_tensor
from torchvision.utils import save_image

from alignfast.data import AdversarialWriter, Manifest, load_dataset, loader, read_adversarial

from .subject import Call, Cost
from .work import EPS, uniform

Shape = tuple[int, ...]

CLASSES = 4
BATCH = 16


def loading(shape: Shape, dtype: torch.dtype, device: torch.device) -> Loading:
    return Loading(shape)


def saving(shape: Shape, dtype: torch.dtype, device: torch.device) -> Saving:
    return Saving(shape)


@dataclass(frozen=True)
class Loading:
    """A folder of PNG files to float32 batches. Sides: "ours", and torchvision's ImageFolder in a DataLoader; both
    read in this process."""

    shape: Shape

    @property
    def cost(self) -> Cost:
        return Cost(moved=torch.Size(self.shape).numel() * torch.float32.itemsize)

    def prepare(self, *, compiled: bool) -> tuple[dict[str, Call], str | None]:
        sides = {"ours": self._ours, "torchvision": self._torchvision}
        ours, theirs = (read() for read in sides.values())
        equal = all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        right = len(ours[0]) == self.shape[0] and equal
        return {**sides}, None if right else "ours: images or labels are other than torchvision's"

    def _ours(self) -> tuple[Tensor, Tensor]:
        batches = list(loader(load_dataset(self._place.name), BATCH))
        return torch.cat([batch.images for batch in batches]), torch.cat([batch.labels for batch in batches])

    def _torchvision(self) -> tuple[Tensor, Tensor]:
        batches = list(DataLoader(ImageFolder(self._place.name, to_tensor), BATCH))
        return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])

    @cached_property
    def _place(self) -> TemporaryDirectory[str]:
        place = TemporaryDirectory(prefix="alignfast-bench-")
        for index, image in enumerate(photos(self.shape)):
            path = Path(place.name) / f"class{index % CLASSES}" / f"{index:05}.png"
            path.parent.mkdir(exist_ok=True)
            to_pil_image(image).save(path)
        return place


@dataclass(frozen=True)
class Saving:
    """8-bit images to PNG files in a new folder. Sides: "ours", which also writes labels, hashes and a manifest, each
    file whole or not at all; "PIL", a loop over `Image.save`; "torchvision", one over `save_image` of float images."""

    shape: Shape

    @property
    def cost(self) -> Cost:
        return Cost(moved=torch.Size(self.shape).numel())

    def prepare(self, *, compiled: bool) -> tuple[dict[str, Call], str | None]:
        sides = {"ours": self._ours, "PIL": self._pil, "torchvision": self._torchvision}
        ours = read_adversarial(sides["ours"]())[0]
        read = {"ours": torch.stack([(ours[index][0] * 255).round().byte() for index in range(len(ours))])}
        read |= {side: _pixels(sides[side]()) for side in ("PIL", "torchvision")}
        wrong = [side for side, pixels in read.items() if not torch.equal(pixels, self._images)]
        return {**sides}, f"{wrong[0]}: files hold other pixels than were given" if wrong else None

    def _ours(self) -> Path:
        folder = self._new_folder()
        manifest = Manifest("pgd", {}, "a model", 0, EPS, "linf", "images")
        labels, indices = torch.zeros(len(self._images), dtype=torch.int64), torch.arange(len(self._images))
        with AdversarialWriter(folder, manifest, [f"{index:05}.png" for index in indices.tolist()]) as writer:
            writer.add(self._images, labels, indices)
        return folder

    def _pil(self) -> Path:
        folder = self._new_folder()
        for index, image in enumerate(self._images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index:05}.png")
        return folder

    def _torchvision(self) -> Path:
        folder = self._new_folder()
        for index, image in enumerate(self._images.float() / 255):
            save_image(image, folder / f"{index:05}.png")
        return folder

    def _new_folder(self) -> Path:
        folder = Path(self._place.name) / str(next(self._numbers))
        folder.mkdir()
        return folder

    @cached_property
    def _numbers(self) -> itertools.count[int]:
        return itertools.count()

    @cached_property
    def _place(self) -> TemporaryDirectory[str]:
        return TemporaryDirectory(prefix="alignfast-bench-")

    @cached_property
    def _images(self) -> Tensor:
        return photos(self.shape)


def photos(shape: Shape) -> Tensor:
    """uint8 [N, C, H, W] that compress about as photographs do: smooth, with a little noise."""
    smooth = F.interpolate(uniform((*shape[:2], 8, 8), 1), size=shape[2:], mode="bicubic")
    return ((smooth + uniform(shape, 2, -0.01, 0.01)).clamp(0, 1) * 255).round().byte()


def _pixels(folder: Path) -> Tensor:
    images = []
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as image:
            images.append(pil_to_tensor(image))
    return torch.stack(images)
