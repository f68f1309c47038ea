"""The input gradient of an attack's objective, over as many views and samples as a step asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from alignfast.attacks.chunks import Chunks
from alignfast.attacks.component import Memory
from alignfast.attacks.objectives import Objective
from alignfast.attacks.observe import Seen, check_layers, observe
from alignfast.attacks.per_image import add_in_order, per_row
from alignfast.attacks.transforms import Transform
from alignfast.attacks.views import Views
from alignfast.draws import COPIES_PER_PASS, FIRST_SLOT, MOST_PASSES, OBJECTIVE_SLOT, SAMPLE_SLOT, SOURCE_SLOT, Draws
from alignfast.models import Classifier
from alignfast.ops import Noise, diversify

# Below this a gradient counts as zero: its reciprocal must be finite.
LEAST_PULL = 1e-35


@dataclass(frozen=True)
class Task:
    """What gradients are taken of, but for the points. draws: of the step, without copies.

    parts: how many such sources the attack's own is made of, as far as memory is concerned.
    """

    source: Classifier
    objective: Objective
    kept: Memory
    labels: Tensor
    transforms: Sequence[Transform]
    draws: Draws
    chunks: Chunks
    parts: int = 1

    @property
    def views(self) -> int:
        """How many views each point is given."""
        return math.prod(transform.copies for transform in self.transforms)

    @cached_property
    def in_half(self) -> bool:
        """Whether part of the source computes in float16, whose smallest numbers are too large for some gradients."""
        return any(isinstance(part, Classifier) and part.dtype == torch.float16 for part in self.source.modules())


class Gradient:
    """Gradients of the objective in one step. Each pass draws anew.

    Sums over samples and views are taken in their order, one by one, so that they do not depend on how many went
    through the model together.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._passes = 0

    def __call__(self, point: Tensor) -> Tensor:
        """[N, C, H, W]: the mean gradient over the views of `point`, of the same shape."""
        return self.mean(1, lambda look: look.gradient(point[None]))

    def mean(self, samples: int, contribution: Callable[[Look], Tensor]) -> Tensor:
        """[N, C, H, W]: the mean over samples of `contribution`, which gives [K, N, C, H, W] for K of them.

        A contribution of a sample must not depend on which others it is asked for with.
        """
        total: Tensor | None = None
        first, begun = 0, self._passes
        while first < samples:
            together = self._task.chunks.most(self._task.views * len(self._task.labels), samples - first)
            which = torch.arange(first, first + together, device=self._task.labels.device)
            look = Look(self._task, which, samples, begun)
            total = add_in_order(total, contribution(look))
            self._passes = max(self._passes, look.passes)
            first += together
        assert total is not None
        return total.div_(samples)

    def gain(self, point: Tensor) -> Tensor:
        """[N]: the mean gain over the views of `point`, [N, C, H, W], without a gradient."""
        look = Look(self._task, torch.zeros_like(self._task.labels[:1]), 1, self._passes)
        self._passes += 1
        return look.gain(point[None])[0]

    @property
    def members(self) -> list[Gradient]:
        """The same for each model that the source is made of, alone, each with draws from the first pass on."""
        members = self.source.members
        for member in members:
            check_layers(member, self._task.objective.layers)
        return [Gradient(replace(self._task, source=member, parts=len(members))) for member in members]

    @property
    def source(self) -> Classifier:
        return self._task.source

    def through(self, source: Classifier) -> Gradient:
        """The same for another source, with draws from the first pass on."""
        return Gradient(replace(self._task, source=source))


