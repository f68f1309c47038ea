"""Several classifiers as one source."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from alignfast.checks import check_choice
from alignfast.draws import Draws
from alignfast.models.classifier import Classifier, Render, as_classifier

Combine = Literal["logits", "probabilities", "losses"]


class Ensemble(Classifier):
    """Attacks the mean of the members' logits, of their probabilities, or of their losses (Liu et al., ICLR 2017;
    Dong et al., CVPR 2018, section 3.2).

    As a classifier it returns mean logits for "logits", and else log mean probabilities.

    Args:
        members: at least one model; they must agree in number of classes and input size.

    Raises:
        ValueError: no member, members that do not agree, or an unknown `combine`.
    """

    def __init__(self, members: Sequence[nn.Module], combine: Combine = "logits") -> None:
        check_choice("combine", combine, ("logits", "probabilities", "losses"))
        models = [as_classifier(member) for member in members]
        if not models:
            raise ValueError("members: got none; allowed is at least one model")
        for name in ("num_classes", "input_size"):
            values = {getattr(model, name) for model in models} - {None}
            if len(values) > 1:
                raise ValueError(f"members: their {name} differ: {sorted(values)}; allowed is one for all")
        super().__init__(
            nn.ModuleList(models),
            num_classes=next((m.num_classes for m in models if m.num_classes is not None), None),
            input_size=next((m.input_size for m in models if m.input_size is not None), None),
        )
        self.combine = combine

    @property
    def members(self) -> list[Classifier]:
        return [module for module in self.module.children() if isinstance(module, Classifier)]

    def logits_of(self, render: Render, draws: Draws | None = None) -> Tensor:
        logits = self._stack(render, draws)
        if self.combine == "logits":
            return logits.mean(0)
        return torch.logsumexp(logits.log_softmax(-1), 0) - math.log(len(logits))

    def heads(self, render: Render, draws: Draws | None = None) -> Tensor:
        return self._stack(render, draws) if self.combine == "losses" else self.logits_of(render, draws)[None]

    def compute_in(self, dtype: torch.dtype) -> None:
        for member in self.members:
            member.compute_in(dtype)

    def check_shape(self, images: Tensor) -> None:
        for member in self.members:
            member.check_shape(images)

    def _stack(self, render: Render, draws: Draws | None) -> Tensor:
        logits = [member.logits_of(render, draws) for member in self.members]
        classes = [one.shape[-1] for one in logits]
        if len(set(classes)) > 1:
            # Members that do not say how many classes they have show it here.
            raise ValueError(f"members: their numbers of classes differ: {classes}; allowed is one for all")
        return torch.stack(logits)
