"""Iterative attacks that differ in where they start, how they step and what they drive up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax, mse_loss, one_hot, softmax

from alignfast.checks import check_choice
from alignfast.compat.torchattacks.attack import Attack
from alignfast.compat.torchattacks.engine import (
    BoundedStep,
    Cost,
    Expectation,
    L2Step,
    MomentumStep,
    SignStep,
    SumOfParts,
    uniform,
    uniform_in_l2,
)

__all__ = ["BIM", "EOTPGD", "PGD", "PGDL2", "RFGSM", "TPGD", "UPGD", "Jitter"]

Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class BIM(Attack):
    """FGSM iterated (Kurakin et al., ICLR 2017 workshop). steps 0: as many as the paper takes."""

    def __init__(self, model: nn.Module, eps: float = 8 / 255, alpha: float = 2 / 255, steps: int = 10) -> None:
        super().__init__("BIM", model)
        self.eps = eps
        self.alpha = alpha
        self.steps = steps or int(min(eps * 255 + 4, 1.25 * eps * 255))
        self.supported_mode = ["default", "targeted"]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        images, wanted = self._wanted(images, labels)
        return self._attack(images, wanted, BoundedStep(), steps=self.steps, eps=self.eps, alpha=self.alpha)


class RFGSM(Attack):
    """From a random corner of the cube of half-side alpha (Tramer et al., ICLR 2018)."""

    def __init__(self, model: nn.Module, eps: float = 8 / 255, alpha: float = 2 / 255, steps: int = 10) -> None:
        super().__init__("RFGSM", model)
        self.eps = eps
        self.alpha = alpha
        self.steps = steps
        self.supported_mode = ["default", "targeted"]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        images, wanted = self._wanted(images, labels)
        step = SignStep(lambda images: self.alpha * torch.randn_like(images).sign())
        return self._attack(images, wanted, step, steps=self.steps, eps=self.eps, alpha=self.alpha)


class PGD(Attack):
    """From a random point of the ball (Madry et al., ICLR 2018)."""

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        random_start: bool = True,
    ) -> None:
        super().__init__("PGD", model)
        self.eps = eps
        self.alpha = alpha
        self.steps = steps
        self.random_start = random_start
        self.supported_mode = ["default", "targeted"]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        images, wanted = self._wanted(images, labels)
        step = SignStep(uniform(self.eps) if self.random_start else None)
        return self._attack(images, wanted, step, steps=self.steps, eps=self.eps, alpha=self.alpha)


class PGDL2(Attack):
    """PGD in the L2 ball (Madry et al., ICLR 2018). eps_for_division: added to the norm of the gradient."""

    def __init__(
        self,
        model: nn.Module,
        eps: float = 1.0,
        alpha: float = 0.2,
        steps: int = 10,
        random_start: bool = True,
        eps_for_division: float = 1e-10,
    ) -> None:
        super().__init__("PGDL2", model)
        self.eps = eps
        self.alpha = alpha
        self.steps = steps
        self.random_start = random_start
        self.eps_for_division = eps_for_division
        self.supported_mode = ["default", "targeted"]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        images, wanted = self._wanted(images, labels)
        step = L2Step(uniform_in_l2(self.eps) if self.random_start else None, self.eps_for_division)
        return self._attack(images, wanted, step, steps=self.steps, eps=self.eps, alpha=self.alpha)


class EOTPGD(Attack):
    """PGD on the mean of eot_iter gradients of a model that draws (Zimmermann, 2019)."""

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        eot_iter: int = 2,
        random_start: bool = True,
    ) -> None:
        super().__init__("EOTPGD", model)
        self.eps = eps
        self.alpha = alpha
        self.steps = steps
        self.eot_iter = eot_iter
        self.random_start = random_start
        self.supported_mode = ["default", "targeted"]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        images, wanted = self._wanted(images, labels)
        step = SignStep(uniform(self.eps) if self.random_start else None)
        return self._attack(
            images, wanted, step, steps=self.steps, eps=self.eps, alpha=self.alpha, estimator=Expectation(self.eot_iter)
        )


class TPGD(Attack):
    """Away from the model's own prediction in KL divergence (TRADES: Zhang et al., ICML 2019). Labels are not read."""

    def __init__(self, model: nn.Module, eps: float = 8 / 255, alpha: float = 2 / 255, steps: int = 10) -> None:
        super().__init__("TPGD", model)
        self.eps = eps
        self.alpha = alpha
        self.steps = steps
        self.supported_mode = ["default"]

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        images = self._moved(images).detach()
        clean = self.get_logits(images).detach()

        def divergence(rows: Tensor, logits: Tensor) -> Tensor:
            return kl_div(log_softmax(logits, 1), softmax(clean, 1), reduction="sum")

        step = SignStep(lambda images: 0.001 * torch.randn_like(images))
        none = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        return self._attack(
            images, none, step, steps=self.steps, eps=self.eps, alpha=self.alpha, objective=Cost(divergence)
        )


