"""Data sets that timm names: webdataset shards, Hugging Face data sets and torchvision's own.

timm's data-set classes skip an image that does not decode and go on with the next one, and its webdataset reader
streams. Here a position stands for one image for ever, so timm is asked where the images lie and they are read one
by one: shards are listed once, by their tar headers, and are then random access like any folder.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.data.dataset_factory import create_dataset

from alignfast.data.images import Pixels, decode, pixels_of
from alignfast.data.sources import Source, check_label_range, numbered

NEEDS = {"wds": "webdataset", "hfds": "datasets", "torch": "torchvision"}
STREAMS = frozenset({"tfds", "hfids"})


def catalog_prefix(path: object) -> str | None:
    """`wds`, `hfds`, `torch`, `tfds` or `hfids` where `path` is text that starts with one of them and a slash."""
    if not isinstance(path, str):
        return None
    prefix, slash, _ = path.partition("/")
    return prefix.lower() if slash and prefix.lower() in STREAMS.union(NEEDS) else None


def catalog_source(path: str, root: str | None, split: str, num_classes: int | None, channels: int) -> Source:
    """The data set that timm calls `path`, as a list of images.

    Raises:
        ValueError: a streaming-only reader, a package that is not installed, or whatever the reader refuses.
    """
    prefix, _, name = path.partition("/")
    prefix = prefix.lower()
    if prefix in STREAMS:
        raise ValueError(f"path: {path} streams and cannot be indexed; allowed are {', '.join(NEEDS)} and local paths")
    if find_spec(NEEDS[prefix]) is None:
        raise ValueError(f"path: {path} needs the package {NEEDS[prefix]!r}, which is not installed")
    if prefix == "wds":
        return _shard_source(Path(root or name), split, num_classes, channels)
    if prefix == "hfds":
        return _hub_source(_open(path, root, split).reader, path, num_classes, channels)
    return _torchvision_source(_open(path, root, split), path, num_classes, channels)


@dataclass(frozen=True)
class ShardReader:
    shards: Sequence[Path]
    names: Sequence[str]
    places: NDArray[np.int64]  # [N, 3]: shard, offset, size
    channels: int

    def __call__(self, index: int) -> Pixels:
        shard, offset, size = (int(value) for value in self.places[index])
        with self.shards[shard].open("rb") as stream:
            stream.seek(offset)
            data = stream.read(size)
        return decode(io.BytesIO(data), f"{self.names[index]} in {self.shards[shard]}", self.channels)


@dataclass(frozen=True)
class HubReader:
    reader: Any  # timm's ReaderHfds
    name: str
    channels: int

    def __call__(self, index: int) -> Pixels:
        stream: IO[bytes]
        stream, _ = self.reader[index]
        with stream:
            return decode(stream, f"{self.name} image {index}", self.channels)


@dataclass(frozen=True)
class TorchvisionReader:
    dataset: Any  # of (PIL image, label)
    name: str
    channels: int

    def __call__(self, index: int) -> Pixels:
        try:
            return pixels_of(self.dataset[index][0], self.channels)
        except Exception as error:
            raise ValueError(f"{self.name} image {index}: not readable as an image ({error})") from error


@dataclass
class _ShardSample:
    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)  # suffix: (offset, size)
    texts: dict[str, bytes] = field(default_factory=dict)


def _open(path: str, root: str | None, split: str) -> Any:
    try:
        return create_dataset(path, root=root, split=split)
    # Each reader has exceptions of its own, and asserts; all of them mean that this name, root and split do not go.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"path: {path} with root {root!r} and split {split!r} cannot be opened ({reason})") from error


def _shard_source(root: Path, split: str, num_classes: int | None, channels: int) -> Source:
    if not root.is_dir():
        raise FileNotFoundError(f"path: no folder {root} of webdataset shards")
    reader = _open("wds/", str(root), split).reader
    shards = [root / name for name in reader.split_info.filenames]
    key = reader.target_key or reader.split_info.alt_label or "cls"
    suffixes = reader.input_key.split(";")
    names, labels, places = [], [], []
    for number, shard in enumerate(shards):
        for sample in _samples(shard):
            label = _shard_label(sample, key, shard)
            if label is None:
                continue
            names.append(sample.key)
            labels.append(label)
            places.append((number, *_image_member(sample, suffixes, shard)))
    if not names:
        raise ValueError(f"path: no images in the shards of split {split!r} in {root}")
    _check_count(root, len(names), reader.num_samples)
    values = np.array(labels, dtype=np.int64)
    check_label_range(str(root), values, num_classes)
    return Source(
        filenames=names,
        labels=torch.from_numpy(values),
        classes=numbered(num_classes or int(values.max()) + 1),
        read=ShardReader(shards, names, np.array(places, dtype=np.int64), channels),
    )


def _samples(shard: Path) -> Iterator[_ShardSample]:
    """Neighbouring members of one key, which ends at the first dot of the file name: webdataset's rule."""
    if not shard.is_file():
        raise FileNotFoundError(f"path: no shard {shard}")
    sample: _ShardSample | None = None
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                folder, _, file = member.name.rpartition("/")
                stem, _, suffix = file.partition(".")
                if not member.isfile() or not suffix or not stem:
                    continue
                key = f"{folder}/{stem}" if folder else stem
                if sample is None or sample.key != key:
                    if sample is not None:
                        yield sample
                    sample = _ShardSample(key)
                suffix = suffix.lower()
                sample.members[suffix] = (member.offset_data, member.size)
                stream = archive.extractfile(member) if suffix in {"cls", "json"} else None
                if stream is not None:
                    sample.texts[suffix] = stream.read()
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{shard}: not readable as an uncompressed tar shard ({error})") from error
    if sample is not None:
        yield sample


