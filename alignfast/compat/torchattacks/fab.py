"""FAB: steps onto the linearised boundary between classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from alignfast.checks import check_count, check_number
from alignfast.compat.torchattacks.auto import TINY, Restarting, Run, class_of_rank

__all__ = ["FAB"]

# Weights that are no larger count as zero in L2.
FLAT = 1e-8
# As a distance: none found yet; as a difference of logits: of the label from itself; as a path: without end.
NO_DISTANCE, NO_DIFFERENCE, NO_END = 1e10, 1e10, 1e12

# The classes to reach, from the logits of the images; None for whichever is nearest.
Aim = Callable[[Tensor], Tensor]


class FAB(Restarting):
    """The nearest images across the linearised boundary, kept if they are within eps (Croce and Hein, ICML 2020).

    norm: "Linf" or "L2"; eps: None for 0.3 or 1; alpha_max: the most that a step is drawn to the image itself; eta: how
    far a step goes, 1 being the boundary; beta: how far from the image to go on after success; multi_targeted: toward
    each of the n_classes - 1 next likely classes in turn, in targeted modes, too.

    Numbers are those of torchattacks also in targeted modes, where it gives the images that are left the targets of the
    first ones of the batch, and takes targets for labels in the mode of targets by label.

    Raises:
        ValueError: an unknown norm, or more classes than the model has.
    """

    def __init__(
        self,
        model: nn.Module,
        norm: Literal["Linf", "L2"] = "Linf",
        eps: float | None = 8 / 255,
        steps: int = 10,
        n_restarts: int = 1,
        alpha_max: float = 0.1,
        eta: float = 1.05,
        beta: float = 0.9,
        verbose: bool = False,
        seed: int = 0,
        multi_targeted: bool = False,
        n_classes: int = 10,
    ) -> None:
        super().__init__("FAB", model)
        self.norm = norm
        self.n_restarts = n_restarts
        self.eps = eps if eps is not None else {"Linf": 0.3, "L2": 1.0}.get(norm, math.nan)
        self.alpha_max = alpha_max
        self.eta = eta
        self.beta = beta
        self.steps = steps
        self.verbose = verbose
        self.seed = seed
        self.target_class: int | Tensor | None = None
        self.multi_targeted = multi_targeted
        self.n_target_classes = n_classes - 1
        self.supported_mode = ["default", "targeted"]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        check_count("steps", self.steps)
        check_number("alpha_max", self.alpha_max, low=0.0, high=1.0)
        check_number("eta", self.eta, low=0.0)
        check_number("beta", self.beta, low=0.0, high=1.0)
        return self._run_all(images, labels, self._runs(images, labels))

    def _runs(self, images: Tensor, labels: Tensor) -> Iterator[Run]:
        if self.multi_targeted:
            for rank in range(2, self.n_target_classes + 2):
                self.target_class = rank
                yield partial(self._single_run, partial(class_of_rank, rank))
        elif self.targeted:
            targets = self.get_target_label(self._moved(images), self._moved(labels))
            self.target_class = targets
            yield partial(self._single_run, lambda logits: targets[: len(logits)])
        else:
            yield partial(self._single_run, None)

    def _single_run(self, aim: Aim | None, x: Tensor, y: Tensor, restart: int) -> tuple[Tensor, Tensor]:
        """The nearest images found, and which fool the model within eps."""
        found = x.clone()
        # Asked again, since a model in training mode may answer otherwise.
        right = self._resists(x, y).nonzero()[:, 0]
        if len(right):
            targets = None if aim is None else aim(self.get_logits(x))[right]
            found[right] = self._nearest(x[right], y[right], targets, restart > 0)
        fooled = ~(self._resists(found, y) | (self._sizes(x - found)[:, 0, 0, 0] > self.eps))
        return found, fooled

    def _nearest(self, x: Tensor, y: Tensor, targets: Tensor | None, random_start: bool) -> Tensor:
        """x itself where no image is found that fools the model."""
        point = (x + self._drawn(x) * 0.5).clamp(0, 1) if random_start else x.clone()
        nearest, distance = x.clone(), x.new_full((len(x),), NO_DISTANCE)
        for _ in range(self.steps):
            point = self._next(x, point, *self._boundary(point, y, targets))
            over = (self._predicted(point) != y).nonzero()[:, 0]
            size = self._sizes(point[over] - x[over])[:, 0, 0, 0]
            closer = size < distance[over]
            nearest[over[closer]], distance[over[closer]] = point[over[closer]], size[closer]
            point[over] = x[over] + (point[over] - x[over]) * self.beta
        return nearest

    def _boundary(self, point: Tensor, y: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor]:
        """Normals [N, C, H, W] and offsets [N] of the planes to step onto."""
        if targets is None:
            differences, slopes = self._all_boundaries(point, y)
            flat = slopes.flatten(2)
            steep = flat.abs().sum(2) if self.norm == "Linf" else (flat**2).sum(2).sqrt()
            which = (differences.abs() / (TINY + steep)).min(1).indices
            rows = torch.arange(len(point), device=point.device)
            difference, slope = differences[rows, which], slopes[rows, which]
        else:
            leaf = point.clone().requires_grad_()
            with torch.enable_grad():
                logits = self.get_logits(leaf)
                ahead = (logits.gather(1, targets[:, None]) - logits.gather(1, y[:, None]))[:, 0]
                slope = torch.autograd.grad(ahead.sum(), leaf)[0].contiguous()
            difference = ahead.detach()
        return slope, -difference + (slope * point).flatten(1).sum(1)

    def _all_boundaries(self, point: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """How far each logit is ahead of the label's, [N, K], and its gradient, [N, K, C, H, W]."""
        leaf = point.clone().requires_grad_()
        with torch.enable_grad():
            logits = self.get_logits(leaf)
            each = [torch.autograd.grad(column.sum(), leaf, retain_graph=True)[0] for column in logits.unbind(1)]
        logits, slopes = logits.detach(), torch.stack(each, 1)
        rows = torch.arange(len(y), device=y.device)
        differences = logits - logits[rows, y][:, None]
        differences[rows, y] = NO_DIFFERENCE
        return differences, slopes - slopes[rows, y][:, None]

    def _next(self, x: Tensor, point: Tensor, normal: Tensor, offset: Tensor) -> Tensor:
        """Between the steps onto the plane from the point and from the image, more of the shorter one's."""
        onto = _onto_plane_linf if self.norm == "Linf" else _onto_plane_l2
        starts, normals = torch.cat((point, x)).flatten(1), torch.cat((normal, normal)).flatten(1)
        steps = onto(starts, normals, torch.cat((offset, offset))).reshape(-1, *x.shape[1:])
        (step, step_of_image), (size, size_of_image) = steps.chunk(2), self._sizes(steps).clamp(min=1e-8).chunk(2)
        alpha = (size / (size + size_of_image)).clamp(0, self.alpha_max)
        return ((point + self.eta * step) * (1 - alpha) + (x + step_of_image * self.eta) * alpha).clamp(0, 1)


