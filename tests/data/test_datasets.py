import io
import json
import pickle
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2

from alignfast.data import load_dataset

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def picture(height=12, width=10, seed=0, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.squeeze()).save(path)
    return path


@pytest.fixture
def classes(tmp_path):
    for seed, name in enumerate(("dog/b.png", "cat/z.png", "cat/deep/a.png")):
        save(tmp_path / name, picture(seed=seed))
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / ".cache").mkdir()
    return tmp_path


def table(folder, text, names=("a.png", "b.png")):
    for seed, name in enumerate(names):
        save(folder / "images" / name, picture(seed=seed))
    (folder / "labels.csv").write_text(text)
    return folder


def arrays(path, **content):
    np.savez(path, **content)
    return path


def refused(pattern, *args, error=ValueError, **kwargs):
    with pytest.raises(error, match=pattern) as caught:
        load_dataset(*args, **kwargs)
    assert "\n" not in str(caught.value)


def test_class_folders_are_labelled_as_image_folder_does(classes):
    dataset = load_dataset(classes, num_classes=2)
    expected = ImageFolder(
        classes / ".." / classes.name, is_valid_file=lambda name: name.endswith(".png"), allow_empty=True
    )
    assert dataset.classes == ("cat", "dog")
    assert dataset.num_classes == 2
    assert dataset.filenames == ["cat/deep/a.png", "cat/z.png", "dog/b.png"]
    assert dataset.labels.tolist() == [0, 0, 1]
    assert [label - 1 for _, label in expected.samples] == dataset.labels.tolist()  # ".cache" is a class there
    assert dataset.targets is None


def test_a_sample_is_its_original_over_255(classes):
    dataset = load_dataset(classes)
    image, label, index = dataset[2]
    assert (label, index) == (1, 2)
    assert image.dtype == torch.float32
    assert image.shape == (3, 12, 10)
    assert torch.equal(dataset.original(2), torch.from_numpy(picture(seed=0)).permute(2, 0, 1))
    assert torch.equal(image, dataset.original(2).float() / 255)
    assert torch.equal(dataset.originals([2, 0])[0], dataset.original(2))
    assert len(list(dataset)) == 3
    with pytest.raises(IndexError, match="allowed is 0 to 2"):
        dataset[3]


@pytest.mark.parametrize(("height", "width"), [(50, 91), (91, 50), (64, 64), (20, 33)])
def test_resizing_equals_torchvision_in_8_bits(tmp_path, height, width):
    pixels = picture(height, width)
    save(tmp_path / "a" / "x.png", pixels)
    size = v2.Resize(round(28 / 0.875), interpolation=InterpolationMode.BICUBIC)
    expected = np.asarray(v2.CenterCrop(28)(size(Image.fromarray(pixels))))
    original = load_dataset(tmp_path, image_size=(28, 28)).original(0)
    assert torch.equal(original, torch.from_numpy(expected.copy()).permute(2, 0, 1))


@pytest.mark.parametrize("size", [(7, 30), (30, 7), (12, 10)])
def test_images_come_out_in_the_size_asked_for(classes, size):
    dataset = load_dataset(classes, image_size=size)
    assert dataset[0].image.shape == (3, *size)
    assert dataset.read(0).shape == (3, 12, 10)


def test_data_sets_go_to_processes_that_share_no_memory(classes):
    dataset = load_dataset(classes, image_size=(6, 6))
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[2].image, dataset[2].image)


def test_an_image_of_the_right_size_is_taken_as_it_is(classes):
    assert torch.equal(load_dataset(classes, image_size=(12, 10)).original(1), load_dataset(classes).original(1))


def test_transform_maps_the_8_bit_image_first(classes):
    dataset = load_dataset(classes, image_size=(6, 6), transform=lambda image: image[:, :6, :6])
    assert torch.equal(dataset.original(1), load_dataset(classes).original(1)[:, :6, :6])
    with pytest.raises(ValueError, match=r"transform: returned torch.float32 .* allowed is torch.uint8 \[3, H, W\]"):
        load_dataset(classes, transform=lambda image: image / 255)[0]


