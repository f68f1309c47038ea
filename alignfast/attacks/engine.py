"""The attack loop: there is one, and it knows no attack by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from alignfast.attacks.draws import FIRST_SLOT, FURTHER_SLOT, START_SLOT, Draws
from alignfast.attacks.estimators import Estimator, Moment, Plain
from alignfast.attacks.graph import CAPTURES, Graphs
from alignfast.attacks.objectives import CrossEntropy, Objective
from alignfast.attacks.shaping import Shaping
from alignfast.attacks.state import State
from alignfast.attacks.steps import SignStep, StepRule
from alignfast.attacks.transforms import Transform
from alignfast.attacks.views import Views
from alignfast.checks import check_count, check_images, check_labels, check_number
from alignfast.models import Classifier, as_classifier, evaluating
from alignfast.ops.philox_uniform import MAX_COPY

PLAIN, SIGN, CROSS_ENTROPY = Plain(), SignStep(), CrossEntropy()


@dataclass(frozen=True, eq=False)
class Attack:
    """An iterative L-inf attack on `source`, put together from components.

    Each of `steps` steps takes the mean gradient of the objective over all views of the images, lets the estimator
    and the shaping work on it, and moves by the step rule within eps of the images and in [0, 1]. All randomness is a
    pure function of (seed, data-set index, step, copy, component), so an image's draws are the same alone, in any
    batch and in any order.

    Args:
        source: maps images in [0, 1] to logits; an `Ensemble` for several. Runs in evaluation mode, its weights and
            modes are left as they were.
        eps: radius in units of [0, 1] images. alpha: step size, same unit. steps: at least 1.
        seed: in [0, 2^64).
        transforms: applied in this order; the views of one image are the product of their copies.
        shaping: applied in this order.
        random_start: start at a uniform point of the ball instead of the image.
        max_batch: the most views that go through the model together; None for all. The views of one copy number are
            never split, so at least as many go as there are images. Changes memory, and results by rounding only.
        cuda_graph: on CUDA, record a step with the model's passes as one CUDA graph for each of the last few shapes of
            images, and replay it. What the model computes in Python is recorded once: weights may change in place or
            be replaced, but a model or component whose Python code does something else from call to call needs False,
            as does one that waits for the device or copies from the host. Changes no result, and nothing elsewhere.

    Raises:
        ValueError: a number outside its range. TypeError: a source that is no module.
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
    cuda_graph: bool = True
    _graphs: Graphs = field(init=False, repr=False, default_factory=Graphs)

    def __post_init__(self) -> None:
        as_classifier(self.source)
        check_number("eps", self.eps, low=0.0, high=1.0)
        check_number("alpha", self.alpha, low=0.0, high=1.0)
        check_count("steps", self.steps)
        check_count("seed", self.seed, low=0, high=2**64 - 1)
        if self.max_batch is not None:
            check_count("max_batch", self.max_batch)
        most = FURTHER_SLOT - FIRST_SLOT - 1
        if len(self.transforms) > most:
            raise ValueError(f"transforms: got {len(self.transforms)}; allowed are at most {most}")

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
        start, step = self._start_state(images, labels, indices), partial(self._step, source)
        capture = CAPTURES.get(images.device.type) if self.cuda_graph else None
        if capture is not None:
            return self._graphs.run(source, start, step, self.steps, capture)
        for number in range(self.steps):
            step(start, number == self.steps - 1)
        return start.adv

    def _start_state(self, images: Tensor, labels: Tensor, indices: Tensor) -> State:
        number = torch.zeros((), dtype=torch.int64, device=images.device)
        return State(
            images=images,
            labels=labels,
            indices=indices,
            adv=self._start(images, indices, number),
            number=number,
            momentum=self.step.memory(images),
            memory=self.estimator.memory(images),
        )

    def _step(self, source: Classifier, state: State, last: bool) -> None:
        """One step, in place. Nothing here may wait for the device or depend on how many steps came before."""
        point = self.step.look_ahead(state.adv, state.momentum, self.alpha)
        moment = Moment(state.adv, point, self.eps, last, state.memory)
        grad = self.estimator.estimate(partial(self._gradient, source, state), moment)
        for shaping in self.shaping:
            grad = shaping.shape(grad)
        self.step.update(state.adv, state.images, grad, state.momentum, self.alpha, self.eps)
        state.number.add_(1)

    def _start(self, images: Tensor, indices: Tensor, number: Tensor) -> Tensor:
        if not self.random_start:
            return images.clone()
        draws = Draws(self.seed, number, indices, torch.zeros_like(indices[:1]), START_SLOT)
        noise = draws.uniform(shape=tuple(images.shape[1:]), low=-self.eps, high=self.eps)[0]
        return (images + noise).clamp_(0, 1)

    def _gradient(self, source: Classifier, state: State, point: Tensor, before: Sequence[Transform]) -> Tensor:
        chain = (*before, *self.transforms)
        total = math.prod(transform.copies for transform in chain)
        if total > MAX_COPY:
            raise ValueError(f"transforms: {total} copies an image; allowed are at most {MAX_COPY}")
        together = total if self.max_batch is None else max(1, self.max_batch // len(point))
        grad = torch.zeros_like(point)
        for first in range(0, total, together):
            copies = torch.arange(first, min(first + together, total), device=point.device)
            draws = Draws(self.seed, state.number, state.indices, copies, FURTHER_SLOT if before else FIRST_SLOT)
            grad += self._gradient_of(source, state.labels, point, chain, draws)
        return grad / total

    def _gradient_of(
        self, source: Classifier, labels: Tensor, point: Tensor, chain: Sequence[Transform], draws: Draws
    ) -> Tensor:
        """The gradient of the objective, summed over the copies in `draws`, which begin at the slot of the first."""
        leaf = point.detach().requires_grad_()
        views, stride = Views(leaf, len(draws.copies)), 1
        with torch.enable_grad():
            for slot, transform in enumerate(chain, draws.slot):
                views = transform.view(views, draws.copies // stride % transform.copies, draws.at(slot))
                stride *= transform.copies
            heads = source.heads(views.render)
            gain = self.objective.gain(heads.flatten(0, 1), labels.repeat(len(heads) * len(draws.copies)))
            # A sum over images, not a mean: an image's gradient must not depend on how many others there are.
            (grad,) = torch.autograd.grad(gain.sum() / len(heads), leaf)
        return grad

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
