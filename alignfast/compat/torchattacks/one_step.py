"""Attacks of one step or none."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from alignfast.compat.torchattacks.attack import Attack
from alignfast.compat.torchattacks.engine import SignStep, Step, uniform_after_normal

__all__ = ["FFGSM", "FGSM", "GN", "VANILA"]


class VANILA(Attack):
    """The images themselves."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__("VANILA", model)
        self.supported_mode = ["default"]

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        return self._moved(images).detach().clone()


class GN(Attack):
    """Gaussian noise of standard deviation `std`."""

    def __init__(self, model: nn.Module, std: float = 0.1) -> None:
        super().__init__("GN", model)
        self.std = std
        self.supported_mode = ["default"]

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        images = self._moved(images).detach()
        return (images + self.std * torch.randn_like(images)).clamp(0, 1)


class FGSM(Attack):
    """One step of size eps (Goodfellow et al., ICLR 2015)."""

    def __init__(self, model: nn.Module, eps: float = 8 / 255) -> None:
        super().__init__("FGSM", model)
        self.eps = eps
        self.supported_mode = ["default", "targeted"]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        images, wanted = self._wanted(images, labels)
        return self._attack(images, wanted, Step(), steps=1, eps=self.eps, alpha=self.eps)


class FFGSM(Attack):
    """One step of size alpha from a random point of the ball (Wong et al., ICLR 2020)."""

    def __init__(self, model: nn.Module, eps: float = 8 / 255, alpha: float = 10 / 255) -> None:
        super().__init__("FFGSM", model)
        self.eps = eps
        self.alpha = alpha
        self.supported_mode = ["default", "targeted"]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        images, wanted = self._wanted(images, labels)
        step = SignStep(uniform_after_normal(self.eps))
        return self._attack(images, wanted, step, steps=1, eps=self.eps, alpha=self.alpha)
