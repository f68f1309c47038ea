"""Every case, with the speed that is aimed at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from . import runs, work
from .subject import Subject

Shape = tuple[int, ...]
Builder = Callable[[Shape, torch.dtype, torch.device], Subject]

GROUPS = ("ops", "attacks", "alignment")
DEVICES = ("cpu", "cuda")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
IMAGES: tuple[Shape, ...] = ((8, 3, 224, 224), (32, 3, 224, 224), (128, 3, 224, 224))
# 21,841 classes are those of ImageNet-21k.
LOGITS: tuple[Shape, ...] = ((128, 1000), (1024, 1000), (256, 21841))
SIDES: Shape = (3, 224, 224)
# Two cores need half a second for a pass of the smaller network at batch 8. On a GPU that is bound by launches, and the
# larger network by arithmetic.
ATTACKED = (
    ("cpu", "resnet18", 8),
    ("cpu", "resnet18", 32),
    ("cuda", "resnet18", 8),
    ("cuda", "resnet50", 32),
    ("cuda", "resnet50", 128),
)
ATTACK_STEPS = {"cpu": 2, "cuda": 10}
ALIGNED = (
    ("cpu", "resnet50", "resnet18", "fp32", 8),
    ("cpu", "resnet50", "resnet18", "bf16", 16),
    ("cpu", "tf_efficientnet_lite2", "tf_efficientnet_lite0", "bf16", 16),
    ("cuda", "resnet50", "resnet18", "fp32", 32),
    ("cuda", "resnet50", "resnet18", "fp32", 128),
    ("cuda", "resnet50", "resnet18", "bf16", 32),
    ("cuda", "resnet50", "resnet18", "bf16", 128),
)
ALIGNED_STEPS = {"cpu": 4, "cuda": 10}


@dataclass(frozen=True)
class Case:
    """One op, attack or alignment on one shape and dtype.

    group: one of `GROUPS`. subject: a function of `alignfast.ops`, an attack's preset, or "align". targets: by side,
    the least value aimed at for its time over ours; that of "copy" is the share of the memory's bandwidth, that of
    "model" the share of the time that goes into bare passes of the models. devices: the types it is measured on.
    """

    group: str
    subject: str
    variant: str
    dtype: str
    shape: Shape
    build: Builder = field(repr=False)
    targets: Mapping[str, float] = field(default_factory=dict)
    devices: Sequence[str] = DEVICES

    @property
    def name(self) -> str:
        return f"{self.subject}/{self.variant}/{self.dtype}/{self.size}"

    @property
    def size(self) -> str:
        return "x".join(map(str, self.shape))

    def subject_on(self, device: torch.device | str = "cpu", shape: Shape | None = None) -> Subject:
        """What is measured there; `shape` is for tests. On torch's "meta" device only its cost can be had."""
        return self.build(shape or self.shape, DTYPES[self.dtype], torch.device(device))


def _grid(
    op: str,
    variants: Mapping[str, Builder],
    shapes: Sequence[Shape],
    targets: Mapping[str, float],
    dtypes: Iterable[str] = DTYPES,
) -> list[Case]:
    return [
        Case("ops", op, variant, dtype, shape, build, targets)
        for variant, build in variants.items()
        for dtype in dtypes
        for shape in shapes
    ]


def _both_ways(variants: Mapping[str, Mapping[str, Any]]) -> dict[str, Builder]:
    return {
        f"{name} {way}": partial(work.diversify, **settings, backward=way == "backward")
        for name, settings in variants.items()
        for way in ("forward", "backward")
    }


STEPS: dict[str, Builder] = {
    "momentum": partial(work.sign_step, momentum=True),
    "plain": partial(work.sign_step, momentum=False),
}
# "enlarge" is TransferAttack's resize-and-pad, "shrink" torchattacks'; 5 copies have the scales of SIM.
VIEWS = _both_ways(
    {
        "enlarge": {"rate": 1.1},
        "enlarge contiguous": {"rate": 1.1, "memory_format": torch.contiguous_format},
        "enlarge 5 copies": {"rate": 1.1, "copies": 5},
        "shrink": {"rate": 0.9},
        "shrink 5 copies": {"rate": 0.9, "copies": 5},
        "noise 5 copies": {"radius": 1.5 * work.EPS, "copies": 5},
    }
)


def _attacks() -> list[Case]:
    return [
        Case(
            "attacks",
            preset,
            f"{network} {ATTACK_STEPS[device]} steps",
            "fp32",
            (batch, *SIDES),
            partial(runs.attack, preset=preset, network=network, steps=ATTACK_STEPS[device]),
            {"torchattacks": 1.0, "model": 0.9},
            [device],
        )
        for preset in runs.ATTACKS
        for device, network, batch in ATTACKED
    ]


def _alignments() -> list[Case]:
    return [
        Case(
            "alignment",
            "align",
            f"{source} to {witness} {ALIGNED_STEPS[device]} steps",
            dtype,
            (batch, *SIDES),
            partial(runs.alignment, source=source, witness=witness, steps=ALIGNED_STEPS[device]),
            {"plain": 1.0} | ({"authors": 2.0, "model": 0.95} if dtype == "bf16" else {}),
            [device],
        )
        for device, source, witness, dtype, batch in ALIGNED
    ]


OP_CASES: tuple[Case, ...] = (
    *_grid(
        "kl_div_with_logits",
        {"loss and gradient": work.kl_div_with_logits},
        LOGITS,
        {"eager": 4.0, "compiled": 1.5},
    ),
    *_grid("sign_step", STEPS, IMAGES, {"eager": 5.0, "compiled": 2.5, "copy": 0.6}),
    *_grid("smooth", {"15x15": work.smooth}, IMAGES, {"eager": 3.0}),
    *_grid("diversify", VIEWS, IMAGES, {"eager": 5.0}),
    *_grid("philox_uniform", {"unit": work.philox_uniform}, IMAGES, {}, dtypes=["fp32"]),
)
OPS = tuple(dict.fromkeys(case.subject for case in OP_CASES))
CASES: tuple[Case, ...] = (*OP_CASES, *_attacks(), *_alignments())


def select(
    groups: Sequence[str] = (),
    ops: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    match: str = "",
    *,
    device: str = "cpu",
    smallest: bool = False,
) -> list[Case]:
    """The cases for a type of device of these groups, ops and dtypes (all if none is named) whose name holds `match`.

    With ops named, no attack and no alignment. With `smallest`, the first shape alone of each subject, variant and
    dtype.
    """
    chosen = [
        case
        for case in CASES
        if device in case.devices
        and (not groups or case.group in groups)
        and (not ops or case.subject in ops)
        and (not dtypes or case.dtype in dtypes)
        and match in case.name
    ]
    if smallest:
        first = {(case.subject, case.variant, case.dtype): case for case in reversed(chosen)}
        chosen = [case for case in chosen if first[case.subject, case.variant, case.dtype] is case]
    return chosen
