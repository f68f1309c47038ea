import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from alignfast.models import Classifier, Ensemble, fingerprint
from tests import cases

NORMALISATION = [((0.4, 0.5, 0.6), (0.2, 0.25, 0.3)), (None, None), ((0.5,) * 3, (0.5,) * 3)]


def members(scale=1.0, **options):
    models = []
    for seed, (mean, std) in enumerate(NORMALISATION):
        torch.manual_seed(seed)
        inner = nn.Sequential(nn.Flatten(), nn.Linear(75, 7))
        with torch.no_grad():
            inner[1].weight.mul_(scale)
        models.append(Classifier(inner, mean, std, **options).double())
    return models


def normalised(x, model):
    if model.mean is None:
        return x
    return (x - model.mean[:, None, None]) / model.std[:, None, None]


def each(models, x):
    """[members, N, classes] from the members' own modules, each behind its own normalisation."""
    return torch.stack([model.module(normalised(x, model)) for model in models])


@pytest.mark.parametrize("scale", [1.0, 3000.0])
def test_means_are_those_of_the_definitions(scale):
    models, x = members(scale), cases.random((6, 3, 5, 5), 1)
    logits = each(models, x)
    torch.testing.assert_close(Ensemble(models)(x), logits.mean(0))
    for combine in ("probabilities", "losses"):
        probabilities = Ensemble(models, combine)(x).exp()
        torch.testing.assert_close(probabilities, logits.softmax(-1).mean(0))
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize("combine", ["logits", "probabilities", "losses"])
def test_what_an_attack_averages(combine):
    models, x, labels = members(), cases.random((6, 3, 5, 5), 2), cases.integers((6,), 3, 0, 7)
    x.requires_grad_()
    logits = each(models, x)
    wanted = {
        "logits": cross_entropy(logits.mean(0), labels),
        "probabilities": -logits.softmax(-1).mean(0)[range(6), labels].log().mean(),
        "losses": torch.stack([cross_entropy(one, labels) for one in logits]).mean(),
    }[combine]
    ensemble = Ensemble(models, combine)
    heads = ensemble.heads(lambda mean, std, *_: x if mean is None else (x - mean[:, None, None]) / std[:, None, None])
    assert heads.shape == (3 if combine == "losses" else 1, 6, 7)
    loss = torch.stack([cross_entropy(head, labels) for head in heads]).mean()
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], torch.autograd.grad(wanted, x)[0])


def test_a_single_member_is_itself():
    (model, *_), x = members(), cases.random((4, 3, 5, 5), 4)
    torch.testing.assert_close(Ensemble([model])(x), model(x))
    torch.testing.assert_close(Ensemble([model], "probabilities")(x), model(x).log_softmax(-1))


def test_underflowing_probabilities_stay_finite():
    one, other = nn.Flatten(), nn.Flatten()
    x = torch.zeros(1, 3, 1, 1)
    ensemble = Ensemble([one, other], "probabilities")
    logits = ensemble.logits_of(lambda mean, std, *_: x + torch.tensor([0.0, 2000.0, -2000.0])[None, :, None, None])
    torch.testing.assert_close(logits, torch.tensor([[-2000.0, 0.0, -4000.0]]))


def test_it_takes_plain_modules_and_what_members_agree_on():
    plain = nn.Sequential(nn.Flatten(), nn.Linear(75, 7))
    known = Classifier(plain, num_classes=7, input_size=(3, 5, 5))
    ensemble = Ensemble([plain, known])
    assert (ensemble.num_classes, ensemble.input_size) == (7, (3, 5, 5))
    assert ensemble.mean is None
    with pytest.raises(ValueError, match=r"images: got shape \[1, 3, 6, 5\]"):
        ensemble(torch.zeros(1, 3, 6, 5))
    with pytest.raises(ValueError, match="images: values span"):
        ensemble(torch.full((1, 3, 5, 5), 2.0))


def test_copies_and_moves_reach_the_members():
    ensemble = Ensemble(members())
    twin = copy.deepcopy(ensemble).float()
    assert all(member is module for member, module in zip(twin.members, twin.module, strict=True))
    assert twin.members[0].mean.dtype == torch.float32
    assert ensemble.members[0].mean.dtype == torch.float64
    assert twin(torch.zeros(2, 3, 5, 5)).dtype == torch.float32


def test_the_fingerprint_knows_the_normalisation_of_members_and_how_they_are_combined():
    base = fingerprint(Ensemble(members()))
    assert fingerprint(Ensemble(members())) == base
    assert fingerprint(Ensemble(members(), "losses")) != base
    others = members()
    others[0].mean[1] += 0.1
    assert fingerprint(Ensemble(others)) != base
    others = members()
    others[2].module[1].bias.data[3] += 0.1
    assert fingerprint(Ensemble(others)) != base


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "members: got none; allowed is at least one model"),
        ((members(), "logit"), "combine: got 'logit' .*did you mean 'logits'"),
        (([*members(num_classes=7), Classifier(nn.Flatten(), num_classes=75)],), "members: their num_classes differ"),
        (
            ([*members(input_size=(3, 5, 5)), Classifier(nn.Flatten(), input_size=(3, 5, 6))],),
            r"members: their input_size differ: \[\(3, 5, 5\), \(3, 5, 6\)\]",
        ),
    ],
)
def test_bad_members_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Ensemble(*arguments)
    with pytest.raises(TypeError, match=r"^model: got str"):
        Ensemble(["timm:resnet18"])


def test_losses_are_never_below_those_of_mean_probabilities():
    """Jensen: the mean of the losses is at least the loss of the mean."""
    models, x, labels = members(20.0), cases.random((16, 3, 5, 5), 5), cases.integers((16,), 6, 0, 7)
    combined = cross_entropy(Ensemble(models, "losses")(x), labels, reduction="none")
    mean = torch.stack([cross_entropy(model(x), labels, reduction="none") for model in models]).mean(0)
    assert bool((combined <= mean + 1e-12).all())
    assert bool((combined >= mean - math.log(3) * 20).any())


def test_members_that_do_not_say_their_classes_are_refused_by_their_logits():
    models = [nn.Sequential(nn.Flatten(), nn.Linear(75, classes)) for classes in (7, 5)]
    with pytest.raises(ValueError, match=r"members: their numbers of classes differ: \[7, 5\]; allowed is one for all"):
        Ensemble(models)(torch.rand(2, 3, 5, 5))
