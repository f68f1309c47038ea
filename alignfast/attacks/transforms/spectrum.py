"""Transforms of an image's frequencies."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from alignfast.attacks.dct import waves
from alignfast.attacks.transforms.transform import Transform
from alignfast.attacks.views import Views
from alignfast.checks import check_count, check_number
from alignfast.draws import Draws

__all__ = ["SpectrumMask"]


@dataclass(frozen=True)
class SpectrumMask(Transform):
    """The spectrum transformation of SSA (Long et al., ECCV 2022): IDCT(DCT(x + xi) * M).

    xi is drawn from N(0, sigma^2), every element of M uniformly from [1 - rho, 1 + rho), and DCT is the orthonormal
    DCT-II of rows and columns. The gradient is that of x, as in the paper; the authors' code and TransferAttack take
    that of the transformed image.

    rho: in [0, 1]. sigma: in units of [0, 1] images, which the paper has at its eps. copies: of an image.

    Raises:
        ValueError: a number outside its range.
    """

    copies: int = 20
    rho: float = 0.5
    sigma: float = 16 / 255

    def __post_init__(self) -> None:
        check_count("copies", self.copies)
        check_number("rho", self.rho, low=0.0, high=1.0)
        check_number("sigma", self.sigma, low=0.0)

    def view(self, views: Views, which: Tensor, draws: Draws) -> Views:
        shape = tuple(views.images.shape[1:])
        noise = self.sigma * draws.normal(0, shape).flatten(0, 1).to(views.images.dtype)
        mask = draws.uniform(2, shape, 1 - self.rho, 1 + self.rho).flatten(0, 1)
        # With four dimensions each, so that every plane is multiplied on its own whatever the number of rows.
        down, along = (waves(size, noise.device).to(noise.dtype)[None, None] for size in shape[1:])
        return views.apply(lambda rows: down.mT @ (down @ (rows + noise) @ along.mT * mask) @ along)
