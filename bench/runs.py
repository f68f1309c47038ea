"""Whole attacks and alignments beside what people run without the library, and beside bare passes of the models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor

from alignfast.alignment import AlignConfig
from alignfast.alignment.loop import fit
from alignfast.alignment.run import Run
from alignfast.alignment.stream import Stream
from alignfast.alignment.terms import terms_of
from alignfast.alignment.training_kernels import trained_by_kernels
from alignfast.alignment.witnesses import Witnesses
from alignfast.attacks import Attack, create
from alignfast.compat.normalised import Normalised
from alignfast.data import as_batches
from alignfast.models import Classifier, prepare

from .networks import captured, classifier, flops_of, input_gradient, tf32
from .peers import PEERS, installed
from .reference import alignment as reference
from .subject import Call, Cost
from .work import ALPHA, EPS, TEMPERATURE, uniform

Shape = tuple[int, ...]
Precision = Literal["fp32", "bf16"]

PRECISIONS: dict[torch.dtype, Precision] = {torch.float32: "fp32", torch.bfloat16: "bf16"}
# More views than these do not go through a model together, so that the cases fit into the memory of most GPUs.
MAX_BATCH = 128
# Images and steps in which an attack is compared with its peers, in full float32, and with itself in float32.
CHECKED_IMAGES, CHECKED_STEPS = 4, 3
# The share of pixels that may differ from the peer's: where a gradient is nearly zero, rounding turns its sign.
TOLERATED_SHARE = 0.01
# In bfloat16, the share of signs that may be others than in float32: one in ten, which is what a cosine of 0.95 between
# the gradients comes to, arccos(0.95) / pi. Networks of random weights may turn more by the rounding alone, so as many
# are allowed as torch's own autocast turns, and a quarter more.
TURNED_IN_BF16, OF_AUTOCAST = 0.1, 1.25
# A peer draws other numbers; an attack moves the pixels by at least this share of the way that the peer does.
LEAST_WAY = 0.5
ROUNDING_OF_BOUNDS = 1e-6
# Of a run that is asked for a few steps at a time, so that its learning rate hardly falls.
MANY_STEPS = 10**6
# Relative to the first loss, between sequences of losses.
LOSS_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2.0**-5}


@dataclass(frozen=True)
class Preset:
    """A preset beside its peers. fixed: parameters of all with which nothing is drawn. further: passes of a step over
    so many copies of an image; copies: those of the pass that every attack has."""

    fixed: Mapping[str, Any] = field(default_factory=dict)
    copies: int = 1
    further: int = 0


ATTACKS = {
    "pgd": Preset({"random_start": False}),
    "mifgsm": Preset(),
    "difgsm": Preset({"diversity_prob": 0.0}),
    "sinifgsm": Preset(copies=5),
    "vmifgsm": Preset({"beta": 0.0}, further=5),
}


def attack(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    *,
    preset: str,
    network: str,
    steps: int,
    peers: Sequence[str] = ("torchattacks",),
) -> AttackRun:
    return AttackRun(preset, network, steps, shape, dtype, device, tuple(peers))


def alignment(
    shape: Shape, dtype: torch.dtype, device: torch.device, *, source: str, witness: str, steps: int
) -> AlignmentRun:
    return AlignmentRun(source, witness, steps, shape, dtype, device)


@dataclass(frozen=True)
class AttackRun:
    """Sides: "ours", on the model as `prepare` makes it in the case's dtype, on CUDA also "no graph"; those of `peers`
    that are installed, on the model as it was loaded, in float32; "model", the prepared model's forward passes and
    input gradients alone, on CUDA in one graph."""

    preset: str
    network: str
    steps: int
    shape: Shape
    dtype: torch.dtype
    device: torch.device
    peers: tuple[str, ...] = ("torchattacks",)

    @property
    def passes(self) -> list[int]:
        """The views of all images that go through the model together, pass after pass; no neighbours in the end."""
        kind = ATTACKS[self.preset]
        step, last = [kind.copies, kind.further], [kind.copies]
        most = max(1, MAX_BATCH // self.shape[0])
        return [part for copies in step * (self.steps - 1) + last for part in _chunks(copies, most)]

    @property
    def cost(self) -> Cost:
        flops = flops_of(self.network, self.shape[1:], "input gradient")
        return Cost(flops=sum(self.passes) * self.shape[0] * flops)

    def sides(self) -> dict[str, Call]:
        attacks = self._attacks()
        calls: dict[str, Call] = {side: partial(attack, self._images, self._labels) for side, attack in attacks.items()}
        return {**calls, "model": captured(self._bare_passes(), self.device)}

    def prepare(self, *, compiled: bool) -> tuple[dict[str, Call], str | None]:
        sides = self.sides()
        return sides, self._compared() or self._faithful() or self._constrained(self._results(sides))

    def _attacks(self) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
        attacks: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ours": self._ours()}
        if self.device.type == "cuda":
            attacks["no graph"] = self._ours(cuda_graph=False)
        return attacks | {name: self._theirs(name) for name in self._beside}

    @property
    def _beside(self) -> list[str]:
        return [name for name in self.peers if installed(name) is not None]

    @cached_property
    def _model(self) -> Classifier:
        return classifier(self.network, self.shape[1:], self.device)

    @cached_property
    def _prepared(self) -> Classifier:
        return prepare(self._model, self._images, PRECISIONS[self.dtype])

    @cached_property
    def _images(self) -> Tensor:
        return uniform(self.shape, 1, device=self.device)

    @cached_property
    def _labels(self) -> Tensor:
        with torch.no_grad():
            labels: Tensor = self._model(self._images).argmax(1)
        return labels

    def _ours(self, model: Classifier | None = None, **parameters: Any) -> Attack:
        numbers = {"eps": EPS, "alpha": ALPHA, "steps": self.steps, "max_batch": MAX_BATCH}
        return create(self.preset, model or self._prepared, **numbers | parameters)

    def _theirs(self, peer: str, **parameters: Any) -> Callable[[Tensor, Tensor], Tensor]:
        numbers = {"eps": EPS, "alpha": ALPHA, "steps": self.steps, "device": self.device}
        return PEERS[peer].attack(self.preset, Normalised(self._model).eval(), **numbers | parameters)

    def _bare_passes(self) -> Callable[[], None]:
        images, labels = self._images, self._labels
        passes = {
            copies: input_gradient(self._prepared, images.repeat(copies, 1, 1, 1), labels.repeat(copies))
            for copies in set(self.passes)
        }

        def call() -> None:
            for copies in self.passes:
                passes[copies]()

        return call

    def _compared(self) -> str | None:
        """Ours, on the model as loaded, takes the steps of each peer of the same definition where nothing is drawn, up
        to the signs that rounding turns."""
        fixed = {**ATTACKS[self.preset].fixed, "steps": CHECKED_STEPS}
        for peer in self._beside:
            if self.preset not in PEERS[peer].alike:
                continue
            with tf32(False):
                ours = self._ours(self._model, **fixed)(*self._few)
                theirs = self._theirs(peer, **fixed)(*self._few)
            if (fault := _differs(ours, theirs, TOLERATED_SHARE, f"{peer}'")) is not None:
                return fault
        return None

    def _faithful(self) -> str | None:
        """The first step on the prepared model is that on the model as loaded, on most pixels. Further steps of a
        network with random weights may go elsewhere by rounding alone, which turns activations on or off."""
        fixed = {**ATTACKS[self.preset].fixed, "steps": 1}
        with tf32(False):
            ours, wanted = (self._ours(model, **fixed)(*self._few) for model in (self._prepared, self._model))
            tolerated = TOLERATED_SHARE
            if self.dtype == torch.bfloat16:
                with torch.autocast(self.device.type, torch.bfloat16):
                    rounded = self._ours(self._model, cuda_graph=False, **fixed)(*self._few)
                tolerated = turned_in_bf16(_share(rounded, wanted))
        return _differs(ours, wanted, tolerated, "those of the model as loaded")

    @property
    def _few(self) -> tuple[Tensor, Tensor]:
        return self._images[:CHECKED_IMAGES], self._labels[:CHECKED_IMAGES]

    def _results(self, sides: Mapping[str, Call]) -> dict[str, Tensor]:
        """Ours as they are timed; those of the peers, which are slower, of a few images."""
        results = {side: _images_of(call) for side, call in sides.items() if side in ("ours", "no graph")}
        return results | {peer: self._theirs(peer)(*self._few) for peer in self._beside}

    def _constrained(self, results: Mapping[str, Tensor]) -> str | None:
        """Every result is an image in the ball around its original, and as far away from it as the peer's."""
        ways = {side: (adv - self._images[: len(adv)]).abs() for side, adv in results.items()}
        needed = LEAST_WAY * float(ways["torchattacks" if "torchattacks" in ways else "ours"].mean())
        for side, adv in results.items():
            most = max(float(ways[side].max()) - EPS, float(-adv.min()), float(adv.max()) - 1)
            # Written so that NaN is a fault too.
            if not most <= ROUNDING_OF_BOUNDS:
                return f"{side}: outside the eps ball or [0, 1] by {most:.2g}"
            if not float(ways[side].mean()) >= needed > 0:
                return f"{side}: moves pixels by {float(ways[side].mean()):.2g}, needed is {needed:.2g}"
        return None


