"""Other packages' attacks, with the same numbers, on the model as it was loaded."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

Call = Callable[[Tensor, Tensor], Tensor]
Maker = Callable[..., Call]


@dataclass(frozen=True)
class Peer:
    """A package with attacks of its own.

    install: the command for whoever lacks it. names: its attacks by our presets. make: an attack of images and labels,
        from (the package, the attack's name, a model in [0, 1], numbers and other parameters). alike: the presets of
        which it has the same definition, so that results are the same where nothing is drawn.
    """

    package: str
    install: str
    names: Mapping[str, str]
    make: Maker
    alike: frozenset[str]

    def attack(self, preset: str, model: nn.Module, **parameters: Any) -> Call:
        package = installed(self.package)
        assert package is not None
        return self.make(package, self.names[preset], model, **parameters)


def _torchattacks(package: Any, name: str, model: nn.Module, device: torch.device, **parameters: Any) -> Call:
    attack: Call = getattr(package, name)(model, **parameters)
    return attack


def _torchattack(package: Any, name: str, model: nn.Module, device: torch.device, **parameters: Any) -> Call:
    attack: Call = getattr(package, name)(model, device=device, **parameters)
    return lambda images, labels: attack(images, labels).detach()


def _foolbox(
    package: Any, name: str, model: nn.Module, device: torch.device, *, eps: float, alpha: float, **parameters: Any
) -> Call:
    bounded = package.PyTorchModel(model, bounds=(0, 1), device=device)
    attack = getattr(package.attacks, name)(abs_stepsize=alpha, **parameters)

    def call(images: Tensor, labels: Tensor) -> Tensor:
        # The attack itself, without the pass that tells which of its images fool the model.
        adv: Tensor = attack.run(bounded, images, package.criteria.Misclassification(labels), epsilon=eps)
        return adv

    return call


_ALL = {"pgd": "PGD", "mifgsm": "MIFGSM", "difgsm": "DIFGSM", "sinifgsm": "SINIFGSM", "vmifgsm": "VMIFGSM"}
_FOOLBOX = {"pgd": "LinfProjectedGradientDescentAttack", "mifgsm": "LinfMomentumIterativeFastGradientMethod"}
_SHARED = {name: _ALL[name] for name in _FOOLBOX}
# torchattack differentiates for the weights too, as it calls `backward` on the loss; foolbox's momentum is of
# gradients of any length, where the paper has them normalised.
PEERS = {
    peer.package: peer
    for peer in (
        Peer("torchattacks", "pip install --no-deps torchattacks==3.5.1", _ALL, _torchattacks, alike=frozenset(_ALL)),
        Peer("torchattack", "pip install torchattack==1.7.2", _SHARED, _torchattack, alike=frozenset(_SHARED)),
        Peer("foolbox", "pip install foolbox==3.3.4", _FOOLBOX, _foolbox, alike=frozenset({"pgd"})),
    )
}


@cache
def installed(package: str) -> Any | None:
    try:
        return importlib.import_module(package)
    except ImportError:
        return None
