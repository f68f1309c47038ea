"""Presets that need a source or an objective of their own, on images of one pixel or one colour, and on one class."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from alignfast.attacks import create, parameters_of
from alignfast.models import Classifier, Ensemble
from alignfast.surrogates import Collection
from tests.attacks.samples import PARAMETERS, PARTICULAR
from tests.surrogates.nets import Cifar

EPS, ALPHA = 0.2, 0.07
TARGETED = {"potrip"}
FEATURES = {"fia", "ila", "naa", "rpa", "tap"}
TRANSFORMERS = {"pna_patchout", "sapr", "tgr"}
ENSEMBLES = {"adaea", "cwa", "svre"}
FEW = {"fia": {"num_ens": 2}, "rpa": {"num_ens": 2}, "naa": {"N": 2}, "pna_patchout": {"crop_length": 1}}
FEW["pna_patchout"]["sample_num_patches"] = 1

IMAGES = {
    "one pixel": torch.tensor([0.0, 0.5, 1.0, 0.3])[:, None, None, None].expand(4, 3, 1, 1),
    "one colour": torch.tensor([0.0, 0.5, 1.0, 0.3])[:, None, None, None].expand(4, 3, 6, 6),
}


def shallow(side: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * side * side, classes))


def residual(side: int, classes: int) -> nn.Module:
    model = Cifar()
    model.linear = nn.Linear(16, classes)
    return model


def transformer(side: int, classes: int) -> nn.Module:
    return VisionTransformer(img_size=side, patch_size=1, num_classes=classes, embed_dim=12, depth=2, num_heads=2)


def collection(side: int, classes: int) -> nn.Module:
    model = residual(side, classes)
    return Collection(Classifier(model), {key: torch.stack([value] * 2) for key, value in model.state_dict().items()})


def source_of(name: str, side: int, classes: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        if name in ENSEMBLES:
            return Ensemble([shallow(side, classes) for _ in range(2)]).double().eval()
        make = {"lgv": collection} | dict.fromkeys(TRANSFORMERS, transformer)
        make |= dict.fromkeys(("bpa", "faug", "ghostnetwork", "linbp", "sgm"), residual)
        return make.get(name, shallow)(side, classes).double().eval()


def attacked(name: str, images: Tensor, labels: Tensor, classes: int) -> Tensor:
    numbers = {"eps": EPS, "alpha": ALPHA, "steps": 3, "targeted": name in TARGETED}
    numbers |= PARAMETERS.get(name, {}) | FEW.get(name, {})
    numbers |= {"layer": "0", "layers": ["0"]} if name in FEATURES else {}
    numbers["pool"] = torch.rand(images.shape, generator=torch.Generator().manual_seed(3), dtype=images.dtype)
    source = source_of(name, images.shape[-1], classes)
    known: dict[str, Any] = {key: value for key, value in numbers.items() if key in parameters_of(name)}
    return create(name, source, **known)(images, labels)


@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("name", sorted(PARTICULAR))
def test_they_stay_finite_and_in_the_ball(name: str, kind: str, classes: int) -> None:
    images = IMAGES[kind].double()
    if name == "potrip" and classes == 1:
        with pytest.raises(ValueError, match="source: got 1 classes; allowed are at least 2 for Po"):
            attacked(name, images, torch.zeros(4, dtype=torch.int64), classes)
        return
    adv = attacked(name, images, torch.arange(4) % classes, classes)
    assert adv.shape == images.shape
    assert bool(((adv >= 0) & (adv <= 1)).all())
    assert (adv - images).abs().max() <= EPS + 1e-12


@pytest.mark.parametrize("name", sorted(PARTICULAR - {"ops"}))
def test_an_image_of_one_colour_is_attacked(name: str) -> None:
    """But for those that integrated gradients, whose share of black is none, leave black."""
    images = IMAGES["one colour"].double()
    moved = (attacked(name, images, torch.arange(4) % 4, 4) - images).flatten(1).any(1)
    assert moved.tolist() == [name != "taig", True, True, True]
