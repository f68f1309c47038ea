"""Whole attacks and alignments beside what people run without the library, and beside bare passes of the models."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from alignfast.alignment import AlignConfig
from alignfast.alignment.loop import fit
from alignfast.attacks import Attack, create
from alignfast.models import Classifier, load_model

from .subject import Call, Cost
from .work import ALPHA, EPS, TEMPERATURE, kl_chain, uniform

Shape = tuple[int, ...]

# More views than these do not go through a model together, so that the cases fit into the memory of most GPUs.
MAX_BATCH = 128
# Images on which an attack is compared with its peer, in full float32.
CHECKED_IMAGES = 4
# The share of pixels that may differ from the peer's: where a gradient is nearly zero, rounding turns its sign.
TOLERATED_SHARE = 0.01
# A peer draws other numbers; an attack moves the pixels by at least this share of the way that the peer does.
LEAST_WAY = 0.5
ROUNDING_OF_BOUNDS = 1e-6
# Relative to the first loss, between sequences of losses.
LOSS_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2.0**-5}


@dataclass(frozen=True)
class Preset:
    """A preset beside its peer. fixed: parameters of both with which nothing is drawn. further: passes of a step over
    so many copies of an image; copies: those of the pass that every attack has."""

    peer: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    copies: int = 1
    further: int = 0


ATTACKS = {
    "pgd": Preset("PGD", {"random_start": False}),
    "mifgsm": Preset("MIFGSM"),
    "difgsm": Preset("DIFGSM", {"diversity_prob": 0.0}),
    "sinifgsm": Preset("SINIFGSM", copies=5),
    "vmifgsm": Preset("VMIFGSM", {"beta": 0.0}, further=5),
}


def attack(
    shape: Shape, dtype: torch.dtype, device: torch.device, *, preset: str, network: str, steps: int
) -> AttackRun:
    assert dtype == torch.float32
    return AttackRun(preset, network, steps, shape, device)


def alignment(
    shape: Shape, dtype: torch.dtype, device: torch.device, *, source: str, witness: str, steps: int
) -> AlignmentRun:
    return AlignmentRun(source, witness, steps, shape, dtype, device)


@dataclass(frozen=True)
class AttackRun:
    """Sides: "ours", on CUDA also "no graph"; "torchattacks" where it is installed; "model", the forward passes and
    input gradients alone, on CUDA in one graph."""

    preset: str
    network: str
    steps: int
    shape: Shape
    device: torch.device

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

    def prepare(self, *, compiled: bool) -> tuple[dict[str, Call], str | None]:
        images, labels = self._images, self._labels
        attacks = {"ours": self._ours()}
        if self.device.type == "cuda":
            attacks["no graph"] = self._ours(cuda_graph=False)
        sides: dict[str, Callable[[], Tensor]] = {
            side: partial(attack, images, labels) for side, attack in attacks.items()
        }
        if torchattacks() is not None:
            sides["torchattacks"] = partial(self._theirs(), images, labels)
        fault = self._compared() or self._constrained({side: call() for side, call in sides.items()})
        return {**sides, "model": captured(self._bare_passes, self.device)}, fault

    @cached_property
    def _model(self) -> Classifier:
        return classifier(self.network, self.shape[1:], self.device)

    @cached_property
    def _images(self) -> Tensor:
        return uniform(self.shape, 1, device=self.device)

    @cached_property
    def _labels(self) -> Tensor:
        with torch.no_grad():
            labels: Tensor = self._model(self._images).argmax(1)
        return labels

    def _ours(self, **parameters: Any) -> Attack:
        numbers = {"eps": EPS, "alpha": ALPHA, "steps": self.steps, "max_batch": MAX_BATCH}
        return create(self.preset, self._model, **numbers, **parameters)

    def _theirs(self, **parameters: Any) -> Callable[[Tensor, Tensor], Tensor]:
        package = torchattacks()
        assert package is not None
        peer = getattr(package, ATTACKS[self.preset].peer)
        theirs: Callable[[Tensor, Tensor], Tensor] = peer(
            Normalised(self._model), eps=EPS, alpha=ALPHA, steps=self.steps, **parameters
        )
        return theirs

    def _bare_passes(self) -> None:
        for copies in self.passes:
            batch = self._images.repeat(copies, 1, 1, 1).requires_grad_()
            loss = F.cross_entropy(self._model.module(batch), self._labels.repeat(copies), reduction="sum")
            torch.autograd.grad(loss, batch)

    def _compared(self) -> str | None:
        """Both take the same steps where nothing is drawn, up to the signs that rounding turns."""
        if torchattacks() is None:
            return None
        images, labels = self._images[:CHECKED_IMAGES], self._labels[:CHECKED_IMAGES]
        fixed = ATTACKS[self.preset].fixed
        with full_precision():
            ours, theirs = self._ours(**fixed)(images, labels), self._theirs(**fixed)(images, labels)
        share = float(((ours - theirs).abs() > ALPHA / 100).double().mean())
        # Written so that NaN is a fault too.
        if not (share <= TOLERATED_SHARE and bool(ours.isfinite().all())):
            return f"ours: {share:.2%} of the pixels differ from torchattacks', allowed are {TOLERATED_SHARE:.0%}"
        return None

    def _constrained(self, results: Mapping[str, Tensor]) -> str | None:
        """Every result is an image in the ball around its original, and as far away from it as the peer's."""
        ways = {side: (adv - self._images).abs() for side, adv in results.items()}
        needed = LEAST_WAY * float(ways["torchattacks" if "torchattacks" in ways else "ours"].mean())
        for side, adv in results.items():
            most = max(float(ways[side].max()) - EPS, float(-adv.min()), float(adv.max()) - 1)
            # Written so that NaN is a fault too.
            if not most <= ROUNDING_OF_BOUNDS:
                return f"{side}: outside the eps ball or [0, 1] by {most:.2g}"
            if not float(ways[side].mean()) >= needed > 0:
                return f"{side}: moves pixels by {float(ways[side].mean()):.2g}, needed is {needed:.2g}"
        return None


