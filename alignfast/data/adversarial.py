"""Folders of adversarial images: lossless PNG files, labels.csv, and a manifest that is written last.

A folder without a manifest is unfinished. Each PNG also carries its own index, label and run in a text chunk, so an
interrupted run can be taken up again from the files alone.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from alignfast.checks import check_choice, check_count, check_labels, check_number, check_shape
from alignfast.data.datasets import ImageDataset
from alignfast.data.images import THREADS, to_pil, to_pixels
from alignfast.data.sources import FileReader, Source, numbered
from alignfast.distributed import gather, on_main
from alignfast.files import replacing, write_json, write_text
from alignfast.versions import package_versions

FORMAT = 1
MANIFEST = "manifest.json"
LABELS = "labels.csv"
IMAGES = "images"
CHUNK = "alignfast"
LONGEST_STEM = 200  # bytes: file systems allow 255, and the index, a suffix and a temporary name's letters come on top
IDENTITY = ("attack", "parameters", "model", "seed", "eps", "norm", "data")


@dataclass(frozen=True)
class AdversarialFile:
    """One written image: file name in images/, data-set index, label, targeted label if any, hash of the file."""

    name: str
    index: int
    label: int
    targeted_label: int | None
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a folder of adversarial images holds and how it came about.

    Attributes:
        attack: its name.
        parameters: of the attack; anything JSON can hold.
        model: fingerprint of the source model.
        seed: of the attack's draws.
        eps: radius of the ball, in units of images in [0, 1].
        norm: "linf" or "l2".
        data: the data set, as it was given.
        num_classes: that labels range over, or None where that is not known.
        channels: 3 or 1; set by the writer.
        versions: of the packages that took part.
        labels_sha256: hash of labels.csv; set by the writer.
        files: by data-set index; set by the writer.
    """

    attack: str
    parameters: Mapping[str, Any]
    model: str
    seed: int
    eps: float
    norm: str
    data: str
    num_classes: int | None = None
    channels: int = 3
    versions: Mapping[str, str] = field(default_factory=package_versions)
    labels_sha256: str = ""
    files: tuple[AdversarialFile, ...] = ()

    def __post_init__(self) -> None:
        check_number("eps", self.eps, low=0.0)
        check_choice("norm", self.norm, ("linf", "l2"))
        try:
            json.dumps(self.parameters)
        except (TypeError, ValueError) as error:
            raise ValueError(f"parameters: got {self.parameters!r}; allowed is what JSON can hold ({error})") from error

    @property
    def run(self) -> str:
        """Hash of what makes two runs the same: attack, parameters, model, seed, eps, norm and data."""
        text = json.dumps({name: getattr(self, name) for name in IDENTITY}, sort_keys=True)
        return _sha256(text.encode())

    @property
    def indices(self) -> tuple[int, ...]:
        """Data-set index of each image, in the order in which `read_adversarial` gives them."""
        return tuple(file.index for file in self.files)

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, "count": len(self.files), **asdict(self)}

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """The manifest of `to_dict`; ValueError on anything else."""
        values = dict(values)
        if values.pop("format") != FORMAT:
            raise ValueError(f"it has another format than {FORMAT}")
        count = values.pop("count")
        files = tuple(_file_from_dict(file) for file in values.pop("files"))
        unknown = set(values) - {each.name for each in fields(cls)}
        if unknown or not files or count != len(files):
            raise ValueError(f"it lists {len(files)} of {count} files")
        return cls(files=files, **values)


