"""What a matrix keeps on disk: outcomes, the forms of prepared sources, and adversarial images."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from alignfast.attacks import Attack
from alignfast.checks import check_labels
from alignfast.data import AdversarialWriter, ImageDataset, Manifest, as_batches, eight_bit, quantise, read_adversarial
from alignfast.data.adversarial import MANIFEST
from alignfast.data.datasets import Sample
from alignfast.distributed import on_main
from alignfast.evaluation.judging import Flags, rate_of
from alignfast.evaluation.shares import Shares, on_device
from alignfast.files import replacing, write_json
from alignfast.models import Classifier, fit_size
from alignfast.models.preparation import DTYPES, NAMES, Form, Preparation
from alignfast.progress import Advance

# Letters besides those of words that file systems and shells take as they are.
PLAIN = " +,=@()"
# File systems allow 255 bytes, and the letters of a temporary name come on top.
LONGEST_NAME = 200
# What `replacing` leaves of a file when its process is killed.
TEMPORARY = re.compile(r"\..*\.[0-9a-f]{16}(\.[A-Za-z0-9]+)?")
LEVELS = 255


def file_name(name: str) -> str:
    """A file's name for any text: two texts have two names, and none is hidden or reaches out of its folder."""
    quoted = quote(name, safe=PLAIN)
    return f"%2E{quoted[1:]}" if quoted.startswith(".") else quoted


def check_files(what: str, names: Iterable[str]) -> None:
    """Refuse by ValueError names for which there is no file, or which would share one, also where case is not told."""
    taken: dict[str, str] = {}
    for name in names:
        if not isinstance(name, str) or not name:
            raise ValueError(f"{what}: got the name {name!r}; allowed is text, in a YAML file in quotes where need be")
        file = file_name(name)
        if len(file) > LONGEST_NAME:
            raise ValueError(
                f"{what}: the name {name[:20]!r}... takes {len(file)} letters in a file's name; allowed are "
                f"{LONGEST_NAME}"
            )
        if file.casefold() in taken:
            raise ValueError(
                f"{what}: {taken[file.casefold()]!r} and {name!r} would be kept in one file; allowed are names that "
                "differ in more than case"
            )
        taken[file.casefold()] = name


def clear_temporaries(folder: str | os.PathLike[str]) -> None:
    """Remove, from a folder and those in it, what writers that were killed have left half-written."""
    for root, _, names in os.walk(folder):
        for name in names:
            if TEMPORARY.fullmatch(name):
                (Path(root) / name).unlink()


@dataclass(frozen=True)
class Part:
    """An outcome on disk, which counts only for the identity that it was written with."""

    path: Path
    identity: str

    def read(self) -> Flags | None:
        if not self.path.is_file():
            return None
        with np.load(self.path, allow_pickle=False) as content:
            return content["wrong"] if str(content["identity"]) == self.identity else None

    def write(self, wrong: Flags) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as temporary:
            np.savez(temporary, wrong=wrong, identity=np.array(self.identity))


@dataclass(frozen=True)
class KeptForm:
    """The form of a prepared source on disk, which counts only for the identity that it was written with."""

    path: Path
    identity: str

    def read(self) -> Preparation | None:
        if not self.path.is_file():
            return None
        content = json.loads(self.path.read_text(encoding="utf-8"))
        return _preparation(content["preparation"]) if content["identity"] == self.identity else None

    def write(self, preparation: Preparation) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"identity": self.identity, "preparation": _plain(preparation)})


def _plain(preparation: Preparation) -> dict[str, Any]:
    form = {**asdict(preparation.form), "dtype": NAMES[preparation.form.dtype]}
    return {"form": form, "members": [_plain(member) for member in preparation.members]}


def _preparation(values: dict[str, Any]) -> Preparation:
    form = {**values["form"], "dtype": DTYPES[values["form"]["dtype"]]}
    return Preparation(Form(**form), members=tuple(_preparation(member) for member in values["members"]))


def filenames_of(data: Iterable[Any], indices: Tensor) -> Sequence[str]:
    """By data-set index: the names of the images where the data have names, else numbers."""
    dataset = getattr(data, "dataset", None)
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    if isinstance(dataset, ImageDataset):
        return dataset.filenames
    most = int(indices.max())
    return [f"{index:0{len(str(most))}d}" for index in range(most + 1)]


def check_keepable(images: Tensor, indices: Tensor) -> None:
    """Refuse by ValueError images that PNG files cannot hold exactly, or several under one index."""
    eight_bit(images)
    if images.shape[1] not in (1, 3):
        raise ValueError(f"data: got images of {images.shape[1]} channels; allowed, where images are kept, are 1 and 3")
    check_labels("data's indices", indices, len(indices), 2**32)
    if len(indices.unique()) < len(indices):
        raise ValueError("data: two images have the same index; allowed, where images are kept, is one for each")


@dataclass(frozen=True)
class KeptImages:
    """Adversarial images in the order of the data that were attacked, under their indices there."""

    dataset: ImageDataset
    positions: Sequence[int]
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, place: int) -> Sample:
        image, label, _ = self.dataset[self.positions[place]]
        return Sample(image, label, self.indices[place])


def kept_images(
    folder: Path,
    manifest: Manifest,
    attack: Attack,
    model: Classifier,
    shares: Shares,
    filenames: Sequence[str],
    tick: Advance,
) -> Shares:
    """The images of `attack` on `model`, from `folder`, where those that are missing are made first.

    Ranks make the images of their own shares, and all wait for each other.

    Raises:
        ValueError: the folder holds images of another run, or they are not as they were written.
    """
    if on_main(partial(_is_whole, folder, manifest, shares)):
        tick(shares.batches, "")
    else:
        _make(folder, manifest, attack, model, shares, filenames, tick)
    dataset, written = read_adversarial(folder, verify=False)
    positions = {index: position for position, index in enumerate(written.indices)}
    indices = shares.indices.tolist()
    return shares.of_images(KeptImages(dataset, [positions[index] for index in indices], indices))


def _is_whole(folder: Path, manifest: Manifest, shares: Shares) -> bool:
    if not (folder / MANIFEST).is_file():
        return False
    _, written = read_adversarial(folder)
    if written.run != manifest.run or written.indices != tuple(sorted(shares.indices.tolist())):
        raise ValueError(f"images: {folder} holds the images of another run; give a new or an empty folder")
    return True


def _make(
    folder: Path,
    manifest: Manifest,
    attack: Attack,
    model: Classifier,
    shares: Shares,
    filenames: Sequence[str],
    tick: Advance,
) -> None:
    done, began = 0, time.monotonic()
    with AdversarialWriter(folder, manifest, filenames, resume=True) as writer:
        for batch in as_batches(shares.own):
            pending = writer.pending(batch.indices)
            if not pending.any():
                tick(1, "")
                continue
            # As a whole, even if a part of it is written: a network may round otherwise in a smaller batch.
            images, labels, indices = on_device(batch, model)
            images, originals = _originals(images, model)
            adversarial = attack(images, labels, indices=indices)
            levels = quantise(adversarial, originals, attack.eps, attack.step.norm)
            rows = pending.to(levels.device)
            writer.add(levels[rows], labels[rows], indices[rows])
            done += len(images)
            tick(1, rate_of(done, began))


def _originals(images: Tensor, model: Classifier) -> tuple[Tensor, Tensor]:
    """Images at the model's size that lie on the 8-bit grid, and the same in 8 bits."""
    fitted = fit_size(images, model)
    if fitted is images:
        return images, eight_bit(images)
    levels = (fitted * LEVELS).round().to(torch.uint8)
    return levels.to(fitted) / LEVELS, levels