def test_grey_and_alpha_and_channels(tmp_path):
    grey = save(tmp_path / "c" / "a.png", picture(channels=1))
    Image.fromarray(picture(channels=4)).save(tmp_path / "c" / "b.png")
    colour, single = load_dataset(tmp_path), load_dataset(tmp_path, channels=1, image_size=(6, 6))
    assert torch.equal(colour.original(0), torch.from_numpy(np.array(Image.open(grey))).expand(3, -1, -1))
    assert torch.equal(colour.original(1), torch.from_numpy(picture(channels=4)[..., :3].copy()).permute(2, 0, 1))
    assert single[1].image.shape == (1, 6, 6)


def test_table_with_targets(tmp_path):
    table(tmp_path, "\ufefflabel,filename,targeted_label\n3,b.png,7\n\n0,a.png,5\n")
    dataset = load_dataset(tmp_path, num_classes=10)
    assert dataset.filenames == ["b.png", "a.png"]
    assert dataset.labels.tolist() == [3, 0]
    assert dataset.targets.tolist() == [7, 5]
    assert dataset.num_classes == 10
    assert load_dataset(tmp_path).num_classes == 8
    assert torch.equal(dataset.original(1), torch.from_numpy(picture(seed=0)).permute(2, 0, 1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "filename,label,author\na.png,0,me\n",
            "unknown column 'author'; allowed are filename, label and targeted_label",
        ),
        ("name,label\na.png,0\n", "unknown column 'name'"),
        ("filename\na.png\n", "missing column 'label'"),
        ("", "missing column 'filename'"),
        ("filename,label,label\na.png,0,1\n", "repeated column 'label'"),
        ("filename,label\na.png,0\nc.png,1\n", "row 3: no file .*c.png"),
        ("filename,label\na.png,0\na.png,1\n", "row 3: a.png is listed twice"),
        ("filename,label\na.png,cat\n", "row 2: label is 'cat'; allowed is a whole number from 0 to 9"),
        ("filename,label\na.png,1.0\n", "row 2: label is '1.0'"),
        ("filename,label\na.png,-1\n", "row 2: label is '-1'"),
        ("filename,label\na.png,0\nb.png,10\n", "row 3: label is '10'"),
        ("filename,label,targeted_label\na.png,0,\n", "row 2: targeted_label is ''"),
        ("filename,label\na.png\n", "row 2: got another number of fields"),
        ("filename,label\na.png,0,1\n", "row 2: got another number of fields"),
        ("filename,label\n../labels.csv,0\n", "row 2: filename is '../labels.csv'; allowed is a path below images/"),
        ("filename,label\n", "lists no images"),
    ],
)
def test_bad_tables_are_refused_by_row(tmp_path, text, message):
    refused(f"labels.csv.*{message}" if "row" in message else message, table(tmp_path, text), num_classes=10)


def test_a_table_that_is_not_text_is_refused(tmp_path):
    table(tmp_path, "")
    (tmp_path / "labels.csv").write_bytes(b"filename,label\n\xff\xfe,0\n")
    refused("not readable as comma-separated text", tmp_path)


def test_arrays(tmp_path):
    images = np.stack([picture(seed=seed) for seed in range(11)])
    labels = np.arange(11, dtype=np.int64)
    dataset = load_dataset(arrays(tmp_path / "a.npz", images=images, labels=labels), num_classes=20)
    assert dataset.filenames[:2] == ["00", "01"]
    assert dataset.num_classes == 20
    assert torch.equal(dataset.original(4), torch.from_numpy(images[4]).permute(2, 0, 1))
    grey = arrays(tmp_path / "g.npz", images=images[..., 0], labels=labels)
    assert torch.equal(load_dataset(grey).original(3), torch.from_numpy(images[3, ..., 0]).expand(3, -1, -1))
    assert load_dataset(grey, channels=1)[3].image.shape == (1, 12, 10)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"x": picture(), "labels": np.zeros(1)}, "holds the arrays labels, x; allowed is an .npz of exactly"),
        ({"images": picture()[None], "labels": np.zeros(1, np.int64), "more": np.zeros(1)}, "images, labels, more"),
        ({"images": picture()[None].astype(np.float32), "labels": np.zeros(1, np.int64)}, "images is float32"),
        ({"images": picture()[0], "labels": np.zeros(12, np.int64)}, r"images is uint8 \[10, 3\]"),
        ({"images": picture(channels=4)[None], "labels": np.zeros(1, np.int64)}, r"allowed is uint8 \[N, H, W, 3\]"),
        ({"images": picture()[None], "labels": np.zeros(1, np.int32)}, "labels is int32"),
        (
            {"images": picture()[None], "labels": np.zeros(2, np.int64)},
            r"labels is int64 \[2\]; allowed is int64 \[1\]",
        ),
        ({"images": picture()[None], "labels": np.full(1, 10)}, "label of image 0 is 10; .* 0 to 9"),
        ({"images": picture()[None], "labels": np.full(1, -1)}, "label of image 0 is -1"),
        ({"images": picture()[None][:0], "labels": np.zeros(0, np.int64)}, "no images"),
        ({"images": np.array([None]), "labels": np.zeros(1, np.int64)}, "cannot be read .*allow_pickle"),
    ],
)
def test_bad_arrays_are_refused_by_name(tmp_path, content, message):
    refused(message, arrays(tmp_path / "a.npz", **content), num_classes=10)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 torn", b"no archive at all"])
