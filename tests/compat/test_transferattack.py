from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

from alignfast.attacks import PRESETS, create
from alignfast.compat import transferattack
from alignfast.compat.transferattack import AdvDataset, attack_zoo, load_attack_class, save_images
from alignfast.models import Classifier, Ensemble

LABELS = torch.tensor([2, 0, 3])


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 144, 5)).double()


def photos(count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand((count, 3, 12, 12), generator=generator, dtype=torch.float64)


def test_it_returns_the_perturbation_of_the_preset() -> None:
    model, images = network(), photos()
    delta = load_attack_class("mifgsm")(model, epsilon=0.1, alpha=0.02, epoch=4, decay=0.5)(images, LABELS)
    expected = create("mifgsm", model, eps=0.1, alpha=0.02, steps=4, decay=0.5)(images, LABELS)
    assert torch.equal(images + delta, expected)
    assert not delta.requires_grad


def test_arguments_have_its_names_and_defaults() -> None:
    signature = inspect.signature(load_attack_class("vmifgsm"))
    defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
    wanted = {"epsilon": 16 / 255, "alpha": 1.6 / 255, "epoch": 10, "decay": 1.0, "num_neighbor": 20, "beta": 1.5}
    wanted |= {"targeted": False, "random_start": False, "norm": "linfty", "loss": "crossentropy", "device": None}
    assert {name: defaults[name] for name in wanted} == wanted
    assert "alpha" not in inspect.signature(load_attack_class("FGSM")).parameters
    attack = load_attack_class("vmifgsm")(network(), num_neighbor=3).attack
    assert repr(attack.estimator) == repr(create("vmifgsm", network(), N=3).estimator)


@pytest.mark.parametrize("name", attack_zoo)
def test_every_class_has_arguments_that_its_preset_knows(name: str) -> None:
    """A name or default that leads nowhere would be an option without effect."""
    peer = attack_zoo[name]
    known = transferattack.parameters_of(peer.preset)
    assert set(peer.names.values()) <= set(known)
    common = {"epsilon", "alpha", "epoch", "targeted", "random_start", "norm", "loss", "device", "attack", "seed"}
    own = {peer.names.get(argument, argument) for argument in peer.signature()} - common
    assert own - {"gamma", "k", "patch_size", "mesh_width", "mesh_height"} <= set(known)
    assert set(peer.made) <= set(known)
    assert set(peer.defaults) <= set(peer.signature())
    made = load_attack_class(name)
    assert made.__name__ == peer.class_name
    assert next(iter(inspect.signature(made).parameters)) == "model_name"


def test_every_preset_is_there_but_those_of_others_alone() -> None:
    """What TransferAttack has under another package's name, or not at all."""
    others = {
        "cwpgd",
        "difgsm",
        "eotpgd",
        "ffgsm",
        "jitter",
        "lfifgsm",
        "pgd",
        "pgdl2",
        "pifgsmpp",
        "rfgsm",
        "sinifgsm",
    }
    others |= {"sinifgsm", "tifgsm", "tpgd", "upgd"}
    assert {peer.preset for peer in attack_zoo.values()} == set(PRESETS) - others


def test_attacks_mix_within_the_batch_unless_there_is_a_pool() -> None:
    model, images = network(), photos()
    few = {"epsilon": 0.1, "alpha": 0.02, "epoch": 2, "num_scale": 2, "num_admix": 2}
    ours = {"eps": 0.1, "alpha": 0.02, "steps": 2, "num_scale": 2, "num_admix": 2}
    pool = photos(5).flip(0)
    for given, used in ((None, images), (pool, pool)):
        delta = load_attack_class("admix")(model, pool=given, **few)(images, LABELS)
        assert torch.equal(images + delta, create("admix", model, pool=used, **ours)(images, LABELS))


def test_a_targeted_attack_takes_two_labels() -> None:
    model, images, aims = network(), photos(), torch.tensor([1, 1, 0])
    attacker = load_attack_class("ifgsm")(model, epsilon=0.1, alpha=0.02, epoch=4, targeted=True)
    expected = create("bim", model, eps=0.1, alpha=0.02, steps=4, targeted=True)(images, aims)
    assert torch.equal(images + attacker(images, torch.stack([LABELS, aims])), expected)
    assert torch.equal(images + attacker(images, [LABELS, aims]), expected)
    with pytest.raises(ValueError, match="label: got 3; allowed for a targeted attack are two"):
        attacker(images, LABELS)


def test_batches_continue_the_numbers_of_images() -> None:
    model, images = network(), photos()
    made = {"epsilon": 0.3, "alpha": 0.02, "epoch": 2, "random_start": True}
    whole = load_attack_class("mifgsm")(model, **made)(images, LABELS)
    attacker = load_attack_class("mifgsm")(model, **made)
    parts = torch.cat([attacker(images[:1], LABELS[:1]), attacker(images[1:], LABELS[1:])])
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)
    again = attacker(images, LABELS, indices=torch.arange(3))
    torch.testing.assert_close(again, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["aifgtm", "mig", "pgn", "ops"])
