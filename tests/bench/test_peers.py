"""Other packages' attacks get the numbers that ours get, and the model as it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from alignfast.bench import peers
from alignfast.bench.peers import PEERS, installed

CPU = torch.device("cpu")
IMAGES = torch.full((2, 3, 4, 4), 0.5)
LABELS = torch.tensor([0, 1])


class Sloped(nn.Module):
    """Two classes; the loss of either falls in one direction for every pixel."""

    def forward(self, images: Tensor) -> Tensor:
        total = images.sum((1, 2, 3))
        return torch.stack([total, -total], 1)


@pytest.mark.parametrize("package", PEERS)
@pytest.mark.parametrize("preset", ["pgd", "mifgsm"])
def test_numbers_arrive(package: str, preset: str) -> None:
    pytest.importorskip(package)
    numbers = {"eps": 0.1, "alpha": 0.03, "steps": 2, "device": CPU}
    fixed = {"random_start": False} if preset == "pgd" else {}
    attack = PEERS[package].attack(preset, Sloped().eval(), **numbers, **fixed)
    way = torch.tensor([-0.06, 0.06])[:, None, None, None]
    adv = attack(IMAGES, LABELS)
    assert torch.allclose(adv, IMAGES + way)
    assert not adv.requires_grad
    longer = PEERS[package].attack(preset, Sloped().eval(), **numbers | {"steps": 9}, **fixed)
    assert torch.allclose(longer(IMAGES, LABELS), IMAGES + way.sign() * 0.1)


def test_what_is_not_installed_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    installed.cache_clear()
    monkeypatch.setattr(peers.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    assert installed("torchattack") is None
    installed.cache_clear()


def test_every_command_names_its_package() -> None:
    for package, peer in PEERS.items():
        assert peer.install.startswith("pip install ")
        assert f"{package}==" in peer.install
        assert peer.alike <= set(peer.names)
