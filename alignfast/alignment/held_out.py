"""How far an alignment has come, on images that it does not train on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from alignfast.data import Batch
from alignfast.distributed import current, gather
from alignfast.models import Classifier, evaluating, fit_size
from alignfast.ops import kl_div_with_logits

# Images on which clean accuracy is measured where none are given; they are kept on the device meanwhile.
MOST_CLEAN = 256


@dataclass(frozen=True)
class CleanAccuracy:
    """Shares of n images that the source classified right before and after it was aligned. given: whether these are
    images that were given for it, and not views that it was trained on."""

    before: float
    after: float
    n: int
    given: bool


@dataclass(frozen=True)
class Proxy:
    """A stand-in for transfer that needs no target: kd, the divergence from the witnesses, and gradient_cosine, the
    mean cosine between the source's and the witnesses' input gradients of the cross-entropy (both are in the analysis
    of Ma et al., ECCV 2024)."""

    kd: float
    gradient_cosine: float


def measure(model: Classifier, witnesses: Sequence[Classifier], batches: Sequence[Batch], temperature: float) -> Proxy:
    """Of `model` in evaluation mode, over all images of `batches`, which are the same on all ranks, each of which takes
    its part of them."""
    count, kd, cosine = 0, 0.0, 0.0
    with evaluating(model, *witnesses):
        for batch in of_this_rank(batches):
            images, labels = (tensor.to(device_of(model)) for tensor in (batch.images, batch.labels))
            mine, logits = _gradient(model, images, labels)
            for witness in witnesses:
                theirs, taught = _gradient(witness, images, labels)
                share = len(images) / len(witnesses)
                kd += share * float(kl_div_with_logits(logits, taught, temperature))
                cosine += float(cosine_similarity(mine.flatten(1), theirs.flatten(1)).sum()) / len(witnesses)
            count += len(images)
    count, kd, cosine = (sum(parts) for parts in zip(*gather((count, kd, cosine)), strict=True))
    return Proxy(kd / count, cosine / count)


def accuracy(model: Classifier, batches: Sequence[Batch]) -> tuple[float, int]:
    """Of `model` in evaluation mode over the images of all ranks, and their number."""
    right, count = 0, 0
    with torch.no_grad(), evaluating(model):
        for batch in batches:
            images, labels = (tensor.to(device_of(model)) for tensor in (batch.images, batch.labels))
            right += int((model.logits(fit_size(images, model)).argmax(1) == labels).sum())
            count += len(images)
    right, count = (sum(parts) for parts in zip(*gather((right, count)), strict=True))
    return right / max(count, 1), count


def of_this_rank(batches: Sequence[Batch]) -> Sequence[Batch]:
    ranks = current()
    return batches[ranks.rank :: ranks.world]


def device_of(model: Classifier) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _gradient(model: Classifier, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """[N, C, H, W] and [N, classes]: of the cross-entropy with respect to the images, and the logits."""
    leaf = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        logits = model.logits(fit_size(leaf, model))
        (grad,) = torch.autograd.grad(cross_entropy(logits.float(), labels, reduction="sum"), leaf)
    return grad, logits.detach()