class Normalised(nn.Module):
    """A classifier's network behind its normalisation, written as people write it."""

    shift: Tensor
    scale: Tensor

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        assert model.mean is not None
        assert model.std is not None
        self.network = model.module
        self.register_buffer("shift", model.mean[:, None, None])
        self.register_buffer("scale", model.std[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network((images - self.shift) / self.scale)
        return logits


@dataclass(frozen=True)
class AlignmentRun:
    """Sides: "ours"; "plain", the loop that people write; where that is in bfloat16, "authors", the same in float32, as
    the paper's authors run it; "model", the passes and gradients without loss and update."""

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

    def prepare(self, *, compiled: bool) -> tuple[dict[str, Call], str | None]:
        sides: dict[str, Call] = {"ours": self._ours, "plain": self._plain}
        if self.dtype == torch.bfloat16:
            sides["authors"] = partial(self._plain, autocast=False)
        return sides | {"model": self._bare_passes}, self._fault()

    def _fault(self) -> str | None:
        """The losses of both loops, step by step."""
        with full_precision():
            ours, plain = self._ours(), self._plain()
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
    def _config(self) -> AlignConfig:
        precision: Literal["fp32", "bf16"] = "fp32" if self.dtype == torch.float32 else "bf16"
        return AlignConfig(temperature=TEMPERATURE, precision=precision, channels_last=True)

    def _ours(self) -> list[float]:
        source, witness = self._models
        return [entry["loss"] for entry in fit(copy.deepcopy(source), [witness], self._batches, self._config)]

    def _plain(self, autocast: bool = True) -> list[float]:
        """The published recipe, with the losses brought to the host in the end."""
        source, witness = copy.deepcopy(self._models[0]).train(), self._models[1]
        config, losses = self._config, []
        optimizer = torch.optim.SGD(
            source.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay, nesterov=config.nesterov
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        student, teacher = Normalised(source), Normalised(witness)
        for images, _ in self._batches:
            optimizer.zero_grad()
            with self._autocast() if autocast else nullcontext():
                logits = student(images)
                with torch.no_grad():
                    taught = teacher(images)
                loss = kl_chain(logits, taught)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        return [float(loss) for loss in losses]

    def _bare_passes(self) -> None:
        source, witness = self._models
        parameters = list(source.parameters())
        source.train()
        for images, _ in self._batches:
            with self._autocast():
                outcome = source.module(images).float().sum()
                with torch.no_grad():
                    witness.module(images)
            torch.autograd.grad(outcome, parameters)
        source.eval()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)


def classifier(network: str, size: Shape, device: torch.device, *, seed: int = 0) -> Classifier:
    """timm's network with random weights, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return load_model(f"timm:{network}", input_size=(size[0], size[1], size[2])).to(device)


@cache
def flops_of(network: str, size: Shape, kind: str) -> int:
    """Operations an image, as torch counts them, of "forward", "input gradient" or "training", the forward included."""
    model = classifier(network, size, torch.device("meta")).module.requires_grad_(kind == "training")
    image = torch.empty((1, *size), device="meta", requires_grad=kind == "input gradient")
    with FlopCounterMode(display=False) as counter:
        logits = model(image)
        if kind != "forward":
            logits.sum().backward()
    flops: int = counter.get_total_flops()
    return flops


@cache
def torchattacks() -> Any | None:
    try:
        return importlib.import_module("torchattacks")
    except ImportError:
        return None


def captured(call: Callable[[], None], device: torch.device) -> Call:
    """On CUDA one graph of the call, so that no launch delays it; elsewhere the call itself."""
    if device.type != "cuda":
        return call
    # As torch.cuda.graph asks: what initialises itself does so before, and not on the default stream.
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@contextmanager
def full_precision() -> Iterator[None]:
    """Without TF32, in which convolutions on a GPU are good to three digits."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def _chunks(copies: int, most: int) -> list[int]:
    return [min(most, copies - first) for first in range(0, copies, most)]