def _images_of(call: Call) -> Tensor:
    adv = call()
    assert isinstance(adv, Tensor)
    return adv


def turned_in_bf16(by_autocast: float) -> float:
    """The share of signs that may differ, where under torch's autocast so many do."""
    return max(TURNED_IN_BF16, OF_AUTOCAST * by_autocast)


def _share(adv: Tensor, wanted: Tensor) -> float:
    """Of pixels that differ by more than rounding."""
    return float(((adv - wanted).abs() > ALPHA / 100).double().mean())


def _differs(ours: Tensor, wanted: Tensor, tolerated: float, whose: str) -> str | None:
    share = _share(ours, wanted)
    # Written so that NaN is a fault too.
    if not (share <= tolerated and bool(ours.isfinite().all())):
        return f"ours: {share:.2%} of the pixels differ from {whose}, allowed are {tolerated:.0%}"
    return None


@dataclass(frozen=True)
class AlignmentRun:
    """Sides: "ours"; "plain", the authors' loop in the case's precision; where that is bfloat16, "authors", the same in
    float32, as they run it; "model", the passes and gradients of ours without loss and update. All are set up before
    they are timed, since a run has thousands of steps."""

    source: str
    witness: str
    steps: int
    shape: Shape
    dtype: torch.dtype
    device: torch.device

    @property
    def cost(self) -> Cost:
        trained = flops_of(self.source, self.shape[1:], "training")
        asked = flops_of(self.witness, self.shape[1:], "forward")
        return Cost(flops=self.steps * self.shape[0] * (trained + asked))

    def sides(self) -> dict[str, Call]:
        sides: dict[str, Call] = {"ours": self._ours(), "plain": self._plain()}
        if self.dtype == torch.bfloat16:
            sides["authors"] = self._plain(autocast=False)
        return sides | {"model": self._bare_passes()}

    def prepare(self, *, compiled: bool) -> tuple[dict[str, Call], str | None]:
        return self.sides(), self._fault()

    def _fault(self) -> str | None:
        """The losses of both loops, step by step."""
        with tf32(False):
            source, witness = self._models
            history = fit(copy.deepcopy(source), [witness], self._batches, self._config)
            ours, plain = [entry["loss"] for entry in history], self._plain()()
        worst = max(abs(a - b) for a, b in zip(ours, plain, strict=True)) / abs(plain[0])
        allowed = LOSS_TOLERANCE[self.dtype]
        if not worst <= allowed:
            return f"ours: losses are off the plain loop's by {worst:.2g} of the first, allowed is {allowed:.2g}"
        return None

    @cached_property
    def _models(self) -> tuple[Classifier, Classifier]:
        source = classifier(self.source, self.shape[1:], self.device)
        return source, classifier(self.witness, self.shape[1:], self.device, seed=1)

    @cached_property
    def _batches(self) -> list[tuple[Tensor, Tensor]]:
        images = uniform(self.shape, 1, device=self.device)
        return [(images, torch.zeros(len(images), dtype=torch.int64, device=self.device))] * self.steps

    @cached_property
    def _open(self) -> ExitStack:
        """What students are trained in, for as long as the run lives."""
        return ExitStack()

    @cached_property
    def _config(self) -> AlignConfig:
        return AlignConfig(temperature=TEMPERATURE, precision=PRECISIONS[self.dtype], channels_last=True)

    def _ours(self) -> Callable[[], None]:
        student, batches = self._student(), list(as_batches(self._batches))
        terms = self._open.enter_context(terms_of(student, [self._models[1]], self._config, batches[0].images))
        run = Run(terms, Stream(self._batches), self._config, MANY_STEPS, [self._models[1]], ())

        def call() -> None:
            for batch in batches:
                run.take([batch])
                run.read()

        return call

    def _plain(self, autocast: bool = True) -> Callable[[], list[float]]:
        source, witness = (Normalised(copy.deepcopy(model)) for model in self._models)
        precision = self._autocast() if autocast else None
        return partial(reference.align, source, witness, self._batches, reference.Recipe(TEMPERATURE), precision)

    def _bare_passes(self) -> Callable[[], None]:
        student, images = self._student(), self._batches[0][0]
        witnesses = Witnesses([self._models[1]], precision=self._config.precision, example=images[:2])
        parameters = list(student.parameters())

        def call() -> None:
            for images, _ in self._batches:
                with self._autocast():
                    outcome = student.logits(images).float().sum()
                witnesses.logits(images)
                torch.autograd.grad(outcome, parameters)

        return call

    def _student(self) -> Classifier:
        """A copy of the source as it is trained."""
        student = copy.deepcopy(self._models[0]).train().to(memory_format=torch.channels_last)
        student.memory_format = torch.channels_last
        self._open.enter_context(trained_by_kernels(student, self._batches[0][0][:1], half=self.dtype != torch.float32))
        return student

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)


def _chunks(copies: int, most: int) -> list[int]:
    return [min(most, copies - first) for first in range(0, copies, most)]
