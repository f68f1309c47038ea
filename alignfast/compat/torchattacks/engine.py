"""The engine's components as torchattacks computes: one loss for the batch, draws from torch's own generator.

Everything else in this package draws with Philox and keeps images apart; here the order of draws and of roundings is
that of torchattacks 3.5.1, so that its numbers come out to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, cross_entropy, interpolate, pad

from alignfast import attacks
from alignfast.attacks import (
    Estimator,
    Gradient,
    Memory,
    Objective,
    Position,
    Seen,
    Shaping,
    Start,
    StepRule,
    Transform,
)
from alignfast.attacks.views import Views
from alignfast.draws import Draws
from alignfast.models import Classifier

# Normalising and going back again leaves [0, 1] by a rounding.
ROUNDING = 1e-5
ROWS = "rows"

Map = Callable[[Tensor], Tensor]


class Source(nn.Module):
    """`logits_of` as a module, beside the `model` whose weights it uses.

    The model's mode is what the caller made it. The module `rows` shows what the model is given.
    """

    def __init__(self, model: nn.Module, logits_of: Map) -> None:
        super().__init__()
        self.rows = nn.Identity()
        self.model = model
        self._logits_of = logits_of

    def forward(self, images: Tensor) -> Tensor:
        return self._logits_of(self.rows(images))

    def train(self, mode: bool = True) -> Source:
        return self


@dataclass(frozen=True, eq=False)
class Loop(attacks.Attack):
    """The engine's loop, for images that may leave [0, 1] by a rounding."""

    def _check(self, source: Classifier, images: Tensor, labels: Tensor, indices: Tensor | None) -> None:
        super()._check(source, in_unit_range(images), labels, indices)


def in_unit_range(images: Tensor) -> Tensor:
    """`images`, clamped if they leave [0, 1] by no more than a rounding; what leaves it by more is left as it is."""
    if not (isinstance(images, Tensor) and images.is_floating_point()):
        return images
    clamped = images.clamp(0, 1)
    return clamped if bool(((images - clamped).abs() <= ROUNDING).all()) else images


def run(source: Source, images: Tensor, labels: Tensor, step: Step, **parts: Any) -> Tensor:
    """One attack: `source` in the mode that it is in, one copy of the images through it at a time."""
    start = step.start is not None
    one = max(len(images), 1)
    return Loop(Classifier(source), step=step, random_start=start, max_batch=one, cuda_graph=False, **parts)(
        images, labels
    )


@dataclass(frozen=True)
class MeanCrossEntropy(Objective):
    """The mean over the batch, one number; less that of the targets if targeted."""

    targeted: bool

    def gain(self, seen: Seen, labels: Tensor, memory: Memory) -> Tensor:
        loss = cross_entropy(seen.logits, labels)
        return -loss if self.targeted else loss


@dataclass(frozen=True)
class Cost(Objective):
    """`of(rows, logits)`, one number for the batch: rows are what the model was given, in the graph of the gradient."""

    of: Callable[[Tensor, Tensor], Tensor]

    @property
    def layers(self) -> tuple[str, ...]:
        return (ROWS,)

    def gain(self, seen: Seen, labels: Tensor, memory: Memory) -> Tensor:
        return self.of(seen.features[ROWS], seen.logits)


@dataclass(frozen=True)
class Diversity(Transform):
    """DI of torchattacks: one size and place for all of a batch, by the width of the images; with a rate above 1 the
    model is given larger images."""

    rate: float
    p: float
    copies: int = 1

    def view(self, views: Views, which: Tensor, draws: Draws) -> Views:
        return views.apply(self.change)

    def change(self, images: Tensor) -> Tensor:
        width, bound = images.shape[-1], int(images.shape[-1] * self.rate)
        low, high = (bound, width) if self.rate < 1 else (width, bound)
        side = _integer(low, high)
        top, left = _integer(0, high - side), _integer(0, high - side)
        if not torch.rand(1) < self.p:
            return images
        resized = interpolate(images, size=[side, side], mode="bilinear", align_corners=False)
        return pad(resized, [left, high - side - left, top, high - side - top])


