"""Matrices that keep their images: what lies on disk, that this is what is measured, and going on at any moment."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.data import Subset

from alignfast.attacks import Attack, create
from alignfast.data import ImageDataset, eight_bit, load_dataset, loader, quantise, read_adversarial
from alignfast.evaluation import TransferMatrix, transfer_matrix
from alignfast.evaluation import matrix as module
from alignfast.evaluation.images import evaluate_images
from alignfast.evaluation.kept import KeptForm, check_files, clear_temporaries, file_name
from alignfast.models import (
    BitDepth,
    Classifier,
    Defended,
    Ensemble,
    Jpeg,
    RandomizedSmoothing,
    RandomResizePad,
    fingerprint,
    prepare,
)
from alignfast.models.preparation import Form, Preparation

COUNT, SIDE, CLASSES = 11, 8, 3
EPS = 24 / 255
ATTACKS: dict[str, Any] = {
    "pgd": {"name": "pgd", "eps": EPS, "alpha": 8 / 255, "steps": 2, "seed": 3},
    "mi/small": {"name": "mifgsm", "eps": 8 / 255, "alpha": 4 / 255, "steps": 2},
}


class Interrupted(Exception):
    pass


class Passes:
    """Passes of all networks, and after which of them there is an interruption."""

    def __init__(self) -> None:
        self.made, self.last = 0, 10**9

    def one(self) -> None:
        self.made += 1
        if self.made > self.last:
            raise Interrupted


PASSES = Passes()


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn((CLASSES, 3, 3, 3), generator=generator))

    def forward(self, images: Tensor) -> Tensor:
        PASSES.one()
        return torch.conv2d(images, self.weight).tanh().mean((2, 3))


def net(seed: int, side: int = SIDE) -> Classifier:
    return Classifier(Net(seed), (0.5,) * 3, (0.25,) * 3, CLASSES, (3, side, side))


def sources() -> dict[str, Classifier]:
    return {"vanilla": net(0), "wide": net(1, 12)}


def targets() -> dict[str, Classifier]:
    plain = net(2)
    smoothed = Defended(plain, [RandomResizePad(0.6), RandomizedSmoothing(0.2, samples=2)])
    return {"t": plain, "t + random": smoothed, "t + jpeg": Defended(plain, [Jpeg(30)]), "small": net(3, 6)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    folder = tmp_path_factory.mktemp("photos")
    (folder / "images").mkdir()
    generator = np.random.default_rng(0)
    rows = ["filename,label"]
    for index in range(COUNT):
        pixels = generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"photo{index}.png")
        rows.append(f"photo{index}.png,{index % CLASSES}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return load_dataset(folder, num_classes=CLASSES)


def measure(photos: Any, folder: Path | None, **options: Any) -> TransferMatrix:
    kept_in = {} if folder is None else {"parts": folder / "parts", "images": folder / "adversarial"}
    return transfer_matrix(
        **(
            {"sources": sources(), "targets": targets(), "attacks": ATTACKS, "data": loader(photos, 4)}
            | kept_in
            | options
        )
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_lies_in_the_folders(photos: ImageDataset, tmp_path: Path) -> None:
    measure(photos, tmp_path, qualified=True)
    found = contents(tmp_path)
    places = [f"sources/{source}/{attack}" for source in ("vanilla", "wide") for attack in ("pgd", "mi%2Fsmall")]
    white = [f"targets/{target}/{attack}" for target in ("t", "small") for attack in ("pgd", "mi%2Fsmall")]
    images = {
        f"adversarial/{place}/{name}"
        for place in (*places, *white)
        for name in ("manifest.json", "labels.csv", *(f"images/photo{index}.png" for index in range(COUNT)))
    }
    parts = {f"parts/{place}/white_box.npz" for place in (*places, *white)}
    parts |= {f"parts/{place}/targets/{target}.npz" for place in places for target in targets()}
    parts |= {f"parts/clean/sources/{name}.npz" for name in sources()}
    parts |= {f"parts/clean/targets/{name}.npz" for name in targets()}
    assert set(found) == images | parts


def test_kept_images_are_those_of_the_attack_in_8_bits(photos: ImageDataset, tmp_path: Path) -> None:
    """Of a source of another size, the originals are the resized images in 8 bits."""
    measure(photos, tmp_path)
    originals = photos.originals(range(COUNT))
    resized = interpolate(originals / 255, size=(12, 12), mode="bilinear", antialias=True).clamp(0, 1)
    of_source = {"vanilla": originals, "wide": (resized * 255).round().to(torch.uint8)}
    for name, model in sources().items():
        for attack, spec in ATTACKS.items():
            folder = tmp_path / "adversarial" / "sources" / name / file_name(attack)
            written, manifest = read_adversarial(folder)
            found = written.originals(range(COUNT))
            indices = torch.arange(COUNT)
            clean = of_source[name] / 255
            adversarial = create(source=model, **spec)(clean, photos.labels, indices=indices)
            assert torch.equal(found, quantise(adversarial, of_source[name], spec["eps"]))
            most = (found.int() - of_source[name].int()).abs().max()
            assert int(most) == round(spec["eps"] * 255)
            assert (manifest.attack, manifest.parameters["model"], manifest.eps) == (attack, name, spec["eps"])
            assert manifest.model == fingerprint(model)


def test_rates_are_those_of_the_kept_images(photos: ImageDataset, tmp_path: Path) -> None:
    matrix = measure(photos, tmp_path)
    assert matrix.config["pixels"] == "8-bit"
    for source in sources():
        for attack in ATTACKS:
            written, _ = read_adversarial(tmp_path / "adversarial" / "sources" / source / file_name(attack))
            again = evaluate_images(
                loader(written, 5), targets(), source=source, attack=attack, clean=loader(photos, 3)
            )
            for cell in again.cells:
                ours = matrix.cell(source, attack, cell.target)
                assert (cell.errors, cell.n, cell.clean_accuracy) == (ours.errors, ours.n, ours.clean_accuracy)
    rates = {cell.rate for cell in matrix.cells}
    assert len(rates) > 3


def test_without_a_folder_images_are_measured_as_they_are_attacked(photos: ImageDataset) -> None:
    matrix = measure(photos, None)
    assert matrix.config["pixels"] == "float"
    images = photos.originals(range(COUNT)) / 255
    indices = torch.arange(COUNT)
    adversarial = create(source=net(0), **ATTACKS["pgd"])(images, photos.labels, indices=indices)
    for name, model in targets().items():
        logits = model.logits(adversarial, indices) if isinstance(model, Defended) else None
        if logits is not None:
            wrong = int((logits.argmax(1) != photos.labels).sum())
            assert matrix.cell("vanilla", "pgd", name).errors == wrong


@pytest.mark.parametrize("qualified", [False, True])
def test_outcomes_do_not_depend_on_the_batch(photos: ImageDataset, tmp_path: Path, qualified: bool) -> None:
    """Random defences included, whose draws belong to the image."""
    whole = measure(photos, tmp_path / "whole", qualified=qualified)
    for size in (1, 11):
        other = measure(photos, tmp_path / str(size), data=loader(photos, size), qualified=qualified)
        assert other.cells == whole.cells


def test_indices_in_the_data_set_are_those_of_the_draws(photos: ImageDataset, tmp_path: Path) -> None:
    """A part of the data has the outcomes that these images have among all."""
    some = [1, 4, 5, 9]
    measure(photos, tmp_path / "all")
    measure(Subset(photos, some), tmp_path / "some")
    cells = [path.relative_to(tmp_path / "all") for path in (tmp_path / "all" / "parts").rglob("*.npz")]
    assert len(cells) > 20
    for cell in cells:
        whole, part = (np.load(tmp_path / name / cell)["wrong"] for name in ("all", "some"))
        assert np.array_equal(part, whole[:, some])
    names = sorted(path.name for path in (tmp_path / "some" / "adversarial/sources/wide/pgd/images").iterdir())
    assert names == [f"photo{index}.png" for index in some]


def test_data_without_names_are_numbered(photos: ImageDataset, tmp_path: Path) -> None:
    whole = next(iter(loader(photos, COUNT)))
    unequal = list(zip(whole.images.split([3, 6, 2]), whole.labels.split([3, 6, 2]), strict=True))
    matrix = measure(photos, tmp_path / "lists", data=unequal)
    assert matrix.cells == measure(photos, tmp_path / "photos").cells
    names = sorted(path.name for path in (tmp_path / "lists" / "adversarial/sources/wide/pgd/images").iterdir())
    assert names == [f"{index:02d}.png" for index in range(COUNT)]


def qualified_by_hand(photos: ImageDataset, attack: str, target: str) -> tuple[int, int]:
    """Errors and count: both right when clean, the source fooled, and the target fooled without its defences."""
    images, labels, indices = photos.originals(range(COUNT)) / 255, photos.labels, torch.arange(COUNT)
    source, judge = net(0), targets()[target]
    behind = judge.undefended if isinstance(judge, Defended) else judge
    spec = ATTACKS[attack]

    def wrong(model: Classifier, shown: Tensor) -> Tensor:
        logits = model.logits(shown, indices) if isinstance(model, Defended) else model.logits(shown)
        return logits.argmax(1) != labels

    def made(model: Classifier) -> Tensor:
        adversarial = create(source=model, **spec)(images, labels, indices=indices)
        return quantise(adversarial, eight_bit(images), spec["eps"]) / 255

    counts = ~wrong(source, images) & ~wrong(judge, images) & wrong(source, made(source)) & wrong(behind, made(behind))
    return int((wrong(judge, made(source)) & counts).sum()), int(counts.sum())


def test_a_defended_target_is_qualified_by_the_model_behind_it(photos: ImageDataset, tmp_path: Path) -> None:
    attacks: list[Any] = []
    run = Attack.__call__

    def counted(self: Attack, *args: Any, **options: Any) -> Tensor:
        attacks.append(self.source)
        return run(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Attack, "__call__", counted)
        matrix = measure(photos, tmp_path, qualified=True)
    # Three batches, two attacks; two sources, and two models among the four targets.
    assert len(attacks) == 3 * 2 * 4
    assert not any(isinstance(source, Defended) for source in attacks)
    for attack in ATTACKS:
        for target in ("t", "t + random", "t + jpeg"):
            cell = matrix.cell("vanilla", attack, target)
            assert (cell.errors, cell.n) == qualified_by_hand(photos, attack, target)
    assert max(cell.n for cell in matrix.cells) > 0


def test_defences_are_told_and_change_what_counts_as_the_same(photos: ImageDataset, tmp_path: Path) -> None:
    matrix = measure(photos, tmp_path)
    assert matrix.config["defences"]["t + jpeg"] == "Jpeg(quality=30)"
    assert set(matrix.config["defences"]) == {"t + random", "t + jpeg"}
    assert len({matrix.config["targets"][name] for name in targets()}) == 4
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")}
    other = targets() | {"t + jpeg": Defended(net(2), [Jpeg(1), BitDepth(1)])}
    again = measure(photos, tmp_path, targets=other)
    written = {path.relative_to(tmp_path).name for path, at in before.items() if path.stat().st_mtime_ns != at}
    assert written == {"t + jpeg.npz"}
    assert again.cells == measure(photos, None, targets=other, parts=tmp_path / "p", images=tmp_path / "i").cells


def measure_few(photos: ImageDataset, folder: Path, **options: Any) -> None:
    """A matrix of a few cells and three batches, with its file."""
    judges = {name: model for name, model in targets().items() if name in ("t", "t + random")}
    few = {"sources": {"wide": net(1, 12)}, "targets": judges, "attacks": {"pgd": ATTACKS["pgd"]}}
    measure(photos, folder, **few, data=loader(Subset(photos, [0, 3, 4, 8, 9]), 2), **options).save(folder / "m.json")


@pytest.mark.parametrize("qualified", [False, True])
def test_after_an_interruption_nothing_is_repeated_and_all_is_the_same(
    photos: ImageDataset, tmp_path: Path, qualified: bool
) -> None:
    """Interrupted before every second pass of a network."""
    whole, folder = tmp_path / "whole", tmp_path / "resumed"
    PASSES.made = 0
    measure_few(photos, whole, qualified=qualified)
    expected, total = contents(whole), PASSES.made
    # Clean, three models of which one takes two samples; two steps an image; white box and targets; likewise on t.
    assert total == 3 * (4 + 2 + 4) + (3 * (2 + 1) if qualified else 0)
    # The longest that is done again is a cell of the target that takes two samples.
    longest = 3 * 2
    for moment in range(int(qualified), total, 2):
        PASSES.made, PASSES.last = 0, moment
        with pytest.raises(Interrupted):
            measure_few(photos, folder, qualified=qualified)
        assert not (folder / "m.json").exists()
        PASSES.made, PASSES.last = 0, 10**9
        measure_few(photos, folder, qualified=qualified)
        assert contents(folder) == expected, moment
        assert moment + PASSES.made < total + longest, moment
        shutil.rmtree(folder)


def test_interrupted_again_and_again(photos: ImageDataset, tmp_path: Path) -> None:
    """A process that never lives for longer than the longest cell takes ends with the same files."""
    measure_few(photos, tmp_path / "whole")
    PASSES.last, turns = 6, 0
    while True:
        turns, PASSES.made = turns + 1, 0
        try:
            measure_few(photos, tmp_path / "resumed")
            break
        except Interrupted:
            assert turns < 30
    PASSES.last = 10**9
    assert turns > 4
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")


def test_interrupted_while_a_file_is_put_in_its_place(
    photos: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a full disk would, for every single file; images are written by threads."""
    measure_few(photos, tmp_path / "whole")
    expected, rename, count = contents(tmp_path / "whole"), Path.replace, [0, 0]

    def failing(self: Path, target: Path) -> Path:
        count[0] += 1
        if count[0] == count[1]:
            raise OSError("no space")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    for moment in range(1, len(expected) + 1):
        count[:] = [0, moment]
        with pytest.raises(OSError, match="no space"):
            measure_few(photos, tmp_path / "resumed")
        measure_few(photos, tmp_path / "resumed")
        assert contents(tmp_path / "resumed") == expected, moment
        shutil.rmtree(tmp_path / "resumed")


