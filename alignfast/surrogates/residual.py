"""Surgery on residual branches and skip connections."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import nn

from alignfast.checks import check_number
from alignfast.draws import Draws
from alignfast.surrogates.structure import KNOWN, residual_branches
from alignfast.surrogates.surrogate import Surgery, on_gradients

__all__ = ["SkipGradient"]


@dataclass(frozen=True)
class SkipGradient(Surgery):
    """SGM (Wu et al., ICLR 2020, eq. 5): with z' = z + f(z) in every block, dz'/dz is taken for 1 + gamma df/dz.

    The forward pass stays the same to the bit. Every residual branch counts, also beside a shortcut with weights, both
    branches of a transformer block, and the layers of a DenseNet. The authors' code (and TransferAttack's) spreads
    gamma over the ReLUs, leaves out the first block of a stage and divides gradients by their deviation.

    Args:
        gamma: in [0, 1]. The paper has 0.2 for ResNet-152 and 0.5 for DenseNet-201.

    Raises:
        ValueError: gamma out of its range; in `check`, a model without a residual branch that is known.
    """

    gamma: float = 0.5

    def __post_init__(self) -> None:
        check_number("gamma", self.gamma, low=0.0, high=1.0)

    def check(self, module: nn.Module) -> None:
        if not residual_branches(module):
            raise ValueError(
                f"source: {type(module).__name__} has no residual branch that is known; allowed are {KNOWN}"
            )

    def operating(self, module: nn.Module, draws: Draws | None) -> AbstractContextManager[None]:
        return on_gradients(residual_branches(module), lambda grad: grad * self.gamma)
