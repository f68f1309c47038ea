"""Rises, profiles and straightness of losses with known answers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alignfast.geometry.flatness import mean_rise, nonlinearity, profile, worst_rise
from tests.geometry.networks import quadratic

RADIUS = 0.1
SLOPE = torch.tensor([1.0, -2.0, 0.5, 0.25], dtype=torch.float64)
BENT = torch.tensor([3.0, 1.0, 0.0, 2.0], dtype=torch.float64)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def slopes(images: Tensor) -> Tensor:
    """Gradients of the quadratic with the diagonal `BENT`."""
    return SLOPE + BENT * images.flatten(1)


def test_the_worst_rise_of_a_bowl_is_at_a_corner(images: Tensor) -> None:
    """With a diagonal Hessian that is nowhere negative: sum of |g| r + h r^2 / 2."""
    wanted = (slopes(images).abs() * RADIUS + BENT * RADIUS**2 / 2).sum(1)
    torch.testing.assert_close(worst_rise(quadratic(SLOPE, torch.diag(BENT)), images, RADIUS), wanted)


def test_the_worst_rise_of_a_hill_is_inside() -> None:
    """At the top, 0.05 away, and not at the corner, where the loss is as low as at the start."""
    hill = quadratic(torch.full((4,), 1.0, dtype=torch.float64), -20 * torch.eye(4, dtype=torch.float64))
    found = worst_rise(hill, torch.zeros(1, 1, 2, 2, dtype=torch.float64), RADIUS, steps=4)
    assert float(found) == pytest.approx(4 * (0.05 - 10 * 0.05**2))


def test_nothing_rises_at_a_peak() -> None:
    peak = quadratic(torch.zeros(4, dtype=torch.float64), -torch.eye(4, dtype=torch.float64))
    assert float(worst_rise(peak, torch.zeros(1, 1, 2, 2, dtype=torch.float64), RADIUS)) == 0.0


def test_the_mean_rise_of_a_quadratic(images: Tensor) -> None:
    """E[g d + h d^2 / 2] = h r^2 / 6 for uniform d; the same by the very draws."""
    half = RADIUS * (
        2 * torch.rand(4000, 3, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) - 1
    )
    # Both signs of each draw, so that the slope adds nothing.
    noise = torch.cat([half, -half])
    found = mean_rise(quadratic(SLOPE, torch.diag(BENT)), images, noise)
    drawn = (slopes(images) * noise.flatten(2) + BENT * noise.flatten(2) ** 2 / 2).sum(2).mean(0)
    torch.testing.assert_close(found, drawn)
    torch.testing.assert_close(found, (BENT.sum() * RADIUS**2 / 6).expand(3), rtol=0.05, atol=0)


def test_a_profile_follows_the_sign_of_the_gradient(images: Tensor) -> None:
    distances = torch.tensor([-0.1, 0.0, 0.05], dtype=torch.float64)
    loss = quadratic(SLOPE, torch.diag(BENT))
    found = profile(loss, images, distances)
    wanted = loss.values(images)[:, None] + slopes(images).abs().sum(1, keepdim=True) * distances
    torch.testing.assert_close(found, wanted + BENT.sum() * distances**2 / 2)


def test_nonlinearity_of_a_quadratic(images: Tensor) -> None:
    bend, line = BENT.sum() * RADIUS**2 / 2, slopes(images).abs().sum(1) * RADIUS
    loss = quadratic(SLOPE, torch.diag(BENT))
    torch.testing.assert_close(nonlinearity(loss, images, RADIUS), bend / (bend + line))
    # Downwards, where the linear model promises more than there is.
    hill = quadratic(SLOPE, -torch.diag(BENT))
    line = (SLOPE - BENT * images.flatten(1)).abs().sum(1) * RADIUS
    torch.testing.assert_close(nonlinearity(hill, images, RADIUS), bend / line)


def test_a_line_is_straight(images: Tensor) -> None:
    found = nonlinearity(quadratic(SLOPE, torch.zeros(4, 4, dtype=torch.float64)), images, RADIUS)
    assert float(found.max()) < 1e-12


def test_without_a_gradient_there_is_no_line() -> None:
    flat = quadratic(torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64))
    assert nonlinearity(flat, torch.zeros(1, 1, 2, 2, dtype=torch.float64), RADIUS).isnan().all()