def test_some_go_in_steps_of_epsilon_over_epoch(name: str) -> None:
    numbers = {"epsilon": 0.2, "epoch": 4}
    assert load_attack_class(name)(network(), **numbers).attack.alpha == pytest.approx(0.05)
    assert load_attack_class(name)(network(), **numbers, alpha=0.02).attack.alpha == 0.02


def test_arguments_that_the_preset_has_in_another_form() -> None:
    def of(name: str, **given: Any) -> Any:
        return load_attack_class(name)(network(), **given).attack

    # Gamma is a step of 16 / 255 there, whatever the others.
    assert of("pifgsm").step.factor == pytest.approx(1.0)
    assert of("pifgsm", gamma=4.0, beta=5.0, alpha=1 / 255).step.factor == pytest.approx(4 / 5)
    assert of("pifgsm", alpha=0.0).step.factor == 0.0
    assert (of("ifgssm").step.stairs, of("ifgssm", k=10.0).step.stairs) == (64, 10)
    assert (of("maskblock").copies, of("maskblock", patch_size=112).copies) == (16, 4)
    assert (of("decowa").estimator.mesh, of("decowa", mesh_width=4, mesh_height=4).estimator.mesh) == (3, 4)
    for name, bad, message in (
        ("decowa", {"mesh_width": 4}, "mesh_height: got 3 beside a mesh_width of 4; allowed is the same"),
        ("ifgssm", {"k": 0.0}, "k: got 0.0"),
        ("maskblock", {"patch_size": 225}, "patch_size: got 225"),
        ("pifgsm", {"gamma": -1.0}, "gamma: got -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            of(name, **bad)


def test_layers_are_those_of_transferattack_where_the_model_has_them() -> None:
    def layer(name: str, model: nn.Module, **given: Any) -> str:
        attack: Any = load_attack_class(name)(model, **given).attack
        return str(attack.objective.layer)

    with torch.device("meta"):
        resnet, vgg = torchvision.models.resnet18(), torchvision.models.vgg11()
    assert [layer(name, resnet) for name in ("fia", "naa", "rpa")] == ["layer2", "layer1", "layer1"]
    assert layer("naa", resnet, feature_layer="layer3") == "layer3"
    assert layer("naa", vgg) == "features.8"


def test_l2_radii_may_be_above_one() -> None:
    model, images = network(), photos().clamp(0.3, 0.7)
    attack = load_attack_class("mifgsm")(model, epsilon=2.5, alpha=1.5, epoch=2, norm="l2").attack
    assert (attack.eps, attack.alpha) == (2.5, 1.5)
    fast = load_attack_class("fgsm")(model, epsilon=2.5, norm="l2")
    # But for the few pixels that end at 0 or 1.
    lengths = fast(images, LABELS).flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 2.5), rtol=0.01, atol=0)
    with pytest.raises(ValueError, match="norm: got 'l2'; allowed is 'linfty', as PC-FGSM has steps of its own"):
        load_attack_class("pcifgsm")(model, norm="l2")
    with pytest.raises(ValueError, match=r"epsilon: got -1\.0"):
        load_attack_class("mifgsm")(model, epsilon=-1.0, norm="l2")


