"""The geometry of losses around images: measured model by model, point by point, image by image."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alignfast.checks import check_choice, check_labels
from alignfast.data import Batch, as_batches
from alignfast.evaluation.shares import on_device
from alignfast.geometry.config import GeometryConfig
from alignfast.geometry.curvature import largest_eigenvalues, lipschitz
from alignfast.geometry.field import Field, field_of, logits_of
from alignfast.geometry.flatness import mean_rise, nonlinearity, profile, worst_rise
from alignfast.geometry.measures import MEASURES, PAIR_MEASURES
from alignfast.geometry.points import (
    BALL,
    CLEAN,
    NOISE,
    RANDOM,
    after,
    along_attack,
    draws_of,
    random_direction,
    random_point,
)
from alignfast.geometry.result import Example, Floats, GeometryResult, Profile, Row, Surface
from alignfast.geometry.summary import differences, estimates
from alignfast.geometry.surface import examples, surface
from alignfast.models import Classifier, as_classifier, evaluating, fingerprint, fit_size, prepare
from alignfast.progress import progress as show_progress
from alignfast.versions import package_versions

# Model, other model or None, point, measure.
Key = tuple[str, str | None, str, str]


def geometry(
    models: Mapping[str, nn.Module],
    data: Iterable[Any],
    config: GeometryConfig | None = None,
    *,
    others: Mapping[str, nn.Module] | None = None,
    baseline: str | None = None,
    progress: bool = False,
) -> GeometryResult:
    """What the loss of each model looks like around every image, and how it goes along with that of others.

    At the image itself, at a random point of the eps ball and along the attack on the model: loss, norms of the input
    gradient, the largest eigenvalue of the input Hessian, the local Lipschitz constant of the gradient, how far and how
    straight the loss rises; against every other model the cosine of the gradients, the KL divergence, whether both
    predict the same and whether the other is fooled (Ma et al., ECCV 2024, section 5 and appendix). Everything is in
    float32, with batch norms folded; the loss is the cross-entropy of the true label.

    Args:
        models: by name, images in [0, 1] to logits. data: batches (images, labels[, indices]), read once.
        others: such as witnesses and targets; None takes the models themselves, each against the rest.
        baseline: the model that the others are compared with, image by image; if None, "vanilla", or else the first.
        progress: show progress on standard error.

    Raises:
        ValueError: no model or image, labels outside the classes, models with other numbers of classes, an unknown
            baseline or `config.along`, or a model without second derivatives; before anything is measured.
    """
    config = config or GeometryConfig()
    if not models:
        raise ValueError("models: got none; allowed is at least one")
    baseline = _named("baseline", baseline, models) or ("vanilla" if "vanilla" in models else next(iter(models)))
    along = _named("along", config.along, models) or next(iter(models))
    batches = [_checked(batch, models) for batch in as_batches(data)]
    if sum(len(batch.labels) for batch in batches) == 0:
        raise ValueError("data: holds no image; allowed is a loader with at least one")
    ready = {name: _frozen(as_classifier(model), batches[0].images) for name, model in models.items()}
    beside = {name: _frozen(as_classifier(model), batches[0].images) for name, model in (others or {}).items()}
    _check_classes({**ready, **beside}, batches[0].images)
    study = _Study(config, ready, beside, along)
    if config.takes("curvature"):
        study.check_second_derivatives(batches[0])
    total = len(batches) * len(ready)
    everyone = [*ready.values(), *beside.values()]
    with evaluating(*everyone), show_progress("geometry", total, "batches", shown=progress) as tick:
        for batch in batches:
            for name in ready:
                study.measure(name, batch)
                tick(1, name)
            study.draw(batch)
    rows = study.rows()
    described = {"baseline": baseline, "images": len(study.indices), **asdict(config), "along": along}
    prints = {
        role: {name: fingerprint(as_classifier(model)) for name, model in group.items()}
        for role, group in (("models", models), ("others", others or {}))
    }
    return GeometryResult(
        rows=rows,
        indices=np.array(study.indices, dtype=np.int64),
        estimates=estimates(rows, config.resamples, config.seed),
        differences=differences(rows, baseline, config.resamples, config.seed),
        surfaces=tuple(study.surfaces),
        profile=study.profile(),
        examples=tuple(study.examples),
        config=described | prints,
        versions=package_versions(),
    )


@dataclass
class _Study:
    """What has been measured so far."""

    config: GeometryConfig
    models: Mapping[str, Classifier]
    others: Mapping[str, Classifier]
    along: str
    values: dict[Key, list[Floats]] = field(default_factory=dict)
    lines: dict[str, list[Floats]] = field(default_factory=dict)
    indices: list[int] = field(default_factory=list)
    surfaces: list[Surface] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    # Of the batch at hand: each model's image after its whole attack.
    ends: dict[str, Tensor] = field(default_factory=dict)

    def measure(self, name: str, batch: Batch) -> None:
        model, config = self.models[name], self.config
        images = fit_size(batch.images, model)
        numbers = {"eps": config.eps, "alpha": config.alpha, "seed": config.seed}
        path = along_attack(model, {**config.attack, **numbers}, config.steps, images, batch.labels, batch.indices)
        points = {CLEAN: images, RANDOM: random_point(images, batch.indices, config.eps, config.seed)}
        points |= {after(steps): reached for steps, reached in path.items()}
        self.ends[name] = path[config.steps[-1]]
        loss = field_of(model, batch.labels)
        for point, where in points.items():
            grad = loss.gradients(where)
            for measure, found in self._alone(loss, where, grad, batch.indices).items():
                self._keep((name, None, point, measure), found)
            for other, partner in (self.others or self.models).items():
                if other != name:
                    for measure, found in _pair(model, partner, where, grad, batch.labels).items():
                        self._keep((name, other, point, measure), found)
        self.lines.setdefault(name, []).append(_array(profile(loss, images, self._distances(images))))

    def draw(self, batch: Batch) -> None:
        """What pictures need of the first images, after every model was measured."""
        config, model = self.config, self.models[self.along]
        images = fit_size(batch.images, model)
        for row in range(min(len(images), config.surfaces - len(self.surfaces))):
            one = slice(row, row + 1)
            where = (images[one], self.ends[self.along][one], batch.labels[one], batch.indices[one])
            reach = config.span * config.eps
            self.surfaces.append(surface(self.models, self.along, *where, config.grid, reach, config.seed))
        more = max(0, config.examples - len(self.examples))
        ends = {name: fit_size(end, model) for name, end in self.ends.items()}
        self.examples += examples(more, images, ends, batch.labels, batch.indices)
        self.indices += batch.indices.tolist()

    def rows(self) -> tuple[Row, ...]:
        return tuple(Row(*key, np.concatenate(parts)) for key, parts in self.values.items())

    def profile(self) -> Profile:
        distances = np.linspace(-self.config.reach, self.config.reach, self.config.profile)
        return Profile(distances, {name: np.concatenate(parts) for name, parts in self.lines.items()})

    def check_second_derivatives(self, batch: Batch) -> None:
        one = Batch(*(each[:1] for each in batch))
        for name, model in self.models.items():
            images = fit_size(one.images, model)
            products = field_of(model, one.labels).hessian(images, self.config.second_derivatives)
            try:
                products(torch.ones_like(images))
            except ValueError as error:
                raise ValueError(f"models: {name}: {error}") from error

    def _alone(self, loss: Field, where: Tensor, grad: Tensor, indices: Tensor) -> dict[str, Tensor]:
        config, flat = self.config, grad.flatten(1)
        start = random_direction(where, indices, config.seed)
        found: dict[str, Tensor] = {}
        if config.takes("curvature"):
            products = loss.hessian(where, config.second_derivatives)
            eigen = largest_eigenvalues(products, start, config.lanczos, config.tolerance)
            found |= {"curvature": eigen.values, "curvature_residual": eigen.residuals}
        computed: dict[str, Callable[[], Tensor]] = {
            "loss": lambda: loss.values(where),
            "gradient_l1": lambda: flat.abs().sum(1),
            "gradient_l2": lambda: torch.linalg.vector_norm(flat, dim=1),
            "lipschitz": lambda: lipschitz(loss, where, start, config.reach, config.ascent),
            "rise_worst": lambda: worst_rise(loss, where, config.reach, config.ascent),
            "rise_mean": lambda: mean_rise(loss, where, self._noise(where, indices)),
            "nonlinearity": lambda: nonlinearity(loss, where, config.reach),
        }
        found |= {name: compute() for name, compute in computed.items() if config.takes(name)}
        return {name: found[name] for name in MEASURES if name in found}

    def _noise(self, where: Tensor, indices: Tensor) -> Tensor:
        draws = draws_of(indices, self.config.seed, self.config.samples).at(NOISE)
        return draws.uniform(BALL, tuple(where.shape[1:]), -self.config.reach, self.config.reach).to(where.dtype)

    def _distances(self, images: Tensor) -> Tensor:
        reach, count = self.config.reach, self.config.profile
        return torch.linspace(-reach, reach, count, dtype=images.dtype, device=images.device)

    def _keep(self, key: Key, found: Tensor) -> None:
        self.values.setdefault(key, []).append(_array(found))


@torch.no_grad()
def _predictions(model: Classifier, where: Tensor) -> Tensor:
    return logits_of(model, where)


def _pair(model: Classifier, other: Classifier, where: Tensor, grad: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """NaN for the cosine where a gradient is zero."""
    theirs = field_of(other, labels).gradients(where)
    mine, his = _predictions(model, where), _predictions(other, where)
    first, second = grad.flatten(1).double(), theirs.flatten(1).double()
    scale = torch.linalg.vector_norm(first, dim=1) * torch.linalg.vector_norm(second, dim=1)
    found = {
        "gradient_cosine": (first * second).sum(1) / scale,
        "kl": F.kl_div(mine.log_softmax(1), his.log_softmax(1), reduction="none", log_target=True).sum(1),
        "agreement": (mine.argmax(1) == his.argmax(1)).double(),
        "fooled": (his.argmax(1) != labels).double(),
    }
    return {name: found[name] for name in PAIR_MEASURES}


def _frozen(model: Classifier, images: Tensor) -> Classifier:
    """A copy to measure, which is also faster; float64 stays as it is, for checks."""
    if images.dtype == torch.float32:
        return prepare(model, fit_size(images, model), "fp32")
    return copy.deepcopy(model).eval().requires_grad_(False)


def _checked(batch: Batch, models: Mapping[str, nn.Module]) -> Batch:
    for name, model in models.items():
        check_labels(f"data's labels for {name}", batch.labels, len(batch.images), as_classifier(model).num_classes)
    return on_device(batch, nn.ModuleList(models.values()))


def _check_classes(models: Mapping[str, Classifier], images: Tensor) -> None:
    classes = {name: _predictions(model, images[:1]).shape[1] for name, model in models.items()}
    if len(set(classes.values())) > 1:
        raise ValueError(f"models, others: their numbers of classes differ: {classes}; allowed is one for all")


def _named(argument: str, name: str | None, models: Mapping[str, nn.Module]) -> str | None:
    return None if name is None else check_choice(argument, name, models)


def _array(found: Tensor) -> Floats:
    array: Floats = found.double().cpu().numpy()
    return array
