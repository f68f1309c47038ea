"""What holds for every surgery."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alignfast.attacks.observe import observe
from alignfast.draws import SOURCE_SLOT, Draws
from alignfast.models import Classifier, Ensemble, fingerprint
from alignfast.surrogates import (
    FeatureNoise,
    GhostDropout,
    GhostSkips,
    LinearBackward,
    NoAttention,
    SkipGradient,
    SmoothBackward,
    Surgery,
    Surrogate,
    TokenGradients,
    TokenShuffle,
    surrogate,
)
from alignfast.surrogates.surrogate import on_outputs
from tests.surrogates.nets import input_gradient, net, photos

OF_KIND: dict[str, list[Surgery]] = {
    "cifar": [
        SkipGradient(0.3),
        LinearBackward(),
        SmoothBackward(),
        GhostSkips(0.4),
        GhostDropout(0.3),
        FeatureNoise(None, 0.4),
    ],
    "vit": [
        SkipGradient(0.3),
        NoAttention(),
        TokenGradients(),
        TokenShuffle(0.8),
        FeatureNoise(None, 0.4),
    ],
}
EVERY = [(name, surgery) for name, surgeries in OF_KIND.items() for surgery in surgeries]
PAIRS = [(name, *pair) for name, surgeries in OF_KIND.items() for pair in itertools.combinations(surgeries, 2)]


def attacked(source: Classifier, images: Tensor) -> Tensor:
    count = len(images)
    draws = Draws(3, 1, torch.arange(count), torch.zeros(1, dtype=torch.int64), SOURCE_SLOT)
    return source.logits_of(lambda *args, **options: images, draws)


def gradient(source: Classifier, images: Tensor) -> Tensor:
    return input_gradient(lambda x: attacked(source, x), images)


@pytest.mark.parametrize(("name", "first", "second"), PAIRS)
def test_pairs_in_either_order_or_refused(name: str, first: Surgery, second: Surgery) -> None:
    model, images = net(name), photos(name)
    if first.replaces is not None and first.replaces == second.replaces:
        with pytest.raises(ValueError, match="has replaced its"):
            surrogate(surrogate(model, first), second)
        return
    one, other = surrogate(surrogate(model, first), second), surrogate(surrogate(model, second), first)
    both = gradient(one, images)
    if {type(first), type(second)} == {LinearBackward, GhostDropout}:
        # What goes into a branch that is to be linear is what is left of its input, or all of it.
        assert not torch.allclose(gradient(other, images), both, rtol=1e-3, atol=0)
    else:
        torch.testing.assert_close(attacked(one, images), attacked(other, images), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(gradient(other, images), both, rtol=1e-6, atol=1e-12)
    for alone in (first, second):
        assert not torch.allclose(both, gradient(surrogate(model, alone), images), rtol=1e-3, atol=0)


@dataclass(frozen=True)
class Zeros(Surgery):
    """What conv1 gives is 0 in its first two channels."""

    def check(self, module: nn.Module) -> None:
        pass

    @contextmanager
    def operating(self, module: nn.Module, draws: Draws | None) -> Iterator[None]:
        kept = torch.tensor([0.0, 0.0, 1.0, 1.0])[:, None, None]
        with on_outputs([module.get_submodule("conv1")], lambda features: features * kept):
            yield


def test_the_first_surgery_comes_first() -> None:
    """A layer's own hooks run last, and see zeros where what was made noisy is dropped."""
    model, images, seen = net("cifar"), photos("cifar"), []
    with model.conv1.register_forward_hook(lambda module, inputs, output: seen.append(output[:, :2])):
        for pair in ((FeatureNoise(), Zeros()), (Zeros(), FeatureNoise())):
            attacked(surrogate(surrogate(model, pair[0]), pair[1]), images)
    assert (seen[0] == 0).all()
    assert (seen[1] != 0).all()


@pytest.mark.parametrize(("name", "surgery"), EVERY)
def test_copies_are_whole(name: str, surgery: Surgery) -> None:
    images = photos(name)
    source = surrogate(Classifier(net(name), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), 5), surgery)
    expected = gradient(source, images)
    for again in (copy.deepcopy(source), pickle.loads(pickle.dumps(source))):
        assert torch.equal(gradient(again, images), expected)
        nn.init.zeros_(next(again.parameters()))
        assert not torch.equal(gradient(again, images), expected)
        assert again.to("meta").source.mean.device.type == "meta"  # type: ignore[attr-defined]
    assert torch.equal(gradient(source, images), expected)


@pytest.mark.parametrize(("name", "surgery"), EVERY)
def test_layers_can_be_watched(name: str, surgery: Surgery) -> None:
    layer = {"cifar": "layer2.0", "vit": "blocks.1"}[name]
    source, images = surrogate(net(name), surgery), photos(name)
    leaf = images.clone().requires_grad_()
    draws = Draws(3, 1, torch.arange(2), torch.zeros(1, dtype=torch.int64), SOURCE_SLOT)
    seen = observe(source, lambda *args, **options: leaf, (layer,), draws)
    (grad,) = torch.autograd.grad(seen.features[layer].square().sum(), leaf)
    assert grad.isfinite().all()
    assert grad.any()
    assert torch.equal(seen.logits, attacked(source, images))


def test_ensembles_and_numbers_of_the_source() -> None:
    members = [Classifier(net("cifar"), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), 5, (3, 8, 8)), net("before")]
    both = surrogate(Ensemble(members, "losses"), SkipGradient(0.3))
    assert isinstance(both, Ensemble)
    assert both.combine == "losses"
    assert all(isinstance(member, Surrogate) for member in both.members)
    assert fingerprint(both) == fingerprint(Ensemble(members, "losses"))
    assert (both.num_classes, both.input_size) == (5, (3, 8, 8))
    with pytest.raises(ValueError, match="source: Plain has no residual branch"):
        surrogate(Ensemble([members[0], net("plain")]), SkipGradient(0.3))
    wrong: Any = "resnet18"
    with pytest.raises(TypeError, match="model: got str"):
        surrogate(wrong, SkipGradient(0.3))
