"""Temperature-scaled divergences between softmax distributions, given by their logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Stands in for -inf, so that a masked class costs a large but finite divergence and a finite gradient.
LOWEST_LOGIT = -1e5


def kl_div_with_logits(
    student: Tensor, teacher: Tensor, temperature: float, direction: str, reduction: str, combine: str
) -> Tensor:
    log_q = _log_softmax(student, temperature)
    log_p = _log_softmax(teacher.detach(), temperature)
    losses = _divergence(log_p, log_q, direction) * temperature**2
    if teacher.ndim == 3:
        losses = {"mean": losses.mean(0), "max": losses.amax(0), "min": losses.amin(0)}[combine]
    if reduction == "none":
        return losses
    total = losses.sum()
    return total / max(len(losses), 1) if reduction == "batchmean" else total


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(wide.clamp(min=LOWEST_LOGIT) / temperature, dim=-1)


def _divergence(log_p: Tensor, log_q: Tensor, direction: str) -> Tensor:
    if direction == "forward":
        return _kl(log_p, log_q)
    if direction == "reverse":
        return _kl(log_q, log_p)
    if direction == "symmetric":
        return 0.5 * (_kl(log_p, log_q) + _kl(log_q, log_p))
    log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
    return 0.5 * (_kl(log_p, log_m) + _kl(log_q, log_m))


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)