def _shard_label(sample: _ShardSample, key: str, shard: Path) -> int | None:
    """The label of a sample; None where the metadata mark it as left out by a negative number, as timm reads it."""
    try:
        if key == "cls":
            return int(sample.texts["cls"])
        label = int(json.loads(sample.texts["json"])[key])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{sample.key} in {shard}: no whole number as its label ({key})") from error
    return label if label >= 0 else None


def _image_member(sample: _ShardSample, suffixes: Sequence[str], shard: Path) -> tuple[int, int]:
    for suffix in suffixes:
        if suffix in sample.members:
            return sample.members[suffix]
    raise ValueError(f"{sample.key} in {shard}: no image; allowed are {', '.join(suffixes)}")


def _check_count(root: Path, found: int, declared: int) -> None:
    if declared and found != declared:
        raise ValueError(f"path: {root} declares {declared} images and its shards hold {found}")


def _hub_source(reader: Any, name: str, num_classes: int | None, channels: int) -> Source:
    labels = _whole_labels(list(reader.iter_targets()), name)
    classes = tuple(sorted(reader.class_to_idx, key=reader.class_to_idx.__getitem__))
    return _indexed_source(labels, classes, HubReader(reader, name, channels), name, num_classes)


def _torchvision_source(dataset: Any, name: str, num_classes: int | None, channels: int) -> Source:
    if not hasattr(dataset, "targets"):
        raise ValueError(f"path: {name} does not list its labels; allowed are data sets with `targets`")
    labels = _whole_labels(dataset.targets, name)
    classes = tuple(str(label) for label in getattr(dataset, "classes", ()))
    return _indexed_source(labels, classes, TorchvisionReader(dataset, name, channels), name, num_classes)


def _indexed_source(
    labels: NDArray[np.int64],
    classes: tuple[str, ...],
    read: HubReader | TorchvisionReader,
    name: str,
    num_classes: int | None,
) -> Source:
    """Images without names of their own: they are called by their position."""
    if len(labels) == 0:
        raise ValueError(f"path: no images in {name}")
    count = num_classes or len(classes) or int(labels.max()) + 1
    check_label_range(name, labels, count)
    width = len(str(len(labels) - 1))
    return Source(
        filenames=[f"{index:0{width}d}" for index in range(len(labels))],
        labels=torch.from_numpy(labels),
        classes=classes if len(classes) == count else numbered(count),
        read=read,
    )


def _whole_labels(values: Any, name: str) -> NDArray[np.int64]:
    labels = np.asarray(values)
    if labels.ndim != 1 or (len(labels) and not np.issubdtype(labels.dtype, np.integer)):
        raise ValueError(f"path: {name} has labels of {labels.dtype} {list(labels.shape)}; allowed is one whole number")
    return labels.astype(np.int64)
