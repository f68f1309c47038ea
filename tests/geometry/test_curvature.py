"""Eigenvalues and Lipschitz constants where they are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from alignfast.geometry.curvature import largest_eigenvalues, lipschitz
from alignfast.geometry.field import field_of
from tests.geometry.networks import quadratic, smooth_network, symmetric

SHAPE = (2, 3, 4)


def start(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_a_network_against_its_dense_hessian() -> None:
    model, labels = smooth_network(), torch.tensor([0, 1, 2, 1])
    images = torch.rand(4, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = largest_eigenvalues(field_of(model, labels).hessian(images), start(4), steps=24, tolerance=1e-6)
    for row in range(4):

        def loss(flat: Tensor, row: int = row) -> Tensor:
            one = (flat.view(1, *SHAPE) - 0.5) / 0.25
            return nn.functional.cross_entropy(model.module(one), labels[row : row + 1])

        wanted = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, images[row].flatten()))[-1]
        assert float(found.values[row]) == pytest.approx(float(wanted), rel=1e-3)
        assert float(found.residuals[row]) <= 1e-6
    assert found.steps < 24


def test_float32_is_as_good_as_it_is_asked_to_be() -> None:
    model, labels = smooth_network(), torch.tensor([0, 1])
    images = torch.rand(2, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    wanted = largest_eigenvalues(field_of(model, labels).hessian(images), start(2), 24, 1e-9).values
    single = smooth_network().float()
    found = largest_eigenvalues(field_of(single, labels).hessian(images.float()), start(2).float(), 24, 1e-3)
    torch.testing.assert_close(found.values, wanted, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "values",
    [
        torch.linspace(-1, 3, 24, dtype=torch.float64),
        torch.tensor([5.0] * 3 + [0.0] * 21, dtype=torch.float64),
        torch.tensor([1.0] + [-7.0] * 23, dtype=torch.float64),
        torch.linspace(-9, -2, 24, dtype=torch.float64),
    ],
    ids=["spread", "repeated", "largest by sign", "negative"],
)
def test_known_matrices(values: Tensor) -> None:
    matrix = symmetric(values)
    found = largest_eigenvalues(lambda rows: (rows.flatten(1) @ matrix).view_as(rows), start(3), 24, 1e-8)
    torch.testing.assert_close(found.values, values.max().expand(3), rtol=1e-6, atol=1e-9)


def test_nothing_is_exact_after_one_product() -> None:
    found = largest_eigenvalues(torch.zeros_like, start(2))
    assert (found.values.tolist(), found.residuals.tolist(), found.steps) == ([0.0, 0.0], [0.0, 0.0], 1)


def test_what_has_not_converged_says_so() -> None:
    matrix = symmetric(torch.linspace(0.9, 1, 24, dtype=torch.float64))
    found = largest_eigenvalues(lambda rows: (rows.flatten(1) @ matrix).view_as(rows), start(2), 2, 1e-6)
    assert (found.residuals > 1e-6).all()
    assert found.steps == 2


def test_images_do_not_change_each_other() -> None:
    """One converges at once, the other not, and has the value that it has alone."""
    scales = torch.tensor([0.0, 1.0], dtype=torch.float64)[:, None]
    matrix = symmetric(torch.linspace(-1, 3, 24, dtype=torch.float64))
    both = largest_eigenvalues(lambda rows: (scales * (rows.flatten(1) @ matrix)).view_as(rows), start(2), 24, 1e-9)
    alone = largest_eigenvalues(lambda rows: (rows.flatten(1) @ matrix).view_as(rows), start(2)[1:], 24, 1e-9)
    assert float(both.values[0]) == 0.0
    assert float(both.values[1]) == pytest.approx(float(alone.values[0]), rel=1e-12)


def test_lipschitz_of_a_quadratic_is_the_largest_magnitude() -> None:
    matrix = symmetric(torch.tensor([-4.0] + [0.1] * 23, dtype=torch.float64))
    loss = quadratic(torch.ones(24, dtype=torch.float64), matrix)
    images = torch.rand(2, *SHAPE, dtype=torch.float64)
    few, many = (lipschitz(loss, images, start(2), 0.01, steps) for steps in (1, 8))
    torch.testing.assert_close(many, torch.full((2,), 4.0, dtype=torch.float64), rtol=1e-8, atol=0)
    assert (few < many).all()


def test_lipschitz_does_not_depend_on_the_radius_of_a_quadratic() -> None:
    matrix = symmetric(torch.linspace(0, 2, 24, dtype=torch.float64))
    loss = quadratic(torch.zeros(24, dtype=torch.float64), matrix)
    images = torch.rand(2, *SHAPE, dtype=torch.float64)
    near, far = (lipschitz(loss, images, start(2), radius, 3) for radius in (1e-3, 1e-1))
    torch.testing.assert_close(near, far, rtol=1e-8, atol=0)


def test_lipschitz_of_a_line_is_zero() -> None:
    loss = quadratic(torch.ones(24, dtype=torch.float64), torch.zeros(24, 24, dtype=torch.float64))
    assert lipschitz(loss, torch.rand(2, *SHAPE, dtype=torch.float64), start(2), 0.1).tolist() == [0.0, 0.0]
