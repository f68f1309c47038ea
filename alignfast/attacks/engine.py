"""The attack loop: there is one, and it knows no attack by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from alignfast.attacks.chunks import ChunksByShape
from alignfast.attacks.component import Component, Memory, Position, Start
from alignfast.attacks.estimators import Estimator, Plain
from alignfast.attacks.gradient import Gradient, Task
from alignfast.attacks.graph import CAPTURES, Graphs, Step
from alignfast.attacks.objectives import CrossEntropy, Objective
from alignfast.attacks.shaping import Shaping
from alignfast.attacks.state import State
from alignfast.attacks.steps import SignStep, StepRule
from alignfast.attacks.transforms import Transform
from alignfast.checks import check_count, check_images, check_labels, check_number
from alignfast.draws import COPIES_PER_PASS, FIRST_SLOT, OBJECTIVE_SLOT, START_SLOT, Draws
from alignfast.models import Classifier, as_classifier, evaluating

PLAIN, SIGN, CROSS_ENTROPY = Plain(), SignStep(), CrossEntropy()


@dataclass(frozen=True, eq=False)
class Attack:
    """An iterative attack on `source`, put together from components.

    Each of `steps` steps takes the mean gradient of the objective over all views of the images, lets the estimator
    and the shaping work on it, and moves by the step rule within eps of the images and in [0, 1]. All randomness is a
    pure function of (seed, data-set index, step, copy, component), so an image's draws are the same alone, in any
    batch and in any order.

    Args:
        source: maps images in [0, 1] to logits; an `Ensemble` for several. Runs in evaluation mode, its weights and
            modes are left as they were.
        eps: radius in units of [0, 1] images, in the norm of the step rule; at most 1 for L-inf.
        alpha: step size, in the same unit; at most 1 for L-inf.
        steps: at least 1.
        seed: in [0, 2^64).
        transforms: applied in this order; the views of one image are the product of their copies.
        shaping: applied in this order.
        random_start: start at a uniform point of the ball instead of the image.
        max_batch: the most rows, views of images or of samples around them, that go through the model together. At
            least as many go as there are images. None for as many as `memory` holds.
        memory: bytes that a pass may take beside the model, as measured on the first pass, which shows each image
            once; None for a part of what is free then. Like max_batch, changes no draw and no order of sums; what the
            model itself computes may differ, by rounding, with the size of its batch.
        cuda_graph: on CUDA, record a step with the model's passes as one CUDA graph for each of the last few shapes of
            images, and replay it. What the model computes in Python is recorded once: weights may change in place or
            be replaced, but a model or component whose Python code does something else from call to call needs False,
            as does one that waits for the device or copies from the host. Changes no result, and nothing elsewhere.

    Raises:
        ValueError: a number outside its range, or an estimator with steps of its own in another norm than the step
            rule's.
        TypeError: a source that is no module.
    """

    source: nn.Module
    eps: float
    alpha: float
    steps: int
    seed: int = 0
    transforms: Sequence[Transform] = ()
    shaping: Sequence[Shaping] = ()
    estimator: Estimator = PLAIN
    step: StepRule = SIGN
    objective: Objective = CROSS_ENTROPY
    random_start: bool = False
    max_batch: int | None = None
    memory: int | None = None
    cuda_graph: bool = True
    _graphs: Graphs = field(init=False, repr=False, default_factory=Graphs)
    _chunks: ChunksByShape = field(init=False, repr=False, default_factory=ChunksByShape)

    def __post_init__(self) -> None:
        as_classifier(self.source)
        high = 1.0 if self.step.norm == "linf" else math.inf
        check_number("eps", self.eps, low=0.0, high=high)
        check_number("alpha", self.alpha, low=0.0, high=high)
        check_count("steps", self.steps)
        check_count("seed", self.seed, low=0, high=2**64 - 1)
        for name in ("max_batch", "memory"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        most = OBJECTIVE_SLOT - FIRST_SLOT
        if len(self.transforms) > most:
            raise ValueError(f"transforms: got {len(self.transforms)}; allowed are at most {most}")
        if self.estimator.norm not in (None, self.step.norm):
            raise ValueError(
                f"step: got {self.step!r}; allowed with {self.estimator!r}, which takes steps of its own, are rules in "
                f"the {self.estimator.norm} norm"
            )
        if self.passes > COPIES_PER_PASS:
            raise ValueError(f"transforms: {self.passes} copies an image; allowed are at most {COPIES_PER_PASS}")

    @property
    def copies(self) -> int:
        """Views of a point that go into its gradient."""
        return math.prod(transform.copies for transform in self.transforms)

    @property
    def passes(self) -> int:
        """Forward and backward passes of the model a step and image; the most, where steps differ."""
        return self.copies * self.estimator.passes

    @property
    def components(self) -> tuple[Component, ...]:
        return (*self.transforms, self.estimator, *self.shaping, self.step, self.objective)

    def __call__(self, images: Tensor, labels: Tensor, *, indices: Tensor | None = None) -> Tensor:
        """Adversarial images, of the shape, dtype and device of `images`.

        Args:
            images: float32 or float64 [N, C, H, W] in [0, 1].
            labels: int64 [N]: the classes to leave, or to reach if the objective is targeted.
            indices: int64 [N], the images' indices in their data set, in [0, 2^32); positions in the batch if None.

        Raises:
            ValueError, TypeError: bad input, before any model runs. RuntimeError: a CUDA graph cannot hold the step.
        """
        source = as_classifier(self.source)
        self._check(source, images, labels, indices)
        if len(images) == 0:
            return images.clone()
        if indices is None:
            indices = torch.arange(len(images), device=images.device)
        with evaluating(source):
            return self._run(source, images.detach(), labels, indices.to(images.device))

    def parameters(self) -> dict[str, Any]:
        """Everything but the source, by name; components as their own text."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.init and item.name != "source"}
        plain = (int, float, type(None))
        return {name: value if isinstance(value, plain) else repr(value) for name, value in values.items()}

    def _run(self, source: Classifier, images: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        start, step = self._start_state(source, images, labels, indices), partial(self._step, source)
        capture = CAPTURES.get(images.device.type) if self.cuda_graph else None
        if capture is not None:
            return self._graphs.run(source, start, step, self.steps, capture)
        self._loop(start, step)
        return start.adv

    def _loop(self, state: State, step: Step) -> None:
        for number in range(self.steps):
            step(state, number == self.steps - 1)

    def _start_state(self, source: Classifier, images: Tensor, labels: Tensor, indices: Tensor) -> State:
        number = torch.zeros((), dtype=torch.int64, device=images.device)
        draws = Draws(self.seed, number, indices, torch.zeros_like(indices[:1]), START_SLOT)
        adv = self._first(images, draws)
        given = (source, images, labels, indices)
        start = partial(
            Start,
            *given,
            adv,
            self.eps,
            self.alpha,
            partial(self._rehearse, *given),
            guide=partial(self._guide, *given),
        )
        kept = (self.step, self.estimator, self.objective)
        # The first point itself is drawn under the first numbers of copies.
        memories = [
            component.memory(start(replace(draws, copies=draws.copies + place * COPIES_PER_PASS)))
            for place, component in enumerate(kept, 1)
        ]
        return State(images, labels, indices, adv, number, *memories)

    def _rehearse(
        self,
        source: Classifier,
        images: Tensor,
        labels: Tensor,
        indices: Tensor,
        rule: StepRule,
        steps: int,
        alpha: float,
    ) -> Memory:
        return self._trial(source, images, labels, indices, step=rule, steps=steps, alpha=alpha).step

    def _guide(
        self,
        source: Classifier,
        images: Tensor,
        labels: Tensor,
        indices: Tensor,
        objective: Objective,
        momentum: float,
    ) -> Tensor:
        step = replace(self.step, momentum=momentum) if isinstance(self.step, SignStep) else self.step
        return self._trial(source, images, labels, indices, objective=objective, step=step).adv

    def _trial(self, source: Classifier, images: Tensor, labels: Tensor, indices: Tensor, **changes: Any) -> State:
        """Where the attack ends with some of its parts changed."""
        # Another key, so that the attack itself does not draw the same again.
        other = replace(self, **changes, seed=self.seed ^ 2**63)
        trial = other._start_state(source, images, labels, indices)
        other._loop(trial, partial(other._step, source))
        return trial

    def _step(self, source: Classifier, state: State, last: bool) -> None:
        """One step, in place. Nothing here may wait for the device or depend on how many steps came before."""
        position = Position(
            images=state.images,
            adv=state.adv,
            point=self.step.look_ahead(state.adv, state.step, self.alpha),
            number=state.number,
            steps=self.steps,
            eps=self.eps,
            alpha=self.alpha,
            last=last,
        )
        draws = Draws(self.seed, state.number, state.indices, torch.zeros_like(state.indices[:1]))
        chunks = self._chunks.of(state.images, self.max_batch, self.memory)
        task = Task(source, self.objective, state.objective, state.labels, self.transforms, draws, chunks)
        grad = self.estimator.estimate(Gradient(task), position, state.estimator)
        for shaping in self.shaping:
            grad = shaping.shape(grad)
        self.step.update(position, grad, state.step)
        state.number.add_(1)

    def _first(self, images: Tensor, draws: Draws) -> Tensor:
        if not self.random_start:
            return images.clone()
        return (images + self.step.offset(images, self.eps, draws)).clamp_(0, 1)

    def _check(self, source: Classifier, images: Tensor, labels: Tensor, indices: Tensor | None) -> None:
        check_images("images", images)
        source.check_shape(images)
        if images.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"images: got dtype {images.dtype}; allowed is torch.float32 or torch.float64")
        check_labels("labels", labels, len(images), source.num_classes)
        if labels.device != images.device:
            raise ValueError(f"labels: on {labels.device}; allowed is the device of images, {images.device}")
        if indices is not None:
            check_labels("indices", indices, len(images), 2**32)
        for component in self.components:
            component.check(source, images)
