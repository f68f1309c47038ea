import csv
import errno
import json
import platform
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from alignfast.data import (
    AdversarialWriter,
    Manifest,
    adversarial,
    eight_bit,
    load_dataset,
    loader,
    png_names,
    quantise,
    read_adversarial,
)
from alignfast.versions import package_versions

COUNT = 5
EPS = 8 / 255
MANIFEST = Manifest(
    attack="mifgsm",
    parameters={"alpha": 2 / 255, "steps": 10, "size": (4, 4)},
    model="abc123",
    seed=3,
    eps=EPS,
    norm="linf",
    data="../data/pets",
    num_classes=4,
)
FILENAMES = ["cat/1.JPEG", "dog/1.jpeg", "dog/two, or more.png", "b/3.png", "b/4.png"]
LABELS = torch.tensor([0, 1, 2, 3, 0])


def pictures(channels=3):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (COUNT, channels, 6, 7), dtype=np.uint8))


def write(folder, indices=range(COUNT), images=None, manifest=MANIFEST, targets=None, **options):
    chosen = torch.tensor(list(indices), dtype=torch.int64)
    images = pictures() if images is None else images
    with AdversarialWriter(folder, manifest, FILENAMES, **options) as writer:
        chosen = chosen[writer.pending(chosen)]
        if len(chosen):
            writer.add(images[chosen], LABELS[chosen], chosen, None if targets is None else targets[chosen])
    return folder


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_images_come_back_as_they_were_written(tmp_path):
    dataset, manifest = read_adversarial(write(tmp_path / "new" / "adv"))
    assert torch.equal(dataset.originals(range(COUNT)), pictures())
    assert torch.equal(dataset.labels, LABELS)
    assert dataset.num_classes == 4
    assert manifest.indices == (0, 1, 2, 3, 4)
    assert dataset.filenames == ["1-0.png", "1-1.png", "two, or more.png", "3.png", "4.png"]
    assert replace(manifest, files=(), labels_sha256="", parameters=MANIFEST.parameters) == MANIFEST
    assert manifest.run == MANIFEST.run
    assert listing(tmp_path / "new" / "adv") == sorted(
        ["labels.csv", "manifest.json", *(f"images/{name}" for name in dataset.filenames)]
    )


def test_grey_images_come_back_grey(tmp_path):
    dataset, _ = read_adversarial(write(tmp_path, images=pictures(1)))
    assert torch.equal(dataset.originals(range(COUNT)), pictures(1))