class AdversarialWriter:
    """Writes adversarial images to `folder`, each whole or not at all, and the manifest when all are there.

        with AdversarialWriter(folder, manifest, dataset.filenames) as writer:
            for images, labels, indices in loader(dataset, 64):
                adversarial = attack(images, labels, indices=indices)
                writer.add(quantise(adversarial, eight_bit(images), eps), labels, indices)

    Threads encode and write the images of a batch while the next one is attacked; at most two batches are held for
    them. Leaving the block waits for all that were added, also when left by an exception, Ctrl-C included, which leaves
    these images whole and no manifest.

    Where a process group is initialised, all of its ranks make a writer of the same folder, each adds images of its
    own, or none, and all finish it together: rank 0 writes the manifest of what all have added.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        manifest: Manifest,
        filenames: Sequence[str],
        *,
        resume: bool = False,
    ) -> None:
        """
        Args:
            folder: created if absent. It must not hold adversarial images yet, unless `resume`.
            manifest: describes the run; `files`, `channels` and `labels_sha256` are filled in.
            filenames: of the whole data set, by data-set index. An image is written under the stem of its name, and
                stems that occur twice get their index appended.
            resume: take up an unfinished folder of the same run; see `pending`.

        Raises:
            ValueError: the folder holds images of another run or is not to be resumed, or cannot be written to.
        """
        self._folder = Path(folder)
        self._images = self._folder / IMAGES
        self._manifest = manifest
        self._run = manifest.run
        self._names = png_names(filenames)
        self._files: dict[int, AdversarialFile] = {}
        # What threads are at, by data-set index, in the order of arrival.
        self._writing: dict[int, Future[AdversarialFile]] = {}
        self._pool = ThreadPoolExecutor(THREADS)
        # By one rank, as the others might take the images that it writes for those of an earlier attempt.
        self._files, channels = on_main(lambda: self._opened(resume))
        self._manifest = replace(self._manifest, channels=channels)
        self._targeted = any(file.targeted_label is not None for file in self._files.values())

    def pending(self, indices: Tensor) -> Tensor:
        """Which of `indices` int64 [N] are not added yet: bool [N] on the CPU. All of them, unless resumed."""
        return torch.tensor([not self._has(index) for index in indices.tolist()], dtype=torch.bool)

    def add(self, images: Tensor, labels: Tensor, indices: Tensor, targets: Tensor | None = None) -> None:
        """Write uint8 images [N, C, H, W] with int64 labels, data-set indices and targeted labels [N].

        The files come to be while the caller goes on.

        Raises:
            ValueError: another dtype or shape, an index that is unknown or already written, or targets for some
                images only. OSError: an image of an earlier call could not be written; it is pending again, and none
                of this call is added.
        """
        self._check(images, labels, indices, targets)
        self._settle(len(images))
        # A finished folder that grows is unfinished again.
        (self._folder / MANIFEST).unlink(missing_ok=True)
        aims = [None] * len(images) if targets is None else targets.tolist()
        # A copy, since the caller may go on with the same buffer.
        rows = zip(images.to("cpu", copy=True), indices.tolist(), labels.tolist(), aims, strict=True)
        for image, index, label, aim in rows:
            self._writing[index] = self._pool.submit(self._write, image, index, label, aim)

    def finish(self) -> Manifest:
        """Write labels.csv and then the manifest, which declares the folder finished.

        Raises:
            ValueError: no image was added, or ranks added the same image or images of several kinds. OSError: an
                image could not be written.
        """
        self._settle(0)
        self._files, channels = _merged(gather((self._files, self._manifest.channels)))
        self._manifest = on_main(partial(self._declared, channels))
        return self._manifest

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self._pool.shutdown()

    def _opened(self, resume: bool) -> tuple[dict[int, AdversarialFile], int]:
        _claim(self._folder, resume)
        for path in sorted(self._images.iterdir()):
            self._take_up(path)
        return self._files, self._manifest.channels

    def _declared(self, channels: int) -> Manifest:
        files = tuple(self._files[index] for index in sorted(self._files))
        _one_kind(files)
        table = _table(files)
        write_text(self._folder / LABELS, table)
        manifest = replace(self._manifest, channels=channels, files=files, labels_sha256=_sha256(table.encode()))
        write_json(self._folder / MANIFEST, manifest.to_dict())
        return manifest

    def _check(self, images: Tensor, labels: Tensor, indices: Tensor, targets: Tensor | None) -> None:
        if images.dtype != torch.uint8:
            raise ValueError(f"images: got {images.dtype}; allowed is torch.uint8, as quantise returns")
        check_shape("images", images.shape, (None, None, None, None))
        begun = bool(self._files or self._writing)
        allowed = {self._manifest.channels} if begun else {1, 3}
        channels = images.shape[1]
        if channels not in allowed:
            raise ValueError(f"images: got {channels} channels; allowed is {' or '.join(map(str, sorted(allowed)))}")
        check_labels("labels", labels, len(images), self._manifest.num_classes)
        check_labels("indices", indices, len(images), len(self._names))
        if targets is not None:
            check_labels("targets", targets, len(images), self._manifest.num_classes)
        if begun and self._targeted != (targets is not None):
            raise ValueError("targets: given for some images only; allowed is for all or for none")
        twice = [index for index, times in Counter(indices.tolist()).items() if times > 1 or self._has(index)]
        if twice:
            raise ValueError(f"indices: image {twice[0]} is already written; allowed is each image once")
        self._manifest = replace(self._manifest, channels=channels)
        self._targeted = targets is not None

    def _has(self, index: int) -> bool:
        return index in self._files or index in self._writing

    def _settle(self, most: int) -> None:
        """Wait until threads are at no more than `most` images; raises what stopped one of those that are done."""
        while self._writing:
            index, future = next(iter(self._writing.items()))
            if len(self._writing) <= most and not future.done():
                return
            wait([future])
            del self._writing[index]
            self._files[index] = future.result()

    def _write(self, image: Tensor, index: int, label: int, targeted_label: int | None) -> AdversarialFile:
        """In a thread, which an interrupt does not stop."""
        record = {"label": label, "index": index, "targeted_label": targeted_label, "run": self._run}
        name, data = self._names[index], _png(image, record)
        with replacing(self._images / name) as temporary:
            temporary.write_bytes(data)
        return AdversarialFile(name, index, label, targeted_label, _sha256(data))

    def _take_up(self, path: Path) -> None:
        """Enter a file of an earlier attempt; remove the temporary file of one that was killed."""
        if path.name.startswith("."):
            path.unlink()
            return
        record = _record(path)
        index = record.get("index")
        if record.get("run") != self._run or not isinstance(index, int) or self._known(index) != path.name:
            raise ValueError(f"out: {path} is torn or not of this run; delete it or give an empty folder")
        self._manifest = replace(self._manifest, channels=record["channels"])
        digest = _sha256(path.read_bytes())
        self._files[index] = AdversarialFile(path.name, index, record["label"], record["targeted_label"], digest)

    def _known(self, index: int) -> str | None:
        return self._names[index] if 0 <= index < len(self._names) else None


def read_adversarial(folder: str | os.PathLike[str], *, verify: bool = True) -> tuple[ImageDataset, Manifest]:
    """A finished folder of adversarial images, as a data set in the order of `manifest.files`.

    A position in the data set is a position in `manifest.files`; `manifest.indices` has the indices in the data set
    that was attacked.

    Args:
        folder: written by `AdversarialWriter`.
        verify: compare the hash of every image with the manifest's.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: unfinished (no manifest), torn, or with files that are missing, surplus or changed; the message
            names the first few.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder: no folder {folder}")
    manifest = _read_manifest(folder)
    _check_listing(folder, manifest)
    if verify:
        changed = [file.name for file in manifest.files if _hash_of(folder / IMAGES / file.name) != file.sha256]
        _refuse(folder, "differ from the manifest", changed)
    return ImageDataset(_source(folder, manifest)), manifest


