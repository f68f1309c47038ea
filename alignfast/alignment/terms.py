"""The terms of the alignment loss."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import chain, count

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from alignfast.alignment.cache import WitnessCache
from alignfast.alignment.config import AlignConfig
from alignfast.alignment.embeddings import EmbeddingLoss
from alignfast.alignment.features import Watched, watching
from alignfast.alignment.outputs import OutputLoss, output_loss
from alignfast.alignment.witnesses import Witnesses
from alignfast.data import Batch
from alignfast.models import Classifier, evaluating
from alignfast.ops import kl_div_with_logits

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

# From a model, what perturbs images for given labels: an attack on it.
Perturb = Callable[[Classifier], Callable[..., Tensor]]


class Student(nn.Module):
    """The source with the projections of its embedding: all that is trained, as one module.

    A pass gives logits [N, C], the embedding [N, D] and its projection for each witness; None and none where no
    embedding is compared.
    """

    def __init__(self, model: Classifier, watched: Watched | None, projections: Sequence[nn.Module]) -> None:
        super().__init__()
        self.model = model
        self.projections = nn.ModuleList(projections)
        self._watched = watched

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        logits = self.model.logits(images)
        if self._watched is None:
            return logits, None, []
        embedding = self._watched.embedding
        return logits, embedding, [project(embedding) for project in self.projections]


class Terms:
    """The loss of a batch and its terms; made by `terms_of`.

    Their names: kd, cls, self, of a further loss of predictions its own, of an embedding loss that of its class. A
    second one of a name is as "jsd 2".
    """

    def __init__(
        self,
        student: Student,
        witnesses: Witnesses | None,
        watched: Sequence[Watched],
        original: Witnesses | None,
        perturbed: Callable[..., Tensor] | None,
        config: AlignConfig,
    ) -> None:
        self.student = student
        # What is called for a pass: the student itself, or what compiles it or keeps it equal on many devices.
        self.run: Callable[[Tensor], tuple[Tensor, Tensor | None, list[Tensor]]] = student
        self._witnesses = witnesses
        self._watched = watched
        self._original = original
        self._perturbed = perturbed
        self._config = config
        self._spread: DistributedDataParallel | None = None

    def flush(self) -> None:
        """What witnesses were asked so far is on disk, if it is kept at all."""
        if self._witnesses is not None and self._witnesses.cache is not None:
            self._witnesses.cache.flush()

    def compile(self) -> None:
        self.run = torch.compile(self.student)

    def spread(self, example: Tensor) -> None:
        """Keep the student equal on all ranks: from here on a backward pass adds up their gradients.

        example: [N, C, H, W], of the images to come.
        """
        device = example.device
        # Auxiliary heads, whose output has no part in the loss, are never waited for.
        unused = any("aux" in name.lower() for name, _ in self.student.named_parameters())
        places = [device.index] if device.type == "cuda" else None
        self._spread = DistributedDataParallel(self.student, device_ids=places, find_unused_parameters=unused)
        self.run = torch.compile(self._spread) if self._config.compile else self._spread
        if not unused:
            # Behind the first of all backward passes gradients are packed in the order in which they came, and so added
            # up over ranks in another. With a pass for nothing, that is done before the first step of every run, also
            # of one that goes on.
            with evaluating(self.student):
                logits, _, projected = self._spread(example)
                torch.stack([output.sum() for output in (logits, *projected)]).sum().backward()
            self.student.zero_grad(set_to_none=True)

    def alone(self) -> AbstractContextManager[None]:
        """For a pass whose gradients wait for those of the next."""
        return nullcontext() if self._spread is None else self._spread.no_sync()

    def of(self, batch: Batch) -> dict[str, Tensor]:
        """Scalars: "loss", weighted, and the terms, unweighted. A term of weight 0 is not there."""
        config, images, labels = self._config, batch.images, batch.labels
        if self._perturbed is not None:
            images = self._perturbed(images, labels, indices=batch.indices)
        with torch.autocast(images.device.type, AUTOCAST.get(config.precision), config.precision in AUTOCAST):
            logits, embedding, projected = self.run(images)
        weighted: list[tuple[float, str, Tensor]] = []
        if self._witnesses is not None:
            taught = self._witnesses.logits(images, None if self._perturbed else batch.indices)
            if config.lambda_kd:
                first = OutputLoss(config.loss, config.direction)
                weighted.append((config.lambda_kd, "kd", self._output_loss(first, logits, taught)))
            weighted += [
                (loss.weight, loss.name, self._output_loss(loss, logits, taught))
                for loss in config.outputs
                if loss.weight
            ]
            if embedding is not None:
                weighted += self._embedding_losses(embedding, projected, labels)
        if config.lambda_cls:
            weighted.append((config.lambda_cls, "cls", cross_entropy(logits.float(), labels)))
        if self._original is not None:
            before = self._original.logits(images)[0]
            weighted.append((config.lambda_self, "self", kl_div_with_logits(logits, before, config.temperature)))
        loss = torch.stack([weight * term for weight, _, term in weighted]).sum()
        found = {"loss": loss}
        for _, name, term in weighted:
            found[_free(name, found)] = term
        return found

    def _output_loss(self, loss: OutputLoss, logits: Tensor, taught: Tensor) -> Tensor:
        config = self._config
        return output_loss(
            logits,
            taught if len(taught) > 1 else taught[0],
            kind=loss.kind,
            temperature=config.temperature if loss.temperature is None else loss.temperature,
            direction=loss.direction,
            combine=config.combine,
        )

    def _embedding_losses(
        self, embedding: Tensor, projected: Sequence[Tensor], labels: Tensor
    ) -> list[tuple[float, str, Tensor]]:
        teachers = [watched.embedding for watched in self._watched]
        result = []
        for loss in self._config.embeddings:
            students = projected if loss.projected else [embedding] * len(teachers)
            each = [loss.loss(mine, theirs, labels) for mine, theirs in zip(students, teachers, strict=True)]
            result.append((loss.weight, name_of(loss), torch.stack(each).mean()))
        return result


def name_of(loss: EmbeddingLoss) -> str:
    return type(loss).__name__.lower()


def _free(name: str, taken: Container[str]) -> str:
    return next(one for one in chain([name], (f"{name} {place}" for place in count(2))) if one not in taken)


@contextmanager
def terms_of(
    model: Classifier,
    witnesses: Sequence[Classifier],
    config: AlignConfig,
    example: Tensor,
    perturb: Perturb | None = None,
    cache: WitnessCache | None = None,
) -> Iterator[Terms]:
    """The terms for `model`, whose layers are watched as long as the context lasts.

    example: [N, C, H, W], of the images to come; the widths of embeddings are taken from its first.
    """
    few = example[:2]
    teachers = None
    if config.needs_witnesses:
        teachers = Witnesses(witnesses, precision=config.precision, example=few, cache=cache)
    original = Witnesses([model], precision=config.precision, example=few) if config.lambda_self else None
    with ExitStack() as stack:
        mine: Watched | None = None
        theirs: list[Watched] = []
        projections: list[nn.Module] = []
        if config.embeddings and teachers is not None:
            mine = stack.enter_context(watching(model, config.source_layer))
            theirs = [stack.enter_context(watching(one, config.witness_layer)) for one in teachers.models]
            projections = _projections(model, teachers, mine, theirs, config, few[:1])
        student = Student(model, mine, projections).to(example.device)
        perturbed = None if perturb is None else perturb(model)
        yield Terms(student, teachers, theirs, original, perturbed, config)


def _projections(
    model: Classifier,
    teachers: Witnesses,
    mine: Watched,
    theirs: Sequence[Watched],
    config: AlignConfig,
    image: Tensor,
) -> list[nn.Module]:
    """For each witness a linear layer to the width of its embedding, where a loss needs both to have one."""
    with torch.no_grad(), evaluating(model):
        model.logits(image)
        teachers.logits(image)
    width, widths = mine.embedding.shape[1], [watched.embedding.shape[1] for watched in theirs]
    needed = any(loss.projected for loss in config.embeddings)
    return [nn.Linear(width, other) if needed and other != width else nn.Identity() for other in widths]