def test_files_are_those_of_index_order_however_they_arrive(tmp_path):
    write(tmp_path / "a")
    with AdversarialWriter(tmp_path / "b", MANIFEST, FILENAMES) as writer:
        for index in (3, 0, 4, 2, 1):
            writer.add(pictures()[[index]], LABELS[[index]], torch.tensor([index]))
    assert listing(tmp_path / "a") == listing(tmp_path / "b")
    for name in listing(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_table_is_transferattacks(tmp_path):
    write(tmp_path / "plain")
    write(tmp_path / "aimed", targets=LABELS.flip(0))
    with (tmp_path / "plain" / "labels.csv").open(newline="") as stream:
        rows = list(csv.reader(stream))
    assert rows[:4] == [["filename", "label"], ["1-0.png", "0"], ["1-1.png", "1"], ["two, or more.png", "2"]]
    dataset = load_dataset(tmp_path / "aimed")
    assert torch.equal(dataset.targets, LABELS.flip(0))
    assert torch.equal(read_adversarial(tmp_path / "aimed")[0].targets, LABELS.flip(0))
    assert torch.equal(dataset.originals(range(COUNT)), pictures())


def test_the_manifest_says_what_was_done(tmp_path):
    write(tmp_path, indices=[4, 1])
    values = json.loads((tmp_path / "manifest.json").read_text())
    assert values["count"] == 2
    assert values["attack"] == "mifgsm"
    assert values["parameters"] == {"alpha": 2 / 255, "steps": 10, "size": [4, 4]}
    assert (values["model"], values["seed"], values["eps"], values["norm"]) == ("abc123", 3, EPS, "linf")
    assert values["data"] == "../data/pets"
    assert values["versions"]["torch"] == package_versions()["torch"]
    assert [file["index"] for file in values["files"]] == [1, 4]
    assert [file["name"] for file in values["files"]] == ["1-1.png", "4.png"]


def test_a_whole_pass_stays_in_the_ball_on_disk(tmp_path):
    np.savez(tmp_path / "a.npz", images=pictures().permute(0, 2, 3, 1).numpy(), labels=LABELS.numpy())
    dataset = load_dataset(tmp_path / "a.npz")
    generator = torch.Generator().manual_seed(0)
    with AdversarialWriter(tmp_path / "adv", MANIFEST, dataset.filenames) as writer:
        for images, labels, indices in loader(dataset, 2, shuffle=True):
            noise = EPS * (torch.randint(0, 2, images.shape, generator=generator) * 2 - 1)
            writer.add(quantise((images + noise).clamp(0, 1), eight_bit(images), EPS), labels, indices)
    back, _ = read_adversarial(tmp_path / "adv")
    change = back.originals(range(COUNT)).int() - dataset.originals(range(COUNT)).int()
    assert int(change.abs().max()) == 8


def test_an_interrupt_leaves_whole_files_and_no_manifest(tmp_path, gate):
    def interrupted():
        with AdversarialWriter(tmp_path, MANIFEST, FILENAMES) as writer:
            writer.add(pictures()[:3], LABELS[:3], torch.arange(3))
            threading.Timer(0.1, gate.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert listing(tmp_path) == ["images/1-0.png", "images/1-1.png", "images/two, or more.png"]
    for index, name in enumerate(listing(tmp_path)):
        assert np.array_equal(np.asarray(Image.open(tmp_path / name)), pictures()[index].permute(1, 2, 0).numpy())
    with pytest.raises(ValueError, match=r"has no manifest.json, so it is unfinished"):
        read_adversarial(tmp_path)
    with pytest.raises(ValueError, match="holds an unfinished set of images"):
        write(tmp_path)


@pytest.fixture
def gate(monkeypatch):
    """Until it is set, no image is encoded."""
    opened, encode = threading.Event(), adversarial._png

    def waiting(image, record):
        assert opened.wait(60)
        return encode(image, record)

    monkeypatch.setattr(adversarial, "_png", waiting)
    yield opened
    opened.set()


def test_images_are_written_while_the_caller_goes_on(tmp_path, gate):
    """With two batches at most in the hands of threads, and from copies."""
    writer = AdversarialWriter(tmp_path, MANIFEST, FILENAMES)
    buffer = pictures()[:2].clone()
    writer.add(buffer, LABELS[:2], torch.tensor([0, 1]))
    buffer.copy_(pictures()[2:4])
    writer.add(buffer, LABELS[2:4], torch.tensor([2, 3]))
    buffer.zero_()
    assert listing(tmp_path) == []
    assert writer.pending(torch.arange(COUNT)).tolist() == [False] * 4 + [True]
    with pytest.raises(ValueError, match="image 3 is already written"):
        writer.add(pictures()[[3]], LABELS[[3]], torch.tensor([3]))
    third = threading.Thread(target=writer.add, args=(pictures()[[4]], LABELS[[4]], torch.tensor([4])))
    third.start()
    third.join(0.2)
    assert third.is_alive()
    gate.set()
    third.join(60)
    assert writer.finish().indices == (0, 1, 2, 3, 4)
    assert torch.equal(read_adversarial(tmp_path)[0].originals(range(COUNT)), pictures())


@pytest.fixture
def full(monkeypatch):
    """A disk that has no place for the third image."""
    whole = Path.write_bytes

    def torn(path, data):
        whole(path, data[: len(data) // 2])
        if path.name.startswith(".two"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(path, data)

    monkeypatch.setattr(Path, "write_bytes", torn)


def test_what_could_not_be_written_is_told_at_the_end(tmp_path, full):
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path)
    assert listing(tmp_path) == sorted(f"images/{name}" for name in png_names(FILENAMES) if name[:3] != "two")


def test_what_could_not_be_written_is_told_by_a_later_addition(tmp_path, full):
    writer = AdversarialWriter(tmp_path, MANIFEST, FILENAMES)
    writer.add(pictures()[:3], LABELS[:3], torch.arange(3))
    writer._pool.shutdown()
    with pytest.raises(OSError, match="No space left"):
        writer.add(pictures()[3:], LABELS[3:], torch.arange(3, COUNT))
    assert writer.pending(torch.arange(COUNT)).tolist() == [False, False, True, True, True]
    assert listing(tmp_path) == ["images/1-0.png", "images/1-1.png"]


def test_an_unfinished_folder_is_taken_up(tmp_path):
    write(tmp_path / "whole")
    folder = write(tmp_path / "part", indices=[0, 3])
    (folder / "manifest.json").unlink()
    (folder / "images" / ".4.abcdefgh.png").write_bytes(b"of a killed process")
    writer = AdversarialWriter(folder, MANIFEST, FILENAMES, resume=True)
    assert writer.pending(torch.arange(COUNT)).tolist() == [False, True, True, False, True]
    write(folder, resume=True)
    assert listing(folder) == listing(tmp_path / "whole")
    for name in listing(folder):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_finished_folder_that_grows_is_unfinished_again(tmp_path):
    write(tmp_path, indices=[0])
    writer = AdversarialWriter(tmp_path, MANIFEST, FILENAMES, resume=True)
    assert (tmp_path / "manifest.json").exists()
    writer.add(pictures()[[2]], LABELS[[2]], torch.tensor([2]))
    assert not (tmp_path / "manifest.json").exists()
    assert writer.finish().indices == (0, 2)


@pytest.mark.parametrize("change", [{"seed": 4}, {"eps": 0.1}, {"model": "other"}, {"parameters": {"steps": 11}}])
def test_another_run_is_not_taken_up(tmp_path, change):
    write(tmp_path)
    before = listing(tmp_path)
    with pytest.raises(ValueError, match=r"1-0.png is torn or not of this run"):
        write(tmp_path, manifest=replace(MANIFEST, **change), resume=True)
    assert listing(tmp_path) == before


def test_a_torn_image_is_not_taken_up(tmp_path):
    path = write(tmp_path) / "images" / "3.png"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"3.png is torn or not of this run"):
        write(tmp_path, resume=True)


def test_results_are_never_overwritten(tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match="holds a finished set of images"):
        write(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        write(tmp_path / "file")
    with pytest.raises(ValueError, match="cannot write to"):
        write(tmp_path / "file" / "below")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": pictures() / 255}, "images: got torch.float32; allowed is torch.uint8"),
        ({"images": pictures()[0]}, "images: got shape"),
        ({"images": pictures()[:, :2]}, "images: got 2 channels; allowed is 1 or 3"),
        ({"labels": LABELS[:3]}, r"labels: got shape \[3\]; allowed is \[5\]"),
        ({"labels": LABELS + 1}, r"labels: values span \[1, 4\]; allowed is \[0, 3\]"),
        ({"indices": torch.arange(5) + 1}, r"indices: values span \[1, 5\]; allowed is \[0, 4\]"),
        ({"indices": torch.tensor([0, 1, 2, 3, 3])}, "indices: image 3 is already written"),
        ({"targets": LABELS.int()}, "targets: got dtype torch.int32"),
    ],
)
def test_bad_additions_are_refused_and_write_nothing(tmp_path, arguments, message):
    writer = AdversarialWriter(tmp_path, MANIFEST, FILENAMES)
    given = {"images": pictures(), "labels": LABELS, "indices": torch.arange(COUNT), **arguments}
    with pytest.raises(ValueError, match=message):
        writer.add(**given)
    assert listing(tmp_path) == []


def test_additions_must_be_of_one_kind(tmp_path):
    writer = AdversarialWriter(tmp_path, MANIFEST, FILENAMES)
    first, second = torch.tensor([0]), torch.tensor([1])
    writer.add(pictures()[:1], LABELS[:1], first)
    with pytest.raises(ValueError, match="image 0 is already written"):
        writer.add(pictures()[:1], LABELS[:1], first)
    with pytest.raises(ValueError, match="targets: given for some images only"):
        writer.add(pictures()[:1], LABELS[:1], second, LABELS[:1])
    with pytest.raises(ValueError, match="got 1 channels; allowed is 3"):
        writer.add(pictures(1)[:1], LABELS[:1], second)


def test_nothing_to_write_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no images were added"):
        write(tmp_path, indices=[])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "l7"}, "norm: got 'l7'"),
        ({"eps": -1.0}, "eps: got -1.0"),
        ({"parameters": {"model": object()}}, "parameters: got .* allowed is what JSON can hold"),
    ],
)
def test_bad_manifests_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(MANIFEST, **change)


