"""Every preset in half precision, through `prepare`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from alignfast.attacks import PRESETS, Attack, create, parameters_of
from alignfast.models import Classifier, Ensemble, prepare
from alignfast.surrogates import Collection
from tests.attacks.samples import PARAMETERS

SIDE, CLASSES = 32, 10
LABELS = torch.tensor([3, 8])
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
# Presets that need a source of their own kind, and those that only reach for a class.
KINDS = {"adaea": "ensemble", "cwa": "ensemble", "svre": "ensemble", "lgv": "collection"}
KINDS |= dict.fromkeys(("tgr", "pna_patchout", "sapr"), "transformer")
TARGETED = {"potrip"}
SMALL = {"pna_patchout": {"crop_length": 8, "sample_num_patches": 8}}
# The least cosine between the ways, where signs of small gradients, which rounding turns, decide more than a pixel: of
# warps, of steps that are passed on to neighbours, and of small steps from member to member. TPGD's first gradient, a
# hair from the clean prediction, is that of a difference which half precision does not hold, so that only its way's
# being there is asked for.
LEAST = {"cwa": 0.7, "decowa": 0.4, "pifgsm": 0.7, "pifgsmpp": 0.6, "tpgd": -1.0}


def images() -> torch.Tensor:
    return torch.rand((2, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(4))


def network(name: str = "test_resnet", seed: int = 0, **options: Any) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Classifier(timm.create_model(name, num_classes=CLASSES, **options), MEAN, STD, CLASSES).eval()


def collection() -> Collection:
    first, second = network(seed=0), network(seed=1)
    states = [model.module.state_dict() for model in (first, second)]
    return Collection(first, {name: torch.stack([state[name] for state in states]) for name in states[0]})


SOURCES: dict[str, Callable[[], Classifier]] = {
    "network": network,
    "transformer": lambda: network("test_vit", img_size=SIDE, patch_size=8),
    "ensemble": lambda: Ensemble([network(seed=0), network(seed=1)]),
    "collection": collection,
}


def attack(name: str, source: nn.Module) -> Attack:
    numbers = (
        {"eps": 0.1, "alpha": 0.03, "targeted": name in TARGETED}
        | PARAMETERS.get(name, {})
        | SMALL.get(name, {})
        | {"steps": 2}
    )
    numbers["pool"] = torch.rand((2, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(6))
    return create(name, source, **{key: value for key, value in numbers.items() if key in parameters_of(name)})


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", sorted(PRESETS))
def test_half_precision_goes_where_float32_goes(name: str, precision: Any) -> None:
    source, x = SOURCES[KINDS.get(name, "network")](), images()
    half = prepare(source, x, precision)
    assert not torch.equal(half(x), source(x))
    moved = attack(name, half)(x, LABELS) - x
    wanted = attack(name, source)(x, LABELS) - x
    assert moved.dtype == torch.float32
    assert moved.isfinite().all()
    assert bool(moved.flatten(1).any(1).all())
    assert cosine_similarity(moved.flatten(1), wanted.flatten(1)).min() > LEAST.get(name, 0.8)
