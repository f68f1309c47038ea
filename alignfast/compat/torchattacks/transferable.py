"""Attacks with momentum, input transforms, smoothed gradients or tuned variance."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from alignfast.attacks import Scales
from alignfast.checks import check_choice
from alignfast.compat.torchattacks.attack import Attack
from alignfast.compat.torchattacks.engine import (
    Diversity,
    MeanCrossEntropy,
    MomentumStep,
    PatchStep,
    Smoothing,
    VarianceTuning,
    uniform,
)

__all__ = ["DIFGSM", "MIFGSM", "NIFGSM", "PIFGSM", "PIFGSMPP", "SINIFGSM", "TIFGSM", "VMIFGSM", "VNIFGSM"]


class MIFGSM(Attack):
    """Momentum (Dong et al., CVPR 2018)."""

    def __init__(
        self, model: nn.Module, eps: float = 8 / 255, alpha: float = 2 / 255, steps: int = 10, decay: float = 1.0
    ) -> None:
        super().__init__("MIFGSM", model)
        self.eps = eps
        self.steps = steps
        self.decay = decay
        self.alpha = alpha
        self.supported_mode = ["default", "targeted"]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        images, wanted = self._wanted(images, labels)
        step = MomentumStep(decay=self.decay)
        return self._attack(images, wanted, step, steps=self.steps, eps=self.eps, alpha=self.alpha)


class NIFGSM(Attack):
    """Nesterov momentum (Lin et al., ICLR 2020)."""

    def __init__(
        self, model: nn.Module, eps: float = 8 / 255, alpha: float = 2 / 255, steps: int = 10, decay: float = 1.0
    ) -> None:
        super().__init__("NIFGSM", model)
        self.eps = eps
        self.steps = steps
        self.decay = decay
        self.alpha = alpha
        self.supported_mode = ["default", "targeted"]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        images, wanted = self._wanted(images, labels)
        step = MomentumStep(decay=self.decay, nesterov=True)
        return self._attack(images, wanted, step, steps=self.steps, eps=self.eps, alpha=self.alpha)


class SINIFGSM(Attack):
    """The mean gradient of m scaled copies, with Nesterov momentum (Lin et al., ICLR 2020)."""

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        decay: float = 1.0,
        m: int = 5,
    ) -> None:
        super().__init__("SINIFGSM", model)
        self.eps = eps
        self.steps = steps
        self.decay = decay
        self.alpha = alpha
        self.m = m
        self.supported_mode = ["default", "targeted"]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        images, wanted = self._wanted(images, labels)
        step = MomentumStep(decay=self.decay, nesterov=True)
        return self._attack(
            images,
            wanted,
            step,
            steps=self.steps,
            eps=self.eps,
            alpha=self.alpha,
            transforms=[Scales(self.m)],
        )


class VMIFGSM(Attack):
    """Momentum with variance tuning over N neighbours (Wang and He, CVPR 2021)."""

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        decay: float = 1.0,
        N: int = 5,
        beta: float = 3 / 2,
    ) -> None:
        super().__init__("VMIFGSM", model)
        self.eps = eps
        self.steps = steps
        self.decay = decay
        self.alpha = alpha
        self.N = N
        self.beta = beta
        self.supported_mode = ["default", "targeted"]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        images, wanted = self._wanted(images, labels)
        step = MomentumStep(decay=self.decay)
        return self._attack(
            images,
            wanted,
            step,
            steps=self.steps,
            eps=self.eps,
            alpha=self.alpha,
            estimator=VarianceTuning(self.N, self.eps * self.beta),
        )


class VNIFGSM(Attack):
    """Nesterov momentum with variance tuning over N neighbours (Wang and He, CVPR 2021)."""

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        decay: float = 1.0,
        N: int = 5,
        beta: float = 3 / 2,
    ) -> None:
        super().__init__("VNIFGSM", model)
        self.eps = eps
        self.steps = steps
        self.decay = decay
        self.alpha = alpha
        self.N = N
        self.beta = beta
        self.supported_mode = ["default", "targeted"]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        images, wanted = self._wanted(images, labels)
        step = MomentumStep(decay=self.decay, nesterov=True)
        return self._attack(
            images,
            wanted,
            step,
            steps=self.steps,
            eps=self.eps,
            alpha=self.alpha,
            estimator=VarianceTuning(self.N, self.eps * self.beta),
        )


class DIFGSM(Attack):
    """Input diversity (Xie et al., CVPR 2019), one size and place for the whole batch."""

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        decay: float = 0.0,
        resize_rate: float = 0.9,
        diversity_prob: float = 0.5,
        random_start: bool = False,
    ) -> None:
        super().__init__("DIFGSM", model)
        self.eps = eps
        self.steps = steps
        self.decay = decay
        self.alpha = alpha
        self.resize_rate = resize_rate
        self.diversity_prob = diversity_prob
        self.random_start = random_start
        self.supported_mode = ["default", "targeted"]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        images, wanted = self._wanted(images, labels)
        step = MomentumStep(uniform(self.eps) if self.random_start else None, self.decay)
        return self._attack(
            images,
            wanted,
            step,
            steps=self.steps,
            eps=self.eps,
            alpha=self.alpha,
            transforms=[Diversity(self.resize_rate, self.diversity_prob)],
        )


class TIFGSM(Attack):
    """Smoothed gradients with input diversity (Dong et al., CVPR 2019).

    kernel_name: "gaussian" of nsig standard deviations from middle to edge, "linear" or "uniform".
    len_kernel: its side.

    Raises:
        ValueError: an unknown kernel_name.
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        decay: float = 0.0,
        kernel_name: str = "gaussian",
        len_kernel: int = 15,
        nsig: float = 3,
        resize_rate: float = 0.9,
        diversity_prob: float = 0.5,
        random_start: bool = False,
    ) -> None:
        super().__init__("TIFGSM", model)
        self.eps = eps
        self.steps = steps
        self.decay = decay
        self.alpha = alpha
        self.resize_rate = resize_rate
        self.diversity_prob = diversity_prob
        self.random_start = random_start
        self.kernel_name = check_choice("kernel_name", kernel_name, ("gaussian", "linear", "uniform"))
        self.len_kernel = len_kernel
        self.nsig = nsig
        self.stacked_kernel = torch.from_numpy(self._kernel().astype(np.float32)).repeat(3, 1, 1, 1)
        self.supported_mode = ["default", "targeted"]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        images, wanted = self._wanted(images, labels)
        step = MomentumStep(uniform(self.eps) if self.random_start else None, self.decay)
        return self._attack(
            images,
            wanted,
            step,
            steps=self.steps,
            eps=self.eps,
            alpha=self.alpha,
            transforms=[Diversity(self.resize_rate, self.diversity_prob)],
            shaping=[Smoothing(self.stacked_kernel)],
        )

    def _kernel(self) -> Any:
        side = self.len_kernel
        if self.kernel_name == "gaussian":
            return gaussian(side, self.nsig)
        if self.kernel_name == "uniform":
            return np.full((side, side), 1.0 / side**2)
        return _square(1 - np.abs(np.linspace((1 - side) / 2, (side - 1) / 2, side) / (side + 1) * 2))


