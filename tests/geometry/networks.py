"""Tiny networks and losses whose geometry is known."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import alignfast as af
from alignfast.geometry.field import Field


def smooth_network(seed: int = 0) -> af.Classifier:
    """Three classes of images [2, 3, 4], float64, with normalisation and curved everywhere."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = nn.Sequential(
            nn.Conv2d(2, 5, 3, padding=1), nn.Softplus(), nn.Flatten(), nn.Linear(60, 8), nn.GELU(), nn.Linear(8, 3)
        )
    for parameter in module.parameters():
        parameter.data.mul_(2)
    return af.Classifier(module, (0.5, 0.5), (0.25, 0.25), 3).double().eval().requires_grad_(False)


def quadratic(slope: Tensor, matrix: Tensor) -> Field:
    """L(x) = slope x + x matrix x / 2 for every image, which is flattened; its Hessian is `matrix`."""

    def value(images: Tensor) -> Tensor:
        rows = images.flatten(1)
        return rows @ slope + ((rows @ matrix) * rows).sum(1) / 2

    return Field(value)


def symmetric(values: Tensor, seed: int = 0) -> Tensor:
    """A dense float64 matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    count = len(values)
    vectors, _ = torch.linalg.qr(torch.randn(count, count, dtype=torch.float64, generator=generator))
    return vectors @ torch.diag(values) @ vectors.T
