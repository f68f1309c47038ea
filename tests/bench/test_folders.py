"""Reading and writing folders: what is read and written is checked before it is timed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from alignfast.bench import folders
from alignfast.bench.folders import Loading, Saving, photos

SHAPE = (5, 3, 12, 10)


def test_both_loaders_read_the_same() -> None:
    loading = Loading(SHAPE)
    sides, fault = loading.prepare(compiled=False)
    assert fault is None
    assert list(sides) == ["ours", "torchvision"]
    images, labels = loading._ours()
    assert sorted(labels.tolist()) == [0, 0, 1, 2, 3]
    assert images.shape == SHAPE
    assert loading.cost.moved == 5 * 3 * 12 * 10 * 4


def test_a_loader_that_reads_other_images_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    read = folders.to_tensor
    monkeypatch.setattr(folders, "to_tensor", lambda image: read(image) / 2)
    assert Loading(SHAPE).prepare(compiled=False)[1] == "ours: images or labels are other than torchvision's"


def test_all_writers_write_the_same_pixels() -> None:
    saving = Saving(SHAPE)
    sides, fault = saving.prepare(compiled=False)
    assert fault is None
    assert list(sides) == ["ours", "PIL", "torchvision"]
    # A new folder at every call.
    places = [call() for call in [*sides.values(), *sides.values()]]
    assert len(set(places)) == 6
    assert all(len(list(Path(str(place)).rglob("*.png"))) == 5 for place in places)
    assert saving.cost.moved == 5 * 3 * 12 * 10


def test_a_writer_of_other_pixels_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def save(image: torch.Tensor, path: Path) -> None:
        Image.new("RGB", (10, 12)).save(path)

    monkeypatch.setattr(folders, "save_image", save)
    assert Saving(SHAPE).prepare(compiled=False)[1] == "torchvision: files hold other pixels than were given"


def test_what_was_written_goes_with_the_case() -> None:
    saving = Saving(SHAPE)
    place = saving._pil()
    assert place.exists()
    del saving
    assert not place.exists()


def test_images_are_the_same_every_time_and_unlike_noise() -> None:
    images = photos((2, 3, 64, 64))
    assert images.dtype == torch.uint8
    assert torch.equal(images, photos((2, 3, 64, 64)))
    neighbours = (images[..., 1:].int() - images[..., :-1].int()).abs().float().mean()
    assert 0 < float(neighbours) < 12
