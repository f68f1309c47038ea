"""Collections against models that were given one set of weights each, and LGV against SGD written out."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from alignfast.attacks import create
from alignfast.draws import SOURCE_SLOT, Draws
from alignfast.models import Classifier, Ensemble, fingerprint
from alignfast.ops import philox_uniform
from alignfast.surrogates import Collection, SkipGradient, lgv, surrogate
from tests.surrogates.nets import CLASSES, collection, input_gradient, net, photos

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
COUNT, SEED = 5, 31


def model_of(number: int) -> Classifier:
    """The model with one of the sets as its own weights."""
    whole = collection(COUNT)
    module = copy.deepcopy(whole.module)
    module.load_state_dict({name: stack[number] for name, stack in whole.stacks().items()})
    return Classifier(module, MEAN, STD, CLASSES).eval().double()


def attacked(source: Classifier, images: Tensor, step: Any, copies: list[int], indices: list[int]) -> Tensor:
    draws = Draws(SEED, step, torch.tensor(indices), torch.tensor(copies), SOURCE_SLOT)
    mean, std = torch.tensor(MEAN).double()[:, None, None], torch.tensor(STD).double()[:, None, None]
    return source.logits_of(lambda *args, **options: (images - mean) / std, draws)


def set_of(step: int, passed: int = 0) -> int:
    """The last of the source's eight draws, of image 0 and the first copy of the pass, orders the sets anew in every
    round through them."""
    drawn = philox_uniform(
        torch.tensor([0]),
        torch.tensor([65536 * passed]),
        (COUNT,),
        seed=SEED,
        step=step // COUNT,
        purpose=8 * SOURCE_SLOT + 7,
    ).flatten()
    return sorted(range(COUNT), key=drawn.tolist().__getitem__)[step % COUNT]


def test_outside_an_attack_logits_are_the_mean() -> None:
    images = photos("cifar")
    expected = torch.stack([model_of(number)(images) for number in range(COUNT)]).mean(0)
    torch.testing.assert_close(collection(COUNT)(images), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("tensor", [False, True])
def test_every_pass_takes_a_set(tensor: bool) -> None:
    whole, images, numbers = collection(COUNT), photos("cifar", 4), []
    for step in range(2 * COUNT):
        for passed in (0, 2):
            number = set_of(step, passed)
            expected = model_of(number).logits(images)
            copies = [65536 * passed + 3, 65536 * passed + 9]
            logits = attacked(whole, images, torch.tensor(step) if tensor else step, copies, [905, 3])
            torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-7)
            numbers.append(number)
    rounds = [numbers[0 : 2 * COUNT : 2], numbers[2 * COUNT :: 2], numbers[1 : 2 * COUNT : 2]]
    assert all(sorted(one) == list(range(COUNT)) for one in rounds)
    assert len({tuple(one) for one in rounds}) == 3


def test_surgery_on_a_collection() -> None:
    images = photos("cifar")
    weak = surrogate(collection(COUNT), SkipGradient(0.2))
    expected = input_gradient(surrogate(model_of(set_of(7)), SkipGradient(0.2)).logits, images)
    gradient = input_gradient(lambda x: attacked(weak, x, 7, [0], [1, 2]), images)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-9)
    assert fingerprint(weak) == fingerprint(collection(COUNT)) != fingerprint(collection(COUNT + 1))
    attack = create("sgm+lgv", collection(COUNT), gamma=0.2, steps=2)
    assert attack(images, torch.tensor([0, 1])).shape == images.shape


def test_moving_what_has_surgery_moves_the_collection() -> None:
    whole = collection(COUNT)
    surrogate(whole, SkipGradient(0.2)).to("meta")
    assert {tensor.device.type for tensor in [*whole.parameters(), *whole.buffers()]} == {"meta"}


def test_files(tmp_path: Path) -> None:
    whole, path = collection(COUNT), tmp_path / "sets.safetensors"
    whole.save(path)
    source = Classifier(net("cifar"), MEAN, STD, CLASSES)
    again = Collection.load(source, path).double().eval()
    assert fingerprint(again) == fingerprint(whole)
    assert torch.equal(again(photos("cifar")), whole(photos("cifar")))
    assert len(again) == COUNT
    wrapped = nn.Sequential()
    wrapped.add_module("module", net("cifar"))
    sets = {f"module.{name}": stack for name, stack in whole.stacks().items()}
    Collection(wrapped, sets).save(path)
    assert Collection.load(wrapped, path).stacks().keys() == wrapped.state_dict().keys()
    with pytest.raises(ValueError, match=r"sets: 52 tensors of .* sets do not fit"):
        Collection.load(net("plain"), path)
    with pytest.raises(ValueError, match=r"path: got .*; allowed is a name that ends in .safetensors"):
        whole.save(tmp_path / "sets.pt")


def test_sets_that_do_not_fit() -> None:
    source, sets = (
        Classifier(net("plain")),
        {name: torch.stack([x, x]) for name, x in net("plain").state_dict().items()},
    )
    bias = {"head.bias": sets["head.bias"][:1]}
    for wrong in ({}, dict(list(sets.items())[1:]), sets | bias, {k: x[:0] for k, x in sets.items()}):
        with pytest.raises(ValueError, match=r"sets: .* do not fit the 6 of the source"):
            Collection(source, wrong)
    for other in (Ensemble([source]), surrogate(net("cifar"), SkipGradient()), collection(2)):
        with pytest.raises(ValueError, match=r"source: got .*; allowed is a single model, as it is"):
            Collection(other, sets)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [(torch.rand((4, 3, 8, 8), generator=generator, dtype=torch.float64), torch.tensor([0, 4, 2, 1]))] * 2 + [
        (torch.rand((3, 3, 8, 8), generator=generator, dtype=torch.float64), torch.tensor([3, 3, 0]))
    ]


def test_lgv_is_sgd_with_a_constant_rate() -> None:
    source = Classifier(net("cifar"), MEAN, STD, CLASSES)
    before, modes = copy.deepcopy(source.state_dict()), [module.training for module in source.modules()]
    random = torch.get_rng_state()
    whole = lgv(source, batches(), lr=0.03, epochs=2, nb_models_epoch=2, wd=0.01, momentum=0.8, seed=4)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.state_dict().items())
    assert [module.training for module in source.modules()] == modes

    model = copy.deepcopy(source).train()
    velocity = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    kept = []
    for _ in range(2):
        for number, (images, labels) in enumerate(batches(), 1):
            grads = torch.autograd.grad(cross_entropy(model.logits(images), labels), list(model.parameters()))
            for (name, p), grad in zip(model.named_parameters(), grads, strict=True):
                velocity[name] = 0.8 * velocity[name] + grad + 0.01 * p.detach()
                p.data.sub_(0.03 * velocity[name])
            if number in (1, 3):
                kept.append(copy.deepcopy(model.module.state_dict()))
    assert len(whole) == len(kept) == 4
    for number, state in enumerate(kept):
        for name, stack in whole.stacks().items():
            # The loop's loss is of single precision.
            torch.testing.assert_close(stack[number], state[name], rtol=1e-5, atol=1e-6)
    assert whole.stacks()["layer1.0.bn1.num_batches_tracked"].tolist() == [1, 3, 4, 6]


def test_the_seed_counts_where_the_source_draws() -> None:
    source = Classifier(nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(192, CLASSES)).double())
    run = partial(lgv, source, batches(), epochs=1, nb_models_epoch=1)
    assert fingerprint(run(seed=1)) == fingerprint(run(seed=1)) != fingerprint(run(seed=2))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"nb_models_epoch": 4}, "nb_models_epoch: got 4; allowed is a whole number, 1 to 3"),
        ({"nb_models_epoch": 0}, "nb_models_epoch: got 0"),
        ({"epochs": 0}, "epochs: got 0"),
        ({"lr": 0.0}, "lr: got 0.0"),
        ({"wd": -1.0}, "weight_decay: got -1.0"),
        ({"loader": iter(())}, "loader: has no length"),
        ({"loader": []}, "loader: holds no batch"),
        ({"source": Ensemble([nn.Flatten()])}, "source: got Ensemble; allowed is a single model"),
        ({"source": nn.Flatten()}, "source: has no parameter that requires a gradient"),
    ],
)
def test_bad_numbers(numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lgv(**{"source": net("cifar"), "loader": batches(), "nb_models_epoch": 1} | numbers)
