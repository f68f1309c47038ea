from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alignfast.attacks import (
    Attack,
    Estimator,
    InputDiversity,
    Neighbors,
    Scales,
    SignStep,
    Smoothing,
    VarianceTuning,
    create,
)
from alignfast.attacks.component import Memory, Position
from alignfast.attacks.gradient import Gradient
from alignfast.draws import Draws
from alignfast.models import Classifier, Ensemble, as_classifier
from tests.attacks.samples import CHANNELS, CLASSES, GENERAL, SIDE, Halving, Network, build, labels_of, made, photos

RANDOM = ["pgd", "vmifgsm", "vnifgsm", "difgsm", "tifgsm"]
RANDOM += ["bsr", "decowa", "dem", "dim", "sia", "ssm"]
RANDOM += ["eotpgd", "ffgsm", "gra", "mumodig", "pgdl2", "pgn", "rap", "rfgsm", "smifgrm"]
RANDOM += ["cwpgd"]


@pytest.mark.parametrize("name", [*GENERAL, "everything"])
def test_an_image_is_attacked_alike_alone_and_in_any_batch(name: str) -> None:
    attack = made(name, Halving(), seed=9)
    images, labels, indices = photos(7), labels_of(7), torch.tensor([40, 2, 0, 2**31, 17, 5, 3])
    together = attack(images, labels, indices=indices)
    alone = torch.cat([attack(images[i : i + 1], labels[i : i + 1], indices=indices[i : i + 1]) for i in range(7)])
    assert torch.equal(alone, together)
    order = torch.tensor([3, 6, 0, 5, 1, 4, 2])
    assert torch.equal(attack(images[order], labels[order], indices=indices[order]), together[order])
    parts = [slice(0, 3), slice(3, 5), slice(5, 7)]
    split = torch.cat([attack(images[part], labels[part], indices=indices[part]) for part in parts])
    assert torch.equal(split, together)


@pytest.mark.parametrize("name", RANDOM)
def test_draws_belong_to_the_index_the_seed_and_nothing_else(name: str) -> None:
    images, labels = photos(1).expand(3, -1, -1, -1), torch.zeros(3, dtype=torch.int64)

    def attack(seed: int) -> Attack:
        # Wide enough for draws to turn signs.
        return build(name, Halving(), eps=0.5, alpha=0.05, steps=6, seed=seed)

    first = attack(seed=1)(images, labels)
    assert torch.equal(attack(seed=1)(images, labels), first)
    assert torch.equal(attack(seed=1)(images, labels, indices=torch.arange(3)), first)
    for other in (2, 1 + 2**32):
        assert not torch.equal(attack(seed=other)(images, labels), first)
    # The same image under three indices.
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])
    assert not torch.equal(first[1], first[2])
    same = attack(seed=1)(images, labels, indices=torch.zeros(3, dtype=torch.int64))
    assert torch.equal(same[1], same[0])
    assert torch.equal(same[2], same[0])


@pytest.mark.parametrize("name", [name for name in GENERAL if name not in RANDOM])
def test_the_seed_is_nothing_to_attacks_without_draws(name: str) -> None:
    images, labels = photos(2), labels_of(2)
    assert torch.equal(build(name, Halving(), seed=1)(images, labels), build(name, Halving(), seed=2)(images, labels))


@pytest.mark.parametrize("name", ["sinifgsm", "vmifgsm", "vnifgsm", "everything"])
@pytest.mark.parametrize("max_batch", [1, 4, 7, 1000])
def test_max_batch_changes_memory_only(name: str, max_batch: int) -> None:
    whole, chunked = Halving(), Halving()
    images, labels = photos(2), labels_of(2)
    expected = made(name, whole, seed=4)(images, labels)
    adv = made(name, chunked, seed=4, max_batch=max_batch)(images, labels)
    assert torch.equal(adv, expected)
    assert max(chunked.batches) <= max(max_batch, 2)
    assert sum(chunked.batches) == sum(whole.batches)
    assert all(size % 2 == 0 for size in chunked.batches)


