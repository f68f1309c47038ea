"""Losses between embeddings, the features that a model's last layer takes.

The reference is the code of Ma et al. (ECCV 2024), whose losses come from the papers that are named here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, smooth_l1_loss
from torch.utils.checkpoint import checkpoint

from alignfast.checks import check_number, check_shape

__all__ = ["CCL", "EGA", "EMBEDDINGS", "NCE", "PKT", "RKD", "EmbeddingLoss", "Hint"]

# What is shorter than this has no direction: it counts as 0 and gets no gradient.
SHORTEST = 1e-12

# The largest tensor of RKD's angles, in numbers: 256 MiB in float32, of which autograd keeps a few.
LARGEST = 2**26

# Of PKT, as in its authors' code.
SMALLEST_PROBABILITY = 1e-7


@dataclass(frozen=True)
class EmbeddingLoss(ABC):
    """How far the embeddings of a batch are from those of a witness.

    weight: of this loss beside the others, at least 0; `loss` is without it.

    Raises:
        ValueError: a negative weight.

    Attributes:
        projected: whether both embeddings must have the same width, so that a linear layer on the student's has to make
            it so where they differ. (The reference projects for every loss where the architectures differ.)
        needs_labels: whether the loss makes use of labels, where there are any.
    """

    weight: float = 1.0

    projected: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number("weight", self.weight, low=0.0)

    def loss(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        """The loss, with a gradient to the student only. Nothing waits for the device.

        Loss and gradient are finite for any finite embeddings of ordinary size: what is not defined (the direction of
        a zero vector, the correlation with a constant, distances relative to a mean of 0) counts as 0 and gives no
        gradient.

        Args:
            student: [N, Ds], any floating dtype; computed in float32, or in float64 if given so, also under autocast.
            teacher: [N, Dt], with Dt = Ds if `projected`.
            labels: int64 [N]; None where there are none.

        Returns:
            A scalar, 0 for an empty batch; float32, or float64 for float64 embeddings.

        Raises:
            ValueError: shapes, dtypes or devices that do not match.
        """
        self._check(student, teacher, labels)
        wide = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
        student, teacher = student.to(wide), teacher.detach().to(wide)
        if len(student) == 0:
            return student.sum()
        with _without_autocast(student.device):
            return self._loss(student, teacher, labels)

    @abstractmethod
    def _loss(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """The same of at least one embedding, in float32 or float64."""

    def _check(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> None:
        check_shape("student", student.shape, (None, None))
        check_shape("teacher", teacher.shape, (len(student), student.shape[1] if self.projected else None))
        for name, embeddings in (("student", student), ("teacher", teacher)):
            if not embeddings.is_floating_point():
                raise ValueError(f"{name}: got dtype {embeddings.dtype}; allowed is a floating-point tensor")
        if labels is not None:
            check_shape("labels", labels.shape, (len(student),))
            if labels.dtype != torch.int64:
                raise ValueError(f"labels: got dtype {labels.dtype}; allowed is torch.int64")
        for name, tensor in (("teacher", teacher), ("labels", labels)):
            if tensor is not None and tensor.device != student.device:
                raise ValueError(f"{name}: on {tensor.device}; allowed is the device of student, {student.device}")


@dataclass(frozen=True)
class Hint(EmbeddingLoss):
    """FitNets (Romero et al., ICLR 2015, eq. 3): the mean over images and features of (s - t)^2.

    That is the reference code's; the paper has half the sum over features.
    """

    projected: ClassVar[bool] = True

    def _loss(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        return mse_loss(student, teacher)


@dataclass(frozen=True)
class RKD(EmbeddingLoss):
    """Relational distillation (Park et al., CVPR 2019, section 3.2): distance * L_D + angle * L_A.

    L_D = mean_ij h(d_ij / m - d'_ij / m'), with d_ij = ||s_i - s_j||, its mean m over i != j, and the same of the
    teacher; L_A = mean_ijk h(a_ijk - a'_ijk), with a_ijk the cosine of the angle at s_i between s_j and s_k, 0 where
    two of them are the same. h is Huber's loss with delta = 1. The two outer means run over all N^2 pairs and all
    N^3 triplets, as in the reference code, where the paper has sums.
    distance, angle: at least 0, one of them above. The defaults are those of the released code.

    L_A needs tensors of N^2 D and N^3 numbers. Where those would be of more than 2^26, it is computed in parts, and
    each part once more in the backward pass.

    Raises:
        ValueError: a negative number, or 0 for both.
    """

    distance: float = 25.0
    angle: float = 50.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_weights(distance=self.distance, angle=self.angle)

    def _loss(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        terms = []
        if self.distance:
            terms.append(self.distance * smooth_l1_loss(_relative_distances(student), _relative_distances(teacher)))
        if self.angle:
            terms.append(self.angle * _angles_apart(student, teacher))
        return torch.stack(terms).sum()


@dataclass(frozen=True)
class PKT(EmbeddingLoss):
    """Probabilistic knowledge transfer (Passalis and Tefas, ECCV 2018), with the cosine kernel.

    mean_ij p_ij log((p_ij + e) / (q_ij + e)), e = 1e-7, with q_ij = k_ij / sum_l k_il, k_ij = (1 + cos(s_i, s_j)) / 2,
    and p the same of the teacher. The mean and e are those of its authors' code, which the reference uses; as p_ij is
    about 1 / N, the loss is small.
    """

    def _loss(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        p, q = _similarities(teacher), _similarities(student)
        return (p * ((p + SMALLEST_PROBABILITY) / (q + SMALLEST_PROBABILITY)).log()).mean()


@dataclass(frozen=True)
class EGA(EmbeddingLoss):
    """Embedding graph alignment (Ma et al., BMVC 2022): node * ||C(t, s) - I||_F + edge * ||C(t, t) - C(s, s)||_F.

    C(a, b)_ij is Pearson's correlation, over features, of a_i and b_j. The reference code runs on CUDA only and gives
    NaN where an embedding is constant; this one runs where the embeddings are, and such a correlation is 0.
    node, edge: at least 0, one of them above. The defaults are those of the released code.

    Raises:
        ValueError: a negative number, or 0 for both.
    """

    node: float = 1.0
    edge: float = 0.3

    projected: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_weights(node=self.node, edge=self.edge)

    def _loss(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        s, t = _standardised(student), _standardised(teacher)
        identity = torch.eye(len(s), dtype=s.dtype, device=s.device)
        node: Tensor = torch.linalg.vector_norm(t @ s.T - identity)
        edge: Tensor = torch.linalg.vector_norm(t @ t.T - s @ s.T)
        return self.node * node + self.edge * edge


@dataclass(frozen=True)
class NCE(EmbeddingLoss):
    """Supervised contrastive loss of the reference code, from compositional contrastive learning (see `CCL`).

    mean_i (-mean_{j: y_j = y_i} log p_ij - mean_{j: y_j != y_i} log(1 - p_ij)), with p_ij = softmax_j(cos(s_i, t_j) /
    temperature). Without labels every image is a class of its own. A mean over no image is 0: a batch of one class has
    the first term only (the reference code: 0 / 0 = NaN).
    temperature: greater than 0.

    Raises:
        ValueError: a number outside its range.
    """

    temperature: float = 0.1

    projected: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("temperature", self.temperature, low=0.0, open_low=True)

    def _loss(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        scores = _unit(student) @ _unit(teacher).T / self.temperature
        classes = torch.arange(len(scores), device=scores.device) if labels is None else labels
        same = (classes[:, None] == classes).to(scores.dtype)
        attracted = _weighted_mean(scores.log_softmax(1), same)
        repelled = _weighted_mean(self._log_of_the_rest(scores), 1 - same)
        return -(attracted + repelled).mean()

    def _log_of_the_rest(self, scores: Tensor) -> Tensor:
        """log(1 - p), exact also where p is near 1, which only the largest of a row can be."""
        largest = torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.argmax(1, keepdim=True), True)
        p = scores.softmax(1).masked_fill(largest, 0)
        # Far below any other score, but finite: of a single image there is nothing else.
        others = scores.masked_fill(largest, -2 / self.temperature - 1e4)
        rest = others.logsumexp(1, keepdim=True) - scores.logsumexp(1, keepdim=True)
        return torch.where(largest, rest, torch.log1p(-p))


@dataclass(frozen=True)
class CCL(NCE):
    """Compositional contrastive learning (Chen et al., CVPR 2021), in the form of the reference code: the part of NCE.

    The other part, KL(p || q) / 2 + KL(q || p) / 2 of the predictions at T = 1, is a loss between outputs and belongs
    there: `OutputLoss("kl", "symmetric", temperature=1.0)`.
    """


def _check_weights(**weights: float) -> None:
    for name, value in weights.items():
        check_number(name, value, low=0.0)
    if not any(weights.values()):
        raise ValueError(f"{', '.join(weights)}: got 0 for both; allowed is at least one above 0")


@contextmanager
def _without_autocast(device: torch.device) -> Iterator[None]:
    if not torch.amp.is_autocast_available(device.type):
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield


def _unit(rows: Tensor, shortest_square: Tensor | float = SHORTEST**2) -> Tensor:
    """Rows of length 1, along the last dimension; 0, with no gradient, where they are too short."""
    square = rows.square().sum(-1, keepdim=True)
    long = square > shortest_square
    return torch.where(long, rows / torch.where(long, square, 1).sqrt(), 0)


def _standardised(embeddings: Tensor) -> Tensor:
    """Rows of mean 0 and length 1; 0 for rows that are constant but for the rounding of their mean."""
    rounding = 16 * torch.finfo(embeddings.dtype).eps
    least = (rounding**2 * embeddings.detach().square().sum(1, keepdim=True)).clamp(min=SHORTEST**2)
    return _unit(embeddings - embeddings.mean(1, keepdim=True), least)


def _similarities(embeddings: Tensor) -> Tensor:
    unit = _unit(embeddings)
    # A cosine may be rounded to less than -1.
    kernel = ((unit @ unit.T + 1) / 2).clamp(min=0)
    return kernel / kernel.sum(1, keepdim=True)


def _relative_distances(embeddings: Tensor) -> Tensor:
    """[N, N], over their mean."""
    distances = torch.cdist(embeddings, embeddings, compute_mode="donot_use_mm_for_euclid_dist")
    pairs = len(embeddings) * (len(embeddings) - 1)
    mean = distances.sum() / max(pairs, 1)
    apart = mean > SHORTEST
    return torch.where(apart, distances / torch.where(apart, mean, 1), 0)


def _angles_apart(student: Tensor, teacher: Tensor) -> Tensor:
    count = len(student)
    at_a_time = max(LARGEST // (count * max(student.shape[1], teacher.shape[1], count, 1)), 1)
    if at_a_time >= count:
        return _angle_losses(student, teacher, student, teacher) / count**3
    parts = zip(student.split(at_a_time), teacher.split(at_a_time), strict=True)
    losses = [
        checkpoint(_angle_losses, s, t, student, teacher, use_reentrant=False, preserve_rng_state=False)
        for s, t in parts
    ]
    return torch.stack(losses).sum() / count**3


def _angle_losses(student_at: Tensor, teacher_at: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    """The sum of Huber losses of the angles at some of the embeddings, between all."""
    return smooth_l1_loss(_cosines(student_at, student), _cosines(teacher_at, teacher), reduction="sum")


def _cosines(at: Tensor, embeddings: Tensor) -> Tensor:
    unit = _unit(embeddings - at[:, None])
    return unit @ unit.transpose(1, 2)


def _weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Of each row, with weights of 0 and 1; 0 where all are 0."""
    return (values * weights).sum(1) / weights.sum(1).clamp(min=1)


# With the constants of the reference's release, and as -dev of its development version.
EMBEDDINGS: dict[str, EmbeddingLoss] = {
    "hint": Hint(),
    "rkd": RKD(distance=25.0, angle=50.0),
    "rkd-dev": RKD(distance=1.0, angle=2.0),
    "pkt": PKT(),
    "ccl": CCL(temperature=0.1),
    "ega": EGA(node=1.0, edge=0.3),
    "ega-dev": EGA(node=0.8, edge=0.24),
    "nce": NCE(temperature=0.1),
}
