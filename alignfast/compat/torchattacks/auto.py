"""Attacks that run again on what is not fooled yet; of them APGD, whose checkpoints halve the steps of some images and
take them back to their best point: a loop of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from alignfast.checks import check_choice, check_count, check_images, check_labels, check_number
from alignfast.compat.torchattacks.attack import Attack
from alignfast.compat.torchattacks.engine import in_unit_range
from alignfast.compat.torchattacks.iterative import dlr

__all__ = ["APGD", "APGDT"]

TINY = 1e-12
# Of a step that is new; the rest is the step before it.
SHARE_OF_NEW = 0.75

# From images that still resist, their labels and the number of the restart: images, and which of them have fooled.
Run = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
LossOf = Callable[[Tensor], Tensor]
# From images and labels: what to increase.
Goal = Callable[[Tensor, Tensor], LossOf]


class Restarting(Attack):
    """Attacks of several runs, in the L-inf or the L2 norm. The global generators are seeded with `seed` at every call.

    Raises:
        ValueError: an unknown norm, eps below 0 or, in L-inf, above 1, no restart.
    """

    norm: Literal["Linf", "L2"]
    eps: float
    n_restarts: int
    seed: int
    verbose: bool

    @torch.no_grad()
    def _run_all(self, images: Tensor, labels: Tensor, runs: Iterable[Run]) -> Tensor:
        """Each run in turn, made after the generators are seeded, `n_restarts` times on what still resists."""
        check_choice("norm", self.norm, ("Linf", "L2"))
        check_number("eps", self.eps, low=0.0, high=1.0 if self.norm == "Linf" else math.inf)
        check_count("n_restarts", self.n_restarts)
        images, labels = self._moved(images).detach(), self._moved(labels)
        check_images("images", in_unit_range(images))
        check_labels("labels", labels, len(images), None)
        adv = images.clone()
        resisting = self._resists(images, labels)
        torch.manual_seed(self.seed)
        for run in runs:
            for restart in range(self.n_restarts):
                left = resisting.nonzero()[:, 0]
                if len(left) == 0:
                    return adv
                found, fooled = run(images[left], labels[left], restart)
                adv[left[fooled]] = found[fooled]
                resisting[left[fooled]] = False
                if self.verbose:
                    print(f"restart {restart} - robust accuracy: {resisting.float().mean():.2%}")
        return adv

    def _resists(self, images: Tensor, labels: Tensor) -> Tensor:
        """bool [N]: whether the attack has not reached its end with these images."""
        return self._predicted(images) == labels

    def _predicted(self, images: Tensor) -> Tensor:
        return self.get_logits(images).max(1).indices

    def _drawn(self, like: Tensor) -> Tensor:
        """A change of size eps in a random direction."""
        if self.norm == "Linf":
            drawn = 2 * torch.rand(like.shape).to(like.device) - 1
            return self.eps * drawn / self._sizes(drawn)
        drawn = torch.randn(like.shape).to(like.device)
        return self.eps * drawn / (self._sizes(drawn) + TINY)

    def _sizes(self, images: Tensor) -> Tensor:
        """[N, 1, 1, 1]: their norms."""
        return images.abs().amax(dim=(1, 2, 3), keepdim=True) if self.norm == "Linf" else _norms(images)

    def _in_cube(self, x: Tensor, point: Tensor) -> Tensor:
        return point.maximum(x - self.eps).minimum(x + self.eps).clamp(0, 1)


class _AutoPGD(Restarting):
    """What both have in common."""

    steps: int
    eot_iter: int
    thr_decr: float
    # Whether all images take the first one's step, as torchattacks has it for targets in L2.
    _step_of_first = False

    def _perturb(self, images: Tensor, labels: Tensor, goals: list[Goal]) -> Tensor:
        check_count("steps", self.steps)
        check_count("eot_iter", self.eot_iter)
        return self._run_all(images, labels, [partial(self._single_run, goal) for goal in goals])

    def _single_run(self, goal: Goal, x: Tensor, y: Tensor, restart: int) -> tuple[Tensor, Tensor]:
        """The last points that fooled the model, and which images have one."""
        adv = (x + self._drawn(x)).clamp(0, 1)
        loss_of = goal(x, y)
        logits, loss, grad = self._look(adv, loss_of)
        fooled = logits.max(1).indices != y
        found, before = adv.clone(), adv
        best, best_loss, best_grad = adv, loss, grad
        length = self.eps * torch.ones_like(x[:, :1, :1, :1]) * 2.0
        # Rows that are not reached yet are zero; the first checkpoint compares the first with the last of them.
        losses = torch.zeros((self.steps, len(x)), device=x.device)
        interval, shortest, shrinks = (max(int(share * self.steps), 1) for share in (0.22, 0.06, 0.03))
        since, checked_loss, halved = 0, best_loss, torch.ones_like(fooled)
        for number in range(self.steps):
            adv, before = self._next(x, adv, before, grad, length, SHARE_OF_NEW if number else 1.0), adv
            logits, loss, grad = self._look(adv, loss_of)
            wrong = logits.max(1).indices != y
            fooled = fooled | wrong
            found = torch.where(_wide(wrong), adv, found)
            losses[number] = loss
            better = loss > best_loss
            best, best_grad = torch.where(_wide(better), adv, best), torch.where(_wide(better), grad, best_grad)
            best_loss = torch.where(better, loss, best_loss)
            since += 1
            if since == interval:
                rises = sum((losses[number - ago] > losses[number - ago - 1]).int() for ago in range(interval))
                halved = (rises <= interval * self.thr_decr) | (~halved & (checked_loss >= best_loss))
                checked_loss = best_loss
                length = torch.where(_wide(halved), length / 2.0, length)
                adv, grad = torch.where(_wide(halved), best, adv), torch.where(_wide(halved), best_grad, grad)
                since, interval = 0, max(interval - shrinks, shortest)
        return found, fooled

    def _look(self, adv: Tensor, loss_of: LossOf) -> tuple[Tensor, Tensor, Tensor]:
        """Logits and losses of the last of `eot_iter` passes, and their mean gradient."""
        total = torch.zeros_like(adv)
        for _ in range(self.eot_iter):
            leaf = adv.detach().requires_grad_()
            with torch.enable_grad():
                logits = self.get_logits(leaf)
                loss = loss_of(logits)
                total += torch.autograd.grad(loss.sum(), leaf)[0]
        return logits.detach(), loss.detach(), total / float(self.eot_iter)

    def _next(self, x: Tensor, adv: Tensor, before: Tensor, grad: Tensor, length: Tensor, share: float) -> Tensor:
        step = length[:1] if self._step_of_first else length
        if self.norm == "Linf":
            moved = self._in_cube(x, adv + length * grad.sign())
            return self._in_cube(x, adv + (moved - adv) * share + (adv - before) * (1 - share))
        moved = self._in_sphere(x, adv + step * grad / (_norms(grad) + TINY), 0.0)
        return self._in_sphere(x, adv + (moved - adv) * share + (adv - before) * (1 - share), TINY)

    def _in_sphere(self, x: Tensor, point: Tensor, more: float) -> Tensor:
        delta = point - x
        size = _norms(delta)
        return (x + delta / (size + TINY) * (size + more).clamp(max=self.eps)).clamp(0, 1)


class APGD(_AutoPGD):
    """PGD that sets its own step (Croce and Hein, ICML 2020). norm: "Linf" or "L2"; loss: "ce" or "dlr"; rho: of the
    steps up to a checkpoint, so many must raise the loss or the step is halved.

    Raises:
        ValueError: an unknown norm or loss.
    """

    def __init__(
        self,
        model: nn.Module,
        norm: Literal["Linf", "L2"] = "Linf",
        eps: float = 8 / 255,
        steps: int = 10,
        n_restarts: int = 1,
        seed: int = 0,
        loss: str = "ce",
        eot_iter: int = 1,
        rho: float = 0.75,
        verbose: bool = False,
    ) -> None:
        super().__init__("APGD", model)
        self.eps = eps
        self.steps = steps
        self.norm = norm
        self.n_restarts = n_restarts
        self.seed = seed
        self.loss = loss
        self.eot_iter = eot_iter
        self.thr_decr = rho
        self.verbose = verbose
        self.supported_mode = ["default"]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        check_choice("loss", self.loss, ("ce", "dlr"))

        def goal(x: Tensor, y: Tensor) -> LossOf:
            if self.loss == "dlr":
                return lambda logits: dlr(logits, y)
            return lambda logits: cross_entropy(logits, y, reduction="none")

        return self._perturb(images, labels, [goal])


class APGDT(_AutoPGD):
    """APGD toward each of the n_classes - 1 next likely classes in turn (Croce and Hein, ICML 2020).

    Raises:
        ValueError: an unknown norm.
    """

    _step_of_first = True

    def __init__(
        self,
        model: nn.Module,
        norm: Literal["Linf", "L2"] = "Linf",
        eps: float = 8 / 255,
        steps: int = 10,
        n_restarts: int = 1,
        seed: int = 0,
        eot_iter: int = 1,
        rho: float = 0.75,
        verbose: bool = False,
        n_classes: int = 10,
    ) -> None:
        super().__init__("APGDT", model)
        self.eps = eps
        self.steps = steps
        self.norm = norm
        self.n_restarts = n_restarts
        self.seed = seed
        self.eot_iter = eot_iter
        self.thr_decr = rho
        self.verbose = verbose
        self.target_class: int | None = None
        self.n_target_classes = n_classes - 1
        self.supported_mode = ["default"]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return self._perturb(images, labels, [self._toward(rank) for rank in range(2, self.n_target_classes + 2)])

    def _toward(self, rank: int) -> Goal:

        def goal(x: Tensor, y: Tensor) -> LossOf:
            self.target_class = rank
            targets = class_of_rank(rank, self.get_logits(x))
            return lambda logits: dlr(logits, y, targets)

        return goal


def class_of_rank(rank: int, logits: Tensor) -> Tensor:
    """int64 [N]: that of the so manieth largest logit."""
    check_count("n_classes", rank, high=logits.shape[1])
    return logits.sort(1).indices[:, -rank]


def _wide(values: Tensor) -> Tensor:
    """[N] as [N, 1, 1, 1]."""
    return values[:, None, None, None]


def _norms(images: Tensor) -> Tensor:
    return (images**2).sum(dim=(1, 2, 3), keepdim=True).sqrt()
