"""Batch normalisation in evaluation mode, folded into the weights of the layer before it."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, cast

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from alignfast.models.classifier import Classifier, fit_size
from alignfast.models.dataflow import followed, has_hooks, paths_of

# No subclasses: others, such as weight-standardised convolutions, make something else of their weights.
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, Conv2dSame)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, BatchNormAct2d)
# Weights of half precision would be rounded a second time.
DTYPES = (torch.float32, torch.float64)
# How far the logits of a folded model may lie from those before, as a part of the largest logit.
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-10}


def folded(model: Classifier, example: Tensor) -> Classifier:
    """A frozen copy of `model` in evaluation mode whose batch normalisations are folded where that can be done.

    The logits of the copy on the example must lie within 1e-4 (float64: 1e-10) of the model's, relative to the largest
    of them; otherwise the copy is left as it was, with a warning. Weights of half precision are not folded.

    Args:
        model: anything that maps images to logits; not changed.
        example: images [N, C, H, W] in [0, 1] on the model's device, resized to its input size.

    Raises:
        ValueError: an example without images.
    """
    if len(example) == 0:
        raise ValueError("example: got no image; allowed is at least one")
    plain = copy.deepcopy(model).eval().requires_grad_(False)
    images = fit_size(example, plain)
    with torch.no_grad():
        wanted = plain.logits(images)
        candidate = copy.deepcopy(plain)
        reason = _failure(candidate, images, wanted)
    if reason is None:
        return candidate
    name = type(model.module).__name__
    warnings.warn(f"{name}: batch normalisation is not folded, because {reason}", RuntimeWarning, stacklevel=2)
    return plain


def fold_batch_norm(module: nn.Module, example: Tensor) -> int:
    """Fold, in place, each batch normalisation into the convolution or linear layer before it; give their number.

    A pair is folded if one pass on the example shows that what the layer returned went into the normalisation
    unchanged and nowhere else, and that each ran exactly once. What is left of a normalisation is the identity, or the
    activation of one that has it. Left as they are: normalisations by the batch, layers with hooks or with
    parametrized weights, weights of half precision, and subclasses whose passes are not known. Changed weights are
    parameters that require no gradient. In training mode the module is another one afterwards.

    Args:
        module: called on the example in evaluation mode and without a gradient; its modes stay.
        example: what it is called on, such as images [N, C, H, W]; one image is enough.
    """
    return _fold(module, lambda: module(example))


def _fold(module: nn.Module, run: Callable[[], Any]) -> int:
    pairs = _pairs(module, run)
    for layer, norm, path in pairs:
        _fuse(layer, norm)
        module.set_submodule(path, _rest(norm), strict=True)
    return len(pairs)


def _failure(candidate: Classifier, images: Tensor, wanted: Tensor) -> str | None:
    """Fold `candidate`; why it is not what it was, or None."""
    try:
        _fold(candidate, lambda: candidate.logits(images[:1]))
        logits = candidate.logits(images)
    # A model may read what is no longer there in as many ways as there are models.
    except Exception as error:
        return f"it does not run then ({type(error).__name__}: {error})"
    if torch.equal(logits, wanted):
        return None
    change, largest = (float(value.abs().max()) for value in (logits - wanted, wanted))
    tolerance = TOLERANCES.get(wanted.dtype, TOLERANCES[torch.float32])
    # Written so that NaN fails.
    return None if change <= tolerance * largest else f"its logits change by {change:.3g}, of {largest:.3g} at most"


def _pairs(module: nn.Module, run: Callable[[], Any]) -> list[tuple[nn.Module, nn.Module, str]]:
    """Each layer with the normalisation behind it and that one's path in `module`."""
    paths = paths_of(module)
    return [
        (one.layer, one.follower, paths[one.follower][0])
        for one in followed(module, run, _is_layer, _is_norm)
        if not one.shared and len(one.shape) == _weight(one.layer).ndim and _fits(one.layer, one.follower)
    ]


def _is_layer(part: nn.Module) -> bool:
    return type(part) in LAYERS and "weight" in part._parameters and not has_hooks(part)


def _is_norm(part: nn.Module) -> bool:
    statistics = (getattr(part, "running_mean", None), getattr(part, "running_var", None))
    return type(part) in NORMS and None not in statistics and not has_hooks(part)


def _weight(layer: nn.Module) -> Tensor:
    return cast(Tensor, layer.weight)


def _fits(layer: nn.Module, norm: Any) -> bool:
    weight = _weight(layer)
    tensors = (layer.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return weight.dtype in DTYPES and all(
        tensor is None or (tensor.dtype == weight.dtype and tensor.shape == weight.shape[:1]) for tensor in tensors
    )


def _fuse(layer: Any, norm: Any) -> None:
    """In double precision, rounded once."""
    statistics = (norm.running_mean.double(), norm.running_var.double(), norm.eps)
    bias, gain, shift = (None if one is None else one.double() for one in (layer.bias, norm.weight, norm.bias))
    fused = fuse_conv_bn_weights(layer.weight.double(), bias, *statistics, gain, shift)
    dtype = layer.weight.dtype
    layer.weight, layer.bias = (nn.Parameter(tensor.detach().to(dtype), requires_grad=False) for tensor in fused)


def _rest(norm: nn.Module) -> nn.Module:
    """What a normalisation does besides normalising."""
    if not isinstance(norm, BatchNormAct2d):
        return nn.Identity().train(norm.training)
    return nn.Sequential(OrderedDict(drop=norm.drop, act=norm.act)).train(norm.training)
