"""The transfer matrix: every attack on every source, measured on every target."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from torch import Tensor, nn

from alignfast.attacks import Attack, create
from alignfast.checks import check_choice, check_labels
from alignfast.data import as_batches
from alignfast.distributed import main, on_main
from alignfast.evaluation.judging import Flags
from alignfast.evaluation.kept import KeptForm, check_files, check_keepable, file_name, filenames_of
from alignfast.evaluation.matrix_result import Cell, Comparison, TransferMatrix
from alignfast.evaluation.outcomes import CLEAN, InMemory, Job, OnDisk, Outcomes
from alignfast.evaluation.shares import form_of, on_device, prepared_alike, shares_of
from alignfast.evaluation.statistics import paired
from alignfast.models import Classifier, Defended, as_classifier, evaluating, fingerprint, fit_size
from alignfast.models.preparation import Precision, Preparation
from alignfast.progress import board
from alignfast.versions import package_versions

# Parameters of a preset with its name, or a function that puts an attack on a source.
AttackSpec = Mapping[str, Any] | Callable[[nn.Module], Attack]


def transfer_matrix(
    sources: Mapping[str, nn.Module],
    targets: Mapping[str, nn.Module],
    attacks: Mapping[str, AttackSpec],
    data: Iterable[Any],
    *,
    qualified: bool = False,
    baseline: str | None = None,
    precision: Precision | None = None,
    parts: str | os.PathLike[str] | None = None,
    images: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> TransferMatrix:
    """Error rates of every target on the adversarial images of every attack on every source.

    Two protocols. All images (the default): the share of all images that the target gets wrong. Qualified: the same
    among the images that source and target both get right when clean, and on which the attack fools each of them
    white-box (Ma et al., ECCV 2024, section 4.1, as a conjunction); this needs the attack run on the targets too. A
    `Defended` target has no gradient: the attack is run on the model behind the defences, and it is that model which
    the images must fool; the clean images, and those of the source, are shown to the target with its defences.

    Where a process group is initialised, all ranks call this with the same arguments. Each attacks and measures every
    `world`-th batch, and all get the result that one process would have got. Rank 0 shows the progress and keeps the
    parts, which any number of ranks can take up again; images are written by all ranks, into a folder that all see.

    Args:
        sources, targets: models by name, images in [0, 1] to logits. A model of another input size is given the
            images resized.
        attacks: by name, a mapping such as dict(name="mifgsm", eps=4/255, alpha=1/255, steps=20), or a function from
            a source to an `Attack`.
        data: batches (images, labels[, indices]) in the same order every time they are iterated.
        baseline: the source that the others are compared with, image by image (McNemar); if None, "vanilla", or else
            the first source.
        precision: in which `prepare` makes a copy of each source for the attacks; None attacks the sources as they are
            given. Whether an image fools a source or a target, and the attacks on targets, are always of the models as
            given. "fp32" differs from None by rounding, and "auto" measures what is fastest.
        parts: a folder in which the outcome of each attack is kept, to be taken from there by a later call with the
            same attack, models, precision and labels under the same names; the images are taken to be the same. With
            "auto", the form that is found for a source is kept there too. With `images`, the outcome of each target is
            kept by itself, and so are clean accuracies.
        images: a folder in which the adversarial images of each attack are kept, as `AdversarialWriter` writes them:
            on the 8-bit grid, within eps of the 8-bit original, at the size of the model that is attacked. Targets are
            then measured on these, and images that are there already are not made again. None measures the images as
            they are attacked, in floating point, and keeps none.
        progress: show progress on standard error.

    Returns:
        Per cell the rate with its Wilson 95 % interval, the target's clean accuracy and the source's own error rate
        (white box), both over all images; and the paired comparisons. Its configuration has the precision, and the
        form of each source that was prepared.

    Raises:
        ValueError: an unknown attack, parameter or precision, an empty mapping, a defended source, labels outside the
            classes, data that are empty or change their order; and with `images`, data that are not 8-bit, names that
            would share a file, or a folder that holds other images; the last when its turn comes, all others before any
            attack runs.
    """
    for name, mapping in (("sources", sources), ("targets", targets), ("attacks", attacks)):
        if not mapping:
            raise ValueError(f"{name}: got none; allowed is at least one")
    if baseline is not None and baseline not in sources:
        raise ValueError(f"baseline: got {baseline!r}; allowed is one of {', '.join(sources)}")
    if precision is not None:
        check_choice("precision", precision, get_args(Precision))
    for name, model in sources.items():
        if isinstance(model, Defended):
            raise ValueError(f"sources: {name} has defences, which have no gradient; allowed is the model behind them")
    if images is not None:
        for what, mapping in (("sources", sources), ("targets", targets), ("attacks", attacks)):
            check_files(what, mapping)
    baseline = baseline or ("vanilla" if "vanilla" in sources else next(iter(sources)))
    # One wrapper for each module, so that a model in several roles is one model.
    wrapped = {id(model): as_classifier(model) for model in (*sources.values(), *targets.values())}
    models = {
        "source": {name: wrapped[id(model)] for name, model in sources.items()},
        "target": {name: wrapped[id(model)] for name, model in targets.items()},
    }
    jobs = _jobs(models, attacks, qualified)
    data = list(data) if isinstance(data, Iterator) else data
    shares = shares_of(data)
    for role, group in models.items():
        for name, model in group.items():
            check_labels(f"data's labels for {role} {name}", shares.labels, len(shares.labels), model.num_classes)
    if images is not None:
        check_keepable(next(as_batches(data)).images, shares.indices)
    everyone = {id(model): model for model in (*wrapped.values(), *(job.model for job in jobs))}
    prints = {key: fingerprint(model) for key, model in everyone.items()}
    if precision is not None:
        kept = parts if parts is not None else images
        jobs = _prepared(jobs, attacks, data, precision, None if kept is None else Path(kept), prints)
    kept_in = None if parts is None else Path(parts)
    outcomes: Outcomes = InMemory(shares, prints, kept_in)
    if images is not None:
        outcomes = OnDisk(shares, prints, kept_in, Path(images), filenames_of(data, shares.indices))
    measured = _measured(outcomes, models, jobs, shown=progress and main())
    config = {
        "protocol": "qualified" if qualified else "all",
        "baseline": baseline,
        "precision": precision,
        "forms": {job.name: job.form for job in jobs if job.form is not None},
        "images": len(shares.labels),
        "pixels": "float" if images is None else "8-bit",
        "attacks": _described(attacks, jobs),
        "eps": {name: _first(jobs, name).eps for name in attacks},
        "norm": {name: _first(jobs, name).step.norm for name in attacks},
        "defences": {name: model.text for name, model in models["target"].items() if isinstance(model, Defended)},
        **{f"{role}s": {name: prints[id(model)] for name, model in group.items()} for role, group in models.items()},
    }
    return _assemble(models, config, measured, qualified)


@dataclass(frozen=True)
class _Measured:
    """right: who is right when clean, [N] by model. fooled: who is wrong after an attack, by role, model and attack;
    [1, N] for the target itself, [1 + T, N] for the source and the targets."""

    right: dict[int, Flags] = field(default_factory=dict)
    fooled: dict[tuple[str, int, str], Flags] = field(default_factory=dict)


def _measured(
    outcomes: Outcomes, models: Mapping[str, Mapping[str, Classifier]], jobs: list[Job], *, shown: bool
) -> _Measured:
    measured = _Measured()
    # By the first name of each model.
    named: dict[int, tuple[str, Classifier]] = {}
    for role, group in models.items():
        for name, model in group.items():
            named.setdefault(id(model), (f"{role}s/{file_name(name)}", model))
    rows = [(CLEAN, outcomes.shares.batches * len(named)), *((str(job), outcomes.units(job)) for job in jobs)]
    everyone = {id(model): model for job in jobs for model in job.everyone}
    with evaluating(*everyone.values()), board("transfer", rows, "batches", shown=shown) as (clean, *ticks):
        for key, (name, model) in named.items():
            measured.right[key] = ~outcomes.clean(name, model, clean)
        for job, tick in zip(jobs, ticks, strict=True):
            measured.fooled[job.role, id(job.model), job.attack_name] = outcomes.fooled(job, tick)
    return measured


def _jobs(
    models: Mapping[str, Mapping[str, Classifier]], attacks: Mapping[str, AttackSpec], qualified: bool
) -> list[Job]:
    attacked = [("source", name, model, models["target"]) for name, model in models["source"].items()]
    # A model and its defended forms are attacked once, under the first name.
    behind: dict[int, tuple[str, str, Classifier, Mapping[str, Classifier]]] = {}
    for name, target in models["target"].items() if qualified else ():
        behind.setdefault(id(_undefended(target)), ("target", name, _undefended(target), {}))
    return [
        Job(role, name, attack_name, model, _attack(spec, model), judges)
        for role, name, model, judges in (*attacked, *behind.values())
        for attack_name, spec in attacks.items()
    ]


def _undefended(model: Classifier) -> Classifier:
    return model.undefended if isinstance(model, Defended) else model


def _prepared(
    jobs: list[Job],
    attacks: Mapping[str, AttackSpec],
    data: Iterable[Any],
    precision: Precision,
    kept: Path | None,
    prints: Mapping[int, str],
) -> list[Job]:
    """The same jobs, those on sources on copies prepared for the first batch."""
    batch = next(as_batches(data))
    copies: dict[int, Classifier] = {}
    changed = []
    for job in jobs:
        if job.role == "source":
            if id(job.model) not in copies:
                example = fit_size(on_device(batch, job.model).images, job.model)
                path = None if kept is None else kept / f"forms/{file_name(job.name)}.json"
                copies[id(job.model)] = _prepared_once(job.model, example, precision, path, prints)
            copy = copies[id(job.model)]
            job = replace(job, attack=_attack(attacks[job.attack_name], copy), form=form_of(copy))
        changed.append(job)
    return changed


def _prepared_once(
    model: Classifier, example: Tensor, precision: Precision, path: Path | None, prints: Mapping[int, str]
) -> Classifier:
    """A copy in the form that an earlier call found, where that was measured and kept."""
    if path is None or precision != "auto":
        return prepared_alike(model, example, precision)
    kept = KeptForm(path, prints[id(model)])
    found: Preparation | None = on_main(kept.read)
    prepared = prepared_alike(model, example, found or precision)
    on_main(lambda: None if prepared.preparation is None else kept.write(prepared.preparation))
    return prepared


def _attack(spec: AttackSpec, model: Classifier) -> Attack:
    if callable(spec):
        return spec(model)
    if "name" not in spec:
        raise ValueError(f"attacks: got {dict(spec)} without a name; allowed is a mapping with the name of an attack")
    return create(str(spec["name"]), model, **{key: value for key, value in spec.items() if key != "name"})


def _first(jobs: list[Job], attack_name: str) -> Attack:
    return next(job.attack for job in jobs if job.attack_name == attack_name)


def _described(attacks: Mapping[str, AttackSpec], jobs: list[Job]) -> dict[str, Any]:
    # Tensors, as images to mix in, are told by the attack in few words.
    return {
        name: dict(spec)
        if isinstance(spec, Mapping) and not any(isinstance(value, Tensor) for value in spec.values())
        else _first(jobs, name).parameters()
        for name, spec in attacks.items()
    }


def _assemble(
    models: Mapping[str, Mapping[str, Classifier]],
    config: dict[str, Any],
    measured: _Measured,
    qualified: bool,
) -> TransferMatrix:
    sources, targets, baseline = models["source"], models["target"], config["baseline"]
    cells, comparisons = [], []
    for attack in config["attacks"]:
        for row, target in enumerate(targets, 1):
            judged = {source: _counted(models, measured, source, attack, target, qualified, row) for source in sources}
            for source, (fooled, counts) in judged.items():
                white_box = measured.fooled["source", id(sources[source]), attack][0]
                clean = measured.right[id(targets[target])]
                n, errors = int(counts.sum()), int((fooled & counts).sum())
                rates = {"clean_accuracy": float(clean.mean()), "white_box": float(white_box.mean())}
                cells.append(Cell.counted(source, attack, target, errors=errors, n=n, **rates))
                if source != baseline:
                    both = counts & judged[baseline][1]
                    result = paired(judged[baseline][0][both], fooled[both])
                    comparisons.append(Comparison.of(baseline, source, attack, target, result))
    return TransferMatrix(tuple(cells), tuple(comparisons), config, package_versions())


def _counted(
    models: Mapping[str, Mapping[str, Classifier]],
    measured: _Measured,
    source: str,
    attack: str,
    target: str,
    qualified: bool,
    row: int,
) -> tuple[Flags, Flags]:
    """Which images fool the target, and which ones count."""
    wrong = measured.fooled["source", id(models["source"][source]), attack]
    if not qualified:
        return wrong[row], np.ones_like(wrong[row])
    right = [measured.right[id(models[role][name])] for role, name in (("source", source), ("target", target))]
    behind = _undefended(models["target"][target])
    white_box = [wrong[0], measured.fooled["target", id(behind), attack][0]]
    return wrong[row], np.logical_and.reduce([*right, *white_box])
