"""Losses of several models in one plane through an image, and pictures of what attacks do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alignfast.geometry.field import field_of, lengths
from alignfast.geometry.points import PLANE, random_direction
from alignfast.geometry.result import Example, Surface
from alignfast.models import Classifier


def surface(
    models: Mapping[str, Classifier],
    along: str,
    image: Tensor,
    adversarial: Tensor,
    label: Tensor,
    index: Tensor,
    grid: int,
    reach: float,
    seed: int,
) -> Surface:
    """The loss of each model over `grid` times `grid` points, at most `reach` from the image along each direction.

    Args:
        image, adversarial: [1, C, H, W]; x is the direction from one to the other, scaled to an L-inf norm of 1, y a
            random one orthogonal to it, of the same L2 norm. Where they are equal, x is random too.
        label, index: int64 [1].
    """
    first = adversarial - image
    if not first.any():
        first = random_direction(image, index, seed)
    first = first / first.abs().max()
    second = random_direction(image, index, seed, PLANE)
    second = second - first * (first * second).sum() / first.square().sum()
    second = second * lengths(first) / lengths(second)
    ticks = torch.linspace(-reach, reach, grid, dtype=image.dtype, device=image.device)
    row = image + ticks[:, None, None, None] * first
    fields = {name: field_of(model, label.expand(grid)) for name, model in models.items()}
    losses = {
        name: torch.stack([field.values(row + height * second) for height in ticks]) for name, field in fields.items()
    }
    axis = ticks.double().cpu().numpy()
    return Surface(
        index=int(index),
        along=along,
        x=axis,
        y=axis,
        loss={name: values.double().cpu().numpy() for name, values in losses.items()},
    )


def examples(
    count: int, images: Tensor, adversarial: Mapping[str, Tensor], labels: Tensor, indices: Tensor
) -> Sequence[Example]:
    """The first `count` images, and what each attack made of them."""
    levels = {name: _pixels(each[:count]) for name, each in adversarial.items()}
    return [
        Example(int(index), int(label), clean, {name: each[row] for name, each in levels.items()})
        for row, (clean, label, index) in enumerate(zip(_pixels(images[:count]), labels, indices, strict=False))
    ]


def _pixels(images: Tensor) -> NDArray[np.uint8]:
    """uint8 [N, H, W, C]."""
    levels: NDArray[np.uint8] = (255 * images).round().to(torch.uint8).movedim(1, -1).cpu().numpy()
    return levels