def test_an_l2_start_lies_in_the_ball_and_so_does_the_end() -> None:
    model, images = network(), photos().clamp(0.3, 0.7)
    attacker = load_attack_class("mifgsm")(model, epsilon=0.5, alpha=0.1, epoch=3, norm="l2", random_start=True)
    lengths = attacker(images, LABELS).flatten(1).norm(dim=1)
    assert bool((lengths <= 0.5 + 1e-9).all())
    assert bool((lengths > 0.05).all())


def test_several_models_are_the_mean_of_their_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def load(spec: str, **options: Any) -> Classifier:
        asked.append((spec, options))
        return Classifier(network(len(asked)))

    monkeypatch.setattr(transferattack, "load_model", load)
    attacker = load_attack_class("ifgsm")(["resnet18", "vit_tiny_patch16_224"])
    assert asked == [
        ("torchvision:resnet18", {"weights": "DEFAULT"}),
        ("timm:vit_tiny_patch16_224", {"pretrained": True}),
    ]
    assert isinstance(attacker.model, Ensemble)
    assert attacker.model.combine == "logits"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epsilom": 0.1}, r"IFGSM: got unknown argument 'epsilom' \(did you mean 'epsilon'\?\)"),
        ({"norm": "l1"}, "norm: got 'l1'"),
        ({"loss": "mse"}, "loss: got 'mse'"),
        ({"targeted": 1}, "targeted: got 1"),
        ({"random_start": "no"}, "random_start: got 'no'"),
        ({"epsilon": -1.0}, "eps: got -1.0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_attack_class("ifgsm")(network(), **arguments)


def test_unknown_attacks() -> None:
    with pytest.raises(ValueError, match=r"attack_name: got 'mifgms' \(did you mean 'mifgsm'\?\)"):
        load_attack_class("mifgms")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.JPEG"):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "images" / name)
    (tmp_path / "labels.csv").write_text("filename,label,targeted_label\na.png,3,5\nb.JPEG,4,6\n", encoding="utf-8")
    return tmp_path


def test_images_and_labels_of_a_folder(folder: Path) -> None:
    dataset = AdvDataset(folder)
    image, label, name = dataset[0]
    assert (len(dataset), label, name) == (2, 3, "a.png")
    with Image.open(folder / "images" / "a.png") as original:
        expected = np.asarray(original.resize((224, 224)))
    assert torch.equal((image * 255).round().byte(), torch.from_numpy(expected.copy()).permute(2, 0, 1))
    assert AdvDataset(folder, targeted=True)[1][1] == [4, 6]
    assert AdvDataset(folder, targeted=True, target_class=9)[1][1] == [4, 9]
    images, labels, names = next(iter(torch.utils.data.DataLoader(AdvDataset(folder, targeted=True), batch_size=2)))
    assert images.shape == (2, 3, 224, 224)
    assert [part.tolist() for part in labels] == [[3, 4], [5, 6]]
    assert list(names) == ["a.png", "b.JPEG"]


def test_written_images_are_rounded_and_read_back(folder: Path) -> None:
    levels = torch.randint(0, 256, (2, 3, 224, 224), generator=torch.Generator().manual_seed(3))
    # Below the level by less than a rounding, which truncating would take a whole level down.
    save_images(folder / "out", (levels / 255 - 1e-4).clamp(min=0), ["a.png", "b.JPEG"])
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["a.png", "b.png"]
    written = AdvDataset(folder, folder / "out", eval=True)
    for index in range(2):
        assert torch.equal((written[index][0] * 255).round().long(), levels[index])


def test_bad_folders(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"input_dir: .*labels\.csv is not there"):
        AdvDataset(tmp_path / "images")
    with pytest.raises(ValueError, match="output_dir: got None"):
        AdvDataset(folder, eval=True)
    with pytest.raises(ValueError, match=r"input_dir: 2 images of labels\.csv are missing, .*a\.png first"):
        AdvDataset(folder, folder, eval=True)
    (folder / "labels.csv").write_text("filename,label\na.png,3\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has no column targeted_label"):
        AdvDataset(folder, targeted=True)
    with pytest.raises(ValueError, match="adversaries: values span"):
        save_images(folder / "new", torch.full((1, 3, 2, 2), 2.0), ["a.png"])
    assert not (folder / "new").exists()
