"""Every case of every op, with the speed that is aimed at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from . import work
from .work import Work

Shape = tuple[int, ...]
Builder = Callable[[Shape, torch.dtype, torch.device], Work]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
IMAGES: tuple[Shape, ...] = ((8, 3, 224, 224), (32, 3, 224, 224), (128, 3, 224, 224))
# 21,841 classes are those of ImageNet-21k.
LOGITS: tuple[Shape, ...] = ((128, 1000), (1024, 1000), (256, 21841))


@dataclass(frozen=True)
class Case:
    """One op on one shape and dtype.

    op: a function of `alignfast.ops`. targets: by side, the least value aimed at for its time over that of the op;
    that of "copy" is the share of the memory's bandwidth.
    """

    op: str
    variant: str
    dtype: str
    shape: Shape
    build: Builder = field(repr=False)
    targets: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.op}/{self.variant}/{self.dtype}/{self.size}"

    @property
    def size(self) -> str:
        return "x".join(map(str, self.shape))

    def work(self, device: torch.device | str = "cpu", shape: Shape | None = None) -> Work:
        """Inputs in memory and what runs on them; `shape` is for tests, on inputs that cost nothing."""
        return self.build(shape or self.shape, DTYPES[self.dtype], torch.device(device))


def _grid(
    op: str,
    variants: Mapping[str, Builder],
    shapes: Sequence[Shape],
    targets: Mapping[str, float],
    dtypes: Iterable[str] = DTYPES,
) -> list[Case]:
    return [
        Case(op, variant, dtype, shape, build, targets)
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

CASES: tuple[Case, ...] = (
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
OPS = tuple(dict.fromkeys(case.op for case in CASES))


def select(
    ops: Sequence[str] = (), dtypes: Sequence[str] = (), match: str = "", *, smallest: bool = False
) -> list[Case]:
    """The cases of these ops and dtypes (all of them if none is named) whose name holds `match`.

    With `smallest`, of each op, variant and dtype the first shape alone.
    """
    chosen = [
        case
        for case in CASES
        if (not ops or case.op in ops) and (not dtypes or case.dtype in dtypes) and match in case.name
    ]
    if smallest:
        first = {(case.op, case.variant, case.dtype): case for case in reversed(chosen)}
        chosen = [case for case in chosen if first[case.op, case.variant, case.dtype] is case]
    return chosen
