"""`load_dataset`: whatever holds the images, one kind of data set with an exact 8-bit original behind every image."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from alignfast.checks import check_choice, check_count, check_number
from alignfast.data.catalogs import catalog_prefix, catalog_source
from alignfast.data.images import MODES, fit, to_float, to_pixels, to_tensor
from alignfast.data.sources import Source, array_source, folder_source, table_source

Transform = Callable[[Tensor], Tensor]

VERIFY_THREADS = 8


class Sample(NamedTuple):
    """One image: float32 [C, H, W] in [0, 1], its label and its position in the data set."""

    image: Tensor
    label: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here


class ImageDataset(Dataset[Sample]):
    """Labelled images in 8 bits; made by `load_dataset`.

    `dataset[i]` is a `Sample` whose image is `original(i) / 255` to the last bit, so each image has an exact 8-bit
    original.

    Attributes:
        labels: int64 [N].
        targets: int64 [N], labels for a targeted attack as the data set lists them, or None.
        filenames: N names, the ones that written images are derived from.
        classes: class names by label; numbers where the data have none.
        num_classes: how many.
        image_size: (height, width) of every image, or None where images keep their own sizes.
    """

    def __init__(
        self,
        source: Source,
        *,
        image_size: tuple[int, int] | None = None,
        crop_pct: float = 0.875,
        transform: Transform | None = None,
    ) -> None:
        self._source = source
        self._crop_pct = crop_pct
        self._transform = transform
        self.image_size = image_size

    @property
    def labels(self) -> Tensor:
        return self._source.labels

    @property
    def targets(self) -> Tensor | None:
        return self._source.targets

    @property
    def filenames(self) -> Sequence[str]:
        return self._source.filenames

    @property
    def classes(self) -> tuple[str, ...]:
        return self._source.classes

    @property
    def num_classes(self) -> int:
        return len(self._source.classes)

    def __len__(self) -> int:
        return len(self._source.filenames)

    def __getitem__(self, index: int) -> Sample:
        return Sample(to_float(self.original(index)), int(self.labels[index]), index)

    def read(self, index: int) -> Tensor:
        """Image `index` in full resolution, after `transform`: uint8 [C, H, W].

        Raises:
            IndexError: `index` outside [0, N).
            ValueError: the image cannot be read; the message names it.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index: got {index}; allowed is 0 to {len(self) - 1}")
        image = to_tensor(self._source.read(index))
        return image if self._transform is None else _transformed(self._transform, image)

    def original(self, index: int) -> Tensor:
        """The 8-bit original of image `index`, cut to `image_size`: uint8 [C, H, W]; raises as `read`."""
        image = self.read(index)
        if self.image_size is None:
            return image
        return to_tensor(fit(to_pixels(image), self.image_size, self._crop_pct))

    def originals(self, indices: Iterable[int] | Tensor) -> Tensor:
        """The 8-bit originals of several images of one size: uint8 [N, C, H, W]."""
        return stack([(int(index), self.original(int(index))) for index in indices])

    def verify(self, *, one_size: bool = False) -> None:
        """Decode every image once, on several threads, so that a bad one is known before any model runs.

        Args:
            one_size: also require that all images come out in one size, as batches need.

        Raises:
            ValueError: the first image, by position, that cannot be read or differs in size.
        """
        with ThreadPool(min(VERIFY_THREADS, os.cpu_count() or 1)) as pool:
            first: torch.Size | None = None
            for index, shape in enumerate(pool.imap(self._shape, range(len(self)), chunksize=4)):
                first = first or shape
                if one_size and shape != first:
                    raise ValueError(_sizes((0, first), (index, shape)))

    def _shape(self, index: int) -> torch.Size:
        # Resizing and cutting what was decoded takes longer than decoding, and cannot fail.
        shape = self.read(index).shape
        return shape if self.image_size is None else torch.Size((shape[0], *self.image_size))