def test_a_batch_that_is_partly_written_is_attacked_as_a_whole(photos: ImageDataset, tmp_path: Path) -> None:
    measure(photos, tmp_path)
    expected = contents(tmp_path)
    folder = tmp_path / "adversarial/sources/vanilla/pgd"
    for name in ("manifest.json", "labels.csv", "images/photo1.png", "images/photo6.png"):
        (folder / name).unlink()
    shutil.rmtree(tmp_path / "parts/sources/vanilla/pgd")
    seen: list[int] = []
    run = Attack.__call__

    def counted(self: Attack, images: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.append(len(images))
        return run(self, images, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Attack, "__call__", counted)
        measure(photos, tmp_path)
    assert seen == [4, 4]
    assert contents(tmp_path) == expected


def test_a_new_target_is_measured_on_the_kept_images(photos: ImageDataset, tmp_path: Path) -> None:
    few = {"t": net(2)}
    measure(photos, tmp_path, targets=few)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Attack, "__call__", None)
        PASSES.made = 0
        matrix = measure(photos, tmp_path, targets=few | {"small": net(3, 6)})
    # Clean, and after two attacks on two sources, in three batches each.
    assert PASSES.made == 3 * 5
    assert matrix.cells == measure(photos, tmp_path / "new", targets=few | {"small": net(3, 6)}).cells