def test_a_torn_archive_is_refused(tmp_path, data):
    (tmp_path / "a.npz").write_bytes(data)
    refused("a.npz cannot be read", tmp_path / "a.npz")


def test_paths_that_hold_nothing(tmp_path, classes):
    refused("nothing at .*absent", tmp_path / "absent", error=FileNotFoundError)
    (tmp_path / "empty").mkdir()
    refused("no images in .*empty", tmp_path / "empty")
    (tmp_path / "cat2").mkdir()
    refused("no images in class folder .*cat2", classes)
    (tmp_path / "a.txt").write_text("text")
    refused("allowed are folders and .npz files", tmp_path / "a.txt")


def test_a_folder_of_splits_is_refused(tmp_path):
    for split in ("train", "val"):
        save(tmp_path / split / "cat" / "a.png", picture())
    refused(f"holds the splits train, val; give one of them, as {re.escape(str(tmp_path / 'train'))}", tmp_path)
    assert load_dataset(tmp_path / "val").classes == ("cat",)


def test_images_without_a_table_are_refused(tmp_path):
    save(tmp_path / "images" / "a.png", picture())
    refused("no labels.csv", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1000}, "num_classes: got 1000, but .* 2 class folders"),
        ({"num_classes": 0}, "num_classes: got 0"),
        ({"image_size": 224}, r"image_size: got 224; allowed is \(height, width\)"),
        ({"image_size": (0, 4)}, "image_size: got 0"),
        ({"crop_pct": 0.0}, "crop_pct: got 0.0"),
        ({"crop_pct": 1.5}, "crop_pct: got 1.5"),
        ({"channels": 2}, "channels: got '2'; allowed is one of 1, 3"),
        ({"split": "train"}, "split: got 'train' .* only with wds/"),
        ({"root": "x"}, "root: got 'x' .* only with wds/"),
    ],
)
def test_bad_arguments_are_refused(classes, arguments, message):
    refused(message, classes, **arguments)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("part", [0.0, 0.01, 0.3, 0.9])
def test_truncated_images_are_named(classes, suffix, part):
    path = save(classes / "dog" / f"torn.{suffix}", picture(64, 64))
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    dataset = load_dataset(classes)
    for read in (lambda: dataset[3], dataset.verify):
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: not readable as an image") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_more_than_8_bits_are_refused(classes):
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(classes / "dog" / "deep.png")
    with pytest.raises(ValueError, match=r"deep.png: .* more than 8 bits"):
        load_dataset(classes).verify()


def test_verify_asks_for_one_size_only_where_wanted(classes):
    save(classes / "dog" / "wide.png", picture(12, 30))
    dataset = load_dataset(classes)
    dataset.verify()
    with pytest.raises(ValueError, match=r"image 0 is \[3, 12, 10\] where image 3 is \[3, 12, 30\]; give image_size"):
        dataset.verify(one_size=True)
    load_dataset(classes, image_size=(8, 8)).verify(one_size=True)


def shard(path, samples):
    """A tar of (key, {suffix: bytes}) samples."""
    with tarfile.open(path, "w") as archive:
        for key, members in samples:
            for suffix, data in members.items():
                header = tarfile.TarInfo(f"{key}.{suffix}")
                header.size = len(data)
                archive.addfile(header, io.BytesIO(data))


def encoded(seed):
    buffer = io.BytesIO()
    Image.fromarray(picture(seed=seed)).save(buffer, "PNG")
    return buffer.getvalue()