def test_copies_go_together_up_to_max_batch() -> None:
    model = Halving()
    attack = create("sinifgsm", model, steps=1, m=5, max_batch=5)
    attack(photos(2), labels_of(2))
    assert model.batches == [4, 4, 2]
    model.batches.clear()
    create("sinifgsm", model, steps=2, m=5)(photos(2), labels_of(2))
    # The first pass is measured.
    assert model.batches == [2, 8, 10]
    model.batches.clear()
    create("vmifgsm", model, steps=2, N=3, max_batch=4)(photos(2), labels_of(2))
    # The variance after the last step would be of no use.
    assert model.batches == [2, 4, 2, 2]


def test_two_images_have_their_own_geometry_and_noise() -> None:
    seen: list[Tensor] = []

    class Recording(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images.detach())
            return images.flatten(1)[:, :CLASSES]

    images = torch.full((4, 1, 30, 30), 0.5, dtype=torch.float64)
    attack = Attack(Recording(), 0.1, 0.05, 2, transforms=[InputDiversity(0.5, 1.0)])
    attack(images, torch.zeros(4, dtype=torch.int64))
    covered = [[(int((one > 0).sum()), int((one > 0).nonzero()[0, 1])) for one in shown] for shown in seen]
    assert len(set(covered[0])) == 4
    assert covered[0] != covered[1]


@pytest.mark.parametrize("name", [*GENERAL, "everything"])
def test_nothing_outside_is_changed(name: str) -> None:
    torch.manual_seed(0)
    model = Network().train()
    model.layers[1].eval()
    model.layers[0].weight.requires_grad_(False)
    model.layers[5].bias.grad = torch.full((CLASSES,), 7.0)
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    images, labels, indices = photos(3, torch.float32), labels_of(3), torch.tensor([4, 9, 2])
    before = [tensor.clone() for tensor in (images, labels, indices)]
    random = torch.get_rng_state()
    adv = made(name, model)(images, labels, indices=indices)
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(model.modes)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert torch.equal(model.layers[5].bias.grad, torch.full((CLASSES,), 7.0))
    assert all(p.grad is None for p in model.parameters() if p is not model.layers[5].bias)
    for tensor, was in zip((images, labels, indices), before, strict=True):
        assert torch.equal(tensor, was)
        assert not tensor.requires_grad
    assert adv.data_ptr() != images.data_ptr()
    assert not adv.requires_grad


