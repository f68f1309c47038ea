"""Dropout, noise and shuffled tokens against forward passes written out, row by row."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from alignfast.attacks import create
from alignfast.draws import SOURCE_SLOT, Draws
from alignfast.models import Classifier
from alignfast.ops import philox_uniform
from alignfast.surrogates import FeatureNoise, GhostDropout, GhostSkips, TokenShuffle, surrogate
from tests.surrogates.nets import input_gradient, net, photos

SEED, STEP = 77, 3
INDICES, COPIES = torch.tensor([905, 3]), torch.tensor([65536, 65539])
ROWS = 4
# What a layer's number adds to the seed.
STRIDE = 0x9E3779B97F4A7C15


def uniform(purpose: int, shape: tuple[int, ...], layer: int = 0) -> Tensor:
    """[ROWS, *shape]; the source has slot 31, and row k N + n is copy k of image n."""
    seed = (SEED + layer * STRIDE) % 2**64
    drawn = philox_uniform(INDICES, COPIES, shape, seed=seed, step=STEP, purpose=8 * 31 + purpose)
    return drawn.reshape(ROWS, *shape).double()


def attacked(source: Classifier, images: Tensor) -> Tensor:
    draws = Draws(SEED, STEP, INDICES, COPIES, SOURCE_SLOT)
    return source.logits_of(lambda *args, **options: images, draws)


def agree(source: Classifier, by_hand: Callable[[Tensor], Tensor], images: Tensor) -> None:
    torch.testing.assert_close(attacked(source, images), by_hand(images), rtol=1e-6, atol=1e-9)
    expected = input_gradient(by_hand, images)
    torch.testing.assert_close(input_gradient(lambda x: attacked(source, x), images), expected, rtol=1e-5, atol=1e-9)
    assert not torch.allclose(input_gradient(source.module, images), expected, rtol=1e-3)


def test_dropout() -> None:
    model: Any = net("plain")
    images = photos("plain", ROWS)

    def by_hand(x: Tensor) -> Tensor:
        x = relu(model.features["conv1"](x))
        x = relu(model.features["conv2"](x * (uniform(1, (6, 6, 6), 1) >= 0.3) / 0.7))
        return model.head(x.mean((2, 3)))

    agree(surrogate(model, GhostDropout(0.3)), by_hand, images)


def test_noise() -> None:
    model: Any = net("plain")
    images = photos("plain", ROWS)
    angle = 2 * math.pi * uniform(3, (6, 6, 6))
    normal = (-2 * (1 - uniform(2, (6, 6, 6))).log()).sqrt() * angle.cos()

    def by_hand(x: Tensor) -> Tensor:
        x = model.features["conv1"](x)
        deviation = (x - x.mean((1, 2, 3), keepdim=True)).square().mean((1, 2, 3), keepdim=True).sqrt().detach()
        x = relu(model.features["conv2"](relu(x + 0.4 * deviation * normal)))
        return model.head(x.mean((2, 3)))

    for layer in (None, "features.conv1"):
        agree(surrogate(model, FeatureNoise(layer, 0.4)), by_hand, images)


def test_shuffled_tokens() -> None:
    model: Any = net("vit")
    images = photos("vit", ROWS)
    chosen = uniform(4, (2,)) < 0.6
    assert 0 < chosen.sum() < 2 * ROWS

    def by_hand(x: Tensor) -> Tensor:
        x = model.patch_embed(x)
        x = torch.cat([model.cls_token.expand(ROWS, -1, -1), x], 1) + model.pos_embed
        for number, block in enumerate(model.blocks):
            drawn, normed = uniform(5, (4,), number + 1), block.norm1(x)
            rows = []
            for row in range(ROWS):
                order = sorted(range(4), key=drawn[row].tolist().__getitem__) if chosen[row, number] else range(4)
                rows.append(torch.stack([normed[row, 0], *(normed[row, 1 + place] for place in order)]))
            x = x + block.ls1(block.attn(torch.stack(rows)))
            x = x + block.ls2(block.mlp(block.norm2(x)))
        return model.head(model.norm(x)[:, 0])

    agree(surrogate(model, TokenShuffle(0.6)), by_hand, images)


@pytest.mark.parametrize(
    ("surgery", "name"), [(GhostDropout(0.3), "cifar"), (FeatureNoise(None, 0.4), "cifar"), (TokenShuffle(0.9), "vit")]
)
def test_without_draws_it_is_the_model(surgery: Any, name: str) -> None:
    model, images = net(name, torch.float32), photos(name, dtype=torch.float32)
    assert torch.equal(surrogate(model, surgery).logits(images), model(images))


def test_ghosts_drop_features_where_there_are_no_skips() -> None:
    assert create("ghostnetwork", net("cifar")).source.surgeries == (GhostSkips(0.22),)  # type: ignore[union-attr]
    plain = create("ghostnetwork", net("plain"), ghost_keep_prob=0.75).source
    assert plain.surgeries == (GhostDropout(0.25),)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GhostDropout(1.0), "rate: got 1.0"),
        (lambda: GhostDropout(-0.1), "rate: got -0.1"),
        (lambda: FeatureNoise(None, -1.0), "std: got -1.0"),
        (lambda: TokenShuffle(1.5), "prob: got 1.5"),
        (lambda: surrogate(net("plain"), FeatureNoise("conv9")), "layer: got 'conv9'; allowed are names"),
        (lambda: surrogate(nn.Flatten(), FeatureNoise()), "source: Flatten has no convolution"),
        (lambda: surrogate(nn.Flatten(), GhostDropout()), "source: Flatten has no convolution"),
        (lambda: surrogate(net("vit"), GhostDropout()), "source: VisionTransformer has one convolution; allowed are"),
        (lambda: surrogate(net("plain"), TokenShuffle()), "source: Plain has no attention that is known"),
    ],
)
def test_what_does_not_fit_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