def shards(folder, **split):
    samples = [(f"n{seed}/img{seed}", {"png": encoded(seed), "cls": str(seed % 3).encode()}) for seed in range(5)]
    shard(folder / "val-0.tar", samples[:3])
    shard(folder / "val-1.tar", samples[3:])
    info = {"name": "val", "num_samples": 5, "filenames": ["val-0.tar", "val-1.tar"], "shard_lengths": [3, 2], **split}
    (folder / "_info.json").write_text(json.dumps({"splits": {"val": info}}))
    return folder


def test_shards_are_indexed_in_order(tmp_path):
    pytest.importorskip("webdataset")
    shards(tmp_path)
    dataset = load_dataset(f"wds/{tmp_path}", split="val")
    assert dataset.filenames == [f"n{seed}/img{seed}" for seed in range(5)]
    assert dataset.labels.tolist() == [0, 1, 2, 0, 1]
    for index in (4, 0, 3):
        assert torch.equal(dataset.original(index), torch.from_numpy(picture(seed=index)).permute(2, 0, 1))
    dataset.verify(one_size=True)
    again = load_dataset("wds/imagenet", root=tmp_path, split="val", num_classes=3)
    assert torch.equal(again[2].image, dataset[2].image)


def test_shards_give_what_timm_gives(tmp_path):
    pytest.importorskip("webdataset")
    from timm.data.dataset_factory import create_dataset

    shards(tmp_path)
    dataset = load_dataset(f"wds/{tmp_path}", split="val")
    streamed = list(create_dataset("wds/x", root=str(tmp_path), split="val"))
    assert [label for _, label in streamed] == dataset.labels.tolist()
    for index, (image, _) in enumerate(streamed):
        assert torch.equal(dataset.original(index), torch.from_numpy(np.array(image)).permute(2, 0, 1))


def test_shards_with_labels_in_json_leave_out_what_is_marked(tmp_path):
    pytest.importorskip("webdataset")
    shards(tmp_path, alt_label="kind", num_samples=2, filenames=["j.tar"], shard_lengths=[3])
    kinds = [4, -1, 2]
    members = [{"jpg": encoded(seed), "json": json.dumps({"kind": kind}).encode()} for seed, kind in enumerate(kinds)]
    shard(tmp_path / "j.tar", [(f"s{seed}", each) for seed, each in enumerate(members)])
    dataset = load_dataset(f"wds/{tmp_path}", split="val")
    assert dataset.labels.tolist() == [4, 2]
    assert dataset.filenames == ["s0", "s2"]


def test_bad_shards_are_named(tmp_path):
    pytest.importorskip("webdataset")
    name = f"wds/{tmp_path}"
    refused("no folder .*absent of webdataset shards", f"{name}/absent", error=FileNotFoundError)
    shards(tmp_path)
    refused("split 'train' cannot be opened .*split train not found", name, split="train")
    refused("label of image 2 is 2", name, split="val", num_classes=2)
    shards(tmp_path, num_samples=6)
    refused("declares 6 images and its shards hold 5", name, split="val")
    shards(tmp_path, filenames=["val-0.tar", "val-7.tar"])
    refused("no shard .*val-7.tar", name, split="val", error=FileNotFoundError)
    shards(tmp_path)
    shard(tmp_path / "val-1.tar", [("k", {"png": encoded(0)})])
    refused(r"k in .*val-1.tar: no whole number as its label \(cls\)", name, split="val")
    shard(tmp_path / "val-1.tar", [("k", {"cls": b"0"})])
    refused("k in .*val-1.tar: no image; allowed are jpg, png, webp", name, split="val")
    (tmp_path / "val-1.tar").write_bytes((tmp_path / "val-0.tar").read_bytes()[:700])
    refused("val-1.tar: not readable as an uncompressed tar shard", name, split="val")


def test_a_torn_image_in_a_shard_is_named(tmp_path):
    pytest.importorskip("webdataset")
    shards(tmp_path)
    torn = [(key, {"png": encoded(1)[:-60], "cls": b"0"}) for key in ("a", "b")]
    shard(tmp_path / "val-1.tar", torn)
    with pytest.raises(ValueError, match=r"^a in .*val-1.tar: not readable as an image"):
        load_dataset(f"wds/{tmp_path}", split="val").verify()