def test_modes_come_back_after_an_error() -> None:
    class Failing(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise RuntimeError("no memory")

    model = Failing().train()
    with pytest.raises(RuntimeError, match="no memory"):
        create("bim", model)(photos(1), labels_of(1))
    assert model.training


def test_no_gradient_is_asked_of_the_caller() -> None:
    images, labels = photos(2), labels_of(2)
    expected = create("mifgsm", Halving())(images, labels)
    with torch.no_grad():
        assert torch.equal(create("mifgsm", Halving())(images, labels), expected)
    leaf = images.clone().requires_grad_()
    adv = create("mifgsm", Halving())(leaf, labels)
    assert torch.equal(adv, expected)
    assert not adv.requires_grad
    assert leaf.grad is None


def test_a_bare_module_is_a_classifier_without_normalisation() -> None:
    images, labels = photos(2), labels_of(2)
    bare = create("nifgsm", Halving())(images, labels)
    assert torch.equal(create("nifgsm", Classifier(Halving(), num_classes=CLASSES))(images, labels), bare)


@pytest.mark.parametrize("name", GENERAL)
def test_memory_layout_and_empty_batches(name: str) -> None:
    attack = build(name, Halving())
    images, labels = photos(2), labels_of(2)
    expected = attack(images, labels)
    interleaved = attack(images.to(memory_format=torch.channels_last), labels)
    # A norm is summed in the order of memory, and no sign hides its last bit.
    torch.testing.assert_close(interleaved, expected, rtol=0, atol=0 if attack.step.norm == "linf" else 1e-14)
    empty = attack(images[:0], labels[:0])
    assert empty.shape == (0, CHANNELS, SIDE, SIDE)
    assert empty.dtype == images.dtype


class Recorder(Estimator):
    """Keeps the gradients it is given."""

    passes = 1

    def __init__(self) -> None:
        self.grads: list[Tensor] = []

    def estimate(self, gradient: Gradient, position: Position, memory: Memory) -> Tensor:
        self.grads.append(gradient(position.point))
        return self.grads[-1]


def softmax(z: Tensor) -> Tensor:
    return z.exp() / z.exp().sum(1, keepdim=True)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("combine", ["logits", "probabilities", "losses"])
def test_ensemble_gradients(combine: Any, targeted: bool) -> None:
    """Against derivatives by hand: linear members with normalisations of their own, z_i = W_i (x - m_i) / s_i."""
    generator = torch.Generator().manual_seed(8)
    size, members, weights = CHANNELS * SIDE * SIDE, [], []
    for std in (0.5, 2.0, 1.25):
        weight = torch.randn((CLASSES, size), generator=generator, dtype=torch.float64) / 8
        layer = nn.Linear(size, CLASSES, bias=False, dtype=torch.float64)
        layer.weight.data.copy_(weight)
        members.append(Classifier(nn.Sequential(nn.Flatten(), layer), (0.25, 0.25), (std, std), CLASSES))
        weights.append(weight / std)
    x, labels = photos(4), labels_of(4)
    z = [(x.flatten(1) - 0.25) @ w.T for w in weights]
    one_hot = torch.eye(CLASSES, dtype=torch.float64)[labels]
    if combine == "logits":
        expected = (softmax(sum(z) / 3) - one_hot) @ (sum(weights) / 3)
    elif combine == "losses":
        expected = sum((softmax(zi) - one_hot) @ wi for zi, wi in zip(z, weights, strict=True)) / 3
    else:
        right = [softmax(zi)[range(4), labels] for zi in z]
        share = [p / sum(right) for p in right]
        terms = zip(share, z, weights, strict=True)
        expected = sum(s[:, None] * ((softmax(zi) - one_hot) @ wi) for s, zi, wi in terms)
    expected = (-expected if targeted else expected).reshape(x.shape)

    recorder = Recorder()
    source = Ensemble(members, combine)
    made = create("fgsm", source, eps=0.1, targeted=targeted)
    adv = Attack(source, 0.1, 0.1, 1, estimator=recorder, objective=made.objective)(x, labels)
    torch.testing.assert_close(recorder.grads[0], expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(adv, (x + 0.1 * expected.sign()).clamp(0, 1), rtol=0, atol=1e-12)
    assert torch.equal(made(x, labels), adv)


@pytest.mark.parametrize("combine", ["logits", "probabilities", "losses"])
@pytest.mark.parametrize("name", GENERAL)
def test_an_ensemble_of_one_is_its_member(name: str, combine: Any) -> None:
    images, labels = photos(2), labels_of(2)
    alone = build(name, Halving())(images, labels)
    torch.testing.assert_close(build(name, Ensemble([Halving()], combine))(images, labels), alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("combine", ["logits", "probabilities", "losses"])
def test_members_see_the_same_views(combine: Any) -> None:
    seen: dict[int, list[Tensor]] = {0: [], 1: []}

    class Recording(nn.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number

        def forward(self, images: Tensor) -> Tensor:
            seen[self.number].append(images.detach())
            return images.flatten(1)[:, :CLASSES]

    build("difgsm", Ensemble([Recording(0), Recording(1)], combine))(photos(2), labels_of(2))
    assert len(seen[0]) == len(seen[1]) == 4
    assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[1], strict=True))


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, images: Tensor) -> Tensor:
        self.count += 1
        return images.flatten(1)[:, :CLASSES]


NAN = photos(2).index_fill(2, torch.tensor([3]), float("nan"))
BAD_CALLS: dict[str, tuple[Any, Any, Any, type[Exception], str]] = {
    "no tensor": (photos(2).numpy(), labels_of(2), None, TypeError, "images: got ndarray"),
    "one image": (photos(2)[0], labels_of(2), None, ValueError, r"images: got shape \[2, 8, 8\]"),
    "channels": (photos(2)[:, :1], labels_of(2), None, ValueError, r"images: got shape \[2, 1, 8, 8\]"),
    "size": (photos(2)[:, :, 1:], labels_of(2), None, ValueError, r"images: got shape \[2, 2, 7, 8\]"),
    "uint8": ((photos(2) * 255).byte(), labels_of(2), None, ValueError, "images: got dtype torch.uint8"),
    "half": (photos(2).half(), labels_of(2), None, ValueError, "images: got dtype torch.float16"),
    "bfloat16": (photos(2).bfloat16(), labels_of(2), None, ValueError, "images: got dtype torch.bfloat16"),
    "nan": (NAN, labels_of(2), None, ValueError, "images: contains NaN"),
    "above": (photos(2) * 255, labels_of(2), None, ValueError, r"images: values span .*; allowed is \[0, 1\]"),
    "below": (photos(2) - 0.5, labels_of(2), None, ValueError, "images: values span"),
    "infinite": (photos(2) / 0, labels_of(2), None, ValueError, "images: values span"),
    "label list": (photos(2), [0, 1], None, TypeError, "labels: got list"),
    "label dtype": (photos(2), labels_of(2).int(), None, ValueError, "labels: got dtype torch.int32"),
    "label floats": (photos(2), labels_of(2).float(), None, ValueError, "labels: got dtype torch.float32"),
    "label count": (photos(2), labels_of(3), None, ValueError, r"labels: got shape \[3\]; allowed is \[2\]"),
    "one-hot": (photos(2), torch.eye(2).long(), None, ValueError, r"labels: got shape \[2, 2\]"),
    "label range": (
        photos(2),
        torch.tensor([0, CLASSES]),
        None,
        ValueError,
        r"labels: values span \[0, 3\]; allowed is \[0, 2\]",
    ),
    "negative label": (photos(2), torch.tensor([0, -100]), None, ValueError, r"labels: values span \[-100, 0\]"),
    "index dtype": (photos(2), labels_of(2), torch.tensor([0.0, 1.0]), ValueError, "indices: got dtype torch.float32"),
    "index count": (
        photos(2),
        labels_of(2),
        torch.arange(3),
        ValueError,
        r"indices: got shape \[3\]; allowed is \[2\]",
    ),
    "index shape": (photos(2), labels_of(2), torch.arange(2)[:, None], ValueError, r"indices: got shape \[2, 1\]"),
    "negative index": (photos(2), labels_of(2), torch.tensor([0, -1]), ValueError, r"indices: values span \[-1, 0\]"),
    "large index": (photos(2), labels_of(2), torch.tensor([0, 2**32]), ValueError, "indices: values span"),
    "index list": (photos(2), labels_of(2), [0, 1], TypeError, "indices: got list"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_is_refused_before_the_model_runs(case: str) -> None:
    images, labels, indices, error, message = BAD_CALLS[case]
    module = Counting()
    source = Classifier(module, (0.5, 0.5), (0.5, 0.5), CLASSES, (CHANNELS, SIDE, SIDE))
    with pytest.raises(error, match=message) as raised:
        create("pgd", source)(images, labels, indices=indices)
    assert "\n" not in str(raised.value)
    assert module.count == 0


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"eps": -0.1}, "eps: got -0.1"),
        ({"eps": 8}, r"eps: got 8; allowed is a number in \[0, 1\]"),
        ({"eps": float("nan")}, "eps: got nan"),
        ({"eps": "8/255"}, "eps: got '8/255'"),
        ({"alpha": -1e-9}, "alpha: got -1e-09"),
        ({"alpha": 2}, "alpha: got 2"),
        ({"alpha": float("inf")}, "alpha: got inf"),
        ({"steps": 0}, "steps: got 0; allowed is a whole number, at least 1"),
        ({"steps": 2.5}, "steps: got 2.5"),
        ({"steps": True}, "steps: got True"),
        ({"seed": -1}, "seed: got -1"),
        ({"seed": 2**64}, "seed: got 18446744073709551616"),
        ({"max_batch": 0}, "max_batch: got 0"),
    ],
)
def test_numbers_outside_their_range_are_refused(parameters: dict[str, Any], message: str) -> None:
    module = Counting()
    with pytest.raises(ValueError, match=message):
        create("bim", module, **parameters)
    with pytest.raises(ValueError, match=message):
        Attack(module, **({"eps": 0.1, "alpha": 0.1, "steps": 1} | parameters))
    assert module.count == 0