def png_names(filenames: Sequence[str]) -> list[str]:
    """A name ending in .png for each of `filenames`: its stem, with the index appended where a stem is not unique.

    A name depends on the whole list and not on which images are written. Names that differ in case only count as
    equal, for file systems that see them so.
    """
    stems = [_stem(name) for name in filenames]
    times = Counter(stem.lower() for stem in stems)
    taken = {stem.lower() for stem in stems if times[stem.lower()] == 1}
    names = []
    for index, stem in enumerate(stems):
        if times[stem.lower()] > 1:
            stem = f"{stem}-{index}"
            while stem.lower() in taken:
                stem += "-"
            taken.add(stem.lower())
        names.append(f"{stem}.png")
    return names


def _stem(filename: str) -> str:
    # A leading dot would hide the file, and control characters do not survive every tool that reads labels.csv.
    kept = "".join(letter if letter.isprintable() else "_" for letter in PurePosixPath(filename).stem)
    short = kept.lstrip(".").encode()[:LONGEST_STEM].decode(errors="ignore")
    return short or "image"


def _claim(folder: Path, resume: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out: {folder} is a file; give a folder")
    if not resume:
        for name, state in ((MANIFEST, "a finished"), (LABELS, "another"), (IMAGES, "an unfinished")):
            if (folder / name).exists():
                raise ValueError(f"out: {folder} holds {state} set of images; resume it or give an empty folder")
    try:
        (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out: cannot write to {folder} ({error.strerror}); give a writable folder") from error


def _png(image: Tensor, record: Mapping[str, object]) -> bytes:
    """uint8 [C, H, W] as a PNG file with `record` in a text chunk."""
    note = PngInfo()
    note.add_text(CHUNK, json.dumps({**record, "channels": image.shape[0]}))
    buffer = io.BytesIO()
    # The perturbation is noise, in which a search for repeats costs time and finds nothing: of photos after an attack
    # zlib's default takes twice this time and leaves 4 % more, and no compression saves a third of it for 43 % more.
    to_pil(to_pixels(image)).save(buffer, format="PNG", pnginfo=note, compress_level=1, compress_type=zlib.Z_RLE)
    return buffer.getvalue()


def _record(path: Path) -> dict[str, Any]:
    """The text chunk of a PNG file; empty where there is none, or where the image is torn."""
    try:
        with Image.open(path) as image:
            record = json.loads(image.info[CHUNK])
            image.load()
    # Pillow raises many types on a broken file.
    except Exception:
        return {}
    return record if isinstance(record, dict) else {}


def _merged(ranks: Sequence[tuple[dict[int, AdversarialFile], int]]) -> tuple[dict[int, AdversarialFile], int]:
    """The files of all ranks by index, and their channels. What was there from the beginning is with every rank."""
    merged: dict[int, AdversarialFile] = {}
    for files, _ in ranks:
        twice = [index for index, file in files.items() if merged.get(index, file) != file]
        if twice:
            raise ValueError(f"indices: image {twice[0]} is written by two ranks; allowed is each image once")
        merged |= files
    channels = {count for files, count in ranks if files}
    if not merged:
        raise ValueError("writer: no images were added, so there is nothing to finish")
    if len(channels) > 1:
        raise ValueError("images: ranks added images of 1 and of 3 channels; allowed is one kind")
    return merged, channels.pop()


def _one_kind(files: Sequence[AdversarialFile]) -> None:
    if len({file.targeted_label is None for file in files}) > 1:
        raise ValueError("targets: given for some images only; allowed is for all or for none")


def _table(files: Sequence[AdversarialFile]) -> str:
    targeted = files[0].targeted_label is not None
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["filename", "label"] + ["targeted_label"] * targeted)
    writer.writerows([file.name, file.label] + [file.targeted_label] * targeted for file in files)
    return text.getvalue()


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"folder: {folder} has no {MANIFEST}, so it is unfinished or holds other data")
    try:
        return Manifest.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"folder: {path} is torn or not a manifest ({error})") from error


