"""The transfer matrix: every attack on every source, measured on every target."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args
from urllib.parse import quote

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from alignfast.attacks import Attack, create
from alignfast.checks import check_choice, check_labels
from alignfast.data import Batch, as_batches
from alignfast.distributed import main, on_main
from alignfast.evaluation.matrix_result import Cell, Comparison, TransferMatrix
from alignfast.evaluation.shares import Shares, form_of, prepared_alike, shares_of
from alignfast.evaluation.statistics import paired
from alignfast.files import replacing
from alignfast.models import Classifier, as_classifier, evaluating, fingerprint, fit_size
from alignfast.models.preparation import Precision
from alignfast.progress import Advance
from alignfast.progress import progress as show_progress
from alignfast.versions import package_versions

Flags = NDArray[np.bool_]
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
    progress: bool = False,
) -> TransferMatrix:
    """Error rates of every target on the adversarial images of every attack on every source.

    Two protocols. All images (the default): the share of all images that the target gets wrong. Qualified: the same
    among the images that source and target both get right when clean, and on which the attack fools each of them
    white-box (Ma et al., ECCV 2024, section 4.1, as a conjunction); this needs the attack run on the targets too.

    Where a process group is initialised, all ranks call this with the same arguments. Each attacks and measures every
    `world`-th batch, and all get the result that one process would have got. Rank 0 shows the progress and keeps the
    parts, which any number of ranks can take up again.

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
            same attack, models, precision and labels under the same names; the images are taken to be the same.
        progress: show progress on standard error.

    Returns:
        Per cell the rate with its Wilson 95 % interval, the target's clean accuracy and the source's own error rate
        (white box), both over all images; and the paired comparisons. Its configuration has the precision, and the
        form of each source that was prepared.

    Raises:
        ValueError: an unknown attack, parameter or precision, an empty mapping, labels outside the classes, data that
            are empty or change their order; before any attack runs.
    """
    for name, mapping in (("sources", sources), ("targets", targets), ("attacks", attacks)):
        if not mapping:
            raise ValueError(f"{name}: got none; allowed is at least one")
    if baseline is not None and baseline not in sources:
        raise ValueError(f"baseline: got {baseline!r}; allowed is one of {', '.join(sources)}")
    if precision is not None:
        check_choice("precision", precision, get_args(Precision))
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
    measured = _Measured(shares.labels)
    everyone = list(wrapped.values())
    total = shares.batches * (len(everyone) + len(jobs))
    for role, group in models.items():
        for name, model in group.items():
            check_labels(f"data's labels for {role} {name}", measured.labels, len(measured.labels), model.num_classes)
    if precision is not None:
        jobs = _prepared(jobs, attacks, data, precision)
    with evaluating(*everyone), show_progress("transfer", total, "batches", shown=progress and main()) as tick:
        for model in everyone:
            own = errors_of(model, [model], shares.own, None, shares.own_labels, tick)
            measured.right[id(model)] = ~shares.merge(own)[0]
        for job in jobs:
            judges = [job.model] if job.role == "target" else [job.model, *models["target"].values()]
            measured.fooled[job.role, job.name, job.attack_name] = _outcome(job, judges, shares, parts, tick)
    described = {job.attack_name: job.attack.parameters() for job in reversed(jobs)}
    for name, spec in attacks.items():
        # Tensors, as images to mix in, are told by the attack in few words.
        if isinstance(spec, Mapping) and not any(isinstance(value, Tensor) for value in spec.values()):
            described[name] = dict(spec)
    config = {
        "protocol": "qualified" if qualified else "all",
        "baseline": baseline,
        "precision": precision,
        "forms": {job.name: job.form for job in jobs if job.form is not None},
        "images": len(measured.labels),
        "attacks": {name: described[name] for name in attacks},
        **{f"{role}s": {name: fingerprint(model) for name, model in group.items()} for role, group in models.items()},
    }
    return _assemble(models, config, measured, qualified)


@dataclass(frozen=True)
class _Job:
    """An attack to run: on a source, or for the qualified protocol on a target.

    model: as given. form: of the copy of it that is attacked; None where that is the model itself.
    """

    role: str
    name: str
    attack_name: str
    model: Classifier
    attack: Attack
    form: str | None = None

    @property
    def file_name(self) -> str:
        # Quoted, so that no two jobs share a file and no name reaches out of the folder.
        return "+".join(quote(part, safe="") for part in (self.role, self.name, self.attack_name)) + ".npz"

    def identity(self, judges: list[Classifier], labels: Tensor) -> str:
        """What decides the outcome, as text."""
        prints = [fingerprint(model) for model in (self.model, *judges)]
        digest = hashlib.sha256(labels.numpy().tobytes()).hexdigest()
        return json.dumps([self.attack.parameters(), prints, digest, self.form])


@dataclass(frozen=True)
class _Part:
    """The outcome of one job on disk, which counts only for the identity that it was written with."""

    path: Path
    identity: str

    def read(self) -> Flags | None:
        if not self.path.is_file():
            return None
        with np.load(self.path, allow_pickle=False) as content:
            return content["wrong"] if str(content["identity"]) == self.identity else None

    def write(self, wrong: Flags) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as temporary:
            np.savez(temporary, wrong=wrong, identity=np.array(self.identity))


@dataclass(frozen=True)
class _Measured:
    """labels: int64 [N]. right: who is right when clean, [N] by model. fooled: who is wrong after an attack, by role,
    model and attack; [1, N] for the target itself, [1 + T, N] for the source and the targets."""

    labels: Tensor
    right: dict[int, Flags] = field(default_factory=dict)
    fooled: dict[tuple[str, str, str], Flags] = field(default_factory=dict)


def _outcome(
    job: _Job, judges: list[Classifier], shares: Shares, parts: str | os.PathLike[str] | None, tick: Advance
) -> Flags:
    """[judges, N]: who is wrong after the attack, from an earlier call where it has been kept."""
    part = None
    if parts is not None and main():
        part = _Part(Path(parts) / job.file_name, job.identity(judges, shares.labels))
    wrong = on_main(lambda: None if part is None else part.read())
    if wrong is not None:
        tick(shares.batches, "")
        return wrong
    wrong = shares.merge(errors_of(job.model, judges, shares.own, job.attack, shares.own_labels, tick))
    if part is not None:
        part.write(wrong)
    return wrong


def _jobs(
    models: Mapping[str, Mapping[str, Classifier]], attacks: Mapping[str, AttackSpec], qualified: bool
) -> list[_Job]:
    roles = ("source", "target") if qualified else ("source",)
    return [
        _Job(role, name, attack_name, model, _attack(spec, model))
        for role in roles
        for name, model in models[role].items()
        for attack_name, spec in attacks.items()
    ]


def _prepared(
    jobs: list[_Job], attacks: Mapping[str, AttackSpec], data: Iterable[Any], precision: Precision
) -> list[_Job]:
    """The same jobs, those on sources on copies prepared for the first batch."""
    batch = next(as_batches(data))
    copies: dict[int, Classifier] = {}
    changed = []
    for job in jobs:
        if job.role == "source":
            if id(job.model) not in copies:
                images = fit_size(_on_device(batch, job.model).images, job.model)
                copies[id(job.model)] = prepared_alike(job.model, images, precision)
            copy = copies[id(job.model)]
            job = replace(job, attack=_attack(attacks[job.attack_name], copy), form=form_of(copy))
        changed.append(job)
    return changed


def _attack(spec: AttackSpec, model: Classifier) -> Attack:
    if callable(spec):
        return spec(model)
    if "name" not in spec:
        raise ValueError(f"attacks: got {dict(spec)} without a name; allowed is a mapping with the name of an attack")
    return create(str(spec["name"]), model, **{key: value for key, value in spec.items() if key != "name"})


def labels_of(data: Iterable[Any]) -> Tensor:
    """int64 [N] on the CPU, in the order of the batches; ValueError where there is no image."""
    labels = [batch.labels for batch in as_batches(data)]
    if sum(map(len, labels)) == 0:
        raise ValueError("data: holds no image; allowed is a loader with at least one")
    return torch.cat(labels).cpu()


def errors_of(
    source: Classifier,
    judges: list[Classifier],
    data: Iterable[Any],
    attack: Attack | None,
    labels: Tensor,
    tick: Advance | None = None,
) -> Flags:
    """[judges, N]: which of the images each judge gets wrong after `attack` on `source`, or clean where it is None."""
    wrong: list[Tensor] = []
    seen: list[Tensor] = []
    for batch in as_batches(data):
        images, truth, indices = _on_device(batch, source)
        images = fit_size(images, source)
        if attack is not None:
            images = attack(images, truth, indices=indices)
        wrong.append(torch.stack([_predict(judge, images).to(truth.device) != truth for judge in judges]))
        seen.append(truth)
        if tick is not None:
            tick(1, "")
    if not torch.equal(torch.cat(seen).cpu() if seen else labels[:0], labels):
        raise ValueError("data: the order changes from pass to pass; allowed is a loader that does not shuffle")
    return torch.cat(wrong, 1).cpu().numpy() if wrong else np.zeros((len(judges), 0), dtype=np.bool_)


@torch.no_grad()
def _predict(model: Classifier, images: Tensor) -> Tensor:
    return model.logits(fit_size(images.to(_device(model)), model)).argmax(1)


def _on_device(batch: Batch, model: Classifier) -> Batch:
    device = _device(model)
    return Batch(*(tensor.to(device, non_blocking=True) for tensor in batch))


def _device(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in model.parameters()), torch.device("cpu"))


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
                white_box = measured.fooled["source", source, attack][0]
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
    wrong = measured.fooled["source", source, attack]
    if not qualified:
        return wrong[row], np.ones_like(wrong[row])
    right = [measured.right[id(models[role][name])] for role, name in (("source", source), ("target", target))]
    white_box = [wrong[0], measured.fooled["target", target, attack][0]]
    return wrong[row], np.logical_and.reduce([*right, *white_box])