@pytest.mark.parametrize("name", GENERAL)
def test_every_preset_checks_eps_and_source(name: str) -> None:
    with pytest.raises(ValueError, match=r"eps: got -0\.1"):
        create(name, Counting(), eps=-0.1)
    with pytest.raises(TypeError, match=r"model: got function; allowed is a torch\.nn\.Module"):
        create(name, lambda images: images.flatten(1))


def test_too_many_transforms_or_copies_are_refused() -> None:
    module = Counting()
    with pytest.raises(ValueError, match="transforms: got 29; allowed are at most 28"):
        Attack(module, 0.1, 0.1, 1, transforms=[Scales(1)] * 29)
    with pytest.raises(ValueError, match="transforms: 131072 copies an image; allowed are at most 65536"):
        Attack(module, 0.1, 0.1, 1, transforms=[Neighbors(2**8, 0.1), Neighbors(2**9, 0.1)])
    half = [Neighbors(2**8, 0.1), Neighbors(2**7, 0.1)]
    with pytest.raises(ValueError, match="transforms: 131072 copies an image; allowed are at most 65536"):
        Attack(module, 0.1, 0.1, 1, transforms=half, estimator=VarianceTuning(3))
    assert module.count == 0


def test_as_many_transforms_as_are_allowed() -> None:
    """The last of them still has draws of its own, also behind the neighbours of variance tuning."""
    chain = [Neighbors(1, 0.01)] * 28
    attack = Attack(Halving(), 0.1, 0.05, 2, transforms=chain, estimator=VarianceTuning(2, 1.5))
    assert attack(photos(2), labels_of(2)).shape == (2, CHANNELS, SIDE, SIDE)