def test_missing_surplus_and_changed_files_are_named(tmp_path):
    folder = write(tmp_path)
    images = folder / "images"
    (images / "4.png").rename(images / "9.png")
    with pytest.raises(ValueError, match=r"4.png are in the manifest and not in images/"):
        read_adversarial(folder)
    (images / "4.png").write_bytes((images / "9.png").read_bytes())
    with pytest.raises(ValueError, match=r"9.png are in images/ and not in the manifest"):
        read_adversarial(folder)
    (images / "9.png").unlink()
    Image.open(images / "3.png").rotate(180).save(images / "3.png")
    with pytest.raises(ValueError, match=r"3.png differ from the manifest"):
        read_adversarial(folder)
    assert len(read_adversarial(folder, verify=False)[0]) == COUNT
    for name in ("1-0.png", "1-1.png", "3.png", "4.png"):
        (images / name).unlink()
    with pytest.raises(ValueError, match=r"1-0.png, 1-1.png, 3.png and 1 more are in the manifest"):
        read_adversarial(folder)


def test_a_changed_table_is_refused(tmp_path):
    write(tmp_path)
    (tmp_path / "labels.csv").write_text("filename,label\n")
    with pytest.raises(ValueError, match=r"labels.csv differ from the manifest"):
        read_adversarial(tmp_path)


