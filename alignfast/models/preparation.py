"""Models made ready for attacks: frozen, and computing in the precision asked for."""

from __future__ import annotations

import copy
import time
from typing import Literal

import torch
from torch import Tensor, nn

from alignfast.checks import check_choice, check_images
from alignfast.models.classifier import Classifier, as_classifier, evaluating

Precision = Literal["auto", "fp32", "bf16", "fp16"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The least cosine between the input gradients of a faithful form and those in float32.
FAITHFUL = 0.95
# Of which the fastest is taken for the time of a form.
PASSES = 3


def prepare(model: nn.Module, images: Tensor, precision: Precision = "auto") -> Classifier:
    """A copy of `model` for attacks and evaluation: its weights frozen, its passes in `precision`.

    Images go in as they are, float32 [N, C, H, W] in [0, 1], and logits come out in float32; normalisation is in
    float32, rounded once. The input gradients that attacks take in fp16 are scaled image by image, so that small ones
    do not vanish. The members of an ensemble are prepared each.

    Args:
        model: anything that maps images to logits; not changed.
        images: an example, float32 on the model's device.
        precision: "fp32", "bf16" or "fp16"; "auto" for the fastest of fp32 and, where the device computes it in
            hardware, bf16, as measured on the example, whose input gradients keep a cosine of 0.95 to fp32's.

    Raises:
        ValueError: an unknown precision, images that the model does not take, or a model that does not run on them in
            this precision.
    """
    check_choice("precision", precision, ("auto", *DTYPES))
    source = as_classifier(model)
    check_images("images", images)
    source.check_shape(images)
    if precision != "auto":
        prepared = _converted(source, DTYPES[precision])
        _pass(prepared, images, precision)
        return prepared
    candidates = [_converted(source, torch.float32)]
    if _computes_bf16(images.device):
        candidates.append(_converted(source, torch.bfloat16))
    wanted = _pass(candidates[0], images, "fp32")
    faithful = [one for one in candidates if _cosine(_pass(one, images, "auto"), wanted) >= FAITHFUL]
    return min(faithful or candidates[:1], key=lambda one: _seconds(one, images))


def _converted(source: Classifier, dtype: torch.dtype) -> Classifier:
    prepared = copy.deepcopy(source).eval().requires_grad_(False)
    for part in prepared.modules():
        if isinstance(part, Classifier) and part.members == [part]:
            part.module.to(dtype)
            part.dtype = dtype
    return prepared


def _pass(prepared: Classifier, images: Tensor, precision: str) -> Tensor:
    """The input gradient of the largest logit of each image."""
    leaf = images.detach().clone().requires_grad_()
    try:
        with torch.enable_grad(), evaluating(prepared):
            (grad,) = torch.autograd.grad(prepared.logits(leaf).amax(-1).sum(), leaf)
    except RuntimeError as error:
        raise ValueError(
            f"precision: got {precision!r}, in which the model does not run on {images.device} "
            f"({str(error).splitlines()[0]}); allowed is one that it supports, such as fp32"
        ) from error
    return grad


def _cosine(grad: Tensor, wanted: Tensor) -> float:
    """The least over images."""
    return float(torch.cosine_similarity(grad.flatten(1).double(), wanted.flatten(1).double()).min())


def _seconds(prepared: Classifier, images: Tensor) -> float:
    """The fastest of a few passes."""
    times = []
    for _ in range(PASSES):
        _wait(images.device)
        begun = time.perf_counter()
        _pass(prepared, images, "auto")
        _wait(images.device)
        times.append(time.perf_counter() - begun)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _computes_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
