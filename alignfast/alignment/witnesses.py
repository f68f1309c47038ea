"""Passes of the witnesses: no gradient, no batch normalisation, in a layout and precision of their own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from alignfast.alignment.cache import WitnessCache
from alignfast.checks import check_choice
from alignfast.models import Classifier, fit_size
from alignfast.models.folding import folded
from alignfast.models.preparation import DTYPES, Fusions, form_in, fusions_in, shaped


class Witnesses:
    """Frozen copies of classifiers in evaluation mode, made for many passes without a gradient.

    Their batch normalisations are folded, and convolutional ones compute in channels-last layout.

    Args:
        models: at least one; not changed, and later changes of theirs do not show here.
        precision: "fp32", "bf16" or "fp16", in which weights are kept and passes computed, also under autocast.
        example: images [N, C, H, W] in [0, 1] on the models' device, on which the folding is verified; None for none.
        cache: logits that are there are read and others stored, by data-set index, where `logits` is given indices.

    Raises:
        ValueError: no model, an unknown precision, or a cache of another number of witnesses.
    """

    def __init__(
        self,
        models: Sequence[Classifier],
        *,
        precision: Literal["fp32", "bf16", "fp16"] = "fp32",
        example: Tensor | None = None,
        cache: WitnessCache | None = None,
    ) -> None:
        check_choice("precision", precision, DTYPES)
        if not models:
            raise ValueError("models: got none; allowed is at least one")
        if cache is not None and cache.shape[0] != len(models):
            raise ValueError(f"cache: is of {cache.shape[0]} witnesses; allowed is one of {len(models)}")
        self.cache = cache
        self.models = [_ready(model, DTYPES[precision], example) for model in models]

    def __len__(self) -> int:
        return len(self.models)

    def logits(self, images: Tensor, indices: Tensor | None = None) -> Tensor:
        """float32 logits [W, N, C] of images [N, C, H, W] in [0, 1], without a gradient, on the images' device.

        Witnesses of another input size are given the images resized.

        Args:
            images: on the witnesses' device.
            indices: int64 [N] data-set indices of the images, for the cache, which is not asked without them. A batch
                of which a row is missing is computed; rows that are there keep their values.

        Raises:
            ValueError: witnesses of different classes, or indices or logits that do not fit the cache.
        """
        if self.cache is None or indices is None:
            return self._computed(images)
        if not self.cache.has(indices):
            self.cache.store(indices, self._computed(images))
        return self.cache.read(indices).to(images.device)

    def _computed(self, images: Tensor) -> Tensor:
        fitted: dict[tuple[int, ...] | None, Tensor] = {}
        # Not in inference mode, whose results autograd refuses to keep.
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            for model in self.models:
                if model.input_size not in fitted:
                    fitted[model.input_size] = fit_size(images, model)
            taught = [model.logits(fitted[model.input_size]).float() for model in self.models]
        classes = [one.shape[-1] for one in taught]
        if len(set(classes)) > 1:
            raise ValueError(f"witnesses: their numbers of classes differ: {classes}; allowed is one for all")
        return torch.stack(taught)


def _ready(model: Classifier, dtype: torch.dtype, example: Tensor | None) -> Classifier:
    if example is None:
        frozen = copy.deepcopy(model).eval().requires_grad_(False)
        return shaped(frozen, form_in(frozen, dtype), Fusions())
    frozen = folded(model, example)
    return shaped(frozen, form_in(frozen, dtype), fusions_in(frozen, example))
