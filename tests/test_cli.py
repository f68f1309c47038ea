"""The command line as a person uses it: what it writes, and one line for bad input."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import alignfast as af
from alignfast import cli
from alignfast.attacks import PRESETS
from alignfast.commands import attack as attacking
from alignfast.config import MatrixConfig, number
from alignfast.evaluation import matrix, outcomes
from alignfast.models import fingerprint, preparation

MODEL = "timm:test_resnet"
SIDE = 160
CLASSES = 3


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two networks of random weights, as checkpoints."""
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("a", 0), ("b", 1)):
        torch.manual_seed(seed)
        module = timm.create_model("test_resnet", num_classes=CLASSES)
        af.save_checkpoint(module, folder / f"{name}.safetensors")
    return str(folder / "a.safetensors"), str(folder / "b.safetensors")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six images with labels and targeted labels, in TransferAttack's layout."""
    folder = tmp_path / "photos"
    (folder / "images").mkdir(parents=True)
    generator = np.random.default_rng(0)
    rows = ["filename,label,targeted_label"]
    for index in range(6):
        pixels = generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
        rows.append(f"{index}.png,{index % CLASSES},{(index + 1) % CLASSES}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder


Runner = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Runner:
    """Run a command that must end with exit code 2 and one line on standard error; gives that line."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        code = cli.run(arguments)
        line = capsys.readouterr().err
        assert code == 2
        assert line.startswith("alignfast: ")
        assert line.count("\n") == 1
        return line

    return run


def attack(photos: Path, checkpoint: str, out: Path, *more: str, name: str = "mifgsm") -> list[str]:
    options = ["--num-classes", str(CLASSES), "--eps", "8/255", "--alpha", "4/255", "--steps", "2", "--batch-size", "4"]
    start = ["attack", "--model", MODEL, "--checkpoint", checkpoint, "--attack", name, "--data", str(photos)]
    return [*start, "--out", str(out), *options, *more]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_attack_then_evaluate(photos: Path, checkpoints: tuple[str, str], tmp_path: Path) -> None:
    adv, out = tmp_path / "adv", tmp_path / "eval"
    assert cli.run(attack(photos, checkpoints[0], adv)) == 0
    moved = [pixels(adv / "images" / f"{i}.png") - pixels(photos / "images" / f"{i}.png") for i in range(6)]
    assert max(abs(delta).max() for delta in moved) == 8
    manifest = json.loads((adv / "manifest.json").read_text())
    assert manifest["attack"] == "mifgsm"
    assert manifest["parameters"]["decay"] == 1.0
    assert manifest["eps"] == pytest.approx(8 / 255)
    targets = [f"first={MODEL}@{checkpoints[0]}", f"second={MODEL}@{checkpoints[1]}"]
    given = ["--images", str(adv), "--num-classes", str(CLASSES), "--data", str(photos), "--out", str(out)]
    assert cli.run(["evaluate", *given, "--targets", *targets]) == 0
    cells = json.loads((out / "matrix.json").read_text())["cells"]
    assert [cell["target"] for cell in cells] == ["first", "second"]
    model = af.load_model(MODEL, checkpoint=checkpoints[1], num_classes=CLASSES)
    images = torch.stack([torch.tensor(pixels(adv / "images" / f"{i}.png")).permute(2, 0, 1) / 255 for i in range(6)])
    with torch.no_grad():
        wrong = model(images).argmax(1) != torch.arange(6) % CLASSES
    assert cells[1]["rate"] == pytest.approx(float(wrong.float().mean()))
    assert cells[1]["clean_accuracy"] is not None
    assert (out / "report.html").stat().st_size > 10_000


def test_attack_tells_what_it_did_and_how_fast(
    photos: Path, checkpoints: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "adv"
    assert cli.run(attack(photos, checkpoints[0], out)) == 0
    said = capsys.readouterr()
    assert re.fullmatch(rf"6 images in {re.escape(str(out))}, \d+\.\d s, \d+\.\d images/s\n", said.out)
    first, last = said.err.splitlines()
    assert first == "precision fp32: fp32, channels-last"
    assert re.fullmatch(r"mifgsm: 6/6 images, \d+ s \d+\.\d images/s", last)


# A processor may have no units for it.
@pytest.mark.filterwarnings("ignore:precision:RuntimeWarning")
@pytest.mark.parametrize("precision", ["auto", "bf16"])
def test_attack_in_another_precision(
    precision: str, photos: Path, checkpoints: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is attacked is the prepared copy; the manifest names the source as it was loaded."""
    monkeypatch.setattr(preparation, "_fast_dtypes", lambda device: [torch.float32])
    sources, run = [], af.attacks.Attack._run

    def recorded(self: af.attacks.Attack, *args: Any) -> torch.Tensor:
        sources.append(self.source)
        return run(self, *args)

    monkeypatch.setattr(af.attacks.Attack, "_run", recorded)
    out = tmp_path / "adv"
    options = ["--precision", precision, "--limit", "1", "--steps", "1"]
    assert cli.run(attack(photos, checkpoints[0], out, *options)) == 0
    form = sources[0].preparation.form
    assert form.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    manifest = json.loads((out / "manifest.json").read_text())
    for record in (manifest["parameters"], json.loads((out / "config.json").read_text())):
        assert (record["precision"], record["form"]) == (precision, str(form))
    assert manifest["model"] == fingerprint(af.load_model(MODEL, checkpoint=checkpoints[0], num_classes=CLASSES))


def test_a_compiled_source_sees_one_size_of_batch(
    photos: Path, checkpoints: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiling takes long; here it is only asked for."""
    run, prepared, sizes, asked = af.attacks.Attack.__call__, attacking.prepared_alike, [], []

    def counted(self: af.attacks.Attack, images: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        sizes.append(len(images))
        return run(self, images, *args, **kwargs)

    def uncompiled(*args: Any, compiled: bool) -> af.Classifier:
        asked.append(compiled)
        return prepared(*args)

    monkeypatch.setattr(af.attacks.Attack, "__call__", counted)
    monkeypatch.setattr(attacking, "prepared_alike", uncompiled)
    assert cli.run(attack(photos, checkpoints[0], tmp_path / "plain", name="difgsm")) == 0
    assert cli.run(attack(photos, checkpoints[0], tmp_path / "compiled", "--compile", name="difgsm")) == 0
    assert asked == [False, True]
    assert sizes == [4, 2, 4, 4]
    for index in range(6):
        plain, filled = (pixels(tmp_path / name / "images" / f"{index}.png") for name in ("plain", "compiled"))
        assert (plain != filled).mean() < 0.01


def test_attack_does_not_depend_on_the_batch(photos: Path, checkpoints: tuple[str, str], tmp_path: Path) -> None:
    for size in ("1", "6"):
        assert cli.run(attack(photos, checkpoints[0], tmp_path / size, "--batch-size", size, name="difgsm")) == 0
    for index in range(6):
        one, six = (pixels(tmp_path / size / "images" / f"{index}.png") for size in ("1", "6"))
        # The network's own rounding may turn the sign of a gradient that is almost zero.
        assert (one != six).mean() < 0.01


def test_targeted_attack_uses_the_targeted_labels(photos: Path, checkpoints: tuple[str, str], tmp_path: Path) -> None:
    assert cli.run(attack(photos, checkpoints[0], tmp_path / "adv", "--targeted", name="bim")) == 0
    model = af.load_model(MODEL, checkpoint=checkpoints[0], num_classes=CLASSES)
    images = torch.tensor(pixels(photos / "images" / "0.png")).permute(2, 0, 1)[None] / 255
    expected = af.attacks.BIM(model, 8 / 255, 4 / 255, 2, targeted=True)(images, torch.tensor([1]))
    written = torch.tensor(pixels(tmp_path / "adv" / "images" / "0.png")).permute(2, 0, 1)
    assert ((expected[0] * 255).round() != written).float().mean() < 0.01


def test_attacks_combine_and_know_their_norm(photos: Path, checkpoints: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "adv"
    assert cli.run(attack(photos, checkpoints[0], out, "--param", "decay=0.5", name="DIFGSM+mifgsm")) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["attack"] == "difgsm+mifgsm"
    assert manifest["parameters"]["decay"] == 0.5
    assert manifest["parameters"]["resize_rate"] == 0.9
    assert manifest["norm"] == "linf"


def test_a_pool_is_given_by_its_size(
    photos: Path, checkpoints: tuple[str, str], tmp_path: Path, refused: Runner
) -> None:
    few = ["--param", "num_scale=1", "--param", "num_admix=1"]
    assert cli.run(attack(photos, checkpoints[0], tmp_path / "adv", *few, "--param", "pool=4", name="admix")) == 0
    assert json.loads((tmp_path / "adv" / "manifest.json").read_text())["parameters"]["pool"] == 4
    assert "pool: got 7; allowed is a whole number, 1 to 6" in refused(
        *attack(photos, checkpoints[0], tmp_path / "no", *few, "--param", "pool=7", name="admix")
    )
    mixes = {"name": "admix", "steps": 1, "num_scale": 1, "num_admix": 1, "pool": 3}
    config = matrix_file(photos, checkpoints, tmp_path / "m.yaml", attacks={"admix": mixes})
    assert cli.run(["transfer", "--config", str(config), "--out", str(tmp_path / "m")]) == 0
    described = json.loads((tmp_path / "m" / "matrix.json").read_text())["config"]["attacks"]["admix"]
    assert "pool=<float32 [3, 3, 160, 160]" in described["transforms"]


def test_the_list_of_attacks(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["attack", "--list"]) == 0
    printed = capsys.readouterr().out
    lines = {line.split()[0]: line for line in printed.splitlines()[1:-1]}
    assert set(PRESETS) <= set(lines)
    assert lines["vnifgsm"].split()[1:3] == ["1", "6"]
    assert "VarianceTuning()" in lines["vnifgsm"]
    assert "SignStep(momentum=1.0, nesterov=True)" in lines["vnifgsm"]
    assert "Wang and He, CVPR 2021" in lines["vnifgsm"]


def test_limit_spreads_over_the_data_set(photos: Path, checkpoints: tuple[str, str], tmp_path: Path) -> None:
    assert cli.run(attack(photos, checkpoints[0], tmp_path / "adv", "--limit", "3")) == 0
    assert sorted(path.name for path in (tmp_path / "adv" / "images").iterdir()) == ["0.png", "2.png", "4.png"]


def test_align_writes_weights_history_and_settings(photos: Path, checkpoints: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    source, witness = checkpoints
    given = ["align", "--source", MODEL, "--witness", MODEL, "--data", str(photos), "--out", str(out)]
    weights = ["--source-checkpoint", source, "--witness-checkpoint", witness, "--num-classes", str(CLASSES)]
    assert cli.run([*given, *weights, "--batch-size", "2", "--epochs", "2", "--lr", "0.01"]) == 0
    before, after = load_file(source), load_file(out / "aligned.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in history] == list(range(1, 7))
    settings = json.loads((out / "config.json").read_text())
    assert settings["lr"] == 0.01
    assert settings["temperature"] == 4.0
    clean = json.loads((out / "clean.json").read_text())
    assert clean["n"] == 6
    assert 0 <= clean["before"] <= 1
    assert cli.run(attack(photos, str(out / "aligned.safetensors"), tmp_path / "adv")) == 0


def align_options(photos: Path, checkpoints: tuple[str, str], out: Path, *more: str) -> list[str]:
    given = ["align", "--source", MODEL, "--witness", MODEL, "--data", str(photos), "--out", str(out)]
    weights = ["--source-checkpoint", checkpoints[0], "--witness-checkpoint", checkpoints[1]]
    return [
        *given,
        *weights,
        "--num-classes",
        str(CLASSES),
        "--batch-size",
        "2",
        "--epochs",
        "2",
        "--lr",
        "0.01",
        *more,
    ]


def test_align_goes_on_and_refuses_other_settings(
    photos: Path, checkpoints: tuple[str, str], tmp_path: Path, refused: Runner
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    every = ["--checkpoint-every", "2"]
    assert cli.run(align_options(photos, checkpoints, whole, *every)) == 0
    assert cli.run(align_options(photos, checkpoints, parts, *every)) == 0
    for name in ("aligned.safetensors", "history.jsonl"):
        (parts / name).unlink()
    (parts / "snapshots" / "step-000000006.pt").unlink()
    assert "already holds files" in refused(*align_options(photos, checkpoints, parts, *every))
    line = refused(*align_options(photos, checkpoints, parts, *every, "--lr", "0.02", "--resume"))
    assert "holds the results of a different run (lr: 0.01 there, 0.02 here)" in line
    assert cli.run(align_options(photos, checkpoints, parts, *every, "--resume")) == 0
    for name in ("aligned.safetensors", "history.jsonl", "clean.json", "config.json"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name


def test_align_with_all_that_it_takes(photos: Path, checkpoints: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    more = [
        "--embedding",
        "rkd-dev=0.5",
        "--embedding",
        "hint",
        "--output",
        "jsd=0.5",
        "--lambda-self",
        "0.1",
        "--warmup",
        "2",
        "--ema",
        "0.9",
    ]
    more += ["--perturb-param", "eps=4/255", "--perturb-param", "steps=1", "--accumulate", "2"]
    more += ["--held-out", str(photos), "--check-every", "2", "--channels-last", "--batch-norm", "recalibrate"]
    assert cli.run(align_options(photos, checkpoints, out, *more)) == 0
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert len(history) == 3
    assert {"rkd", "hint", "jsd", "self", "kd", "grad_norm"} <= history[0].keys()
    assert "gradient_cosine" in history[1]
    perturb = json.loads((out / "config.json").read_text())["perturb"]
    assert (perturb["name"], perturb["steps"]) == ("pgd", 1)


def test_align_keeps_what_witnesses_say_of_fixed_views(
    photos: Path, checkpoints: tuple[str, str], tmp_path: Path
) -> None:
    given = ["--fixed-views", "--witness-cache", str(tmp_path / "cache")]
    assert cli.run(align_options(photos, checkpoints, tmp_path / "first", *given)) == 0
    assert (tmp_path / "cache" / "witnesses-0.logits").exists()
    assert cli.run(align_options(photos, checkpoints, tmp_path / "again", *given)) == 0
    assert cli.run(align_options(photos, checkpoints, tmp_path / "plain", "--fixed-views")) == 0
    histories = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "history.jsonl").read_text().splitlines()]
        for name in ("first", "again", "plain")
    ]
    assert histories[0] == pytest.approx(histories[2], rel=1e-4)
    assert histories[1] == pytest.approx(histories[2], rel=1e-4)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--embedding", "rkt"], "embedding: got 'rkt' (did you mean 'rkd'?)"),
        (["--output", "jds"], "output: got 'jds' (did you mean 'jsd'?)"),
        (["--embedding", "rkd=x"], "embedding: got 'rkd=x'; allowed is NAME or NAME=WEIGHT"),
        (["--witness-cache", "cache"], "witness-cache: got one without --fixed-views"),
        (["--perturb", "pgdd"], "perturb.name: got 'pgdd' (did you mean 'pgd'?)"),
        (["--patience", "2"], "patience: got a number without held_out images"),
        (["--batch-norm", "synchronise"], "batch_norm: got 'synchronise' on the CPU"),
        (["--source-layer", "layer9", "--embedding", "rkd"], "layer: got 'layer9' (did you mean 'layer"),
        (["--checkpoint-every", "0"], "every: got 0"),
    ],
)
def test_align_refuses_bad_options(
    more: list[str], message: str, photos: Path, checkpoints: tuple[str, str], tmp_path: Path, refused: Runner
) -> None:
    assert message in refused(*align_options(photos, checkpoints, tmp_path / "out", *more))
    assert not list((tmp_path / "out").glob("aligned*"))


def matrix_file(photos: Path, checkpoints: tuple[str, str], path: Path, **changes: object) -> Path:
    models = [{"model": MODEL, "checkpoint": name, "num_classes": CLASSES} for name in checkpoints]
    content = {
        "data": str(photos),
        "sources": {"vanilla": models[0], "both": {"ensemble": models, "combine": "losses"}},
        "targets": {"b": models[1]},
        "attacks": {"mi": {"name": "mifgsm", "eps": "8/255", "alpha": "2/255", "steps": 2}},
        "batch_size": 3,
        **changes,
    }
    path.write_text(yaml.safe_dump(content))
    return path


def test_transfer_is_taken_up_where_it_stopped(
    photos: Path, checkpoints: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = matrix_file(photos, checkpoints, tmp_path / "m.yaml")
    assert cli.run(["transfer", "--config", str(config), "--out", str(tmp_path / "whole")]) == 0
    run, calls = af.attacks.Attack.__call__, []

    def interrupted(self: af.attacks.Attack, *args: object, **kwargs: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(af.attacks.Attack, "__call__", interrupted)
    arguments = ["transfer", "--config", str(config), "--out", str(tmp_path / "resumed")]
    assert cli.run(arguments) == 130
    assert not (tmp_path / "resumed" / "matrix.json").exists()
    assert cli.run(arguments) == 0
    # Two batches of the first source were done, so two of the second remain after the interrupted call.
    assert len(calls) == 5
    whole, resumed = (json.loads((tmp_path / name / "matrix.json").read_text()) for name in ("whole", "resumed"))
    assert whole == resumed


def test_transfer_prepares_sources_in_the_precision_of_the_file(
    photos: Path, checkpoints: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, asked = matrix.prepared_alike, []

    def recorded(model: af.Classifier, images: torch.Tensor, precision: Any) -> af.Classifier:
        asked.append((precision, len(images)))
        return prepared(model, images, "fp32")

    monkeypatch.setattr(matrix, "prepared_alike", recorded)
    for name, changes in (("usual", {}), ("auto", {"precision": "auto"})):
        config = matrix_file(photos, checkpoints, tmp_path / f"{name}.yaml", **changes)
        assert cli.run(["transfer", "--config", str(config), "--out", str(tmp_path / name)]) == 0
        written = json.loads((tmp_path / name / "matrix.json").read_text())["config"]
        precision = changes.get("precision", "fp32")
        assert written["precision"] == json.loads((tmp_path / name / "config.json").read_text())["precision"]
        assert written["precision"] == precision
        assert written["forms"] == {
            "vanilla": "fp32, channels-last",
            "both": "fp32, channels-last; fp32, channels-last",
        }
    assert asked == [("fp32", 3)] * 2 + [("auto", 3)] * 2


def test_transfer_refuses_the_folder_of_another_matrix(
    photos: Path, checkpoints: tuple[str, str], tmp_path: Path, refused: Runner
) -> None:
    config = matrix_file(photos, checkpoints, tmp_path / "m.yaml", limit=2)
    assert cli.run(["transfer", "--config", str(config), "--out", str(tmp_path / "m")]) == 0
    before = (tmp_path / "m" / "matrix.json").read_bytes()
    matrix_file(photos, checkpoints, config, limit=3)
    line = refused("transfer", "--config", str(config), "--out", str(tmp_path / "m"))
    assert "different run" in line
    assert (tmp_path / "m" / "matrix.json").read_bytes() == before


def test_transfer_over_budgets_and_defences(
    photos: Path, checkpoints: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images are kept; what `evaluate` finds on them is what the matrix says."""
    config = matrix_file(
        photos,
        checkpoints,
        tmp_path / "m.yaml",
        budgets=["4/255", "8/255"],
        defences={
            "jpeg": {"name": "jpeg", "quality": 40},
            "random": [{"name": "resize_pad"}, {"name": "smoothing", "samples": 2}],
        },
        defend="all",
    )
    out, name = tmp_path / "m", "mi 8/255"
    assert cli.run(["transfer", "--config", str(config), "--out", str(out)]) == 0
    document = json.loads((out / "matrix.json").read_text())
    cells = {(cell["source"], cell["attack"], cell["target"]): cell for cell in document["cells"]}
    targets = ("b", "b + jpeg", "b + random")
    assert set(cells) == {(s, f"mi {r}/255", t) for s in ("vanilla", "both") for r in (4, 8) for t in targets}
    for source in ("vanilla", "both"):
        for radius in (4, 8):
            manifest = json.loads((out / f"adversarial/sources/{source}/mi {radius}%2F255/manifest.json").read_text())
            assert manifest["eps"] == radius / 255
            assert manifest["parameters"]["alpha"] == pytest.approx(radius / 255 / 4)
    assert json.loads((out / "config.json").read_text())["budgets"] == ["4/255", "8/255"]
    assert document["config"]["defences"]["b + jpeg"] == "Jpeg(quality=40)"
    assert document["config"]["eps"][name] == 8 / 255
    images = out / "adversarial/sources/both/mi 8%2F255"
    given = ["--num-classes", str(CLASSES), "--data", str(photos), "--targets", f"b={MODEL}@{checkpoints[1]}"]
    assert cli.run(["evaluate", "--images", str(images), *given, "--out", str(tmp_path / "eval")]) == 0
    (again,) = json.loads((tmp_path / "eval" / "matrix.json").read_text())["cells"]
    assert (again["source"], again["attack"]) == ("both", name)
    ours = cells["both", name, "b"]
    assert [again[key] for key in ("rate", "n", "clean_accuracy")] == [
        ours[key] for key in ("rate", "n", "clean_accuracy")
    ]
    # A second call finds all there is, and says so in as many lines.
    before = (out / "matrix.json").read_bytes()
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(af.attacks.Attack, "__call__", None)
        patch.setattr(outcomes, "errors_of", None)
        assert cli.run(["transfer", "--config", str(config), "--out", str(out)]) == 0
    assert (out / "matrix.json").read_bytes() == before
    # Four models when clean, and four attacks with four judges, in two batches each.
    assert f"transfer: {2 * (5 + 4 * 5)}/50 batches" in capsys.readouterr().err


def test_transfer_clears_what_killed_writers_left(photos: Path, checkpoints: tuple[str, str], tmp_path: Path) -> None:
    config, out = matrix_file(photos, checkpoints, tmp_path / "m.yaml", limit=1), tmp_path / "m"
    for _ in range(2):
        assert cli.run(["transfer", "--config", str(config), "--out", str(out)]) == 0
        left = [path for path in out.rglob("*") if path.name.startswith(".")]
        assert not left
        (out / "parts" / ".b.0123456789abcdef.npz").write_text("")
        (out / ".matrix.0123456789abcdef.json").write_text("")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sorces": {}}, "did you mean 'sources'"),
        ({"attacks": {"mi": {"name": "mifgms"}}}, "did you mean 'mifgsm'"),
        ({"attacks": {"mi": {"name": "mifgsm", "epz": 1}}}, "did you mean 'eps'"),
        ({"attacks": {"mi": {"name": "mifgsm", "eps": "4/x"}}}, "attacks.mi.eps"),
        ({"attacks": {}}, "attacks"),
        ({"precision": "bf61"}, "config: precision: got 'bf61' (did you mean 'bf16'?)"),
        ({"precision": 16}, "config: precision: got 16"),
        ({"baseline": "other"}, "baseline"),
        ({"targets": {"b": {"modl": MODEL}}}, "targets.b"),
        ({"budgets": []}, "budgets is []"),
        ({"budgets": [8]}, "eps: got 8"),
        ({"defences": {"j": {"name": "jpeg", "quality": 101}}, "defend": "all"}, "defences.j.quality: got 101"),
        ({"attacks": {"a": {"name": "bim"}, "A": {"name": "bim"}}}, "'A' and 'a' would be kept in one file"),
    ],
)
def test_matrix_files_with_faults(
    photos: Path, checkpoints: tuple[str, str], tmp_path: Path, refused: Runner, changes: dict[str, object], said: str
) -> None:
    config = matrix_file(photos, checkpoints, tmp_path / "m.yaml", **changes)
    assert said in refused("transfer", "--config", str(config), "--out", str(tmp_path / "m"))
    assert not (tmp_path / "m" / "matrix.json").exists()


