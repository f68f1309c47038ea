"""Every case, with the speed that is aimed at."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from . import folders, passes, runs, work
from .limits import has_bf16
from .networks import CIFAR_RESNET20
from .peers import PEERS
from .subject import Subject

Shape = tuple[int, ...]
Builder = Callable[[Shape, torch.dtype, torch.device], Subject]

GROUPS = ("ops", "preparation", "attacks", "alignment", "files")
# Groups that run models end to end.
MODELS = ("preparation", "attacks", "alignment")
DEVICES = ("cpu", "cuda")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "uint8": torch.uint8}
FLOATS = ("fp32", "bf16")
IMAGES: tuple[Shape, ...] = ((8, 3, 224, 224), (32, 3, 224, 224), (128, 3, 224, 224))
# 21,841 classes are those of ImageNet-21k.
LOGITS: tuple[Shape, ...] = ((128, 1000), (1024, 1000), (256, 21841))
# Between two layers of an EfficientNet-Lite2.
ACTIVATIONS: Shape = (8, 144, 56, 56)
# Between the 3 x 3 convolutions of a ResNet's second stage at 224 x 224.
FEATURES: Shape = (8, 128, 28, 28)
# Of a small residual network's first stage.
SMALL_FEATURES: Shape = (128, 16, 32, 32)
# Images, tokens, three parts, heads and channels of a ViT-S/16 at 224 x 224.
TOKENS: Shape = (8, 197, 3, 6, 64)
# Those of the ops' shapes that `make bench` measures.
USUAL_SHAPES = (IMAGES[1], LOGITS[1], ACTIVATIONS, FEATURES, SMALL_FEATURES, TOKENS)
SIDES: Shape = (3, 224, 224)
CIFAR_SIDES: Shape = (3, 32, 32)
# By network and dtype, how many times as fast as torchattacks on two CPU threads.
SPEEDS = {
    "resnet50": {"fp32": 1.3, "bf16": 2.5},
    "tf_efficientnet_lite2": {"fp32": 2.5, "bf16": 3.3},
    "vit_small_patch16_224": {"fp32": 1.05, "bf16": 2.3},
}
# By network, of the measured rate of matrix products in bfloat16.
SHARES = {"resnet50": 0.85, "vit_small_patch16_224": 0.7}
# A call lasts some seconds on two cores, so there are fewer steps than the ten that people take. A step is as long in
# either, but for the last one of VMI, which asks for no neighbours: three steps have 13 passes where torchattacks has
# 18, ten have 55 and 60.
CPU_STEPS = {8: 2, 32: 1}
# A pass of this one is so short that what an attack does once would count five times.
STEPS_OF_ITS_OWN = {("tf_efficientnet_lite2", 8): 10}
DRAWN_STEPS = {"difgsm": 2, "sinifgsm": 2, "vmifgsm": 3}
DRAWN_SPEEDS = {"difgsm": 2.5, "sinifgsm": 2.5, "vmifgsm": 2.5 * (18 / 13) / (60 / 55)}
DRAWN_BATCH = 4
SMALL_BATCH, SMALL_STEPS = 128, 4
CUDA_STEPS = 10
# The smaller network at batch 8 is bound by launches, and the larger network by arithmetic.
ON_CUDA = (("resnet18", 8), ("resnet50", 32), ("resnet50", 128))
PREPARED_BATCH = 8
# Device, source, witness, dtype, batch, and whether `make bench` leaves it out.
ALIGNED = (
    ("cpu", "resnet50", "resnet18", "fp32", 8, False),
    ("cpu", "resnet50", "resnet18", "bf16", 8, True),
    ("cpu", "resnet50", "resnet18", "bf16", 16, True),
    ("cpu", "tf_efficientnet_lite2", "tf_efficientnet_lite0", "fp32", 16, True),
    ("cpu", "tf_efficientnet_lite2", "tf_efficientnet_lite0", "bf16", 16, False),
    ("cuda", "resnet50", "resnet18", "fp32", 32, False),
    ("cuda", "resnet50", "resnet18", "fp32", 128, False),
    ("cuda", "resnet50", "resnet18", "bf16", 32, False),
    ("cuda", "resnet50", "resnet18", "bf16", 128, False),
)
ALIGNED_STEPS = {"cpu": 2, "cuda": 10}
FILES: Shape = (32, *SIDES)
# Of the peak memory that torchattacks takes for as many rows at once.
MEMORY = 0.6


@dataclass(frozen=True)
class Case:
    """One op, preparation, attack, alignment, or way of reading or writing files, on one shape and dtype.

    group: one of `GROUPS`. subject: a function of `alignfast.ops`, an attack's preset, or what is done. targets: by
    side, the least value aimed at for its time over ours; that of "copy" is the share of the memory's bandwidth, that
    of "model" the share of the time that goes into bare passes of the models, and "gemm" is the share of the rate at
    which the hardware multiplies matrices. devices: the types it is measured on. extended: left out of `make bench`,
    which is to end within 20 minutes. memory: the most that is aimed at for its peak over torchattacks'.
    """

    group: str
    subject: str
    variant: str
    dtype: str
    shape: Shape
    build: Builder = field(repr=False)
    targets: Mapping[str, float] = field(default_factory=dict)
    devices: Sequence[str] = DEVICES
    extended: bool = False
    memory: float | None = None

    @property
    def name(self) -> str:
        return f"{self.subject}/{self.variant}/{self.dtype}/{self.size}"

    @property
    def size(self) -> str:
        return "x".join(map(str, self.shape))

    def subject_on(self, device: torch.device | str = "cpu", shape: Shape | None = None) -> Subject:
        """What is measured there; `shape` is for tests. On torch's "meta" device only its cost can be had."""
        return self.build(shape or self.shape, DTYPES[self.dtype], torch.device(device))

    @property
    def kind(self) -> tuple[str, str, str]:
        """What it has in common with cases of other shapes, which may have other numbers of steps."""
        return self.subject, re.sub(r" \d+ steps?$", "", self.variant), self.dtype

    def to_dict(self) -> dict[str, Any]:
        """What names it in a report."""
        return {
            "name": self.name,
            "group": self.group,
            "subject": self.subject,
            "variant": self.variant,
            "dtype": self.dtype,
            "shape": list(self.shape),
        }

    def lacks(self, device: torch.device) -> str | None:
        """Why it is not measured there, or None."""
        if self.group in MODELS and self.dtype == "bf16" and not has_bf16(device):
            return "this hardware has no bfloat16"
        return None