def load_dataset(
    path: str | os.PathLike[str],
    *,
    image_size: tuple[int, int] | None = None,
    num_classes: int | None = None,
    channels: int = 3,
    crop_pct: float = 0.875,
    root: str | os.PathLike[str] | None = None,
    split: str | None = None,
    transform: Transform | None = None,
) -> ImageDataset:
    """A data set from the layout found at `path`.

    - `FOLDER/CLASS/...`: one folder a class, classes sorted by name, images at any depth. Give the folder that holds
      the class folders: `imagenet/val`, not `imagenet`.
    - `FOLDER/labels.csv` and `FOLDER/images/`: columns `filename,label` and, if wanted, `targeted_label`.
    - `FILE.npz`: `images` uint8 [N, H, W, 3] or [N, H, W] and `labels` int64 [N], held in memory.
    - `wds/FOLDER`: webdataset shards with the `_info.json` that timm reads; uncompressed and local. Shards are listed
      once, in order, and a position in that list is the index of an image.
    - `hfds/NAME`: a Hugging Face data set, or a folder in its formats (`hfds//data/pets`), by timm's reader; needs the
      package `datasets`. `root` is its cache.
    - `torch/NAME`: a torchvision data set that timm knows, such as `torch/cifar10`, with its `root`.

    A local folder whose name starts with one of these prefixes is written `./wds/...`.

    Args:
        path: see above.
        image_size: (height, width). The image is resized in 8 bits (bicubic) until `image_size / crop_pct` is just
            covered, and `image_size` is cut from its centre; one that has `image_size` already is taken as it is.
            None leaves every image as it is, and batches then need images of one size.
        num_classes: labels must lie in [0, num_classes). For class folders it must be their number. None takes what
            the data say.
        channels: 3 or 1. Grey images are repeated to 3; colour files become luminance for 1; alpha is dropped.
        crop_pct: in (0, 1].
        root: folder of `wds/`, in place of the one behind the prefix; cache or folder of `hfds/` and `torch/`.
        split: of `wds/`, `hfds/` and `torch/` only; "validation" where None.
        transform: maps each image as read, uint8 [C, H, W], to another such, before any resizing or augmentation.

    Raises:
        FileNotFoundError: nothing at `path`, or a shard is missing.
        ValueError: no images, or data or arguments that are not as above; the message names the file, row or array.
    """
    size = None if image_size is None else _checked_size("image_size", image_size)
    check_number("crop_pct", crop_pct, low=0.0, high=1.0, open_low=True)
    check_choice("channels", str(channels), [str(count) for count in MODES])
    if num_classes is not None:
        check_count("num_classes", num_classes)
    source = _source(path, root, split, num_classes, channels)
    return ImageDataset(source, image_size=size, crop_pct=crop_pct, transform=transform)


def stack(images: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Images [C, H, W] with their positions, as one batch [N, C, H, W]; ValueError where they differ in size."""
    if not images:
        raise ValueError("indices: got none; allowed is at least one")
    first = images[0]
    for index, image in images:
        if image.shape != first[1].shape:
            raise ValueError(_sizes((first[0], first[1].shape), (index, image.shape)))
    return torch.stack([image for _, image in images])


def _source(
    path: str | os.PathLike[str],
    root: str | os.PathLike[str] | None,
    split: str | None,
    num_classes: int | None,
    channels: int,
) -> Source:
    if catalog_prefix(path):
        folder = None if root is None else os.fspath(root)
        return catalog_source(str(path), folder, split or "validation", num_classes, channels)
    for name, value in (("root", root), ("split", split)):
        if value is not None:
            raise ValueError(f"{name}: got {value!r} with {path}; allowed only with wds/, hfds/ and torch/ data sets")
    return _local_source(Path(path), num_classes, channels)


def _local_source(path: Path, num_classes: int | None, channels: int) -> Source:
    if not path.exists():
        raise FileNotFoundError(f"path: nothing at {path}; give a folder of images or an .npz file")
    if path.is_dir():
        reader = table_source if (path / "labels.csv").is_file() else folder_source
        return reader(path, num_classes, channels)
    if path.suffix == ".npz":
        return array_source(path, num_classes, channels)
    raise ValueError(f"path: {path} is a file of another kind; allowed are folders and .npz files")


def _checked_size(name: str, size: tuple[int, int]) -> tuple[int, int]:
    if isinstance(size, str) or not isinstance(size, Sequence) or len(size) != 2:
        raise ValueError(f"{name}: got {size!r}; allowed is (height, width)")
    height, width = (check_count(name, side) for side in size)
    return height, width


def _transformed(transform: Transform, image: Tensor) -> Tensor:
    changed = transform(image)
    if not isinstance(changed, Tensor) or changed.dtype != torch.uint8 or changed.shape[:-2] != image.shape[:1]:
        got = f"{changed.dtype} {list(changed.shape)}" if isinstance(changed, Tensor) else type(changed).__name__
        raise ValueError(f"transform: returned {got}; allowed is torch.uint8 [{image.shape[0]}, H, W]")
    return changed


def _sizes(first: tuple[int, torch.Size], other: tuple[int, torch.Size]) -> str:
    (i, a), (j, b) = first, other
    return (
        f"images: a batch needs one size, and image {i} is {list(a)} where image {j} is {list(b)}; "
        "give image_size to load_dataset"
    )
