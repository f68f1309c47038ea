"""The copies of a batch that an attack shows the model, described first and built in one op."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from alignfast.attacks.draws import Draws
from alignfast.ops import Mixing, Noise, ResizePad, diversify

# The order in which `diversify` applies them.
PARTS = ("noise", "mixing", "scale", "resize_pad")


@dataclass(frozen=True)
class Views:
    """K views of each of N images, as what is still to be done to them.

    images: [N, C, H, W], or [K N, C, H, W] once the views are built, copy k of image n in row k N + n.
    scale and the tensors of mixing and resize_pad: [K, N].
    """

    images: Tensor
    copies: int
    built: bool = False
    noise: Noise | None = None
    mixing: Mixing | None = None
    scale: Tensor | None = None
    resize_pad: ResizePad | None = None

    def with_noise(self, radius: float, draws: Draws) -> Views:
        """Uniform noise in [-radius, radius) on every element."""
        views = self._ready_for("noise")
        if views.built:
            noise = draws.uniform(shape=tuple(views.images.shape[1:]), low=-radius, high=radius)
            return replace(views, images=views.images + noise.flatten(0, 1))
        noise_of = Noise(radius, draws.seed, draws.step, draws.purpose(0), draws.images, draws.copies)
        return replace(views, noise=noise_of)

    def with_mixing(self, mixing: Mixing) -> Views:
        return replace(self._ready_for("mixing"), mixing=mixing)

    def with_scale(self, scale: Tensor) -> Views:
        # Scaling and resize-and-pad are linear and commute, so a pending geometry is no obstacle.
        views = self if self.scale is None else self.build()
        return replace(views, scale=scale)

    def with_resize_pad(self, resize_pad: ResizePad) -> Views:
        return replace(self._ready_for("resize_pad"), resize_pad=resize_pad)

    def build(self) -> Views:
        """The same views with nothing left to be done to them."""
        return Views(self.render(), self.copies, built=True)

    def render(self, mean: Tensor | None = None, std: Tensor | None = None) -> Tensor:
        """[K N, C, H, W] in row order k N + n, normalised by (mean, std) if given."""
        return diversify(
            self.images,
            copies=1 if self.built else self.copies,
            noise=self.noise,
            mixing=self._mixing_rows(),
            scale=self._rows(self.scale),
            resize_pad=self._resize_pad_rows(),
            mean=mean,
            std=std,
        )

    def _ready_for(self, part: str) -> Views:
        """These views where `part` and all that `diversify` does after it are free, else the built ones."""
        pending = PARTS[PARTS.index(part) :]
        return self if all(getattr(self, name) is None for name in pending) else self.build()

    def _rows(self, values: Tensor | None) -> Tensor | None:
        return values.reshape(1, -1) if self.built and values is not None else values

    def _mixing_rows(self) -> Mixing | None:
        if self.mixing is None or not self.built:
            return self.mixing
        mixing = self.mixing
        return replace(mixing, partner=mixing.partner.reshape(1, -1), weight=mixing.weight.reshape(1, -1))

    def _resize_pad_rows(self) -> ResizePad | None:
        if self.resize_pad is None or not self.built:
            return self.resize_pad
        geometry = self.resize_pad
        return replace(
            geometry,
            resized=geometry.resized.reshape(1, -1),
            top=geometry.top.reshape(1, -1),
            left=geometry.left.reshape(1, -1),
        )
