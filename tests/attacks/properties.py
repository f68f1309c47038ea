"""What holds for every attack, for those whose sources or options are of a kind of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from alignfast.attacks import Attack, graph
from alignfast.models import as_classifier
from tests.attacks.no_sync import NoSync
from tests.attacks.samples import labels_of, photos
from tests.attacks.tape import Taping

Make = Callable[..., Attack]


def assert_independent(make: Make) -> None:
    """Alone, in a batch, in another order and in other chunks: the same to the last bit."""
    images, labels, indices = photos(3), labels_of(3), torch.tensor([40, 0, 2**31])
    attack = make(seed=9)
    together = attack(images, labels, indices=indices)
    assert not torch.equal(together, images)
    alone = [attack(images[i : i + 1], labels[i : i + 1], indices=indices[i : i + 1]) for i in range(3)]
    assert torch.equal(torch.cat(alone), together)
    order = torch.tensor([2, 0, 1])
    assert torch.equal(attack(images[order], labels[order], indices=indices[order]), together[order])
    assert torch.equal(make(seed=9, max_batch=1)(images, labels, indices=indices), together)
    assert attack(images[:0], labels[:0]).shape == (0, *images.shape[1:])


def assert_leaves_all_as_it_was(make: Make, source: nn.Module) -> None:
    """`make` makes attacks on `source`."""
    source.train()
    state, modes = copy.deepcopy(source.state_dict()), [module.training for module in source.modules()]
    images, labels = photos(2, torch.float32), labels_of(2)
    before, random = images.clone(), torch.get_rng_state()
    adv = make()(images, labels)
    assert adv.dtype == torch.float32
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in source.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in source.state_dict().items())
    assert all(parameter.grad is None for parameter in source.parameters())
    assert not any(module._forward_hooks for module in source.modules())


def assert_replays(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recorded step gives what the loop gives, batch after batch."""
    taping = Taping()
    monkeypatch.setitem(graph.CAPTURES, "cpu", taping)
    replayed, plain = make(seed=5), make(seed=5, cuda_graph=False)
    images, labels = photos(4), labels_of(4)
    for part in (slice(0, 2), slice(2, 4)):
        expected = plain(images[part], labels[part])
        assert torch.equal(replayed(images[part], labels[part]), expected)
    assert taping.replays.count(0) == 2 * (replayed.steps if len(taping.steps) == 1 else replayed.steps - 1)


def assert_nothing_waits(make: Make, source: nn.Module) -> None:
    """Neither the start nor a step reads from the device, copies to it, or makes a tensor elsewhere."""
    source = as_classifier(source).eval().to("meta")
    images, labels, indices = _batch("meta")
    with NoSync("meta"):
        adv = make(source)._run(source, images, labels, indices)
    assert adv.shape == images.shape


def assert_all_on_the_gpu(make: Make, source: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """With fake tensors; the backward pass, which asks the driver for its device, has the test above."""

    def grad_of(gain: Tensor, leaf: Tensor) -> tuple[Tensor]:
        assert gain.requires_grad
        return (torch.ones_like(leaf),)

    monkeypatch.setattr(torch.autograd, "grad", grad_of)
    with FakeTensorMode(allow_non_fake_inputs=False) as fake:
        with torch.device("cuda"):
            model = as_classifier(source()).eval()
        images, labels, indices = (fake.from_tensor(tensor).to("cuda") for tensor in _batch("cpu"))
        with NoSync("cuda:0"):
            adv = make(model, cuda_graph=False)._run(model, images, labels, indices)
    assert adv.device == torch.device("cuda:0")


def _batch(device: str) -> tuple[Any, ...]:
    return photos(2, torch.float32).to(device), labels_of(2).to(device), torch.arange(2, device=device)
