"""Gradients of a perturbation of which only some patches are shown."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alignfast.attacks.component import Memory, Position
from alignfast.attacks.estimators.base import Estimator
from alignfast.attacks.gradient import Gradient, Look
from alignfast.checks import check_count, check_number
from alignfast.models import Classifier

__all__ = ["PatchOut"]


@dataclass(frozen=True)
class PatchOut(Estimator):
    """PatchOut (Wei et al., AAAI 2022): the gradient with respect to the perturbation d of
    J(images + M d) + weight ||d||_2, where M keeps `patches` patches of side `patch`, drawn anew in every step.

    Each image draws its own (TransferAttack: all the same, by the number of the step), and its d is normed alone
    (TransferAttack: with the batch).

    Args:
        patch: pixels, dividing height and width. patches: at most as many as an image has. weight: at least 0.

    Raises:
        ValueError: a number out of its range; in `check`, images that do not fit.
    """

    patch: int = 16
    patches: int = 130
    weight: float = 0.1

    def __post_init__(self) -> None:
        check_count("patch", self.patch)
        check_count("patches", self.patches)
        check_number("weight", self.weight, low=0.0)

    @property
    def passes(self) -> int:
        return 1

    def check(self, source: Classifier, images: Tensor) -> None:
        height, width = images.shape[-2:]
        if height % self.patch or width % self.patch:
            raise ValueError(f"patch: got {self.patch}; allowed is a divisor of height and width, {height} and {width}")
        check_count("patches", self.patches, high=(height // self.patch) * (width // self.patch))

    def estimate(self, gradient: Gradient, position: Position, memory: Memory) -> Tensor:
        perturbation = position.point - position.images

        def shown(look: Look) -> Tensor:
            mask = self._mask(look, position.images)
            return mask * look.gradient(position.images + mask * perturbation)

        norms: Tensor = perturbation.flatten(1).norm(dim=1).clamp(min=torch.finfo(perturbation.dtype).tiny)
        return gradient.mean(1, shown) + self.weight * perturbation / norms[:, None, None, None]

    def _mask(self, look: Look, images: Tensor) -> Tensor:
        """[K, N, 1, H, W]: 1 where the perturbation is shown, else 0."""
        rows, columns = images.shape[-2] // self.patch, images.shape[-1] // self.patch
        drawn = look.draws.uniform(0, (rows * columns,))
        kept = (drawn.argsort(2).argsort(2) < self.patches).to(images.dtype)
        grid = kept.reshape(*kept.shape[:2], 1, rows, columns)
        mask: Tensor = grid.repeat_interleave(self.patch, 3).repeat_interleave(self.patch, 4)
        return mask
