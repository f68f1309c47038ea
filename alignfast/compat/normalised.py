"""A classifier as other packages expect a model: a module of plain PyTorch that takes images in [0, 1]."""

from __future__ import annotations

from torch import Tensor, nn

from alignfast.models import Classifier


class Normalised(nn.Module):
    """A classifier's network behind (images - mean) / std, written as people write it; shares the weights."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        assert model.mean is not None
        assert model.std is not None
        self.network = model.module
        self.register_buffer("mean", model.mean[:, None, None])
        self.register_buffer("std", model.std[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network((images - self.mean) / self.std)
        return logits