def _integer(low: int, high: int) -> int:
    """In [low, high), from the CPU's global generator."""
    return int(torch.randint(low, high, (1,), dtype=torch.int32))


@dataclass(frozen=True)
class Smoothing(Shaping):
    """Each channel with its own of `kernel`, [C, 1, k, k], or all with the first where there are not as many."""

    kernel: Tensor

    def shape(self, grad: Tensor) -> Tensor:
        return by_channel(grad, self.kernel)


def by_channel(images: Tensor, kernel: Tensor) -> Tensor:
    """[N, C, H, W], each channel convolved with its kernel, zeros around it."""
    channels = images.shape[1]
    weights = kernel if len(kernel) == channels else kernel[:1].repeat(channels, 1, 1, 1)
    return conv2d(images, weights.to(images), padding="same", groups=channels)


@dataclass(frozen=True)
class Expectation(Estimator):
    """The mean of `samples` gradients of one point, of a model that draws."""

    samples: int

    @property
    def passes(self) -> int:
        return self.samples

    def estimate(self, gradient: Gradient, position: Position, memory: Memory) -> Tensor:
        return gradient.mean(self.samples, lambda look: look.gradient(position.point[None]))


@dataclass(frozen=True)
class SumOfParts(Expectation):
    """The same, each gradient divided before they are added."""

    def estimate(self, gradient: Gradient, position: Position, memory: Memory) -> Tensor:
        total = torch.zeros_like(position.point)
        for _ in range(self.samples):
            total += gradient(position.point) / self.samples
        return total


@dataclass(frozen=True)
class VarianceTuning(Estimator):
    """VT with neighbours of the images so far, drawn at the last step too."""

    neighbors: int
    radius: float

    @property
    def passes(self) -> int:
        return 1 + self.neighbors

    def memory(self, start: Start) -> Memory:
        return {"variance": torch.zeros_like(start.images)}

    def estimate(self, gradient: Gradient, position: Position, memory: Memory) -> Tensor:
        here, variance = gradient(position.point), memory["variance"]
        tuned = here + variance
        around = gradient.mean(self.neighbors, lambda look: look.gradient(self._near(position.adv)[None]))
        torch.sub(around, here, out=variance)
        return tuned

    def _near(self, images: Tensor) -> Tensor:
        # The normal draws are overwritten, but the generator moves on by them.
        return images + torch.randn_like(images).uniform_(-self.radius, self.radius)


@dataclass(frozen=True)
class Step(StepRule):
    """A step without projection, clamped to [0, 1]: FGSM's. start: from images to the offset of the first point."""

    start: Map | None = None

    def offset(self, images: Tensor, eps: float, draws: Draws) -> Tensor:
        assert self.start is not None
        return self.start(images)

    def update(self, position: Position, grad: Tensor, memory: Memory) -> None:
        position.adv.copy_((position.images + position.eps * grad.sign()).clamp(0, 1))


@dataclass(frozen=True)
class SignStep(Step):
    """alpha sign(g); the offset is clamped to the ball, then the image to [0, 1]."""

    def update(self, position: Position, grad: Tensor, memory: Memory) -> None:
        moved = position.adv + position.alpha * grad.sign()
        delta = (moved - position.images).clamp(-position.eps, position.eps)
        position.adv.copy_((position.images + delta).clamp(0, 1))


@dataclass(frozen=True)
class BoundedStep(Step):
    """BIM's: alpha sign(g), then no less than max(x - eps, 0), no more than x + eps, and no more than 1."""

    def update(self, position: Position, grad: Tensor, memory: Memory) -> None:
        moved = position.adv + position.alpha * grad.sign()
        moved = moved.maximum((position.images - position.eps).clamp(min=0)).minimum(position.images + position.eps)
        position.adv.copy_(moved.clamp(max=1))


