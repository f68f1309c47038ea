"""Small models, images and attacks that several tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from alignfast.attacks import (
    PRESETS,
    Attack,
    InputDiversity,
    Neighbors,
    Scales,
    SignStep,
    Smoothing,
    VarianceTuning,
    create,
    parameters_of,
)

CHANNELS, SIDE, CLASSES = 2, 8, 3


class Halving(nn.Module):
    """A network whose arithmetic is elementwise throughout, so that no sum's order depends on the batch size."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        weight = torch.randn((CLASSES, CHANNELS * SIDE * SIDE), generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(weight)
        self.coupled = nn.Identity()
        self.batches: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        flat = images.flatten(1)
        # Couples the pixels of an image, so that a pixel's gradient depends on the others.
        flat = self.coupled(flat + 0.5 * flat * flat.roll(1, 1))
        return torch.stack([self._sum(flat * row) for row in self.weight], 1)

    def _sum(self, x: Tensor) -> Tensor:
        while x.shape[1] > 1:
            half = x.shape[1] // 2
            x = x[:, :half] + x[:, half:]
        return x[:, 0] / 8


def pool(count: int) -> Tensor:
    """To mix in."""
    return torch.rand((count, CHANNELS, SIDE, SIDE), generator=torch.Generator().manual_seed(6), dtype=torch.float64)


# What presets cannot do without, and small numbers of copies, for `Halving` and `Network` and their images.
PARAMETERS: dict[str, dict[str, Any]] = {
    "admix": {"num_scale": 2, "num_admix": 2, "admix_strength": 2.0, "pool": pool(3)},
    "anda": {"n_ens": 4},
    "bsr": {"num_scale": 2},
    "decowa": {"num_warping": 2, "rho": 0.5},
    "dem": {"resize_rates": (1.3, 1.6)},
    "dim": {"resize_rate": 1.5},
    "dta": {"K": 2, "u": 0.6},
    "emifgsm": {"num_sample": 3},
    "gifgsm": {"pre_epoch": 2},
    "gra": {"num_neighbor": 3},
    "ifgssm": {"stairs": 7},
    "maskblock": {"num_block": 2},
    "pgdl2": {"eps": 1.0, "alpha": 0.3},
    "smifgrm": {"num_neighbor": 3},
    "rap": {"adv_steps": 2, "alpha_n": 0.05, "epsilon_n": 0.5, "transpoint": 1},
    "mig": {"s_factor": 3},
    "ops": {"num_sample_neighbor": 2, "num_sample_operator": 1},
    "mumodig": {"N_trans": 2},
    "pcifgsm": {"K": 2},
    "pgn": {"num_neighbor": 2},
    "sia": {"num_scale": 2},
    "ssm": {"num_spectrum": 2},
    "taig": {"s_factor": 3},
    "usmm": {"num_scale": 2, "num_mix": 2, "pool": pool(3)},
}
# Attacks over several samples whose steps are more than signs, so that rounding shows: a model rounds differently with
# the size of its batch, which is another on the first pass.
UNSIGNED = {"smifgrm"}
# Presets that need a source of a kind of its own, or images on the device of those attacked, or that show too many
# views by default; their own tests have what they need.
PARTICULAR = {"admix", "ops", "usmm"}
PARTICULAR |= {"adaea", "cwa", "fia", "ila", "jitter", "logit", "naa", "potrip", "rpa", "svre", "taig", "tap", "tpgd"}
PARTICULAR |= {"bpa", "faug", "ghostnetwork", "lgv", "linbp", "pna_patchout", "sapr", "sgm", "tgr"}
GENERAL = [name for name in PRESETS if name not in PARTICULAR]


def photos(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand((count, CHANNELS, SIDE, SIDE), generator=torch.Generator().manual_seed(5), dtype=dtype)


def labels_of(count: int) -> Tensor:
    return torch.arange(count) % CLASSES


def build(name: str, model: nn.Module, **options: Any) -> Attack:
    numbers = {"eps": 0.1, "alpha": 0.03, "steps": 4} | PARAMETERS.get(name, {}) | options
    return create(name, model, **{key: value for key, value in numbers.items() if key in parameters_of(name)})


def everything(model: nn.Module, **options: Any) -> Attack:
    """All components at once, and two that draw for every copy."""
    return Attack(
        model,
        eps=0.1,
        alpha=0.03,
        steps=3,
        transforms=[InputDiversity(0.7, 0.7), Scales(2), Neighbors(2, 0.05), InputDiversity(1.3, 0.7)],
        shaping=[Smoothing("linear", 3)],
        estimator=VarianceTuning(2, 1.5),
        step=SignStep(1.0, nesterov=True),
        random_start=True,
        **options,
    )


def made(name: str, model: nn.Module, **options: Any) -> Attack:
    return everything(model, **options) if name == "everything" else build(name, model, **options)


class Network(nn.Module):
    """Batch norm, dropout and a module that was put into evaluation mode by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(CHANNELS, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(144, CLASSES)
        )
        self.modes: list[bool] = []

    def forward(self, images: Tensor) -> Tensor:
        self.modes += [module.training for module in self.modules()]
        result: Tensor = self.layers(images)
        return result