def test_catalogs_that_are_absent_or_stream(tmp_path, monkeypatch):
    monkeypatch.setattr("alignfast.data.catalogs.find_spec", lambda name: None)
    refused("hfds/pets needs the package 'datasets', which is not installed", "hfds/pets")
    refused("tfds/mnist streams and cannot be indexed; allowed are wds, hfds, torch", "tfds/mnist")
    save(tmp_path / "wds" / "cat" / "a.png", picture())
    monkeypatch.chdir(tmp_path)
    assert load_dataset("./wds").classes == ("cat",)
    assert load_dataset(Path("wds")).classes == ("cat",)


class HubReader:
    """What timm's reader of Hugging Face data sets looks like from outside."""

    def __init__(self, labels, class_to_idx):
        self.labels, self.class_to_idx = labels, class_to_idx
        self.reader = self

    def __getitem__(self, index):
        return io.BytesIO(encoded(index) if index < 3 else b"torn"), self.labels[index]

    def iter_targets(self):
        return iter(self.labels)


def test_hub_readers(monkeypatch):
    monkeypatch.setattr("alignfast.data.catalogs.find_spec", lambda name: name)
    monkeypatch.setattr("alignfast.data.catalogs._open", lambda *_: HubReader([1, 0, 1, 1], {"dog": 1, "cat": 0}))
    dataset = load_dataset("hfds/pets")
    assert dataset.classes == ("cat", "dog")
    assert dataset.labels.tolist() == [1, 0, 1, 1]
    assert torch.equal(dataset.original(2), torch.from_numpy(picture(seed=2)).permute(2, 0, 1))
    with pytest.raises(ValueError, match=r"^hfds/pets image 3: not readable as an image"):
        dataset.verify()
    monkeypatch.setattr("alignfast.data.catalogs._open", lambda *_: HubReader([[1, 0], [0, 1]], {}))
    refused("hfds/pets has labels of int64 .* allowed is one whole number", "hfds/pets")


def test_hub_data_sets(tmp_path):
    pytest.importorskip("datasets", reason="needs the optional package datasets")
    for seed, name in enumerate(("cat/a.png", "dog/b.png", "dog/c.png")):
        save(tmp_path / "hub" / "validation" / name, picture(seed=seed))
    dataset = load_dataset(f"hfds/{tmp_path / 'hub'}", root=tmp_path / "cache")
    assert dataset.classes == ("cat", "dog")
    assert dataset.labels.tolist() == [0, 1, 1]
    assert dataset.filenames == ["0", "1", "2"]
    assert torch.equal(dataset.original(2), torch.from_numpy(picture(seed=2)).permute(2, 0, 1))
    dataset.verify(one_size=True)
    refused("cannot be opened", f"hfds/{tmp_path / 'hub'}", root=tmp_path / "cache", split="absent")


def test_torchvision_data_sets(tmp_path):
    refused("torch/cifar10 with root .* cannot be opened", "torch/cifar10", root=tmp_path)
    save(tmp_path / "val" / "cat" / "a.png", picture())
    dataset = load_dataset("torch/image_folder", root=tmp_path)
    assert dataset.classes == ("cat",)
    assert torch.equal(dataset.original(0), torch.from_numpy(picture()).permute(2, 0, 1))


@pytest.mark.skipif(not (SHARED / "imagenet-sample").is_dir(), reason="no shared ImageNet sample")
def test_the_imagenet_sample():
    dataset = load_dataset(SHARED / "imagenet-sample", image_size=(224, 224), num_classes=1000)
    assert len(dataset) == 250
    assert dataset.labels[:2].tolist() == [0, 4]
    assert dataset.filenames[1] == "n01494475_hammerhead.JPEG"
    dataset.verify(one_size=True)
    assert dataset[7].image.shape == (3, 224, 224)
    assert min(load_dataset(SHARED / "imagenet-sample").original(7).shape[1:]) == 288


@pytest.mark.skipif(not (SHARED / "cifar10").is_dir(), reason="no shared CIFAR-10")
def test_the_cifar_test_images():
    dataset = load_dataset(SHARED / "cifar10" / "test.npz", image_size=(32, 32), num_classes=10)
    with np.load(SHARED / "cifar10" / "test.npz") as content:
        assert torch.equal(dataset.labels, torch.from_numpy(content["labels"]))
        assert torch.equal(dataset.original(1999), torch.from_numpy(content["images"][1999]).permute(2, 0, 1))
    assert len(dataset) == 2000
