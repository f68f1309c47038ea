"""Bare passes of a prepared model beside those of the model as it was loaded, in float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from alignfast.models import Classifier, prepare

from .networks import captured, classifier, flops_of, input_gradient, tf32
from .runs import PRECISIONS, TOLERATED_SHARE, Shape, turned_in_bf16
from .subject import Call, Cost
from .work import uniform


def preparation(shape: Shape, dtype: torch.dtype, device: torch.device, *, network: str) -> PreparationRun:
    return PreparationRun(network, shape, dtype, device)


@dataclass(frozen=True)
class PreparationRun:
    """Sides: "ours", a forward pass and the gradient of its input on the prepared model; "as loaded", the same on the
    model in float32. On CUDA each is one graph."""

    network: str
    shape: Shape
    dtype: torch.dtype
    device: torch.device

    @property
    def cost(self) -> Cost:
        return Cost(flops=self.shape[0] * flops_of(self.network, self.shape[1:], "input gradient"))

    def sides(self) -> dict[str, Call]:
        return {side: captured(self._pass(model), self.device) for side, model in self._models.items()}

    def prepare(self, *, compiled: bool) -> tuple[dict[str, Call], str | None]:
        return self.sides(), self._fault()

    def _pass(self, model: Classifier) -> Callable[[], Tensor]:
        return input_gradient(model, self._images, self._labels)

    def _fault(self) -> str | None:
        """The gradients have the signs of those in float32, up to rounding."""
        ours, loaded = self._models.values()
        with tf32(False):
            wanted = self._pass(loaded)()
            share = _turned(self._pass(ours)(), wanted)
        tolerated = TOLERATED_SHARE
        if self.dtype == torch.bfloat16:
            with torch.autocast(self.device.type, torch.bfloat16):
                tolerated = turned_in_bf16(_turned(self._pass(loaded)(), wanted))
        # Written so that NaN is a fault too.
        if not share <= tolerated:
            return f"ours: {share:.2%} of the gradient's signs are others than as loaded, allowed are {tolerated:.0%}"
        return None

    @cached_property
    def _models(self) -> dict[str, Classifier]:
        model = classifier(self.network, self.shape[1:], self.device)
        return {"ours": prepare(model, self._images, PRECISIONS[self.dtype]), "as loaded": model}

    @cached_property
    def _images(self) -> Tensor:
        return uniform(self.shape, 1, device=self.device)

    @cached_property
    def _labels(self) -> Tensor:
        return torch.zeros(self.shape[0], dtype=torch.int64, device=self.device)


def _turned(gradient: Tensor, wanted: Tensor) -> float:
    if not bool(gradient.isfinite().all()):
        return math.nan
    return float((gradient.sign() != wanted.sign()).double().mean())