def _grid(
    op: str,
    variants: Mapping[str, Builder],
    shapes: Sequence[Shape],
    targets: Mapping[str, float],
    dtypes: Iterable[str] = FLOATS,
    devices: Sequence[str] = DEVICES,
) -> list[Case]:
    return [
        Case("ops", op, variant, dtype, shape, build, targets, devices, extended=shape not in USUAL_SHAPES)
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


def _convolutions() -> list[Case]:
    return [
        case
        for way, gradient, speed in (("forward", "", 1.5), ("backward", "images", 1.1), ("weight", "weight", 1.0))
        for name, side, stride in (("3x3", 3, 1), ("5x5 stride 2", 5, 2))
        for case in _grid(
            "depthwise_conv2d",
            {f"{name} {way}": partial(work.depthwise_conv2d, side=side, stride=stride, gradient=gradient)},
            [ACTIVATIONS],
            {"eager": speed},
            devices=["cpu"],
        )
    ]


def _preparations() -> list[Case]:
    return [
        Case(
            "preparation",
            "prepare",
            network,
            dtype,
            (PREPARED_BATCH, *SIDES),
            partial(passes.preparation, network=network),
        )
        for network in SPEEDS
        for dtype in FLOATS
    ]


def _attack(
    device: str,
    preset: str,
    network: str,
    steps: int,
    dtype: str,
    shape: Shape,
    targets: Mapping[str, float],
    peers: Sequence[str] = ("torchattacks",),
    **settings: Any,
) -> Case:
    return Case(
        "attacks",
        preset,
        f"{network} {steps} step{'s' if steps > 1 else ''}",
        dtype,
        shape,
        partial(runs.attack, preset=preset, network=network, steps=steps, peers=peers),
        targets,
        [device],
        **settings,
    )


def _momentum_attacks() -> list[Case]:
    return [
        _attack(
            "cpu",
            "mifgsm",
            network,
            STEPS_OF_ITS_OWN.get((network, batch), steps),
            dtype,
            (batch, *SIDES),
            {"torchattacks": speeds[dtype], "model": 0.97 if (network, batch) == ("resnet50", 32) else 0.95}
            | ({"gemm": SHARES[network]} if dtype == "bf16" and network in SHARES else {}),
            peers=tuple(PEERS) if (network, batch, dtype) == ("resnet50", 8, "fp32") else ("torchattacks",),
            extended=batch == 32,
            memory=MEMORY,
        )
        for network, speeds in SPEEDS.items()
        for dtype in FLOATS
        for batch, steps in CPU_STEPS.items()
    ]


def _drawn_attacks() -> list[Case]:
    return [
        _attack(
            "cpu",
            preset,
            "resnet50",
            steps,
            dtype,
            (DRAWN_BATCH, *SIDES),
            {"torchattacks": DRAWN_SPEEDS[preset] if dtype == "bf16" else 1.0, "model": 0.9},
            extended=(preset, dtype) != ("vmifgsm", "bf16"),
        )
        for preset, steps in DRAWN_STEPS.items()
        for dtype in FLOATS
    ]


def _small_attacks() -> list[Case]:
    shape = (SMALL_BATCH, *CIFAR_SIDES)
    of_model = {"model": 0.95}
    momentum = of_model | {"torchattacks": 3.0}
    return [
        _attack("cpu", "pgd", CIFAR_RESNET20, SMALL_STEPS, "fp32", shape, of_model, peers=tuple(PEERS)),
        _attack("cpu", "mifgsm", CIFAR_RESNET20, SMALL_STEPS, "fp32", shape, momentum, peers=tuple(PEERS)),
        _attack("cpu", "mifgsm", CIFAR_RESNET20, SMALL_STEPS, "bf16", shape, momentum),
    ]


def _cuda_attacks() -> list[Case]:
    return [
        _attack(
            "cuda",
            preset,
            network,
            CUDA_STEPS,
            "fp32",
            (batch, *SIDES),
            {"torchattacks": 1.0, "model": 0.9},
            memory=MEMORY if preset == "mifgsm" else None,
        )
        for preset in runs.ATTACKS
        for network, batch in ON_CUDA
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
            extended=extended,
        )
        for device, source, witness, dtype, batch, extended in ALIGNED
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
    *_convolutions(),
    *_grid(
        "attention",
        {"forward": work.attention, "backward": partial(work.attention, gradient=True)},
        [TOKENS],
        {"eager": 1.2},
        devices=["cpu"],
    ),
    # In bfloat16 the expression rounds what lies between, and so decides otherwise what passes a rectifier.
    *_grid(
        "inverted_residual",
        {"forward": work.inverted_residual},
        [ACTIVATIONS],
        {"eager": 1.5},
        devices=["cpu"],
    ),
    *_grid(
        "inverted_residual",
        {"backward": partial(work.inverted_residual, gradient=True)},
        [ACTIVATIONS],
        {"eager": 1.5},
        dtypes=["fp32"],
        devices=["cpu"],
    ),
    # In half precision layers are left to torch.
    *_grid(
        "winograd_conv2d",
        {"forward": work.winograd_conv2d, "backward": partial(work.winograd_conv2d, gradient=True)},
        [FEATURES],
        {"eager": 1.5},
        dtypes=["fp32"],
        devices=["cpu"],
    ),
    *_grid(
        "basic_block",
        {"forward": work.basic_block, "backward": partial(work.basic_block, gradient=True)},
        [SMALL_FEATURES],
        {"eager": 1.5},
        dtypes=["fp32"],
        devices=["cpu"],
    ),
    *_grid(
        "batch_norm",
        {way: partial(work.batch_norm, backward=way == "backward") for way in ("forward", "backward")},
        [ACTIVATIONS],
        {"eager": 1.3},
        devices=["cpu"],
    ),
    *_grid("diversify", VIEWS, IMAGES, {"eager": 5.0}),
    *_grid("philox_uniform", {"unit": work.philox_uniform}, IMAGES, {}, dtypes=["fp32"]),
)
OPS = tuple(dict.fromkeys(case.subject for case in OP_CASES))
FILE_CASES = (
    Case("files", "load", "PNG folder", "fp32", FILES, folders.loading, devices=["cpu"]),
    Case("files", "save", "PNG files", "uint8", FILES, folders.saving, devices=["cpu"]),
)
ATTACK_CASES = sorted(
    [*_momentum_attacks(), *_drawn_attacks(), *_small_attacks(), *_cuda_attacks()],
    key=lambda case: list(runs.ATTACKS).index(case.subject),
)
CASES: tuple[Case, ...] = (*OP_CASES, *_preparations(), *ATTACK_CASES, *_alignments(), *FILE_CASES)


def select(
    groups: Sequence[str] = (),
    ops: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    match: str = "",
    *,
    device: str = "cpu",
    smallest: bool = False,
    extended: bool = True,
) -> list[Case]:
    """The cases for a type of device of these groups, ops and dtypes (all if none is named) whose name holds `match`.

    With ops named, ops alone. With `smallest`, the first shape alone of each kind. Without `extended`, not those that
    `make bench` leaves out.
    """
    chosen = [
        case
        for case in CASES
        if device in case.devices
        and (not groups or case.group in groups)
        and (not ops or case.subject in ops)
        and (not dtypes or case.dtype in dtypes)
        and match in case.name
        and (extended or not case.extended)
    ]
    if smallest:
        first = {case.kind: case for case in reversed(chosen)}
        chosen = [case for case in chosen if first[case.kind] is case]
    return chosen