class PIFGSM(Attack):
    """Patch-wise steps (Gao et al., ECCV 2020). momentum and prob are held and not used, as in torchattacks."""

    def __init__(
        self,
        model: nn.Module,
        max_epsilon: float = 16 / 255,
        num_iter_set: int = 10,
        momentum: float = 1.0,
        amplification: float = 10.0,
        prob: float = 0.7,
    ) -> None:
        super().__init__("PIFGSM", model)
        self.max_epsilon = max_epsilon
        self.num_iter_set = num_iter_set
        self.momentum = momentum
        self.amplification = amplification
        self.prob = prob
        self.supported_mode = ["default"]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        images, wanted = self._wanted(images, labels)
        alpha = self.max_epsilon / self.num_iter_set
        length = alpha * self.amplification
        step = PatchStep(length=length, gamma=length)
        return self._attack(images, wanted, step, steps=self.num_iter_set, eps=self.max_epsilon, alpha=alpha)


class PIFGSMPP(Attack):
    """Patch-wise steps along smoothed gradients (Gao et al., 2020: Patch-wise++). RGB images only.

    momentum and prob are held and not used. The labels given are the classes to reach in every targeted mode, and
    channel i is smoothed with column i of the kernel in place of each of its columns; both as in torchattacks.
    """

    def __init__(
        self,
        model: nn.Module,
        max_epsilon: float = 16 / 255,
        num_iter_set: int = 10,
        momentum: float = 1.0,
        amplification: float = 10.0,
        prob: float = 0.7,
        project_factor: float = 0.8,
    ) -> None:
        super().__init__("PIFGSMPP", model)
        self.max_epsilon = max_epsilon
        self.num_iter_set = num_iter_set
        self.momentum = momentum
        self.amplification = amplification
        self.prob = prob
        self.project_factor = project_factor
        self.supported_mode = ["default", "targeted"]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        images, labels = self._moved(images).detach(), self._moved(labels)
        alpha = self.max_epsilon / self.num_iter_set
        length = alpha * self.amplification
        step = PatchStep(length=length, gamma=length * self.project_factor, sign=-1 if self.targeted else 1, keep=False)
        columns = torch.from_numpy(gaussian(3, 3).astype(np.float32).T)[:, None, :, None].repeat(1, 1, 1, 3)
        return self._attack(
            images,
            labels,
            step,
            steps=self.num_iter_set,
            eps=self.max_epsilon,
            alpha=alpha,
            objective=MeanCrossEntropy(False),
            shaping=[Smoothing(columns)],
        )


def gaussian(side: int, deviations: float) -> Any:
    """float64 [side, side], summing to 1: a normal density out to so many standard deviations."""
    # Imported here, as it takes long.
    from scipy.stats import norm

    return _square(norm.pdf(np.linspace(-deviations, deviations, side)))


def _square(weights: Any) -> Any:
    kernel = np.outer(weights, weights)
    return kernel / kernel.sum()