def _file_from_dict(values: Any) -> AdversarialFile:
    file = AdversarialFile(**values)
    if not isinstance(file.name, str) or file.name != PurePosixPath(file.name).name:
        raise ValueError(f"it lists the file {file.name!r}")
    check_count("index", file.index, low=0)
    check_count("label", file.label, low=0)
    return file


def _check_listing(folder: Path, manifest: Manifest) -> None:
    images = folder / IMAGES
    present = {path.name for path in images.iterdir() if not path.name.startswith(".")} if images.is_dir() else set()
    listed = {file.name for file in manifest.files}
    _refuse(folder, "are in the manifest and not in images/", sorted(listed - present))
    _refuse(folder, "are in images/ and not in the manifest", sorted(present - listed))
    if not (folder / LABELS).is_file() or _hash_of(folder / LABELS) != manifest.labels_sha256:
        _refuse(folder, "differ from the manifest", [LABELS])


def _refuse(folder: Path, problem: str, names: Sequence[str]) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(f"folder: {folder}: {', '.join(names[:3])}{more} {problem}")


def _source(folder: Path, manifest: Manifest) -> Source:
    labels = torch.tensor([file.label for file in manifest.files], dtype=torch.int64)
    aims = [file.targeted_label for file in manifest.files if file.targeted_label is not None]
    targets = torch.tensor(aims, dtype=torch.int64) if aims else None
    return Source(
        filenames=[file.name for file in manifest.files],
        labels=labels,
        classes=numbered(manifest.num_classes or 1 + max(int(labels.max()), *aims, 0)),
        read=FileReader([folder / IMAGES / file.name for file in manifest.files], manifest.channels),
        targets=targets,
    )


def _hash_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