def test_parameters_are_numbers_and_text() -> None:
    attack = create("difgsm", Halving(), eps=0.1, seed=3)
    parameters = attack.parameters()
    assert "source" not in parameters
    assert {key: parameters[key] for key in ("eps", "steps", "seed", "max_batch")} == {
        "eps": 0.1,
        "steps": 10,
        "seed": 3,
        "max_batch": None,
    }
    assert parameters["transforms"] == "[InputDiversity(rate=0.9, p=0.5, copies=1)]"
    assert create("difgsm", Halving(), eps=0.1, seed=3).parameters() == parameters
    assert create("difgsm", Halving(), eps=0.1, seed=3, diversity_prob=0.4).parameters() != parameters


def test_any_combination_can_be_built_by_hand() -> None:
    """Hand-built presets equal the named ones."""
    images, labels, model = photos(2), labels_of(2), Halving()
    base = {"eps": 8 / 255, "alpha": 2 / 255, "steps": 10, "seed": 2}
    by_hand = {
        "vnifgsm": Attack(model, **base, estimator=VarianceTuning(5, 1.5), step=SignStep(1.0, nesterov=True)),
        "sinifgsm": Attack(model, **base, transforms=[Scales(5)], step=SignStep(1.0, nesterov=True)),
        "tifgsm": Attack(
            model, **base, transforms=[InputDiversity(0.9, 0.5)], shaping=[Smoothing("gaussian", 15, 3.0)]
        ),
        "pgd": Attack(model, **base, random_start=True),
    }
    for name, attack in by_hand.items():
        assert torch.equal(attack(images, labels), create(name, model, seed=2)(images, labels)), name
    assert as_classifier(model).module is model


def test_no_two_draws_of_a_step_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither two components nor two passes of variance tuning share a draw."""
    drawn: list[tuple[int, int, int]] = []
    original = Draws.purpose

    def purpose(self: Draws, number: int) -> int:
        key = original(self, number)
        drawn.extend((int(self.step), int(copy), key) for copy in self.copies)
        return key

    monkeypatch.setattr(Draws, "purpose", purpose)
    chain = [InputDiversity(0.9, 0.5), Neighbors(2, 0.01)]
    attack = Attack(Halving(), 0.1, 0.05, 2, transforms=chain, estimator=VarianceTuning(2, 1.5))
    attack(photos(2), labels_of(2))
    # Two views, 4 draws of the diversity and one of the noise each; the first step has a second pass over both views
    # of both neighbours, behind one draw for each neighbour.
    assert len(drawn) == 2 * 5 + (2 + 4 * 5) + 2 * 5
    assert len(set(drawn)) == len(drawn)