def _onto_plane_linf(points: Tensor, normals: Tensor, offsets: Tensor) -> Tensor:
    """[M, D]: the L-inf smallest change of points in [0, 1] that keeps them there and has <normal, point> = offset, or
    comes nearest to it."""
    change, toward = _gap(points, normals, offsets)
    up = toward < 0
    # All coordinates go by one length, but those that meet the border of [0, 1] before.
    room = torch.where(up, 1 - points, points)
    whole = torch.where(toward != 0, up.to(points.dtype) - points, 0.0)
    longest = room.argsort(1).flip(1)
    moving = toward.gather(1, longest)
    most = (toward * whole).sum(1)
    # By rank of room: what is gained a unit of length by those with as much of it, and by those with less in all.
    rate = moving.abs().cumsum(1)
    rest = (-moving * whole.gather(1, longest)).cumsum(1) + most[:, None]
    enough = -change[:, None] - (rest - rate * room.gather(1, longest)) > 0
    free, reached = enough[:, -1], -change - most > 0
    rank = torch.where(free, points.shape[1] - 1, _last_true(enough))[:, None]
    length = ((-change[:, None] - rest.gather(1, rank)) / -rate.gather(1, rank)).clamp(min=0)
    partly = torch.where(up, length.minimum(whole), (-length).maximum(whole))
    step = torch.where(reached[:, None], partly, whole)
    step = torch.where(free[:, None], torch.where(up, length, -length), step)
    return torch.where(toward != 0, step, 0.0)


def _onto_plane_l2(points: Tensor, normals: Tensor, offsets: Tensor) -> Tensor:
    """[M, D]: as `_onto_plane_linf`, in L2."""
    change, toward = _gap(points, normals, offsets)
    # All coordinates go along the normal by one multiple of it, but those that meet the border of [0, 1] before.
    room = (points / toward).maximum((points - 1) / toward).masked_fill(toward.abs() < FLAT, NO_END)
    whole = torch.where(toward.abs() > FLAT, -(room * toward), 0.0)
    ordered, order = room.sort(1)
    following = pad(ordered[:, 1:], (0, 1))
    ordered, following = (ends.masked_fill(ends == NO_END, 0) for ends in (ordered, following))
    squares = (toward**2).gather(1, order)
    square = squares.sum(1, keepdim=True)
    # By rank of room: what those with more of it gain a unit of the multiple, and what all have gained so far.
    rate = square - squares.cumsum(1)
    first = -square * ordered[:, :1]
    gained = torch.cat((first, ((ordered - following) * rate).cumsum(1) + first), 1)
    free = gained[:, 0] + change < 0
    unreached = (whole * toward).sum(1) + change > 0
    rank = _last_true(gained[:, :-1] + change[:, None] > 0)[:, None]
    slope = rate.gather(1, rank)
    multiple = (gained.gather(1, rank) + change[:, None]) / slope + ordered.gather(1, rank)
    multiple = multiple.masked_fill(slope == 0, 0)
    step = torch.where(unreached[:, None] | (multiple > room), whole, -multiple * toward)
    step = torch.where(free[:, None], -(change[:, None] / square) * toward, step)
    return torch.where(toward.abs() > FLAT, step, 0.0)


def _gap(points: Tensor, normals: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """By how much <normal, point> must become smaller, [M], for normals turned so that it must, [M, D]."""
    gap = (normals * points).sum(1) - offsets
    return gap.abs(), torch.where((gap >= 0)[:, None], normals, -normals)


def _last_true(holds: Tensor) -> Tensor:
    """[M]: where rows [M, D], true up to some column, are true for the last time; by halving, as rounding may leave
    rows that are true again further on."""
    count = holds.shape[1]
    low = torch.zeros(len(holds), dtype=torch.int64, device=holds.device)
    high = torch.full_like(low, count - 1)
    for _ in range(math.ceil(math.log2(count))):
        middle = (low + high) // 2
        held = holds.gather(1, middle[:, None])[:, 0]
        low, high = torch.where(held, middle, low), torch.where(held, high, middle)
    return low
