"""Where images lie: class folders, a folder with labels.csv, .npz arrays. Files are listed here and read later."""

from __future__ import annotations

import csv
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from alignfast.data.images import Pixels, decode

SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test"})
COLUMNS = ("filename", "label", "targeted_label")
ARRAYS = ("images", "labels")


@dataclass(frozen=True)
class Source:
    """A list of labelled images, and how to read one of them.

    Attributes:
        filenames: one name an image, the names that written images are derived from.
        labels: int64 [N].
        classes: class names, by label.
        read: from position to uint8 [H, W, C]; picklable, raises ValueError naming an unreadable image.
        targets: int64 [N], labels a targeted attack aims at, or None.
    """

    filenames: Sequence[str]
    labels: Tensor
    classes: tuple[str, ...]
    read: Callable[[int], Pixels]
    targets: Tensor | None = None


@dataclass(frozen=True)
class FileReader:
    paths: Sequence[Path]
    channels: int

    def __call__(self, index: int) -> Pixels:
        return decode(self.paths[index], str(self.paths[index]), self.channels)


@dataclass(frozen=True)
class ArrayReader:
    images: Pixels  # [N, H, W, C or 1]
    channels: int

    def __call__(self, index: int) -> Pixels:
        return np.repeat(self.images[index], self.channels // self.images.shape[3], axis=2)


def folder_source(path: Path, num_classes: int | None, channels: int) -> Source:
    """Class folders below `path`: classes sorted by name, images found at any depth and sorted by path."""
    classes = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    _check_class_folders(path, classes)
    if num_classes is not None and num_classes != len(classes):
        raise ValueError(
            f"num_classes: got {num_classes}, but {path} holds {len(classes)} class folders and a label is the place "
            f"of its folder among them; allowed is {len(classes)} (for part of the classes, use labels.csv)"
        )
    files = [(file, label) for label, name in enumerate(classes) for file in _images_of(path / name)]
    return Source(
        filenames=[file.relative_to(path).as_posix() for file, _ in files],
        labels=torch.tensor([label for _, label in files], dtype=torch.int64),
        classes=tuple(classes),
        read=FileReader([file for file, _ in files], channels),
    )


def table_source(path: Path, num_classes: int | None, channels: int) -> Source:
    """`path`/labels.csv and `path`/images: TransferAttack's layout."""
    rows = list(_rows(path / "labels.csv", path / "images", num_classes))
    if not rows:
        raise ValueError(f"path: {path / 'labels.csv'} lists no images")
    labels = torch.tensor([row.label for row in rows], dtype=torch.int64)
    targets = [row.target for row in rows if row.target is not None]
    aims = torch.tensor(targets, dtype=torch.int64) if targets else None
    count = num_classes or 1 + max(int(labels.max()), -1 if aims is None else int(aims.max()))
    return Source(
        filenames=[row.filename for row in rows],
        labels=labels,
        classes=numbered(count),
        read=FileReader([path / "images" / row.filename for row in rows], channels),
        targets=aims,
    )


def array_source(path: Path, num_classes: int | None, channels: int) -> Source:
    """An .npz of `images` uint8 [N, H, W, 3] or [N, H, W] and `labels` int64 [N]."""
    images, labels = _arrays(path)
    if images.ndim == 3:
        images = images[..., None]
    _check_arrays(path, images, labels, channels)
    check_label_range(str(path), labels, num_classes)
    width = len(str(len(labels) - 1))
    return Source(
        filenames=[f"{index:0{width}d}" for index in range(len(labels))],
        labels=torch.from_numpy(labels),
        classes=numbered(num_classes or int(labels.max()) + 1),
        read=ArrayReader(images, channels),
    )


def numbered(count: int) -> tuple[str, ...]:
    return tuple(str(label) for label in range(count))


def check_label_range(name: str, labels: np.ndarray, num_classes: int | None) -> None:
    """All of int64 `labels` in [0, num_classes); else ValueError naming the first image outside."""
    outside = labels < 0 if num_classes is None else (labels < 0) | (labels >= num_classes)
    if outside.any():
        index = int(outside.argmax())
        raise ValueError(f"{name}: label of image {index} is {labels[index]}; {_allowed_labels(num_classes)}")


@dataclass(frozen=True)
class _Row:
    filename: str
    label: int
    target: int | None


def _check_class_folders(path: Path, classes: list[str]) -> None:
    if not classes:
        raise ValueError(f"path: no images in {path}; allowed are class folders, images/ with labels.csv, or an .npz")
    if classes == ["images"]:
        raise ValueError(f"path: {path} holds images/ but no labels.csv (columns filename,label)")
    if SPLITS.issuperset(classes):
        raise ValueError(
            f"path: {path} holds the splits {', '.join(classes)}; give one of them, as {path / classes[0]}"
        )
    empty = [name for name in classes if next(_images_of(path / name), None) is None]
    if empty:
        raise ValueError(f"path: no images in class folder {path / empty[0]}; allowed are {', '.join(IMG_EXTENSIONS)}")


def _images_of(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in IMG_EXTENSIONS and not file.name.startswith(".") and file.is_file():
            yield file


def _rows(table: Path, images: Path, num_classes: int | None) -> Iterator[_Row]:
    seen: set[str] = set()
    with table.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        try:
            _check_columns(table, reader.fieldnames or [])
            for fields in reader:
                place = f"{table} row {reader.line_num}"
                row = _row(place, fields, num_classes)
                if row.filename in seen:
                    raise ValueError(f"{place}: {row.filename} is listed twice")
                if not (images / row.filename).is_file():
                    raise ValueError(f"{place}: no file {images / row.filename}")
                seen.add(row.filename)
                yield row
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{table}: not readable as comma-separated text ({error})") from error


def _check_columns(table: Path, columns: Sequence[str]) -> None:
    unknown = [name for name in columns if name not in COLUMNS]
    missing = [name for name in COLUMNS[:2] if name not in columns]
    repeated = [name for name in COLUMNS if list(columns).count(name) > 1]
    for problem, names in (("unknown", unknown), ("missing", missing), ("repeated", repeated)):
        if names:
            raise ValueError(f"{table}: {problem} column {names[0]!r}; allowed are filename, label and targeted_label")


def _row(place: str, fields: dict[str, str], num_classes: int | None) -> _Row:
    # DictReader files surplus fields under None, and gives None for absent ones.
    if None in fields or None in fields.values():
        raise ValueError(f"{place}: got another number of fields than the header has")
    filename = fields["filename"]
    parts = PurePosixPath(filename)
    if not filename or parts.is_absolute() or ".." in parts.parts:
        raise ValueError(f"{place}: filename is {filename!r}; allowed is a path below images/")
    target = fields.get("targeted_label")
    return _Row(
        filename=filename,
        label=_label(place, "label", fields["label"], num_classes),
        target=None if target is None else _label(place, "targeted_label", target, num_classes),
    )


def _label(place: str, column: str, text: str, num_classes: int | None) -> int:
    try:
        label = int(text)
    except ValueError:
        label = -1
    if label < 0 or (num_classes is not None and label >= num_classes):
        raise ValueError(f"{place}: {column} is {text!r}; {_allowed_labels(num_classes)}")
    return label


def _allowed_labels(num_classes: int | None) -> str:
    top = "" if num_classes is None else f" to {num_classes - 1}"
    return f"allowed is a whole number from 0{top}"


def _arrays(path: Path) -> tuple[np.ndarray, np.ndarray]:
    wanted = "allowed is an .npz of exactly the arrays images and labels"
    try:
        content = np.load(path, allow_pickle=False)
        arrays = dict(content) if isinstance(content, np.lib.npyio.NpzFile) else {}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"path: {path} cannot be read ({error}); {wanted}") from error
    if sorted(arrays) != sorted(ARRAYS):
        raise ValueError(f"path: {path} holds the arrays {', '.join(sorted(arrays)) or 'none'}; {wanted}")
    return arrays["images"], arrays["labels"]


def _check_arrays(path: Path, images: np.ndarray, labels: np.ndarray, channels: int) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in {1, channels}:
        wanted = f"uint8 [N, H, W, {channels}] or [N, H, W]"
        raise ValueError(f"{path}: images is {images.dtype} {list(images.shape)}; allowed is {wanted}")
    if labels.dtype != np.int64 or labels.shape != images.shape[:1]:
        wanted = f"int64 [{len(images)}], one label an image"
        raise ValueError(f"{path}: labels is {labels.dtype} {list(labels.shape)}; allowed is {wanted}")
    if 0 in images.shape:
        raise ValueError(f"path: no images in {path}")