@dataclass(frozen=True)
class MomentumStep(SignStep):
    """g / mean|g| plus decay times that of the step before; nesterov: the gradient is that of a point ahead.

    A gradient that is zero throughout makes this NaN, whose sign is 0: the image stays where it is from then on.
    """

    decay: float = 1.0
    nesterov: bool = False

    def memory(self, start: Start) -> Memory:
        return {"momentum": torch.zeros_like(start.images)}

    def look_ahead(self, adv: Tensor, memory: Memory, alpha: float) -> Tensor:
        return adv + self.decay * alpha * memory["momentum"] if self.nesterov else adv

    def update(self, position: Position, grad: Tensor, memory: Memory) -> None:
        momentum = memory["momentum"]
        size = torch.mean(torch.abs(grad), dim=(1, 2, 3), keepdim=True)
        momentum.copy_(grad / size + momentum * self.decay)
        super().update(position, momentum, memory)


@dataclass(frozen=True)
class L2Step(Step):
    """alpha g / (||g|| + tiny); the offset is scaled back to the L2 ball, then the image clamped to [0, 1]."""

    norm: ClassVar[Literal["linf", "l2"]] = "l2"
    tiny: float = 1e-10

    def update(self, position: Position, grad: Tensor, memory: Memory) -> None:
        moved = position.adv + position.alpha * (grad / (_norms(grad) + self.tiny))
        delta = moved - position.images
        factor = torch.min(position.eps / _norms(delta), torch.ones_like(delta[:, :1, :1, :1]))
        position.adv.copy_((position.images + delta * factor).clamp(0, 1))


def _norms(images: Tensor) -> Tensor:
    """[N, 1, 1, 1]"""
    norms: Tensor = torch.norm(images.flatten(1), p=2, dim=1)
    return norms[:, None, None, None]


@dataclass(frozen=True)
class PatchStep(Step):
    """PI (Gao et al., ECCV 2020): what the accumulated step has beyond eps is handed to the pixels around.

    length: of the step, and gamma of what is handed on, in units of [0, 1] images. sign: -1 towards targets.
    keep: whether what is handed on counts as accumulated.
    """

    length: float = 0.0
    gamma: float = 0.0
    sign: int = 1
    keep: bool = True

    def memory(self, start: Start) -> Memory:
        return {"accumulated": torch.zeros_like(start.images)}

    def update(self, position: Position, grad: Tensor, memory: Memory) -> None:
        images, eps, accumulated = position.images, position.eps, memory["accumulated"]
        step = self.length * grad.sign()
        accumulated += step
        beyond = (accumulated.abs() - eps).clamp(0, 10000.0) * accumulated.sign()
        handed = self.gamma * by_channel(beyond, _around(images)).sign()
        if self.keep:
            accumulated += handed
        moved = position.adv + self.sign * step + self.sign * handed
        low, high = (images - eps).clamp(0, 1), (images + eps).clamp(0, 1)
        position.adv.copy_(moved.maximum(low).minimum(high))


def _around(images: Tensor) -> Tensor:
    """[1, 1, 3, 3]: the mean of the eight pixels around one."""
    kernel = torch.full((1, 1, 3, 3), 1 / 8, dtype=images.dtype, device=images.device)
    kernel[..., 1, 1] = 0
    return kernel


def uniform(radius: float) -> Map:
    return lambda images: torch.empty_like(images).uniform_(-radius, radius)


def uniform_after_normal(radius: float) -> Map:
    """The same from a generator that has moved on by as many normal draws."""
    return lambda images: torch.randn_like(images).uniform_(-radius, radius)


def uniform_in_l2(radius: float) -> Map:
    """In a direction that is uniform, at a distance that is uniform in [0, radius)."""

    def offset(images: Tensor) -> Tensor:
        delta = torch.empty_like(images).normal_()
        norms = _norms(delta)
        return delta * (torch.zeros_like(norms).uniform_(0, 1) / norms * radius)

    return offset
