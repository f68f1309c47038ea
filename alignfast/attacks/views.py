"""What an attack shows the model, described first and built in one op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alignfast.draws import Draws
from alignfast.ops import Mixing, ResizePad, diversify

# The order in which `diversify` applies them.
PARTS = ("mixing", "scale", "resize_pad")


@dataclass(frozen=True)
class Views:
    """K views of each of N images, as what is still to be done to them.

    images: [K N, C, H, W], view k of image n in row k N + n. scale and the tensors of mixing and resize_pad: [K, N].
    """

    images: Tensor
    mixing: Mixing | None = None
    scale: Tensor | None = None
    resize_pad: ResizePad | None = None

    def with_noise(self, radius: float, draws: Draws) -> Views:
        """Uniform noise in [-radius, radius) on every element."""
        return self.apply(
            lambda rows: rows + draws.uniform(shape=tuple(rows.shape[1:]), low=-radius, high=radius).flatten(0, 1)
        )

    def with_mixing(self, mixing: Mixing) -> Views:
        return replace(self._ready_for("mixing"), mixing=mixing)

    def with_scale(self, scale: Tensor) -> Views:
        # Scaling and resize-and-pad are linear and commute, so a pending geometry is no obstacle.
        views = self if self.scale is None else self.build()
        return replace(views, scale=scale)

    def with_resize_pad(self, resize_pad: ResizePad) -> Views:
        return replace(self._ready_for("resize_pad"), resize_pad=resize_pad)

    def apply(self, change: Callable[[Tensor], Tensor]) -> Views:
        """Any differentiable change of the rows [K N, C, H, W], after all that is still to be done."""
        return Views(change(self.build().images))

    def build(self) -> Views:
        """The same views with nothing left to be done to them."""
        return self if all(getattr(self, part) is None for part in PARTS) else Views(self.render())

    def render(
        self,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        dtype: torch.dtype | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Tensor:
        """[K N, C, H, W] in row order k N + n, normalised by (mean, std) if given."""
        mixing, geometry = self.mixing, self.resize_pad
        return diversify(
            self.images,
            mixing=mixing
            and replace(mixing, partner=mixing.partner.reshape(1, -1), weight=mixing.weight.reshape(1, -1)),
            scale=None if self.scale is None else self.scale.reshape(1, -1),
            resize_pad=geometry
            and replace(
                geometry,
                resized=geometry.resized.reshape(1, -1),
                top=geometry.top.reshape(1, -1),
                left=geometry.left.reshape(1, -1),
            ),
            mean=mean,
            std=std,
            dtype=dtype,
            memory_format=memory_format,
        )

    def _ready_for(self, part: str) -> Views:
        """These views where `part` and all that `diversify` does after it are free, else the built ones."""
        pending = PARTS[PARTS.index(part) :]
        return self if all(getattr(self, name) is None for name in pending) else self.build()