def test_images_that_were_changed_are_refused(photos: ImageDataset, tmp_path: Path) -> None:
    measure(photos, tmp_path)
    image = tmp_path / "adversarial/sources/vanilla/pgd/images/photo1.png"
    shutil.copy(image.with_name("photo2.png"), image)
    shutil.rmtree(tmp_path / "parts")
    with pytest.raises(ValueError, match=r"photo1\.png differ from the manifest"):
        measure(photos, tmp_path)


@pytest.mark.parametrize("torn", [False, True])
def test_images_of_another_attack_are_refused_and_stay(photos: ImageDataset, tmp_path: Path, torn: bool) -> None:
    measure(photos, tmp_path)
    if torn:
        (tmp_path / "adversarial/sources/vanilla/pgd/manifest.json").unlink()
    before = contents(tmp_path / "adversarial")
    other = ATTACKS | {"pgd": ATTACKS["pgd"] | {"seed": 4}}
    with pytest.raises(ValueError, match="not of this run" if torn else "holds the images of another run"):
        measure(photos, tmp_path, attacks=other)
    assert contents(tmp_path / "adversarial") == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": {"a": net(0), "A": net(1)}}, "sources: 'a' and 'A' would be kept in one file"),
        ({"attacks": {"x" * 201: ATTACKS["pgd"]}}, "attacks: the name 'x+'... takes 201 letters"),
        ({"data": [(torch.full((2, 3, 8, 8), 0.3333), torch.tensor([0, 1]))]}, "values lie between 8-bit levels"),
        ({"data": [(torch.zeros(2, 2, 8, 8), torch.tensor([0, 1]))]}, "images of 2 channels"),
        (
            {"data": [(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]), torch.tensor([4, 4]))]},
            "two images have the same index",
        ),
        ({"sources": {"d": targets()["t + jpeg"]}}, "sources: d has defences, which have no gradient"),
    ],
)
def test_errors_come_before_anything_runs(
    photos: ImageDataset, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    PASSES.made = 0
    with pytest.raises(ValueError, match=message):
        measure(photos, tmp_path, **changes)
    assert PASSES.made == 0
    assert not list(tmp_path.iterdir())


def test_the_form_that_was_found_is_kept(photos: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later call neither measures again nor takes another form."""
    asked: list[Any] = []

    def prepared(model: Classifier, images: Tensor, precision: Any) -> Classifier:
        asked.append(precision)
        return prepare(model, images, "bf16" if precision == "auto" else precision)

    monkeypatch.setattr(module, "prepared_alike", prepared)
    members = sources() | {"vanilla": Ensemble([net(0), net(4)])}

    def run() -> TransferMatrix:
        return measure(photos, tmp_path, sources=members, precision="auto")

    first = run()
    assert first.config["forms"] == {"vanilla": "bf16, contiguous; bf16, contiguous", "wide": "bf16, contiguous"}
    asked.clear()
    PASSES.made = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Attack, "__call__", None)
        assert run() == first
    assert [one.form.dtype for one in asked] == [torch.bfloat16] * 2
    members["wide"] = net(5, 12)
    asked.clear()
    with pytest.raises(ValueError, match="holds the images of another run"):
        run()
    assert asked[1] == "auto"


def test_forms_on_disk(tmp_path: Path) -> None:
    one = Preparation(Form(torch.bfloat16, True, False, compiled=True))
    both = Preparation(one.form, members=(one, Preparation(Form(torch.float32, fused_attention=None))))
    kept_form = KeptForm(tmp_path / "forms" / "s.json", "print")
    assert kept_form.read() is None
    for preparation in (one, both):
        kept_form.write(preparation)
        assert kept_form.read() == preparation
    assert KeptForm(kept_form.path, "other").read() is None


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("vgg + jpeg75", "vgg + jpeg75"),
        ("mi 4/255", "mi 4%2F255"),
        ("..", "%2E."),
        (".hidden", "%2Ehidden"),
        ("50%", "50%25"),
        ("timm:vit.a1", "timm%3Avit.a1"),
        ("é", "%C3%A9"),
    ],
)
def test_names_of_files(name: str, file: str) -> None:
    assert file_name(name) == file


def test_names_that_differ_after_quoting_are_taken() -> None:
    check_files("sources", ["a/b", "a%2Fb", "a b", ".a", "%2Ea"])
    with pytest.raises(ValueError, match="would be kept in one file"):
        check_files("sources", ["a/b%2F", "a/b%2f"])


def test_what_killed_writers_leave_is_removed(tmp_path: Path) -> None:
    left = [".matrix.0123456789abcdef.json", "a/.t + jpeg.0123456789abcdef.npz", "a/.m.x.0123456789abcdef.png"]
    stays = [".git", "a/.hidden", "a/matrix.0123456789abcdef.json", "a/.short.0123.json"]
    (tmp_path / "a").mkdir()
    for name in left + stays:
        (tmp_path / name).write_text("")
    clear_temporaries(tmp_path)
    assert set(contents(tmp_path)) == set(stays)


def test_progress_counts_attacks_and_judges(
    photos: ImageDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        measure(photos, tmp_path, progress=True, qualified=True)
        # Six models when clean; four jobs with five judges and four with one; three batches each, attacks included.
        assert capsys.readouterr().err.startswith(f"transfer: {3 * (6 + 4 * 6 + 4 * 2)}/114 batches, ")