class Jitter(Attack):
    """Squared distance of scaled and noisy probabilities to the label's, over the size of the change once the model
    is wrong (Schwinn et al., 2021)."""

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        scale: float = 10,
        std: float = 0.1,
        random_start: bool = True,
    ) -> None:
        super().__init__("Jitter", model)
        self.eps = eps
        self.alpha = alpha
        self.steps = steps
        self.random_start = random_start
        self.scale = scale
        self.std = std
        self.supported_mode = ["default", "targeted"]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        images, wanted = self._wanted(images, labels)
        labels = self._moved(labels)

        def distance(rows: Tensor, logits: Tensor) -> Tensor:
            largest = torch.norm(logits, p=float("inf"), dim=1, keepdim=True)
            probabilities = softmax(self.scale * logits / largest, 1)
            if self.std != 0:
                probabilities = probabilities + self.std * torch.randn_like(probabilities)
            aim = one_hot(wanted, logits.shape[1]).to(logits.dtype)
            loss = mse_loss(probabilities, aim, reduction="none").mean(1)
            change = torch.norm(rows - images, p=float("inf"), dim=(1, 2, 3))
            counts = (logits.max(1).indices != labels) & (change != 0)
            loss = (-loss if self.targeted else loss) / torch.where(counts, change, 1)
            return loss.mean()

        step = SignStep(uniform(self.eps) if self.random_start else None)
        return self._attack(
            images, wanted, step, steps=self.steps, eps=self.eps, alpha=self.alpha, objective=Cost(distance)
        )


class UPGD(Attack):
    """PGD with momentum, expectation and a choice of losses: "ce", "dlr", "margin", or a function of images, labels
    and target labels (None if not targeted) that gives one number to increase."""

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        random_start: bool = False,
        loss: str | Loss = "ce",
        decay: float = 1.0,
        eot_iter: int = 1,
    ) -> None:
        super().__init__("UPGD", model)
        self.eps = eps
        self.alpha = alpha
        self.steps = steps
        self.random_start = random_start
        self.loss = loss
        self.decay = decay
        self.eot_iter = eot_iter
        self.supported_mode = ["default", "targeted"]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        images, wanted = self._wanted(images, labels)
        labels, targets = self._moved(labels), wanted if self.targeted else None
        parts: dict[str, Any] = {"estimator": SumOfParts(self.eot_iter)}
        if not isinstance(self.loss, str):
            loss = self.loss
            # The function runs the model itself.
            parts["logits_of"] = lambda rows: loss(rows, labels, targets).reshape(1, 1)
            parts["objective"] = Cost(lambda rows, value: value.sum())
        elif check_choice("loss", self.loss, ("ce", *LOSSES)) != "ce":
            of = LOSSES[self.loss]
            parts["objective"] = Cost(lambda rows, logits: of(logits, labels, targets).sum())
        step = MomentumStep(uniform(self.eps) if self.random_start else None, self.decay)
        return self._attack(images, wanted, step, steps=self.steps, eps=self.eps, alpha=self.alpha, **parts)


def dlr(logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    """[N]: the difference of logits ratio, or its targeted form (Croce and Hein, ICML 2020, eq. 6 and 7)."""
    ranked, order = logits.sort(1)
    own = logits.gather(1, labels[:, None])[:, 0]
    if targets is not None:
        gap = own - logits.gather(1, targets[:, None])[:, 0]
        return -gap / (ranked[:, -1] - 0.5 * ranked[:, -3] - 0.5 * ranked[:, -4] + 1e-12)
    right = (order[:, -1] == labels).to(logits.dtype)
    gap = own - ranked[:, -2] * right - ranked[:, -1] * (1.0 - right)
    return -gap / (ranked[:, -1] - ranked[:, -3] + 1e-12)


def margin(logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    """[N]: how far the label's logit is ahead of the others', or the others' ahead of the target's, not below 0;
    negated. The largest of the others counts as no less than 0."""
    aim = one_hot(labels if targets is None else targets, logits.shape[1]).to(logits.dtype)
    others = ((1 - aim) * logits).max(1).values
    own = logits.masked_select(aim.bool())
    return -(own - others if targets is None else others - own).clamp(min=0)


LOSSES = {"dlr": dlr, "margin": margin}
