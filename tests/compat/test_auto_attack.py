"""AutoAttack, FAB and Square of `alignfast.compat.torchattacks` against torchattacks 3.5.1, bit for bit."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alignfast.compat import torchattacks as ours
from alignfast.compat.parity import small_network
from alignfast.compat.torchattacks.fab import _onto_plane_l2, _onto_plane_linf
from tests.compat.test_torchattacks import MEAN, MODES, STD, Network, same, untrained

theirs = pytest.importorskip("torchattacks")


@pytest.fixture(scope="module")
def small() -> Network:
    network, images, labels = small_network()
    return network, images[:24], labels[:24]


def made(package: Any, name: str, network: nn.Module, mode: str | None = None, **parameters: Any) -> Any:
    attack = getattr(package, name)(network, **parameters)
    if mode is not None:
        MODES[mode](attack)
    return attack


def changed(adv: Tensor, images: Tensor) -> int:
    return int(((adv - images).abs().amax((1, 2, 3)) > 1 / 255).sum())


@pytest.mark.parametrize("mode", [None, *MODES])
@pytest.mark.parametrize("multi_targeted", [False, True])
@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.06), ("L2", 1.3)])
def test_fab(small: Network, norm: str, eps: float, multi_targeted: bool, mode: str | None) -> None:
    network, images, labels = small
    parameters = {"norm": norm, "eps": eps, "steps": 5, "n_restarts": 2, "seed": 5, "n_classes": 4}

    def use(package: Any) -> list[Tensor]:
        attack = made(package, "FAB", network, mode, multi_targeted=multi_targeted, **parameters)
        return [attack(images, labels), attack(images[:1], labels[:1]), attack(images[1:8], labels[1:8])]

    found = changed(same(use)[0], images)
    # Labels that are right are no targets.
    assert found == 0 if mode == "label" and not multi_targeted else 0 < found < len(images)


@pytest.mark.parametrize(
    ("norm", "parameters"),
    [
        *(("Linf", {"eps": None}), ("L2", {"eps": None}), ("Linf", {"eta": 1.5, "alpha_max": 0.5, "beta": 0.5})),
        ("L2", {"eps": 0.8, "eta": 1.5, "alpha_max": 0.0, "beta": 0.7}),
    ],
)
def test_other_parameters_of_fab(small: Network, norm: str, parameters: dict[str, Any]) -> None:
    network, images, labels = small
    same(lambda package: made(package, "FAB", network, norm=norm, n_restarts=3, **parameters)(images, labels))


@pytest.mark.parametrize("mode", [None, *MODES])
@pytest.mark.parametrize("loss", ["margin", "ce"])
@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.15), ("L2", 3.0)])
def test_square(small: Network, norm: str, eps: float, loss: str, mode: str | None) -> None:
    network, images, labels = small
    wide = 2 if mode else 1
    parameters = {"norm": norm, "eps": wide * eps, "n_queries": 40, "n_restarts": 2, "loss": loss, "seed": 5}

    def use(package: Any) -> list[Tensor]:
        attack = made(package, "Square", network, mode, resc_schedule=loss == "ce", **parameters)
        return [attack(images, labels), attack(images[:1], labels[:1]), attack(images[1:8], labels[1:8])]

    found = changed(same(use)[0], images)
    assert found < len(images)
    # So few queries do not lead to unlikely classes, and labels that are right are reached before it begins.
    if mode in (None, "random", "function", "label"):
        assert (found > 0) == (mode != "label")


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize(
    "size", [(5, 5), (6, 6), (8, 8), (9, 9), (10, 10), (13, 13), (20, 20), (28, 28), (32, 32), (24, 20)]
)
def test_squares_of_all_sizes(norm: str, size: tuple[int, int]) -> None:
    network, images = of_size(size)
    eps = 0.05 if norm == "Linf" else 0.5

    def use(package: Any) -> Tensor:
        labels = network(images).argmax(1)
        adv: Tensor = package.Square(network, norm=norm, eps=eps, n_queries=60, p_init=0.5)(images, labels)
        return adv

    if norm == "L2" and size == (24, 20):
        assert use(ours).isfinite().all()
        with pytest.raises(RuntimeError, match="must match the size"):
            use(theirs)
        return
    same(use)


def of_size(size: tuple[int, int]) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        network = nn.Sequential(nn.AdaptiveAvgPool2d(5), nn.Flatten(), nn.Linear(75, 10)).eval()
        return network, torch.rand(4, 3, *size)


@pytest.mark.parametrize("version", ["standard", "plus", "rand"])
@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.05), ("L2", 0.9)])
def test_auto_attack(small: Network, norm: str, eps: float, version: str) -> None:
    network, images, labels = small

    def use(package: Any) -> Tensor:
        attack = package.AutoAttack(network, norm=norm, eps=eps, version=version, n_classes=4, seed=3)
        for part in attack._autoattack.attacks:
            if part.attack == "Square":
                part.n_queries = 30
        adv: Tensor = attack(images, labels)
        return adv

    assert 0 < changed(same(use), images) < len(images)


def test_what_auto_attack_is_made_of(small: Network) -> None:
    for version, norm in itertools.product(("standard", "plus", "rand"), ("Linf", "L2")):
        parts = [
            [repr(part) for part in package.AutoAttack(small[0], norm, 0.1, version, 7, 3, True)._autoattack.attacks]
            for package in (ours, theirs)
        ]
        assert parts[0] == parts[1]
    assert len({part.seed for part in ours.AutoAttack(small[0])._autoattack.attacks}) == 1


@pytest.mark.parametrize("training", [(True, True, True), (True, False, True)])
@pytest.mark.parametrize("mode", [None, "label"])
@pytest.mark.parametrize("name", ["FAB", "Square"])
def test_models_in_training_mode(name: str, mode: str | None, training: tuple[bool, bool, bool]) -> None:
    """Passes come in the same order and number, as dropout and the statistics of batch norm show."""
    images = torch.rand((5, 3, 8, 8), generator=torch.Generator().manual_seed(4))
    labels = untrained().eval()(images).argmax(1)
    options = {"FAB": {"n_restarts": 2, "steps": 3}, "Square": {"n_queries": 5}}[name]

    def use(package: Any) -> list[Tensor]:
        network = untrained()
        attack = made(package, name, network, mode, **options)
        attack.set_model_training_mode(*training)
        return [attack(images, labels), attack(images[:2], labels[:2]), network[1].running_mean]

    same(use)


@pytest.mark.parametrize("name", ["FAB", "Square", "AutoAttack"])
def test_normalised_images(small: Network, name: str) -> None:
    network, images, labels = small
    images, labels = images[:6], labels[:6]
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    options = {"FAB": {"eps": 0.1}, "Square": {"eps": 0.3, "n_queries": 20}, "AutoAttack": {"eps": 0.1, "seed": 0}}

    def use(package: Any) -> Tensor:
        attack = made(package, name, network, **options[name])
        attack.set_normalization_used(MEAN, STD)
        return torch.stack([attack((images - mean) / std, labels), attack((images - mean) / std, labels)])

    same(use)


@pytest.mark.parametrize("name", ["FAB", "Square", "AutoAttack"])
def test_the_model_is_left_as_it_was(name: str) -> None:
    network = untrained().train()
    network[1].eval()
    network[0].weight.requires_grad_(False)
    before = [value.clone() for value in network.state_dict().values()]
    images = torch.rand((5, 3, 8, 8), generator=torch.Generator().manual_seed(4))
    options = {"Square": {"n_queries": 5}}.get(name, {"n_classes": 4})
    kept = images.clone()
    with torch.random.fork_rng(devices=[]):
        adv = made(ours, name, network, eps=0.3, **options)(images, torch.tensor([3, 1, 4, 1, 5]))
    assert not adv.requires_grad
    assert torch.equal(images, kept)
    assert [module.training for module in network] == [True, False, True, True, True, True]
    assert [parameter.requires_grad for parameter in network.parameters()] == [False, *[True] * 5]
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(one, other) for one, other in zip(before, network.state_dict().values(), strict=True))


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_steps_onto_planes(norm: str) -> None:
    """As short as a search over the length finds them; out of reach of the plane, as far as they can."""
    generator = torch.Generator().manual_seed(8)
    points, normals = torch.rand((200, 12), generator=generator).double(), torch.randn((200, 12), generator=generator)
    normals = normals.double().masked_fill(torch.rand(normals.shape, generator=generator) < 0.1, 0)
    offsets = (normals * points).sum(1) + 3 * torch.randn(200, generator=generator).double()
    step = (_onto_plane_linf if norm == "Linf" else _onto_plane_l2)(points, normals, offsets)
    wanted = offsets - (normals * points).sum(1)
    toward = normals * wanted.sign()[:, None]

    def by(length: Tensor) -> Tensor:
        change = toward.sign() * length[:, None] if norm == "Linf" else toward * length[:, None]
        return (points + change).clamp(0, 1) - points

    low, high = torch.zeros(200).double(), torch.full((200,), 1e6).double()
    for _ in range(100):
        middle = (low + high) / 2
        short = (toward * by(middle)).sum(1) < wanted.abs()
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    torch.testing.assert_close(step, by(high), rtol=0, atol=1e-6)
    reached = ((normals * step).sum(1) - wanted).abs() < 1e-6
    assert 20 < reached.sum() < 200


def test_verbose(small: Network, capsys: pytest.CaptureFixture[str]) -> None:
    ours.Square(small[0], eps=0.3, n_queries=5, verbose=True)(*small[1:])
    assert capsys.readouterr().out.startswith("restart 0 - robust accuracy: ")


def test_refusals(small: Network) -> None:
    network, images, labels = small
    for name in ("FAB", "Square", "AutoAttack"):
        with pytest.raises(ValueError, match="norm: got 'L1'; allowed is one of Linf, L2"):
            made(ours, name, network, norm="L1")(images, labels)
        with pytest.raises(ValueError, match="eps: got 8"):
            made(ours, name, network, eps=8)(images, labels)
        with pytest.raises(ValueError, match="images: values span"):
            made(ours, name, network)(images * 2, labels)
        with pytest.raises(ValueError, match=r"labels: got dtype torch\.int32"):
            made(ours, name, network)(images, labels.int())
    with pytest.raises(ValueError, match="version: got 'fast'; allowed is one of standard, plus, rand"):
        ours.AutoAttack(network, version="fast")
    with pytest.raises(ValueError, match="n_classes: got 11"):
        ours.AutoAttack(network, eps=0.0, n_classes=11)(images, labels)
    with pytest.raises(ValueError, match="n_restarts: got 0"):
        ours.FAB(network, n_restarts=0)(images, labels)
    for name, value in (("steps", 0), ("alpha_max", 2), ("eta", -1), ("beta", 1.1)):
        with pytest.raises(ValueError, match=f"{name}: got {value}"):
            made(ours, "FAB", network, **{name: value})(images, labels)
    for name, value in (("loss", "dlr"), ("n_queries", 0), ("p_init", 0)):
        with pytest.raises(ValueError, match=f"{name}: got {value!r}"):
            made(ours, "Square", network, **{name: value})(images, labels)
    for size in ((4, 4), (16, 20)):
        with pytest.raises(ValueError, match=f"images: got {size[0]} x {size[1]}"):
            ours.Square(of_size(size)[0], norm="L2")(of_size(size)[1], labels[:4])
