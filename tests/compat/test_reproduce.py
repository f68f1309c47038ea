"""The authors' arguments end to end on small images, and their mask of qualified images by hand."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision import transforms

from alignfast import cli
from alignfast.attacks import create, parameters_of
from alignfast.compat import reproduce, torchattacks
from alignfast.compat.reproduce import ATTACKS, CentreCrop, attack_of, config_of, load, parse, qualified, transfer
from alignfast.data import loader
from alignfast.models import Classifier
from tests.test_distributed import ended, free_ports, started

SIDE, CLASSES = 32, 3
EPS = 6 / 255


def image(label: int, seed: int) -> Image.Image:
    """40 x 40 pixels of noise, one channel of which is a little brighter."""
    generator = np.random.default_rng(1000 * label + seed)
    pixels = generator.normal(110, 40, (40, 40, 3))
    pixels[..., label] += 14
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def as_they_do(path: Path) -> Tensor:
    chain = [transforms.Resize(round(SIDE * 256 / 224)), transforms.CenterCrop(SIDE), transforms.ToTensor()]
    picture: Tensor = transforms.Compose(chain)(Image.open(path).convert("RGB"))
    return picture


def network(path: Path | None = None) -> nn.Module:
    model: nn.Module = torchvision.models.resnet18(num_classes=CLASSES)
    if path is not None:
        model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def normalised(model: nn.Module) -> Classifier:
    return Classifier(model, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), CLASSES)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/train, data/val, and two networks that learned a little: a.pt, and b.pt as if saved under DDP."""
    folder = tmp_path_factory.mktemp("reproduce")
    for split, count, first in (("train", 6, 100), ("val", 12, 0)):
        for label in range(CLASSES):
            where = folder / "data" / split / f"n{label}"
            where.mkdir(parents=True)
            for number in range(count):
                image(label, first + number).save(where / f"{number}.{'png' if number % 2 else 'JPEG'}")
    images = torch.stack([as_they_do(path) for path in sorted(folder.glob("data/train/*/*"))])
    labels = torch.arange(CLASSES).repeat_interleave(6)
    for name, seed in (("a", 0), ("b", 1)):
        torch.save(trained(images, labels, seed), folder / f"{name}.pt")
    tensors = torch.load(folder / "b.pt", weights_only=True)
    torch.save({f"module.{key}": tensor for key, tensor in tensors.items()}, folder / "ddp.pt")
    return folder


def trained(images: Tensor, labels: Tensor, seed: int) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = network().train()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(12):
            logits = normalised(model).logits(images + 0.02 * torch.randn_like(images))
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, labels).backward()
            optimizer.step()
    return model.state_dict()


def given(place: Path, out: Path, *more: str) -> list[str]:
    models = [f"--{role}_{what}" for role in ("source", "witness", "target") for what in ("arch", "dir")]
    values = ["res18", place / "a.pt", "resnet18", place / "b.pt", "res18", place / "ddp.pt"]
    pairs = [str(part) for pair in zip(models, values, strict=True) for part in pair]
    folders = ["--output_dir", str(out), "--data_dir", str(place / "data")]
    return [*folders, *pairs, "--image_size", str(SIDE), "-j", "0", "--device", "cpu", *more]


def only_measured(place: Path, out: Path, *more: str) -> list[str]:
    models = ["--eval_arch", "res18", "--eval_dir", str(place / "a.pt")]
    strength = ["--pgd_eps", "6./255.", "--pgd_alpha", "2./255", "--pgd_itr", "3"]
    return given(place, out, *models, *strength, *more)


def run(arguments: list[str]) -> dict[str, Any]:
    assert cli.run(["reproduce", *arguments]) == 0
    out = arguments[arguments.index("--output_dir") + 1]
    result: dict[str, Any] = json.loads((Path(out) / "result.json").read_text())
    return result


