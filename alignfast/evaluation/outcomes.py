"""Who is wrong after an attack: measured on images in memory, or on images that are kept."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from urllib.parse import quote

import numpy as np

from alignfast.attacks import Attack
from alignfast.data import Manifest
from alignfast.distributed import main, on_main
from alignfast.evaluation.judging import Flags, errors_of
from alignfast.evaluation.kept import Part, file_name, kept_images
from alignfast.evaluation.shares import Shares
from alignfast.models import Classifier
from alignfast.progress import Advance

CLEAN, WHITE_BOX = "clean", "white box"


@dataclass(frozen=True)
class Job:
    """An attack to run: on a source, or for the qualified protocol on a target.

    model: as given. form: of the copy of it that is attacked; None where that is the model itself. judges: of the
    images, by name and besides the model itself.
    """

    role: str
    name: str
    attack_name: str
    model: Classifier
    attack: Attack
    judges: Mapping[str, Classifier]
    form: str | None = None

    @property
    def everyone(self) -> list[Classifier]:
        return [self.model, *self.judges.values()]

    def __str__(self) -> str:
        return f"{self.name}, {self.attack_name}" + (f" ({WHITE_BOX})" if self.role == "target" else "")


@dataclass(frozen=True)
class Outcomes(ABC):
    """shares: of the ranks in the images. prints: fingerprints by a model's id. parts: the folder in which outcomes are
    kept, or None."""

    shares: Shares
    prints: Mapping[int, str]
    parts: Path | None

    @abstractmethod
    def units(self, job: Job) -> int:
        """Batches of this rank in `fooled`."""

    @abstractmethod
    def clean(self, name: str, model: Classifier, tick: Advance) -> Flags:
        """[N]: which images a model gets wrong when clean."""

    @abstractmethod
    def fooled(self, job: Job, tick: Advance) -> Flags:
        """[1 + judges, N]: who is wrong after the attack, the model itself first."""

    def part(self, path: str, *identity: object) -> Part | None:
        """Where an outcome is kept, on rank 0; `identity` is what decides it, besides the images."""
        if self.parts is None or not main():
            return None
        return Part(self.parts / path, json.dumps([*identity, self.shares.digest]))

    def once(self, part: Part | None, units: int, tick: Advance, measure: Callable[[], Flags]) -> Flags:
        """The outcome that is kept, or else the one that is measured, which is then kept."""
        found = on_main(lambda: None if part is None else part.read())
        if found is not None:
            tick(units, "")
            return found
        wrong = measure()
        if part is not None:
            part.write(wrong)
        return wrong

    def described(self, job: Job) -> list[object]:
        """What decides the images of a job."""
        return [attacked(job), self.prints[id(job.model)], job.form]


class InMemory(Outcomes):
    """All judges see each batch as it is attacked, in floating point; a part has the outcome of a job."""

    def units(self, job: Job) -> int:
        return self.shares.batches

    def clean(self, name: str, model: Classifier, tick: Advance) -> Flags:
        wrong: Flags = errors_in(self.shares, [model], model, None, tick)[0]
        return wrong

    def fooled(self, job: Job, tick: Advance) -> Flags:
        # Quoted, so that no two jobs share a file and no name reaches out of the folder.
        name = "+".join(quote(text, safe="") for text in (job.role, job.name, job.attack_name)) + ".npz"
        part = self.part(name, *self.described(job), [self.prints[id(model)] for model in job.everyone])
        measure = partial(errors_in, self.shares, job.everyone, job.model, job.attack, tick)
        return self.once(part, self.units(job), tick, measure)


@dataclass(frozen=True)
class OnDisk(Outcomes):
    """Images are attacked first and kept in 8 bits; each judge then sees those, and a part has the outcome of one.

    folder: that of the images. filenames: by data-set index.
    """

    folder: Path
    filenames: Sequence[str]

    def units(self, job: Job) -> int:
        return self.shares.batches + self.shares.even_batches * len(job.everyone)

    def clean(self, name: str, model: Classifier, tick: Advance) -> Flags:
        part = self.part(f"{CLEAN}/{name}.npz", self.prints[id(model)])
        measure = partial(errors_in, self.shares, [model], model, None, tick)
        wrong: Flags = self.once(part, self.shares.batches, tick, measure)[0]
        return wrong

    def fooled(self, job: Job, tick: Advance) -> Flags:
        place = f"{job.role}s/{file_name(job.name)}/{file_name(job.attack_name)}"
        # Made, or read, for the first outcome that is missing.
        images = cache(partial(self.images, job, place, _doing("attacking", tick)))
        judges = {f"{place}/white_box.npz": ("itself", job.model)}
        judges |= {f"{place}/targets/{file_name(name)}.npz": (name, judge) for name, judge in job.judges.items()}
        rows = []
        for path, (name, judge) in judges.items():
            part = self.part(path, *self.described(job), self.prints[id(judge)])
            measure = partial(_judged, images, judge, _doing(f"measuring {name}", tick))
            rows.append(self.once(part, self.shares.even_batches, tick, measure))
        if images.cache_info().misses == 0:
            tick(self.shares.batches, "")
        return np.concatenate(rows)

    def images(self, job: Job, place: str, tick: Advance) -> Shares:
        """The images of a job, made as far as they are not there."""
        folder, manifest = self.folder / place, self.manifest(job)
        return kept_images(folder, manifest, job.attack, job.model, self.shares, self.filenames, tick)

    def manifest(self, job: Job) -> Manifest:
        return Manifest(
            attack=job.attack_name,
            parameters={"model": job.name, **attacked(job), "form": job.form},
            model=self.prints[id(job.model)],
            seed=job.attack.seed,
            eps=job.attack.eps,
            norm=job.attack.step.norm,
            data=f"{len(self.shares.labels)} images, sha256 of labels and indices {self.shares.digest}",
            num_classes=job.model.num_classes,
        )


def attacked(job: Job) -> dict[str, object]:
    """The attack's parameters, with the surgeries of its source."""
    surgeries = [surgery for member in _members(job.attack) for surgery in getattr(member, "surgeries", ())]
    return job.attack.parameters() | ({"surgeries": repr(surgeries)} if surgeries else {})


def _members(attack: Attack) -> Iterable[object]:
    return attack.source.members if isinstance(attack.source, Classifier) else ()


def errors_in(
    shares: Shares, judges: list[Classifier], model: Classifier, attack: Attack | None, tick: Advance
) -> Flags:
    """[judges, N]: `errors_of` all images of all ranks."""
    return shares.merge(errors_of(model, judges, shares.own, attack, shares.own_labels, tick))


def _judged(images: Callable[[], Shares], judge: Classifier, tick: Advance) -> Flags:
    return errors_in(images(), [judge], judge, None, tick)


def _doing(what: str, tick: Advance) -> Advance:
    return partial(_told, what, tick)


def _told(what: str, tick: Advance, done: int, note: str) -> None:
    tick(done, f"{what} {note}".rstrip())
