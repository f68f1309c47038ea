"""Several attacks on the same images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alignfast.compat.torchattacks.attack import Attack

__all__ = ["MultiAttack"]


class MultiAttack(Attack):
    """Each attack is run on the images that none before it has made the model get wrong.

    Raises:
        ValueError: fewer than two attacks, or attacks on different models.
    """

    def __init__(self, attacks: Sequence[Attack], verbose: bool = False) -> None:
        super().__init__("MultiAttack", attacks[0].model)
        self.attacks = attacks
        self.verbose = verbose
        self.supported_mode = ["default"]
        self.check_validity()
        # How many images were there, and left after each attack; those of all calls while they are summed.
        self._records: list[int] | None = None

    def check_validity(self) -> None:
        if len(self.attacks) < 2:
            raise ValueError("More than two attacks should be given.")
        if len({id(attack.model) for attack in self.attacks}) != 1:
            raise ValueError("At least one of attacks is referencing a different model.")

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        result, labels = self._moved(images).detach().clone(), self._moved(labels)
        left = torch.arange(len(images), device=result.device)
        images, records = result.clone(), [len(images)]
        for attack in self.attacks:
            adv = attack(images[left], labels[left])
            with torch.no_grad():
                right = self.get_logits(adv).max(1).indices == labels[left]
            result[left[~right]] = adv[~right]
            left = left[right]
            records.append(len(left))
            if len(left) == 0:
                break
        records += [0] * (1 + len(self.attacks) - len(records))
        if self._records is not None:
            self._records = [total + now for total, now in zip(self._records, records, strict=True)]
        elif self.verbose:
            print(_rates_text(records))
        return result

    def save(  # type: ignore[override]
        self,
        data_loader: Any,
        save_path: str | os.PathLike[str] | None = None,
        verbose: bool = True,
        return_verbose: bool = False,
        save_predictions: bool = False,
        save_clean_images: bool = False,
    ) -> Any:
        """As `Attack.save`; return_verbose gives robust accuracy, the success rates of the attacks so far in percent,
        the mean L2 distance and the seconds of the last batch."""
        self._records = [0] * (1 + len(self.attacks))
        try:
            told = super().save(data_loader, save_path, verbose, return_verbose, save_predictions, save_clean_images)
            return (told[0], _rates(self._records), *told[1:]) if return_verbose else None
        finally:
            self._records = None

    def _save_print(self, progress: float, rob_acc: float, l2: float, elapsed_time: float, end: str) -> None:
        assert self._records is not None
        print(
            f"- Save progress: {progress:2.2f} % / Robust accuracy: {rob_acc:2.2f} % / {_rates_text(self._records)} / "
            f"L2: {l2:1.5f} ({elapsed_time:2.3f} it/s) \t",
            end=end,
        )


def _rates(records: Sequence[int]) -> list[float]:
    return [(1 - left / records[0]) * 100 for left in records[1:]]


def _rates_text(records: Sequence[int]) -> str:
    return "Attack success rate: " + " | ".join(f"{rate:2.2f} %" for rate in _rates(records))