Runner = Callable[[list[str]], str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Runner:
    def refuse(arguments: list[str]) -> str:
        capsys.readouterr()
        assert cli.run(["reproduce", *arguments]) == 2
        line = capsys.readouterr().err
        assert line.startswith("alignfast: ")
        assert line.count("\n") == 1
        return line

    return refuse


def test_aligns_saves_and_measures(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    wanted = ["--save_modified_model", "1", "--eval_standard", "yes", "--eval_whitebox", "1", "--batch_size", "5"]
    attack = ["--pgd_eps", "6./255.", "--pgd_alpha", "2./255", "--pgd_itr", "3", "--no-amp", "--clip_grad_norm", "1.0"]
    result = run(given(place, out, *wanted, *attack))
    written = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    models = {"model/final_model.pt", "model/final_model.safetensors"}
    assert written == {"config.json", "history.jsonl", "result.json", *models}
    weights = torch.load(out / "model" / "final_model.pt", weights_only=True)
    before = network(place / "a.pt").state_dict()
    assert weights.keys() == before.keys()
    assert not torch.equal(weights["fc.weight"], before["fc.weight"])
    other = load_file(out / "model" / "final_model.safetensors")
    assert all(torch.equal(other[name], tensor) for name, tensor in weights.items())
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    # 18 images in batches of 5, the last one smaller.
    assert len(history) == 4
    assert result["loss"] == result["loss_align"] == pytest.approx(np.mean([entry["kd"] for entry in history]))
    assert result["loss_cls"] is None
    clean = result["clean"]
    assert (clean["n"], clean["given"], clean["after"]) == (36, True, pytest.approx(1 - result["test-err"] / 100))
    images = torch.stack([as_they_do(path) for path in sorted_files(place)])
    with torch.no_grad():
        right = normalised(network(place / "a.pt"))(images).argmax(1) == torch.arange(CLASSES).repeat_interleave(12)
    assert clean["before"] == pytest.approx(float(right.double().mean()))
    settings = json.loads((out / "config.json").read_text())
    assert (settings["clip_grad_norm"], settings["pgd_eps"], settings["amp"]) == (1.0, EPS, False)
    # The same from the saved weights, measured alone.
    saved = ["--eval_dir", str(out / "model" / "final_model.pt"), "--eval_standard", "1", "--eval_whitebox", "1"]
    alone = run(only_measured(place, tmp_path / "alone", *saved))
    for key in ("test-err", "whitebox-err", "res18", "transfer"):
        assert alone[key] == result[key]
    assert alone["loss"] is None


def test_two_processes_align_and_measure_as_one_does(place: Path, tmp_path: Path) -> None:
    strength = ["--pgd_eps", "6./255.", "--pgd_alpha", "2./255", "--pgd_itr", "3"]
    measured = [*strength, "--eval_standard", "1", "--eval_whitebox", "1"]
    # 18 images in batches of 17: the last one is too small for two.
    wanted = [*measured, "--batch_size", "17", "--no-amp", "--save_modified_model", "1"]
    out = tmp_path / "two"
    command = [sys.executable, "-m", "alignfast", "reproduce", *given(place, out, *wanted)]
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_ports()[0]}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    (first, said, error), second = ended([started(command, variables | rank) for rank in ranks])
    assert first == 0, error
    assert second == (0, "", "")
    assert said.splitlines()[-1] == str(out / "result.json")
    found = json.loads((out / "result.json").read_text())
    assert found["alignment"]["processes"] == 2
    assert len((out / "history.jsonl").read_text().splitlines()) == 1
    saved = ["--eval_arch", "res18", "--eval_dir", str(out / "model" / "final_model.pt")]
    alone = run(given(place, tmp_path / "one", *measured, *saved))
    for key in ("test-err", "whitebox-err", "res18", "transfer"):
        assert alone[key] == found[key]
    assert found["transfer"]["images"] == 36
    assert found["clean"]["after"] == pytest.approx(1 - found["test-err"] / 100)


def by_hand(place: Path) -> dict[str, Any]:
    """Flags of the 36 images of val/ in the order of their files."""
    images = torch.stack([as_they_do(path) for path in sorted_files(place)])
    labels = torch.arange(CLASSES).repeat_interleave(12)
    models = {name: normalised(network(place / f"{name}.pt")) for name in "ab"}

    def wrong(judge: str, attacked: str | None) -> Any:
        adversarial = images
        if attacked is not None:
            attack = create("pgd", models[attacked], eps=EPS, alpha=2 / 255, steps=3, seed=0)
            adversarial = attack(images, labels)
        with torch.no_grad():
            return (models[judge](adversarial).argmax(1) != labels).numpy()

    names = {"source_clean": ("a", None), "target_clean": ("b", None), "source": ("a", "a"), "target": ("b", "b")}
    return {name: wrong(*which) for name, which in names.items()} | {"transferred": wrong("b", "a")}


def sorted_files(place: Path) -> list[Path]:
    return sorted((place / "data" / "val").glob("*/*"))


def test_errors_are_those_counted_by_hand(place: Path, tmp_path: Path) -> None:
    flags = by_hand(place)
    chosen = ~flags["source_clean"] & ~flags["target_clean"] & flags["source"] & flags["target"]
    # So that the case has something to count, and something to leave out.
    assert 3 < chosen.sum() < 33
    result = run(only_measured(place, tmp_path / "and", "--eval_standard", "1", "--eval_whitebox", "1"))
    assert result["test-err"] == pytest.approx(100 * flags["source_clean"].mean())
    assert result["whitebox-err"] == pytest.approx(100 * flags["source"].mean())
    expected = flags["transferred"][chosen]
    assert result["res18"] == pytest.approx(100 * expected.mean())
    detail = result["transfer"]
    assert (detail["n"], detail["images"], detail["mask"]) == (len(expected), 36, "conjunction")
    assert detail["rate"] == pytest.approx(expected.mean())
    assert detail["low"] < detail["rate"] < detail["high"] or detail["rate"] in (0, 1)
    assert detail["clean_accuracy"] == pytest.approx(1 - flags["target_clean"].mean())
    quirky = run(only_measured(place, tmp_path / "parity", "--faithful-quirks"))
    falses = sum((~flags[name]).astype(int) for name in ("source", "target")) + flags["source_clean"]
    even = (falses + flags["target_clean"]) % 2 == 0
    assert even.sum() > chosen.sum()
    assert quirky["transfer"]["n"] == even.sum()
    assert quirky["transfer"]["mask"] == "parity"
    assert quirky["res18"] == pytest.approx(100 * flags["transferred"][even].mean())


def test_the_mask_of_all_sixteen_cases() -> None:
    cases = np.array(list(itertools.product([False, True], repeat=4)))
    assert [tuple(case) for case in cases[qualified(*cases.T)]] == [(True, True, True, True)]
    parity = {"".join(str(int(flag)) for flag in case) for case in cases[qualified(*cases.T, parity=True)]}
    # 0011: neither model is right on the clean image. 1100: neither is fooled.
    assert parity == {"0000", "0011", "0101", "0110", "1001", "1010", "1100", "1111"}


def test_it_stops_after_enough_qualified_images(place: Path) -> None:
    models = [normalised(network(place / f"{name}.pt")) for name in "ab"]
    seen = []

    def batches() -> Any:
        for batch in loader(dataset, 4):
            seen.append(len(batch.images))
            yield batch

    dataset = [(as_they_do(path), index // 12) for index, path in enumerate(sorted_files(place))]
    attacks = tuple(create("bim", model, eps=EPS, alpha=2 / 255, steps=3) for model in models)
    every = transfer(*models, loader(dataset, 4), attacks, 1000)  # type: ignore[arg-type]
    counts = np.cumsum(every.counted.reshape(-1, 4).sum(1))
    assert len(every.counted) == 36
    some = transfer(*models, batches(), attacks, 2)  # type: ignore[arg-type]
    assert len(seen) == len(some.counted) // 4 == int(np.argmax(counts > 2)) + 1 < 9
    assert np.array_equal(some.counted, every.counted[: len(some.counted)])


def test_ranks_stop_where_one_process_does(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 of 2, which is told what the other one finds in its batches, of which there is one less."""
    models = [normalised(network(place / f"{name}.pt")) for name in "ab"]
    dataset = [(as_they_do(path), index // 12) for index, path in enumerate(sorted_files(place))]
    attacks: Any = tuple(create("bim", model, eps=EPS, alpha=2 / 255, steps=3) for model in models)
    parts = [transfer(*models, [batch], attacks, 1000) for batch in loader(dataset, 4)]
    seen: list[int] = []

    def attacked(source: Any, target: Any, batch: Any, *_: Any) -> Any:
        seen.append(int(batch.indices[0]) // 4)
        return parts[seen[-1]]

    monkeypatch.setattr(reproduce, "_attacked", attacked)
    ends = set()
    for enough in (*range(1, int(sum(part.counted.sum() for part in parts))), 1000):
        alone = transfer(*models, loader(dataset, 4), attacks, enough)
        others = iter(parts[1::2])
        with monkeypatch.context() as patch:
            patch.setattr(reproduce, "gather", lambda mine, others=others: [mine, next(others, None)])
            seen.clear()
            found = transfer(*models, loader(dataset, 4).deal(0, 2), attacks, enough)
        for one, other in zip(vars(found).values(), vars(alone).values(), strict=True):
            assert np.array_equal(one, other)
        ends.add(len(alone.counted) // 4)
        assert seen == list(range(0, len(alone.counted) // 4, 2))
    # Behind batches of either rank.
    assert {end % 2 for end in ends} == {0, 1}


def test_no_qualified_image(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(only_measured(place, tmp_path / "out", "--pgd_eps", "0", "--pgd_alpha", "0"))
    assert result["res18"] is None
    assert (result["transfer"]["n"], result["transfer"]["rate"]) == (0, None)
    assert "none of 36 images is qualified" in capsys.readouterr().out


def test_debug_is_short(place: Path, tmp_path: Path) -> None:
    result = run(given(place, tmp_path / "out", "--debug", "1", "--batch_size", "4"))
    assert result["alignment"]["steps"] == 3
    assert result["alignment"]["precision"] == "bf16"
    assert result["transfer"]["images"] <= 32
    assert result["transfer"]["parameters"]["steps"] == 1
    assert not (tmp_path / "out" / "model").exists()


def test_the_same_run_again_and_another(place: Path, tmp_path: Path, refused: Runner) -> None:
    arguments = only_measured(place, tmp_path / "out", "--eval_transfer", "0", "--eval_standard", "1")
    first = run(arguments)
    assert run(arguments) == first
    assert "different run" in refused([*arguments, "--seed", "1"])
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == first


README = """--output_dir out --data_dir data --source_arch vit_b_16 --source_dir s.pt --witness_arch vit_t_16
    --witness_dir w.pt --target_arch swin_s --target_dir t.pt --lr 0.1 --clip_grad_norm 1.0 --save_modified_model 1
    --eval_standard 0 --eval_whitebox 0 --eval_transfer 1 --dist-url tcp://127.0.0.1:33967 --dist-backend nccl
    --multiprocessing-distributed --world-size 1 --rank 0"""


def test_arguments_of_the_readme() -> None:
    args = parse(README.split())
    assert (args.save_modified_model, args.eval_standard, args.eval_transfer) == (True, False, True)
    assert (args.multiprocessing_distributed, args.world_size, args.rank, args.workers) == (True, 1, 0, 4)
    config = config_of(args)
    assert (config.lr, config.clip_norm, config.temperature, config.precision) == (0.1, 1.0, 4.0, "bf16")
    assert (config.momentum, config.nesterov, config.weight_decay, config.epochs) == (0.9, True, 1e-4, 1)
    assert (config.optimizer, config.schedule, config.lambda_kd, config.lambda_cls) == ("sgd", "cosine", 1.0, 0.0)
    args = parse([*README.split(), "--clip_grad_norm", "None", "--amp", "--faithful-quirks", "--epoch", "3"])
    assert (config_of(args).clip_norm, config_of(args).precision, config_of(args).epochs) == (None, "fp32", 3)
    args = parse([*README.split(), "--method", "rkd", "--lr_scheduler_type", "fixed", "--optim", "sgd_step"])
    assert len(config_of(args).embeddings) == 1
    assert (config_of(args).schedule, config_of(args).optimizer) == ("constant", "sgd")
    assert parse([*README.split(), "--pgd_eps", "8./255."]).pgd_eps == 8 / 255


def test_attacks_have_torchattacks_defaults() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
    for name, preset in ATTACKS.items():
        args = parse([*README.split(), "--atk", name])
        attack = attack_of(args, Classifier(model))
        made = {"eps": 4 / 255, "alpha": 1 / 255, "steps": 20, "seed": 0}
        assert attack.parameters() == create(preset, model, **made).parameters()
        theirs = {"vni": "VNIFGSM", "vmi": "VMIFGSM", "sini": "SINIFGSM", "pgd": "PGD"}.get(name, f"{name.upper()}FGSM")
        peer = getattr(torchattacks, theirs)(model, eps=4 / 255, alpha=1 / 255, steps=20)
        for option in (
            "decay",
            "m",
            "N",
            "beta",
            "resize_rate",
            "diversity_prob",
            "random_start",
            "len_kernel",
            "nsig",
        ):
            if hasattr(peer, option):
                assert parameters_of(preset)[option] == getattr(peer, option)


def test_images_are_cut_as_torchvision_cuts_them(place: Path) -> None:
    path = sorted_files(place)[0]
    wide = Image.open(path).convert("RGB").resize((61, 47))
    for picture in (wide, wide.transpose(Image.Transpose.ROTATE_90)):
        wanted = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])(picture)
        ours = CentreCrop(224)(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
        assert torch.equal(ours, torch.from_numpy(np.array(wanted)).permute(2, 0, 1))


def test_models_of_the_authors(tmp_path: Path) -> None:
    import timm

    made = timm.create_model("vit_tiny_patch16_224", num_classes=4)
    torch.save(made.state_dict(), tmp_path / "vit.pt")
    args = parse([*README.split(), "--witness_dir", str(tmp_path / "vit.pt")])
    args.device = "cpu"
    model = load("witness", args)
    assert (model.num_classes, model.input_size) == (4, (3, 224, 224))
    # Whatever timm's own configuration of this network says.
    assert model.mean is not None
    torch.testing.assert_close(model.mean, torch.tensor([0.485, 0.456, 0.406]))
    args.image_size = 64
    with pytest.raises(ValueError, match="image_size: got 64, which vit_t_16 does not take"):
        load("witness", args)


def test_bad_arguments(place: Path, tmp_path: Path, refused: Runner) -> None:
    out = tmp_path / "out"

    def said(*more: str) -> str:
        line = refused(given(place, out, *more))
        assert not out.exists()
        return line

    assert "did you mean '--batch_size'" in said("--batchsize", "128")
    assert "'4/x'" in said("--pgd_eps", "4/x")
    assert "eval_transfer" in said("--eval_transfer", "2")
    assert "lr" in said("--lr", "-1")
    assert "batch_size" in said("--batch_size", "0")
    assert "workers" in said("-j", "-1")
    assert "--atk" in said("--atk", "fgsm")
    assert "dataset" in said("--dataset", "cifar10")
    assert "did you mean 'ega'" in said("--method", "egaa")
    assert "optim" in said("--optim", "adam")
    assert "lr_warmup_epoch" in said("--lr_warmup_epoch", "1")
    assert "lr_scheduler_type" in said("--lr_scheduler_type", "multistep")
    assert "did you mean 'res50'" in said("--target_arch", "res5O")
    assert "witness_dir: no file nowhere.pt" in said("--witness_dir", "nowhere.pt")
    assert "eps" in said("--pgd_eps", "2")
    assert "has no classifier.bias" in said("--target_arch", "densenet121")
    assert "does not fit" in said("--target_arch", "resnet34")
    assert "nowhere" in said("--data_dir", str(tmp_path / "nowhere"))
    assert "eval_arch" in said("--eval_dir", str(place / "a.pt"))
    assert "'tpu'" in said("--device", "tpu")
    assert "output_dir" in refused(["--data_dir", "x"])
    assert "source_arch: got none" in refused(["--output_dir", str(out), "--data_dir", str(place / "data")])


def test_data_and_models_of_other_classes(place: Path, tmp_path: Path, refused: Runner) -> None:
    torch.manual_seed(0)
    save_file(torchvision.models.resnet18(num_classes=5).state_dict(), tmp_path / "five.safetensors")
    five = str(tmp_path / "five.safetensors")
    assert "has 5 classes" in refused(given(place, tmp_path / "out", "--witness_dir", five))
    alone = only_measured(place, tmp_path / "out", "--eval_dir", five, "--eval_transfer", "0", "--eval_standard", "1")
    assert "3 class folders" in refused(alone)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["reproduce", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "alignfast reproduce" in printed
    assert "--pgd_itr" in printed
