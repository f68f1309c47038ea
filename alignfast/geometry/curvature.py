"""Curvature of a loss at every image of a batch: the Hessian's largest eigenvalue, and how fast the gradient turns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alignfast.geometry.field import Field, Products, lengths

# Of the root mean square of what the operator gives: a Krylov space that grows by less has come to its end.
EXHAUSTED = 1e-6


@dataclass(frozen=True)
class Eigenvalues:
    """values: float64 [N], the largest of each image, by sign and not by magnitude. residuals: float64 [N],
    |H v - value v| / |value| for the vector v found. steps: products that it took."""

    values: Tensor
    residuals: Tensor
    steps: int


def largest_eigenvalues(products: Products, start: Tensor, steps: int = 20, tolerance: float = 1e-3) -> Eigenvalues:
    """The largest eigenvalue of each image's symmetric operator, by the Lanczos iteration with full reorthogonalisation
    (Lanczos, J. Res. Nat. Bur. Standards 45, 1950; Parlett, The Symmetric Eigenvalue Problem, 1980, chapter 13).

    All images iterate together until each one's residual is at most `tolerance`, and an image's value is the one with
    which it got there; at most `steps` times.

    Args:
        products: directions [N, ...] to products of the same shape.
        start: [N, ...], not zero; the eigenvector must have a part in it, as a random one has.
    """
    count = len(start)
    basis = [_unit(start.flatten(1))]
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    values = torch.zeros(count, dtype=torch.float64, device=start.device)
    residuals = torch.full_like(values, torch.inf)
    for _ in range(steps):
        image = products(basis[-1].view_as(start)).flatten(1)
        alphas.append((image * basis[-1]).sum(1).double())
        rest = _orthogonal(image, basis)
        betas.append(_norm(rest).double())
        found, left = _ritz(alphas, betas, _norm(image).double())
        open_ = residuals > tolerance
        values, residuals = torch.where(open_, found, values), torch.where(open_, left, residuals)
        if not (residuals > tolerance).any():
            break
        basis.append(_unit(rest))
    return Eigenvalues(values, residuals, len(alphas))


def lipschitz(field: Field, images: Tensor, start: Tensor, radius: float, steps: int = 5) -> Tensor:
    """[N]: a lower bound of the local Lipschitz constant of the input gradient,

        max over the points met of |g(x + d) - g(x)| / |d|, with |d| = radius sqrt(C H W) in the L2 norm,

    where each d is the last difference of gradients at that length, a power iteration on the difference quotient. For a
    quadratic it is the iteration on its matrix and tends to the largest magnitude of the eigenvalues.

    Args:
        images: [N, C, H, W], from which the points may lead out of [0, 1]. start: the first direction, of their shape.
        radius: root mean square over pixels, in units of [0, 1] images.
    """
    distance = radius * images[0].numel() ** 0.5
    here = field.gradients(images)
    direction, best = start, torch.zeros(len(images), dtype=images.dtype, device=images.device)
    for _ in range(steps):
        norms = lengths(direction)
        moved = torch.where(norms > 0, direction / norms.clamp_min(torch.finfo(images.dtype).tiny), start)
        # Where gradients do not change, the first direction is as good as any.
        moved = distance * moved / lengths(moved)
        direction = field.gradients(images + moved) - here
        best = torch.maximum(best, lengths(direction).flatten() / distance)
    return best


def _orthogonal(rows: Tensor, basis: list[Tensor]) -> Tensor:
    # Once leaves what rounding leaves of it; twice is enough (Parlett, section 6.9).
    for _ in range(2):
        for other in basis:
            rows = rows - (rows * other).sum(1, keepdim=True) * other
    return rows


def _ritz(alphas: list[Tensor], betas: list[Tensor], scale: Tensor) -> tuple[Tensor, Tensor]:
    """Largest eigenvalues [N] of the tridiagonal matrices, and their residuals relative to them."""
    diagonal = torch.stack(alphas, 1)
    matrix = torch.diag_embed(diagonal)
    if len(alphas) > 1:
        beside = torch.stack(betas[:-1], 1)
        matrix = matrix + torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)
    found, vectors = torch.linalg.eigh(matrix)
    values = found[:, -1]
    left = betas[-1] * vectors[:, -1, -1].abs()
    exhausted = betas[-1] <= EXHAUSTED * scale
    size = values.abs().clamp_min(torch.finfo(torch.float64).tiny)
    return values, torch.where(exhausted | (left == 0), 0.0, left / size)


def _norm(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms


def _unit(rows: Tensor) -> Tensor:
    """Zero where the rows are: a space that has come to its end stays as it is."""
    norms = _norm(rows).unsqueeze(1)
    return torch.where(norms > 0, rows / norms.clamp_min(torch.finfo(rows.dtype).tiny), 0.0)
