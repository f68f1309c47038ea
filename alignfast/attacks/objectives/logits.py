"""Objectives over logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from alignfast.attacks.component import Memory, Start
from alignfast.attacks.objectives.base import (
    Objective,
    check_classes,
    clean_logits,
    refuse_targeted,
    refuse_untargeted,
)
from alignfast.attacks.observe import Seen
from alignfast.checks import check_number
from alignfast.models import Classifier

__all__ = [
    "CrossEntropy",
    "Divergence",
    "Jittered",
    "Logit",
    "LogitMargin",
    "LogitRatio",
    "Margin",
    "PoincareTriplet",
    "Probability",
]

# Below this, what is divided by is taken to be this: where it is 0, so is what it divides.
TINY = 1e-12


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """Cross-entropy of the label (Goodfellow et al., ICLR 2015), or less that of the target class if targeted."""

    targeted: bool = False

    def gain(self, seen: Seen, labels: Tensor, memory: Memory) -> Tensor:
        loss = cross_entropy(seen.logits, labels, reduction="none")
        return -loss if self.targeted else loss


@dataclass(frozen=True)
class Margin(Objective):
    """C&W (Carlini and Wagner, S&P 2017, f_6): min(max_{i != y} z_i - z_y, kappa), or with z_t - max_{i != t} z_i.

    kappa: the confidence, of at least 0, from where on there is nothing more to gain. With one class the margin is 0.

    Raises:
        ValueError: a negative kappa.
    """

    targeted: bool = False
    kappa: float = 50.0

    def __post_init__(self) -> None:
        check_number("kappa", self.kappa, low=0.0)

    def gain(self, seen: Seen, labels: Tensor, memory: Memory) -> Tensor:
        margin = _best_other(seen.logits, labels) - _of(seen.logits, labels)
        return (-margin if self.targeted else margin).clamp(max=self.kappa)


@dataclass(frozen=True)
class LogitRatio(Objective):
    """DLR (Croce and Hein, ICML 2020, eq. 6 and 7): the margin over a difference of the largest logits, z_(1) first.

    (max_{i != y} z_i - z_y) / (z_(1) - z_(3)), or if targeted (z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2), with the
    source's class of the clean image for y. Needs 3 classes, or 4 if targeted. It is 1 where y is third, with a
    gradient of 0.
    """

    targeted: bool = False

    def check(self, source: Classifier, images: Tensor) -> None:
        check_classes("DLR", source.num_classes, self._least)

    def memory(self, start: Start) -> Memory:
        return {"classes": clean_logits(start).argmax(1)} if self.targeted else {}

    def gain(self, seen: Seen, labels: Tensor, memory: Memory) -> Tensor:
        logits = seen.logits
        check_classes("DLR", logits.shape[1], self._least)
        largest = logits.topk(self._least).values
        if self.targeted:
            margin = _of(logits, labels) - _of(logits, seen.rows(memory["classes"]))
        else:
            margin = _best_other(logits, labels) - _of(logits, labels)
        return margin / (largest[:, 0] - largest[:, 2:].mean(1)).clamp(min=TINY)

    @property
    def _least(self) -> int:
        return 4 if self.targeted else 3


@dataclass(frozen=True)
class Logit(Objective):
    """Logit (Zhao et al., NeurIPS 2021, eq. 4): z_t of the target class; the paper has no other than targeted use.

    Untargeted it is -z_y of the label, as in TransferAttack.
    """

    targeted: bool = False

    def gain(self, seen: Seen, labels: Tensor, memory: Memory) -> Tensor:
        logit = _of(seen.logits, labels)
        return logit if self.targeted else -logit


@dataclass(frozen=True)
class LogitMargin(Objective):
    """Logit calibration by margin (Weng et al., TIFS 2023, section III): cross-entropy of z / (z_(1) - z_(2)).

    The difference of the two largest logits is a constant to the gradient.
    """

    targeted: bool = False

    def gain(self, seen: Seen, labels: Tensor, memory: Memory) -> Tensor:
        largest = seen.logits.detach().topk(min(2, seen.logits.shape[1])).values
        gap = (largest[:, :1] - largest[:, -1:]).clamp(min=TINY)
        loss = cross_entropy(seen.logits / gap, labels, reduction="none")
        return -loss if self.targeted else loss


@dataclass(frozen=True)
class PoincareTriplet(Objective):
    """Po+Trip (Li et al., CVPR 2020, eq. 6 to 11): -d(u, v) - lam max(D(z, t) - D(z, y) + gamma, 0), targeted only.

    u = z / ||z||_1, v = max(onehot(t) - 1e-5, 0), d(u, v) = arcosh(1 + 2 ||u - v||^2 / ((1 - ||u||^2) (1 - ||v||^2)))
    with norms of L2, and D(z, c) = 1 - |z_c| / ||z||_2. The true class y is the source's own of the clean image.
    lam: weight of the triplet. gamma: its margin. Both at least 0. Needs 2 classes.

    Raises:
        ValueError: untargeted use, or a negative number.
    """

    targeted: bool = True
    lam: float = 0.01
    gamma: float = 0.007

    def __post_init__(self) -> None:
        refuse_untargeted("Po+Trip", self.targeted)
        check_number("lam", self.lam, low=0.0)
        check_number("gamma", self.gamma, low=0.0)

    def check(self, source: Classifier, images: Tensor) -> None:
        check_classes("Po+Trip", source.num_classes, 2)

    def memory(self, start: Start) -> Memory:
        return {"classes": clean_logits(start).argmax(1)}

    def gain(self, seen: Seen, labels: Tensor, memory: Memory) -> Tensor:
        logits = seen.logits
        check_classes("Po+Trip", logits.shape[1], 2)
        unit = logits / logits.abs().sum(1, keepdim=True).clamp(min=TINY)
        corner = (_one_hot(logits, labels) - 1e-5).clamp(min=0)
        room = ((1 - unit.square().sum(1)) * (1 - corner.square().sum(1))).clamp(min=TINY)
        distance = torch.acosh(1 + 2 * (unit - corner).square().sum(1) / room)
        length = logits.square().sum(1).clamp(min=TINY).sqrt()
        classes = seen.rows(memory["classes"])
        triplet = (_of(logits, classes).abs() - _of(logits, labels).abs()) / length + self.gamma
        return -distance - self.lam * triplet.clamp(min=0)


@dataclass(frozen=True)
class Divergence(Objective):
    """TRADES' inner objective (Zhang et al., ICML 2019, eq. 5): KL(p(x) || p(adv)), with the clean images' p(x).

    It knows no labels, and is 0 with a gradient of 0 at the images themselves.

    Raises:
        ValueError: targeted use.
    """

    targeted: bool = False

    def __post_init__(self) -> None:
        refuse_targeted("the divergence from the clean prediction", self.targeted)

    def memory(self, start: Start) -> Memory:
        return {"clean": clean_logits(start).log_softmax(1)}

    def gain(self, seen: Seen, labels: Tensor, memory: Memory) -> Tensor:
        clean = seen.rows(memory["clean"])
        return (clean.exp() * (clean - seen.logits.log_softmax(1))).sum(1)


@dataclass(frozen=True)
class Jittered(Objective):
    """Jitter (Schwinn et al., 2021, eq. 7 to 9): mean (p + e - onehot(y))^2 with p = softmax(scale z / max |z|).

    e is normal noise of standard deviation `std`, drawn for every class, view and step. Where the view is misclassified
    already, this is divided by max |x - images|, so that the perturbation shrinks. Targeted it is less the same with
    the target class, which is never divided (torchattacks: as well). The mean of squares is torchattacks' choice.
    scale: greater than 0. std: at least 0.

    Raises:
        ValueError: a number outside its range.
    """

    targeted: bool = False
    scale: float = 10.0
    std: float = 0.1

    def __post_init__(self) -> None:
        check_number("scale", self.scale, low=0.0, open_low=True)
        check_number("std", self.std, low=0.0)

    def memory(self, start: Start) -> Memory:
        return {} if self.targeted else {"images": start.images.clone()}

    def gain(self, seen: Seen, labels: Tensor, memory: Memory) -> Tensor:
        assert seen.draws is not None
        assert seen.points is not None
        logits = seen.logits
        largest = logits.abs().amax(1, keepdim=True).clamp(min=TINY)
        noise = seen.draws.normal(0, (logits.shape[1],)).flatten(0, 1).to(logits.dtype)
        jittered = (self.scale * logits / largest).softmax(1) + self.std * seen.rows(noise)
        loss = (jittered - _one_hot(logits, labels)).square().mean(1)
        if self.targeted:
            return -loss
        moved = (seen.rows(seen.points) - seen.rows(memory["images"])).abs().amax((1, 2, 3))
        shrinking = (logits.argmax(1) != labels) & (moved > 0)
        return loss / torch.where(shrinking, moved, 1)


def _one_hot(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.zeros_like(logits).scatter(1, labels[:, None], 1.0)


def _of(logits: Tensor, classes: Tensor) -> Tensor:
    """[B]: the logit of each row's class."""
    return logits.gather(1, classes[:, None])[:, 0]


def _best_other(logits: Tensor, labels: Tensor) -> Tensor:
    """[B]: the largest logit of another class than the label; the label's own where there is no other."""
    others = logits if logits.shape[1] == 1 else logits.scatter(1, labels[:, None], -math.inf)
    return others.amax(1)


@dataclass(frozen=True)
class Probability(Objective):
    """-p of the label, or p of the target class if targeted, with p the softmax (MIG, Ma et al., ICCV 2023)."""

    targeted: bool = False

    def gain(self, seen: Seen, labels: Tensor, memory: Memory) -> Tensor:
        probability = seen.logits.softmax(1).gather(1, labels[:, None])[:, 0]
        return probability if self.targeted else -probability
