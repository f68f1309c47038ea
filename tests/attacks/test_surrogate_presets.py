"""Presets that operate on their source, on small networks of the kinds that they know."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from alignfast.attacks import Attack, create, graph
from alignfast.attacks.presets import surrogates
from alignfast.models import Ensemble, as_classifier
from tests.attacks.no_sync import NoSync
from tests.attacks.samples import PARTICULAR
from tests.attacks.tape import Taping
from tests.surrogates.nets import CLASSES, collection, net, photos

EPS, ALPHA, STEPS = 0.1, 0.03, 3
# A network that the preset knows, and numbers that fit it.
SOURCES: dict[str, Callable[..., nn.Module]] = {
    "sgm": partial(net, "cifar"),
    "linbp": partial(net, "cifar"),
    "ghostnetwork": partial(net, "cifar"),
    "tgr": partial(net, "vit"),
    "pna_patchout": partial(net, "vit"),
    "lgv": collection,
    "bpa": partial(net, "cifar"),
    "faug": partial(net, "cifar"),
    "sapr": partial(net, "vit"),
}
NUMBERS: dict[str, dict[str, Any]] = {
    "ghostnetwork": {"ghost_random_range": 0.9},
    "sapr": {"prob": 0.7},
    "pna_patchout": {"crop_length": 4, "sample_num_patches": 2},
}
RANDOM = {"faug", "ghostnetwork", "lgv", "pna_patchout", "sapr"}


def attack(name: str, source: nn.Module | None = None, **options: Any) -> Attack:
    numbers = {"eps": EPS, "alpha": ALPHA, "steps": STEPS} | NUMBERS.get(name, {}) | options
    return create(name, SOURCES[name]() if source is None else source, **numbers)


def batch(count: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return photos("", count, dtype), torch.arange(count) % CLASSES, torch.tensor([40, 2, 0, 2**31])[:count]


@pytest.mark.parametrize("name", SOURCES)
def test_alone_in_a_batch_in_any_order_and_in_chunks(name: str) -> None:
    # In double precision rounding that differs with the batch does not turn a sign.
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-9)
    images, labels, indices = batch()
    run = attack(name, seed=9)
    together = run(images, labels, indices=indices)
    assert together.dtype == images.dtype
    for at in range(4):
        one = slice(at, at + 1)
        close(run(images[one], labels[one], indices=indices[one]), together[one])
    order = torch.tensor([2, 0, 3, 1])
    close(run(images[order], labels[order], indices=indices[order]), together[order])
    copied = create(f"{name}+sinifgsm", SOURCES[name](), m=3, **NUMBERS.get(name, {}))
    chunked = create(f"{name}+sinifgsm", SOURCES[name](), m=3, max_batch=4, **NUMBERS.get(name, {}))
    close(chunked(images, labels, indices=indices), copied(images, labels, indices=indices))


@pytest.mark.parametrize("name", SOURCES)
def test_the_ball_the_range_and_the_seed(name: str) -> None:
    images, labels, _ = batch()
    adv = attack(name, seed=1)(images, labels)
    assert not torch.equal(adv, images)
    assert (adv - images).abs().max() <= EPS + 1e-12
    assert adv.min() >= 0
    assert adv.max() <= 1
    assert torch.equal(adv, attack(name, seed=2)(images, labels)) == (name not in RANDOM)
    assert not torch.equal(adv, attack(name, seed=1, targeted=True)(images, labels))


@pytest.mark.parametrize("name", SOURCES)
def test_it_is_another_attack_than_momentum_alone(name: str) -> None:
    images, labels, _ = batch()
    assert not torch.equal(
        attack(name)(images, labels),
        create("mifgsm", SOURCES[name](), eps=EPS, alpha=ALPHA, steps=STEPS)(images, labels),
    )


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_no_step_waits_for_the_device(name: str, device: str) -> None:
    run = attack(name, SOURCES[name](dtype=torch.float32))
    source = as_classifier(run.source).to(device)
    images, labels, indices = (tensor.to(device) for tensor in batch(2, torch.float32))
    with NoSync(device):
        adv = run._run(source, images, labels, indices)
    assert adv.device.type == device


@pytest.mark.parametrize("name", SOURCES)
def test_every_tensor_of_a_forward_pass_is_on_the_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in tests/attacks/test_no_sync.py."""

    def grad_of(gain: Tensor, leaf: Tensor) -> tuple[Tensor]:
        assert gain.requires_grad
        return (torch.ones_like(leaf),)

    monkeypatch.setattr(torch.autograd, "grad", grad_of)
    run = attack(name, SOURCES[name](dtype=torch.float32), cuda_graph=False)
    with FakeTensorMode(allow_non_fake_inputs=False) as fake:
        source = as_classifier(run.source)
        for module in source.modules():
            for table in (module._parameters, module._buffers):
                table.update({k: v if v is None else fake.from_tensor(v).to("cuda") for k, v in table.items()})
        images, labels, indices = (fake.from_tensor(tensor).to("cuda") for tensor in batch(2, torch.float32))
        with NoSync("cuda:0"):
            adv = run._run(source, images, labels, indices)
    assert adv.device == torch.device("cuda:0")


