"""Thin-plate splines: smooth warps of images by what they do to a few points."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from alignfast.attacks.transforms.sampling import interpolate


def warp(rows: Tensor, offsets: Tensor) -> Tensor:
    """Rows [B, C, H, W] by the thin-plate spline that moves the inner points of a mesh by `offsets`; elsewhere 0.

    The mesh has n x n points evenly over the image, whose corners are (-1, -1) and (1, 1). The spline f has the least
    bending among those with f(x_i) = x_i + offset_i and no offset on the rim (Bookstein, 1989), and the result has at
    p what the image has at f(p), bilinear. (TransferAttack's grid is half a pixel wider on each side, so that no offset
    is not no change.)

    offsets: [B, (n - 2)^2, 2], vertical and horizontal, of inner points in row order; differentiable.
    """
    height, width = rows.shape[-2:]
    y, x = (torch.arange(size, dtype=rows.dtype, device=rows.device) for size in (height, width))
    y, x = y[:, None].expand(height, width), x.expand(height, width)
    basis = _basis(round(offsets.shape[1] ** 0.5) + 2, _even(y, height), _even(x, width))
    moved = (offsets[..., None, None] * basis[:, None]).sum(1)
    return interpolate(rows, y + moved[:, 0] * ((height - 1) / 2), x + moved[:, 1] * ((width - 1) / 2))


def _even(pixel: Tensor, size: int) -> Tensor:
    """From -1 at the first pixel to 1 at the last."""
    return (2 * pixel - (size - 1)) / max(size - 1, 1)


def _basis(mesh: int, y: Tensor, x: Tensor) -> Tensor:
    """[(mesh - 2)^2, H, W]: how far a point goes where one inner point goes by 1 and the others stay."""
    waves = [torch.ones_like(y), y, x]
    for at_y, at_x in _points(mesh):
        square = (y - at_y) ** 2 + (x - at_x) ** 2
        waves.append(torch.xlogy(square, square))
    return torch.stack([sum((f * w for f, w in zip(line, waves, strict=True)), 0 * y) for line in _factors(mesh)])


@lru_cache(maxsize=8)
def _factors(mesh: int) -> list[list[float]]:
    """Of every inner point, the factors of 1, y, x and r^2 log r^2 around each point.

    They depend on nothing but the mesh, so they are found on the host, once.
    """
    points = np.array(_points(mesh))
    square = ((points[:, None] - points) ** 2).sum(2)
    radial = square * np.log(np.where(square == 0, 1, square))
    plane = np.concatenate([np.ones((len(points), 1)), points], 1)
    system = np.block([[plane, radial], [np.zeros((3, 3)), plane.T]])
    inner = [i for i, point in enumerate(_points(mesh)) if max(map(abs, point)) < 1]
    factors: list[list[float]] = np.linalg.inv(system)[:, inner].T.tolist()
    return factors


def _points(mesh: int) -> list[tuple[float, float]]:
    line = [2 * i / (mesh - 1) - 1 for i in range(mesh)]
    return [(y, x) for y in line for x in line]
