"""AutoAttack: APGD, APGDT, FAB and Square one after another."""

from __future__ import annotations

import time
from typing import Literal

from torch import Tensor, nn

from alignfast.checks import check_choice
from alignfast.compat.torchattacks.attack import Attack
from alignfast.compat.torchattacks.auto import APGD, APGDT
from alignfast.compat.torchattacks.fab import FAB
from alignfast.compat.torchattacks.multi import MultiAttack
from alignfast.compat.torchattacks.square import Square

__all__ = ["AutoAttack"]


class AutoAttack(Attack):
    """Each attack on what those before it left (Croce and Hein, ICML 2020), as torchattacks runs them: APGD, APGDT and
    FAB for 10 steps. norm: "Linf" or "L2"; version: "standard", "plus" or "rand"; seed: None for the time.

    Raises:
        ValueError: an unknown version; when called, an unknown norm, or more classes than the model has.
    """

    def __init__(
        self,
        model: nn.Module,
        norm: Literal["Linf", "L2"] = "Linf",
        eps: float = 8 / 255,
        version: str = "standard",
        n_classes: int = 10,
        seed: int | None = None,
        verbose: bool = False,
    ) -> None:
        super().__init__("AutoAttack", model)
        self.norm = norm
        self.eps = eps
        self.version = check_choice("version", version, ("standard", "plus", "rand"))
        self.n_classes = n_classes
        self.seed = seed
        self.verbose = verbose
        self.supported_mode = ["default"]
        self._autoattack = MultiAttack(self._attacks())

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return self._autoattack(images, labels)

    def _attacks(self) -> list[Attack]:
        seed = int(time.time()) if self.seed is None else self.seed

        def apgd(loss: str, n_restarts: int = 1, eot_iter: int = 1) -> Attack:
            return APGD(self.model, self.norm, self.eps, 10, n_restarts, seed, loss, eot_iter, verbose=self.verbose)

        def fab(multi_targeted: bool, n_restarts: int = 1) -> Attack:
            return FAB(
                *(self.model, self.norm, self.eps),
                n_restarts=n_restarts,
                verbose=self.verbose,
                seed=seed,
                multi_targeted=multi_targeted,
                n_classes=self.n_classes,
            )

        apgdt = APGDT(self.model, self.norm, self.eps, seed=seed, verbose=self.verbose, n_classes=self.n_classes)
        square = Square(self.model, self.norm, self.eps, seed=seed, verbose=self.verbose)
        if self.version == "standard":
            return [apgd("ce"), apgdt, fab(True), square]
        if self.version == "plus":
            return [apgd("ce", 5), apgd("dlr", 5), fab(False, 5), square, apgdt, fab(True)]
        return [apgd("ce", eot_iter=20), apgd("dlr", eot_iter=20)]
