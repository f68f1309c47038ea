from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, normalize, smooth_l1_loss, softmax

from alignfast.alignment import embeddings
from alignfast.alignment.embeddings import CCL, EGA, EMBEDDINGS, NCE, PKT, RKD, EmbeddingLoss, Hint
from alignfast.alignment.outputs import output_loss
from tests.attacks.no_sync import NoSync

N, WIDTH, NARROW = 6, 5, 3
LABELS = torch.tensor([0, 1, 0, 2, 1, 0])

LOSSES: dict[str, EmbeddingLoss] = EMBEDDINGS | {
    "rkd distance": RKD(distance=2.0, angle=0.0),
    "rkd angle": RKD(distance=0.0, angle=3.0),
    "ega node": EGA(node=2.0, edge=0.0),
    "ega edge": EGA(node=0.0, edge=2.0),
    "nce warm": NCE(temperature=0.7),
}
RELATIONAL = [name for name, loss in LOSSES.items() if not loss.projected]


def rows(count: int = N, width: int = WIDTH, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((count, width), generator=generator, dtype=torch.float64).to(dtype)


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def minus(a: list[float], b: list[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def length(a: list[float]) -> float:
    return math.sqrt(dot(a, a))


def cosine(a: list[float], b: list[float]) -> float:
    return dot(a, b) / (length(a) * length(b))


def huber(x: float) -> float:
    return x * x / 2 if abs(x) <= 1 else abs(x) - 0.5


def plain_hint(loss: Any, s: list[list[float]], t: list[list[float]], labels: list[int]) -> float:
    return sum((a - b) ** 2 for x, y in zip(s, t, strict=True) for a, b in zip(x, y, strict=True)) / (N * len(s[0]))


def plain_rkd(loss: Any, s: list[list[float]], t: list[list[float]], labels: list[int]) -> float:
    def potential(x: list[list[float]]) -> list[list[float]]:
        table = [[length(minus(a, b)) for b in x] for a in x]
        mean = sum(map(sum, table)) / (N * (N - 1))
        return [[value / mean for value in row] for row in table]

    def angle(x: list[list[float]], i: int, j: int, k: int) -> float:
        return 0.0 if i in (j, k) else cosine(minus(x[j], x[i]), minus(x[k], x[i]))

    one, other, every = potential(s), potential(t), range(N)
    apart = sum(huber(one[i][j] - other[i][j]) for i in every for j in every) / N**2
    turned = sum(huber(angle(s, i, j, k) - angle(t, i, j, k)) for i in every for j in every for k in every) / N**3
    return float(loss.distance * apart + loss.angle * turned)


def plain_pkt(loss: Any, s: list[list[float]], t: list[list[float]], labels: list[int]) -> float:
    def table(x: list[list[float]]) -> list[list[float]]:
        kernel = [[(1 + cosine(a, b)) / 2 for b in x] for a in x]
        return [[value / sum(row) for value in row] for row in kernel]

    p, q, e = table(t), table(s), 1e-7
    return sum(p[i][j] * math.log((p[i][j] + e) / (q[i][j] + e)) for i in range(N) for j in range(N)) / N**2


def plain_ega(loss: Any, s: list[list[float]], t: list[list[float]], labels: list[int]) -> float:
    def pearson(a: list[float], b: list[float]) -> float:
        return cosine([x - sum(a) / len(a) for x in a], [x - sum(b) / len(b) for x in b])

    pairs = [(i, j) for i in range(N) for j in range(N)]
    node = math.sqrt(sum((pearson(t[i], s[j]) - (i == j)) ** 2 for i, j in pairs))
    edge = math.sqrt(sum((pearson(t[i], t[j]) - pearson(s[i], s[j])) ** 2 for i, j in pairs))
    return float(loss.node * node + loss.edge * edge)


def plain_nce(loss: Any, s: list[list[float]], t: list[list[float]], labels: list[int]) -> float:
    total = 0.0
    for i in range(N):
        powers = [math.exp(cosine(s[i], t[j]) / loss.temperature) for j in range(N)]
        rest = [sum(powers[:j] + powers[j + 1 :]) / sum(powers) for j in range(N)]
        same = [math.log(powers[j] / sum(powers)) for j in range(N) if labels[j] == labels[i]]
        others = [math.log(rest[j]) for j in range(N) if labels[j] != labels[i]]
        total -= sum(same) / len(same) + (sum(others) / len(others) if others else 0)
    return total / N


PLAIN: dict[type[EmbeddingLoss], Callable[..., float]] = {
    Hint: plain_hint,
    RKD: plain_rkd,
    PKT: plain_pkt,
    EGA: plain_ega,
    NCE: plain_nce,
    CCL: plain_nce,
}


@pytest.mark.parametrize("name", LOSSES)
def test_equations(name: str) -> None:
    loss, student, teacher = LOSSES[name], rows(), rows(seed=1)
    wanted = PLAIN[type(loss)](loss, student.tolist(), teacher.tolist(), LABELS.tolist())
    assert float(loss.loss(student, teacher, LABELS)) == pytest.approx(wanted, rel=1e-10)
    single = loss.loss(student.float(), teacher.float(), LABELS)
    assert single.dtype == torch.float32
    assert float(single) == pytest.approx(wanted, rel=1e-3 if name == "pkt" else 1e-5)


@pytest.mark.parametrize("labels", [None, torch.zeros(N, dtype=torch.int64), torch.arange(N)])
@pytest.mark.parametrize("temperature", [0.03, 0.1, 1.0])
def test_contrast_with_and_without_classes(labels: Tensor | None, temperature: float) -> None:
    loss, student, teacher = NCE(temperature=temperature), rows(), rows(seed=1)
    classes = list(range(N)) if labels is None else labels.tolist()
    wanted = plain_nce(loss, student.tolist(), teacher.tolist(), classes)
    assert float(loss.loss(student, teacher, labels)) == pytest.approx(wanted, rel=1e-10)


def test_contrast_is_exact_where_one_probability_is_almost_one() -> None:
    """log(1 - p) in float32, where p itself is 1."""
    loss, student = NCE(temperature=0.05), torch.eye(N, WIDTH + 1, dtype=torch.float64)
    teacher, labels = student.roll(1, 0), torch.arange(N)
    wanted = plain_nce(loss, student.tolist(), teacher.tolist(), labels.tolist())
    single = student.float().requires_grad_()
    result = loss.loss(single, teacher.float(), labels)
    assert result.item() == pytest.approx(wanted, rel=1e-5)
    result.backward()
    double = student.clone().requires_grad_()
    loss.loss(double, teacher, labels).backward()
    assert single.grad is not None
    assert double.grad is not None
    torch.testing.assert_close(single.grad.double(), double.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", RELATIONAL)
def test_relations_need_no_common_width(name: str) -> None:
    loss, student, teacher = LOSSES[name], rows(), rows(width=NARROW, seed=1)
    wanted = PLAIN[type(loss)](loss, student.tolist(), teacher.tolist(), [])
    assert float(loss.loss(student, teacher)) == pytest.approx(wanted, rel=1e-10)


def reference_rkd(s: Tensor, t: Tensor) -> Tensor:
    def distances(x: Tensor) -> Tensor:
        d = (x[:, None] - x).pow(2).sum(2).sqrt()
        return d / d[d > 0].mean()

    def angles(x: Tensor) -> Tensor:
        unit = normalize(x[None] - x[:, None], dim=2)
        return (unit @ unit.transpose(1, 2)).flatten()

    return 25 * smooth_l1_loss(distances(s), distances(t)) + 50 * smooth_l1_loss(angles(s), angles(t))


def reference_pkt(s: Tensor, t: Tensor) -> Tensor:
    def table(x: Tensor) -> Tensor:
        unit = x / (x.norm(dim=1, keepdim=True) + 1e-7)
        kernel = (unit @ unit.T + 1) / 2
        return kernel / kernel.sum(1, keepdim=True)

    p, q = table(t), table(s)
    return (p * torch.log((p + 1e-7) / (q + 1e-7))).mean()


def reference_ega(s: Tensor, t: Tensor) -> Tensor:
    c = torch.corrcoef(torch.cat((t, s)))
    return (c[:N, N:] - torch.eye(N)).norm() + 0.3 * (c[:N, :N] - c[N:, N:]).norm()


def reference_nce(s: Tensor, t: Tensor) -> Tensor:
    other = (LABELS[:, None] != LABELS).double()
    cosines = 1 - (normalize(s, dim=1)[:, None] - normalize(t, dim=1)).pow(2).sum(2) / 2
    p = softmax(cosines / 0.1, 1)
    near, far = -torch.log(p + 1e-10) * (1 - other), -torch.log(1 - p + 1e-10) * other
    return (near.sum(1) / (1 - other).sum(1) + far.sum(1) / other.sum(1)).mean()


REFERENCE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hint": torch.nn.functional.mse_loss,
    "rkd": reference_rkd,
    "pkt": reference_pkt,
    "ega": reference_ega,
    "nce": reference_nce,
}


@pytest.mark.parametrize("name", REFERENCE)
def test_the_references_formulas(name: str) -> None:
    student, teacher = rows(), rows(seed=1)
    result = EMBEDDINGS[name].loss(student, teacher, LABELS)
    torch.testing.assert_close(result, REFERENCE[name](student, teacher), rtol=1e-5, atol=1e-9)


def test_ccl_is_the_reference_together_with_a_loss_of_outputs() -> None:
    student, teacher, q, p = rows(), rows(seed=1), rows(seed=2), rows(seed=3)
    reference = reference_nce(student, teacher)
    for a, b in ((q, p), (p, q)):
        reference = reference + kl_div(log_softmax(a, 1), softmax(b, 1), reduction="batchmean") / 2
    outputs = output_loss(q, p, temperature=1.0, direction="symmetric")
    torch.testing.assert_close(EMBEDDINGS["ccl"].loss(student, teacher, LABELS) + outputs, reference, rtol=1e-5, atol=0)


def test_constants_of_the_reference() -> None:
    assert {
        "hint": Hint(weight=1.0),
        "rkd": RKD(weight=1.0, distance=25.0, angle=50.0),
        "rkd-dev": RKD(distance=1.0, angle=2.0),
        "pkt": PKT(weight=1.0),
        "ccl": CCL(temperature=0.1),
        "ega": EGA(node=1.0, edge=0.3),
        "ega-dev": EGA(node=0.8, edge=0.24),
        "nce": NCE(temperature=0.1),
    } == EMBEDDINGS
    assert EMBEDDINGS["rkd"] == RKD()
    assert EMBEDDINGS["ega"] == EGA()
    assert {name for name, loss in EMBEDDINGS.items() if loss.projected} == {"hint", "ccl", "ega", "ega-dev", "nce"}
    assert {name for name, loss in EMBEDDINGS.items() if loss.needs_labels} == {"ccl", "nce"}


@pytest.mark.parametrize("labels", [LABELS, None])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name: str, labels: Tensor | None) -> None:
    teacher = rows(seed=1)
    assert torch.autograd.gradcheck(lambda s: LOSSES[name].loss(s, teacher, labels), rows().requires_grad_())


@pytest.mark.parametrize("name", LOSSES)
def test_the_teacher_gets_no_gradient(name: str) -> None:
    student, teacher = rows().requires_grad_(), rows(seed=1).requires_grad_()
    LOSSES[name].loss(student, teacher, LABELS).backward()
    assert student.grad is not None
    assert student.grad.abs().max() > 0
    assert teacher.grad is None


def constant(value: float) -> Tensor:
    """Of which the mean is not always the value."""
    return torch.full((N, 7), value)


def some(changed: Callable[[Tensor], Tensor]) -> Tensor:
    """Of which half of the rows are degenerate."""
    return torch.cat((rows()[: N // 2], changed(rows()[N // 2 :])))


DEGENERATE: dict[str, tuple[Tensor, Tensor]] = {
    "one image": (rows(1), rows(1, seed=1)),
    "two images": (rows(2), rows(2, seed=1)),
    "no image": (rows(0), rows(0)),
    "one feature": (rows(width=1), rows(width=1, seed=1)),
    "equal": (rows(), rows()),
    "opposite": (rows(), -rows()),
    "identical student": (rows(1).expand(N, -1), rows()),
    "identical teacher": (rows(), rows(1).expand(N, -1)),
    "identical both": (rows(1).expand(N, -1), rows(1).expand(N, -1)),
    "zero student": (torch.zeros(N, WIDTH), rows()),
    "zero teacher": (rows(), torch.zeros(N, WIDTH)),
    "zero both": (torch.zeros(N, WIDTH), torch.zeros(N, WIDTH)),
    "constant student": (constant(0.1), rows(width=7)),
    "constant teacher": (rows(width=7), constant(1e4 / 3)),
    "constant both": (constant(1 / 3), constant(0.7)),
    "some zero": (some(torch.zeros_like), some(torch.zeros_like)),
    "some constant": (some(lambda x: torch.full_like(x, 0.1)), rows()),
    "some identical": (some(lambda x: x[:1].expand_as(x)), rows()),
    "tiny": (1e-25 * rows(), rows()),
    "small": (1e-10 * rows(), rows()),
    "large": (1e10 * rows(), 1e10 * rows(seed=1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_embeddings(case: str, name: str, dtype: torch.dtype) -> None:
    student, teacher = (tensor.to(dtype, copy=True) for tensor in DEGENERATE[case])
    for labels in (None, LABELS[: len(student)], torch.zeros(len(student), dtype=torch.int64)):
        leaf = student.clone().requires_grad_()
        loss = LOSSES[name].loss(leaf, teacher, labels)
        loss.backward()
        assert leaf.grad is not None
        assert torch.isfinite(loss)
        assert torch.isfinite(leaf.grad).all()
        assert case != "no image" or loss == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("name", "case"),
    [
        *[(name, case) for name in ("rkd", "rkd distance", "rkd angle") for case in ("identical student", "one image")],
        *[(name, "zero student") for name in ("pkt", "ega", "nce", "rkd")],
        *[("ega", case) for case in ("one feature", "constant student", "constant both")],
        ("pkt", "tiny"),
        ("nce", "tiny"),
    ],
)
def test_what_is_not_defined_gives_no_gradient(name: str, case: str, dtype: torch.dtype) -> None:
    student, teacher = (tensor.to(dtype, copy=True) for tensor in DEGENERATE[case])
    leaf = student.clone().requires_grad_()
    LOSSES[name].loss(leaf, teacher, LABELS[: len(student)]).backward()
    assert leaf.grad is not None
    assert not leaf.grad.any()


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-3, 12345.678, -7.7])
@pytest.mark.parametrize("width", [2, 3, 7, 512, 2048])
def test_constant_embeddings_have_no_correlation(value: float, width: int) -> None:
    student = torch.full((3, width), value, requires_grad=True)
    loss = EGA(node=1.0, edge=0.0).loss(student, rows(3, width, dtype=torch.float32))
    loss.backward()
    assert student.grad is not None
    assert loss.item() == pytest.approx(math.sqrt(3))
    assert not student.grad.any()


def test_cosines_that_are_rounded_to_less_than_minus_one() -> None:
    for seed in range(100):
        student = rows(1, 300, seed, torch.float32)
        pair = torch.cat((student, -student)).requires_grad_()
        loss = PKT().loss(pair, rows(2, seed=seed, dtype=torch.float32))
        loss.backward()
        assert pair.grad is not None
        assert torch.isfinite(loss)
        assert torch.isfinite(pair.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["hint", "rkd", "rkd-dev", "pkt"])
def test_equal_embeddings_have_no_loss(name: str, dtype: torch.dtype) -> None:
    student = rows(dtype=dtype).requires_grad_()
    loss = LOSSES[name].loss(student, rows(dtype=dtype))
    loss.backward()
    assert student.grad is not None
    assert loss == 0
    assert student.grad.abs().max() < 1e-7


def test_a_batch_of_one_class_has_the_first_term_of_contrast() -> None:
    student, teacher = rows(), rows(seed=1)
    scores = normalize(student, dim=1) @ normalize(teacher, dim=1).T / 0.1
    result = NCE().loss(student, teacher, torch.full((N,), 7))
    torch.testing.assert_close(result, -log_softmax(scores, 1).mean())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    student, teacher = rows(dtype=dtype).requires_grad_(), rows(seed=1, dtype=dtype)
    wanted = LOSSES[name].loss(student.float(), teacher.float(), LABELS)
    with torch.autocast("cpu", torch.bfloat16):
        result = LOSSES[name].loss(student, teacher, LABELS)
        mixed = LOSSES[name].loss(student.double(), teacher, LABELS)
    assert result.dtype == torch.float32
    assert torch.equal(result, wanted)
    assert mixed.dtype == torch.float64
    torch.testing.assert_close(mixed, wanted.double(), rtol=1e-3, atol=1e-6)
    result.backward()
    assert student.grad is not None
    assert student.grad.dtype == dtype
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_nothing_waits_for_the_device(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, labels = rows(seed=1).to(device), LABELS.to(device)
    for largest in (2**26, 1):
        monkeypatch.setattr(embeddings, "LARGEST", largest)
        for given in (labels, None):
            student = rows().to(device).requires_grad_()
            with NoSync(device):
                LOSSES[name].loss(student, teacher, given).backward()
            assert student.grad is not None


@pytest.mark.parametrize("at_a_time", [1, 2, 4, 5])
def test_angles_in_parts(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, teacher = RKD(distance=0.0, angle=1.0), rows(seed=1)
    results = []
    for largest in (2**26, at_a_time * N * N):
        monkeypatch.setattr(embeddings, "LARGEST", largest)
        student = rows().requires_grad_()
        value = loss.loss(student, teacher)
        value.backward()
        assert student.grad is not None
        results.append((value.detach(), student.grad))
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-14)


def test_parts_bound_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "LARGEST", 3 * N * N)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        RKD(distance=0.0, angle=1.0).loss(rows().requires_grad_(), rows(seed=1))
    assert max((tensor.numel() for tensor in kept), default=0) <= N * WIDTH


def test_weights_of_the_terms() -> None:
    student, teacher = rows(), rows(seed=1)

    def of(loss: EmbeddingLoss) -> float:
        return float(loss.loss(student, teacher))

    assert of(RKD(distance=3.0, angle=7.0)) == pytest.approx(
        3 * of(RKD(distance=1.0, angle=0.0)) + 7 * of(RKD(distance=0.0, angle=1.0))
    )
    assert of(EGA(node=3.0, edge=7.0)) == pytest.approx(
        3 * of(EGA(node=1.0, edge=0.0)) + 7 * of(EGA(node=0.0, edge=1.0))
    )
    for kind in (Hint, RKD, PKT, CCL, EGA, NCE):
        assert kind(weight=5.0).weight == 5.0
        assert of(kind(weight=5.0)) == of(kind(weight=0.0)) == of(kind())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Hint(weight=-1.0), "weight: got -1.0; allowed is a number of at least 0"),
        (lambda: RKD(weight=math.nan), "weight: got nan"),
        (lambda: EGA(weight=-1.0), "weight: got -1.0"),
        (lambda: NCE(weight=math.inf), "weight: got inf"),
        (lambda: RKD(distance=-1.0), "distance: got -1.0"),
        (lambda: RKD(angle=-1.0), "angle: got -1.0"),
        (lambda: RKD(distance=0.0, angle=0.0), "distance, angle: got 0 for both; allowed is at least one above 0"),
        (lambda: EGA(node=-0.1), "node: got -0.1"),
        (lambda: EGA(edge=-0.1), "edge: got -0.1"),
        (lambda: EGA(node=0.0, edge=0.0), "node, edge: got 0 for both"),
        (lambda: NCE(temperature=0.0), "temperature: got 0.0; allowed is a number greater than 0"),
        (lambda: CCL(temperature=-0.1), "temperature: got -0.1"),
    ],
)
def test_settings_outside_their_range(make: Callable[[], EmbeddingLoss], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", LOSSES)
def test_tensors_that_do_not_go_together(name: str) -> None:
    loss = LOSSES[name]
    refused: list[tuple[Tensor, Tensor, Tensor | None, str]] = [
        (rows()[0], rows(), None, r"student: got shape \[5\]; allowed is \[any, any\]"),
        (rows(), rows(N + 1), None, r"teacher: got shape \[7, 5\]"),
        (rows().long(), rows(), None, r"student: got dtype torch\.int64"),
        (rows(), rows().to("meta"), None, "teacher: on meta; allowed is the device of student, cpu"),
        (rows(), rows(), LABELS[1:], r"labels: got shape \[5\]; allowed is \[6\]"),
        (rows(), rows(), LABELS.double(), r"labels: got dtype torch\.float64; allowed is torch\.int64"),
        (rows(), rows(), LABELS.to("meta"), "labels: on meta"),
    ]
    for student, teacher, labels, message in refused:
        with pytest.raises(ValueError, match=message):
            loss.loss(student, teacher, labels)
    if loss.projected:
        with pytest.raises(ValueError, match=r"teacher: got shape \[6, 3\]; allowed is \[6, 5\]"):
            loss.loss(rows(), rows(width=NARROW))