def edited(folder, change):
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.pop("attack"),
        lambda values: values.update(format=2),
        lambda values: values.update(count=7),
        lambda values: values.update(more=1),
        lambda values: values.update(files=[], count=0),
        lambda values: values["files"][0].pop("sha256"),
        lambda values: values["files"][0].update(name="../manifest.json"),
        lambda values: values["files"][0].update(index="0"),
    ],
)
def test_torn_manifests_are_refused(tmp_path, change):
    write(tmp_path)
    edited(tmp_path, change)
    with pytest.raises(ValueError, match=r"manifest.json is torn or not a manifest"):
        read_adversarial(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "5"])
def test_manifests_that_are_not_one_are_refused(tmp_path, text):
    write(tmp_path)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest.json is torn or not a manifest"):
        read_adversarial(tmp_path)


def test_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*absent"):
        read_adversarial(tmp_path / "absent")


def test_names_are_unique_plain_and_independent_of_case():
    names = png_names(["a/x.png", "b/X.jpg", "x-1.png", "..png", "tab\there.png", ".hidden.png", f"{'é' * 300}.png"])
    assert names[:3] == ["x-0.png", "X-1-.png", "x-1.png"]
    assert names[4:6] == ["tab_here.png", "hidden.png"]
    assert len({name.lower() for name in names}) == len(names)
    assert not any(name.startswith(".") for name in names)
    assert max(len(name.encode()) for name in names) < 230


def test_versions_name_what_took_part():
    versions = package_versions()
    assert versions["python"] == platform.python_version()
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(versions) >= {"alignfast", "torchvision", "timm", "numpy", "pillow"}