class Look:
    """The passes of a step over some of its samples. which: int64 [K], the numbers of these samples."""

    def __init__(self, task: Task, which: Tensor, samples: int, passes: int) -> None:
        self._task = task
        self._samples = samples
        self.which = which
        self.passes = passes

    @property
    def draws(self) -> Draws:
        """Of the next pass over these samples, for the estimator's own use."""
        return replace(self._draws(self.which), slot=SAMPLE_SLOT)

    def neighbors(self, point: Tensor, radius: float) -> Tensor:
        """[K, N, C, H, W]: each point [N, C, H, W] with uniform noise in [-radius, radius), one neighbour a sample."""
        draws = self.draws
        noise = Noise(radius, draws.seed, draws.step, draws.purpose(0), draws.images, draws.copies)
        around = diversify(point, copies=len(self.which), noise=noise)
        return around.reshape(len(self.which), *point.shape)

    def gradient(self, points: Tensor) -> Tensor:
        """[K, N, C, H, W]: the mean gradient over the views of each of these points, [K, N, C, H, W]."""
        return self._over_views(points, self._gradients)

    def gain(self, points: Tensor) -> Tensor:
        """[K, N]: the mean gain over the views of each of these points, [K, N, C, H, W]."""
        return self._over_views(points, self._gains)

    def _over_views(self, points: Tensor, of: Callable[[Tensor, Tensor, Draws], Tensor]) -> Tensor:
        views, rows = self._task.views, points.flatten(0, 1)
        total: Tensor | None = None
        first = 0
        while first < views:
            together = self._task.chunks.most(len(rows), views - first)
            numbers = torch.arange(first, first + together, device=rows.device)
            copies = (self.which + self._samples * numbers[:, None]).flatten()
            repeated = rows if together == 1 else rows.repeat(together, 1, 1, 1)
            which = numbers.repeat_interleave(len(points), output_size=len(copies))
            result = of(repeated, which, self._draws(copies))
            total = add_in_order(total, result.reshape(together, len(points), -1, *result.shape[1:]))
            first += together
        assert total is not None
        self.passes += 1
        return total.div_(views)

    def _gradients(self, rows: Tensor, which: Tensor, draws: Draws) -> Tensor:
        """[R, C, H, W]: the gradient of every row, `which` saying the number of its view."""
        leaf = rows.detach().requires_grad_()
        with torch.enable_grad(), self._task.chunks.measuring(self._task.source, leaf, self._task.parts):
            seen = self._seen(leaf, which, draws)
            if self._task.in_half:
                return self._scaled(seen, leaf)
            # A sum over images, not a mean: an image's gradient must not depend on how many others there are.
            (grad,) = torch.autograd.grad(self._gain_of(seen).sum() / len(seen.heads), leaf)
        return grad

    def _scaled(self, seen: Seen, leaf: Tensor) -> Tensor:
        """The gradient through a model in float16, where each row's, as it enters the model, has a largest element of
        about 1, so that it does not vanish on its way."""
        shown = [seen.heads, *seen.features.values(), leaf]
        ends = [tensor.detach().requires_grad_() for tensor in shown]
        features = dict(zip(seen.features, ends[1:-1], strict=True))
        probe = replace(seen, heads=ends[0], features=features, points=ends[-1])
        gain = self._gain_of(probe).sum() / len(seen.heads)
        pulls = torch.autograd.grad(gain, ends, materialize_grads=True)
        # [B]; the heads of a row are the second dimension there.
        sizes = [pulls[0].abs().amax((0, 2)), *(pull.abs().flatten(1).amax(1) for pull in pulls[1:])]
        scale = torch.exp2(torch.stack(sizes).amax(0).clamp(min=LEAST_PULL).log2().ceil())
        scaled = [pulls[0] / scale[:, None], *(pull / per_row(scale, pull) for pull in pulls[1:])]
        (grad,) = torch.autograd.grad(shown, leaf, scaled)
        # What overflowed on its way has no direction to give.
        return torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0) * per_row(scale, grad)

    @torch.no_grad()
    def _gains(self, rows: Tensor, which: Tensor, draws: Draws) -> Tensor:
        seen = self._seen(rows, which, draws)
        return self._gain_of(seen).reshape(len(seen.heads), -1).mean(0)

    def _gain_of(self, seen: Seen) -> Tensor:
        return self._task.objective.gain(seen, seen.rows(self._task.labels), self._task.kept)

    def _seen(self, rows: Tensor, which: Tensor, draws: Draws) -> Seen:
        views, stride, task = Views(rows), 1, self._task
        for slot, transform in enumerate(task.transforms, FIRST_SLOT):
            views = transform.view(views, which // stride % transform.copies, draws.at(slot))
            stride *= transform.copies
        seen = observe(task.source, views.render, task.objective.layers, draws.at(SOURCE_SLOT))
        return replace(seen, points=rows, draws=draws.at(OBJECTIVE_SLOT))

    def _draws(self, copies: Tensor) -> Draws:
        if self.passes >= MOST_PASSES:
            raise ValueError(f"estimator: more than {MOST_PASSES} passes a step; allowed are at most so many")
        return replace(self._task.draws, copies=copies + COPIES_PER_PASS * self.passes)
