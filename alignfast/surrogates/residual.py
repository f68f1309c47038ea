"""Surgery on residual branches and skip connections."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from alignfast.checks import check_number
from alignfast.draws import Draws
from alignfast.surrogates.structure import KNOWN, ConvBlock, conv_blocks, residual_branches
from alignfast.surrogates.surrogate import Surgery, on_gradients, on_outputs, removing

__all__ = ["GhostSkips", "SkipGradient"]


@dataclass(frozen=True)
class SkipGradient(Surgery):
    """SGM (Wu et al., ICLR 2020): with z' = z + f(z) in every block, dz'/dz is taken for 1 + gamma df/dz.

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


@dataclass(frozen=True)
class GhostSkips(Surgery):
    """Ghost networks, skip connection erosion (Li et al., AAAI 2020): z' = lambda z + f(z) in every residual
    block, lambda ~ U[1 - radius, 1 + radius).

    Every block, image and copy draws its own lambda in every pass (the authors' code and TransferAttack draw one a
    channel, for the whole batch). Without draws, outside an attack, lambda is 1.

    Args:
        radius: in [0, 1]. The paper has 0.22 for ResNet-50, 0.16 for ResNet-101 and 0.12 for ResNet-152.

    Raises:
        ValueError: radius out of its range; in `check`, a model without a residual block of convolutions.
    """

    radius: float = 0.22

    def __post_init__(self) -> None:
        check_number("radius", self.radius, low=0.0, high=1.0)

    def fits(self, module: nn.Module) -> bool:
        """Whether there is a residual block of convolutions in `module`."""
        return bool(_with_skips(module))

    def check(self, module: nn.Module) -> None:
        if not self.fits(module):
            raise ValueError(
                f"source: {type(module).__name__} has no skip connection that is known; allowed are residual blocks "
                "with conv1 and conv2 (ResNets of timm, torchvision and for CIFAR)"
            )

    @contextmanager
    def operating(self, module: nn.Module, draws: Draws | None) -> Iterator[None]:
        blocks = _with_skips(module)
        with ExitStack() as stack:
            if draws is not None:
                factors = draws.uniform(0, (len(blocks),), 1 - self.radius, 1 + self.radius)
                for block, of_rows in zip(blocks, factors.flatten(0, 1).unbind(1), strict=True):
                    stack.enter_context(_scaled_skip(block, of_rows))
            yield


def _with_skips(module: nn.Module) -> list[ConvBlock]:
    return [block for block in conv_blocks(module) if not block.dense]


@contextmanager
def _scaled_skip(block: ConvBlock, factors: Tensor) -> Iterator[None]:
    """The block is given its input times `factors`, [B], and every layer of it that would be given the same is given
    the input itself; so what the block does with its input without a layer is scaled. Layers that lead around the
    branch have their output scaled instead."""
    # One after another through the block: the input, and what the block has instead of it.
    passing: list[Tensor] = []

    def scaled(tensor: Tensor) -> Tensor:
        return tensor * factors.to(tensor.dtype).reshape(-1, *[1] * (tensor.ndim - 1))

    def enter(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        passing[:] = [inputs[0], scaled(inputs[0])]
        return (passing[1], *inputs[1:])

    def restore(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (passing[0], *inputs[1:]) if inputs and inputs[0] is passing[1] else None

    handles: list[Any] = [block.block.register_forward_pre_hook(enter)]
    handles += [layer.register_forward_pre_hook(restore, prepend=True) for layer in block.block.children()]
    with removing(handles), on_outputs(block.skips, scaled):
        yield