@pytest.mark.parametrize("name", SOURCES)
def test_replays_are_the_plain_attack(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(graph.CAPTURES, "cpu", Taping())
    source = SOURCES[name]()
    replayed, plain = attack(name, source), attack(name, source, cuda_graph=False)
    images, labels, indices = batch()
    for part in (slice(0, 2), slice(2, 4), slice(0, 2)):
        adv = replayed(images[part], labels[part], indices=indices[part])
        assert torch.equal(adv, plain(images[part], labels[part], indices=indices[part]))


@pytest.mark.parametrize("name", SOURCES)
def test_the_model_stays_as_it_was(name: str) -> None:
    source = SOURCES[name]().train()
    state = copy.deepcopy(source.state_dict())
    before = {part: dict(vars(module)) for part, module in source.named_modules()}
    random = torch.get_rng_state()
    attack(name, source)(*batch(2)[:2])
    assert torch.equal(torch.get_rng_state(), random)
    for key, value in source.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert all(parameter.grad is None for parameter in source.parameters())
    for part, module in source.named_modules():
        assert vars(module).keys() == before[part].keys()
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        for key, value in vars(module).items():
            assert key.startswith("_") or value is before[part][key], (part, key)


@pytest.mark.parametrize("name", SOURCES)
def test_hooks_are_gone_after_an_error(name: str) -> None:
    source = SOURCES[name]()
    attributes = {part: dict(vars(module)) for part, module in source.named_modules()}
    final = [module for module in source.modules() if isinstance(module, nn.Linear)][-1]

    def failing(module: nn.Module, inputs: Any) -> None:
        raise RuntimeError("no memory")

    with final.register_forward_pre_hook(failing), pytest.raises(RuntimeError, match="no memory"):
        attack(name, source)(*batch(2)[:2])
    for part, module in source.named_modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert all(key.startswith("_") or value is attributes[part][key] for key, value in vars(module).items())


@pytest.mark.parametrize("name", SOURCES)
def test_a_gradient_of_zero_gives_no_step(name: str) -> None:
    source = SOURCES[name]()
    head = [part for part, module in source.named_modules() if isinstance(module, nn.Linear)][-1]
    for key, tensor in source.state_dict().items():
        if key.replace("/", ".").endswith(f"{head.removeprefix('module.')}.weight"):
            tensor.zero_()
    images, labels, _ = batch(2)
    assert torch.equal(attack(name, source)(images, labels), images)


@pytest.mark.parametrize("name", SOURCES)
def test_members_of_ensembles(name: str) -> None:
    source, (images, labels, _) = SOURCES[name](), batch(2)
    both = Ensemble([source, source], "losses")
    torch.testing.assert_close(attack(name, both)(images, labels), attack(name, source)(images, labels))


@pytest.mark.parametrize("name", SOURCES)
def test_models_that_are_not_known_are_refused(name: str) -> None:
    calls: list[int] = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES))
    model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=r"source: .*allowed") as raised:
        attack(name, model)
    assert "\n" not in str(raised.value)
    assert not calls


def test_every_particular_preset_that_operates_is_here() -> None:
    names = {name.lower() for name in surrogates.__all__}
    assert names == SOURCES.keys()
    assert names <= PARTICULAR