def test_bad_input_to_attack(photos: Path, checkpoints: tuple[str, str], tmp_path: Path, refused: Runner) -> None:
    good, out = checkpoints[0], tmp_path / "adv"

    def given(*more: str, data: Path = photos, name: str = "mifgsm") -> str:
        line = refused(*attack(data, good, out, *more, name=name))
        assert not out.exists()
        return line

    assert "mifgsm" in given(name="mifgms")
    assert "eps" in given("--eps", "-1/255")
    assert "alpha" in given("--alpha", "-1")
    assert "steps" in given("--steps", "0")
    assert "foo" in given("--param", "foo=1")
    assert "--nothing" in given("--nothing")
    assert "nowhere" in given(data=tmp_path / "nowhere")
    assert "'tpu'" in given("--device", "tpu")
    assert "limit" in given("--limit", "0")
    assert "precision: got 'fp23' (did you mean 'fp32'?)" in given("--precision", "fp23")
    assert "resnet18" in refused("attack", "--model", "timm:resnet1x8", *attack(photos, good, out)[3:])
    (photos / "labels.csv").write_text("filename,lable\n0.png,0\n")
    assert "lable" in given()
    (photos / "labels.csv").write_text("filename,label\n0.png,7\n")
    assert "7" in given()
    (photos / "labels.csv").write_text("filename,label\n0.png,0\n")
    assert "targeted" in given("--targeted")
    whole = (photos / "images" / "0.png").read_bytes()
    (photos / "images" / "0.png").write_bytes(whole[: len(whole) // 2])
    assert "0.png" in given()


def test_used_and_unwritable_folders(
    photos: Path, checkpoints: tuple[str, str], tmp_path: Path, refused: Runner
) -> None:
    out = tmp_path / "adv"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert "already holds files" in refused(*attack(photos, checkpoints[0], out))
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    assert "is a file" in refused(*attack(photos, checkpoints[0], out / "notes.txt"))
    assert "cannot write" in refused(*attack(photos, checkpoints[0], out / "notes.txt" / "below"))


def test_commands_and_options_that_do_not_exist(refused: Runner) -> None:
    assert "geometri" in refused("geometri")
    assert "preset" in refused("demo", "--preset", "digit")
    assert "--images" in refused("evaluate", "--targets", "a", "b")


def test_evaluate_refuses_an_unfinished_folder(tmp_path: Path, refused: Runner) -> None:
    (tmp_path / "adv" / "images").mkdir(parents=True)
    line = refused("evaluate", "--images", str(tmp_path / "adv"), "--targets", MODEL, "--out", str(tmp_path / "out"))
    assert "manifest" in line


def test_an_interrupt_leaves_no_half_file(photos: Path, checkpoints: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "adv"
    command = attack(photos, checkpoints[0], out, "--steps", "100", "--batch-size", "1", name="bim")
    # A job that a shell runs in the background ignores interrupts, and so would what it starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "alignfast", *command],
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    finally:
        signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 100
    while not list(out.glob("images/*.png")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.decode().splitlines()[-1] == "alignfast: interrupted"
    assert not (out / "manifest.json").exists()
    left = [path for path in out.rglob("*") if path.is_file()]
    assert all(path.suffix in (".png", ".json") and not path.name.startswith(".") for path in left)
    for path in out.glob("images/*.png"):
        Image.open(path).load()


def test_doctor_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"backends", "chosen", "memory", "self_test"}
    assert set(report["self_test"].values()) == {"ok"}


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("demo", "align", "attack", "evaluate", "transfer", "doctor"):
        assert cli.run([command, "--help"]) == 0
        assert command in capsys.readouterr().out


def test_several_values_after_one_option() -> None:
    given = ["evaluate", "--targets", "a", "b", "--out", "c"]
    assert cli.spread(given) == ["evaluate", "--targets", "a", "--targets", "b", "--out", "c"]


@pytest.mark.parametrize(("text", "value"), [("4/255", 4 / 255), ("0.5", 0.5), ("1e-3", 1e-3), (2, 2.0)])
def test_numbers_as_people_write_them(text: str, value: float) -> None:
    assert number(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["4/0", "four", "1/2/3", ""])
def test_what_is_no_number(text: str) -> None:
    with pytest.raises(ValueError, match="allowed is a number"):
        number(text)


def test_matrix_file_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="config"):
        MatrixConfig.read(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="mapping"):
        MatrixConfig.read(tmp_path / "list.yaml")
