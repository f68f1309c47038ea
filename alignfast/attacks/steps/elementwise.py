"""Step rules in which each element moves as far as it is told."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from alignfast.attacks.component import Memory, Position, Start
from alignfast.attacks.per_image import dot, over_mean, total
from alignfast.attacks.steps.sign import SignStep, StepRule
from alignfast.checks import check_count, check_number
from alignfast.ops import smooth

__all__ = ["AdaptiveTanhStep", "DecayingStep", "PatchwiseStep", "RescaledStep", "StaircaseStep"]


@dataclass(frozen=True)
class DecayingStep(SignStep):
    """GRA's decay indicator (Zhu et al., ICCV 2023): alpha M sign(m), elementwise.

    M begins as 1 / eta and is multiplied by eta wherever the sign of m, the momentum or else the gradient, is another
    than at the step before; at the first step it is 1 wherever m is not 0. eta: in (0, 1].

    Raises:
        ValueError: a negative momentum, or an eta outside (0, 1].
    """

    eta: float = 0.94

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("eta", self.eta, low=0.0, high=1.0, open_low=True)

    def memory(self, start: Start) -> Memory:
        images = start.images
        indicator, sign = torch.full_like(images, 1 / self.eta), torch.zeros_like(images)
        return super().memory(start) | {"indicator": indicator, "sign": sign}

    def update(self, position: Position, grad: Tensor, memory: Memory) -> None:
        sign, indicator = followed(grad, self.momentum, memory).sign(), memory["indicator"]
        indicator.copy_(torch.where(sign == memory["sign"], indicator, self.eta * indicator))
        memory["sign"].copy_(sign)
        move(position, position.alpha * indicator * sign)


@dataclass(frozen=True)
class PatchwiseStep(SignStep):
    """PI (Gao et al., ECCV 2020, algorithm 1): beta alpha sign(m) + gamma sign(W * C), summed up in a.

    C = sign(a) max(|a| - eps, 0) is what of all steps so far lies outside the ball, and W spreads it evenly over the
    `size` x `size` - 1 neighbours of each element, zero outside the image. m is the momentum, or else the gradient.

    amplification: beta. factor: gamma over beta alpha. size: odd, at least 3. feedback: a counts the spread part too,
    as in PI-FGSM; not so in PI-FGSM++.

    Raises:
        ValueError: a negative momentum or factor, an amplification that is not positive, or an even size.
    """

    amplification: float = 10.0
    factor: float = 1.0
    size: int = 3
    feedback: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("amplification", self.amplification, low=0.0, open_low=True)
        check_number("factor", self.factor, low=0.0)
        if check_count("size", self.size, low=3) % 2 == 0:
            raise ValueError(f"size: got {self.size}; allowed is an odd whole number")

    def memory(self, start: Start) -> Memory:
        return super().memory(start) | {"noise": torch.zeros_like(start.images)}

    def update(self, position: Position, grad: Tensor, memory: Memory) -> None:
        stride, noise = self.amplification * position.alpha, memory["noise"]
        way = stride * followed(grad, self.momentum, memory).sign()
        noise.add_(way)
        cut = noise.sign() * (noise.abs() - position.eps).clamp_(min=0)
        spread = smooth(cut, torch.ones(self.size, dtype=cut.dtype, device=cut.device)) - cut
        # What is summed are multiples of few numbers, so that sums are often zero but for rounding.
        spread = torch.where(spread.abs() > 1e-4 * stride, spread.sign(), 0) * (self.factor * stride)
        if self.feedback:
            noise.add_(spread)
        move(position, way + spread)


@dataclass(frozen=True)
class StaircaseStep(SignStep):
    """SSM (Gao et al., arXiv 2104.09722): alpha w sign(m), w growing in `stairs` steps with |m|.

    Elements between the (j / stairs)- and the ((j + 1) / stairs)-quantile of |m| in their image's channel have
    w = (2 j + 1) / stairs, 1 on average; a quantile is the next lower value. m is the momentum, or else the gradient.

    Raises:
        ValueError: a negative momentum, or no stair.
    """

    stairs: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("stairs", self.stairs)

    def update(self, position: Position, grad: Tensor, memory: Memory) -> None:
        direction = followed(grad, self.momentum, memory)
        size = direction.abs().flatten(2).contiguous()
        places = torch.arange(1, self.stairs + 1, device=size.device) * (size.shape[-1] - 1) // self.stairs
        stair = torch.searchsorted(size.sort(-1).values[..., places], size).reshape(direction.shape)
        weight = (2 * stair + 1).to(direction.dtype) / self.stairs
        move(position, position.alpha * weight * direction.sign())


@dataclass(frozen=True)
class RescaledStep(SignStep):
    """FGRM (Han et al., arXiv 2307.02828): alpha c sign(m) s(l), with s the logistic function.

    l is log2 |m| less its mean over the image and over its standard deviation, both of the elements other than 0; m is
    the momentum, or else the gradient. c: `factor`. TransferAttack keeps this as
    the momentum and takes its sign once more.

    Raises:
        ValueError: a negative momentum, or a factor that is not positive.
    """

    factor: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("factor", self.factor, low=0.0, open_low=True)

    def update(self, position: Position, grad: Tensor, memory: Memory) -> None:
        direction = followed(grad, self.momentum, memory)
        there = direction != 0
        count = total(there).clamp(min=1)
        size = torch.where(there, direction.abs().log2(), 0)
        size = torch.where(there, size - total(size) / count, 0)
        deviation = (dot(size, size) / count).sqrt()
        level = torch.where(deviation > 0, size / deviation, 0).to(direction.dtype)
        move(position, (position.alpha * self.factor) * direction.sign() * level.sigmoid())


@dataclass(frozen=True)
class AdaptiveTanhStep(StepRule):
    """AI-FGTM (Zou et al., AAAI 2022): a_t tanh(lam m / sqrt(v)), m and v the sums of mu_1 g and mu_2 g^2.

    a_t is alpha times w_t over the mean of all w, w_t = (1 - beta_1^t) / sqrt(1 - beta_2^t) for t = 1, 2, ...; with
    alpha = eps / steps as in the paper, all steps together reach eps.

    beta_1, beta_2: in [0, 1). mu_1, mu_2, lam: greater than 0.

    Raises:
        ValueError: one of them outside its range.
    """

    beta_1: float = 0.9
    beta_2: float = 0.99
    mu_1: float = 1.5
    mu_2: float = 1.9
    lam: float = 1.3

    def __post_init__(self) -> None:
        for name in ("beta_1", "beta_2"):
            if check_number(name, getattr(self, name), low=0.0, high=1.0) == 1.0:
                raise ValueError(f"{name}: got 1; allowed is a number in [0, 1)")
        for name in ("mu_1", "mu_2", "lam"):
            check_number(name, getattr(self, name), low=0.0, open_low=True)

    def memory(self, start: Start) -> Memory:
        return {"first": torch.zeros_like(start.images), "second": torch.zeros_like(start.images)}

    def update(self, position: Position, grad: Tensor, memory: Memory) -> None:
        first = memory["first"].add_(grad, alpha=self.mu_1)
        second = memory["second"].addcmul_(grad, grad, value=self.mu_2)
        ratio = torch.where(second > 0, first / second.sqrt(), 0)
        move(position, (self._share(position) * position.alpha) * torch.tanh(self.lam * ratio))

    def _share(self, position: Position) -> Tensor:
        """float64 []: the size of this step over the mean size of all."""
        of_all = [(1 - self.beta_1**t) / math.sqrt(1 - self.beta_2**t) for t in range(1, position.steps + 1)]
        t = position.number.double() + 1
        return (1 - self.beta_1**t) / (1 - self.beta_2**t).sqrt() * (position.steps / math.fsum(of_all))


def followed(grad: Tensor, decay: float, memory: Memory) -> Tensor:
    """The momentum after this gradient (Dong et al., CVPR 2018, eq. 6), in place of the old one, if there is any."""
    momentum = memory.get("momentum")
    return grad if momentum is None else momentum.mul_(decay).add_(over_mean(grad))


def move(position: Position, way: Tensor) -> None:
    """`position.adv` by `way`, [N, C, H, W], within eps of the images and in [0, 1]; in place."""
    delta = (position.adv + way - position.images).clamp_(-position.eps, position.eps)
    torch.clamp(position.images + delta, 0, 1, out=position.adv)
