"""Rates against flags counted by hand: linear models of two channels, for which an attack's step is known."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from alignfast.attacks import Attack, create
from alignfast.data import Batch
from alignfast.distributed import Ranks
from alignfast.evaluation import matrix as module
from alignfast.evaluation import shares
from alignfast.evaluation.matrix import transfer_matrix
from alignfast.evaluation.matrix_result import TransferMatrix
from alignfast.evaluation.shares import form_of, prepared_alike
from alignfast.models import Classifier, fingerprint, prepare

EPS = 0.2
# weight of each channel, and the threshold above which the class is 1
LINES = {"across": (1.0, 0.0, 0.5), "up": (0.0, 1.0, 0.45), "both": (1.0, 1.0, 1.02), "down": (0.5, -1.0, -0.2)}


class Line(nn.Module):
    def __init__(self, a: float, b: float, threshold: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([a, b]))
        self.threshold = nn.Parameter(torch.tensor(threshold))
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        score = (images.mean((2, 3)) * self.weight).sum(1) - self.threshold
        return torch.stack([-score, score], 1)


def line(name: str, **options: Any) -> Classifier:
    return Classifier(Line(*LINES[name]), num_classes=2, **options)


def points() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    images = torch.rand((40, 2, 1, 1), generator=generator)
    labels = (images.sum((1, 2, 3)) > 1).long()
    # Some labels that most models find wrong.
    labels[::7] = 1 - labels[::7]
    return images, labels


def batches(size: int = 16) -> list[tuple[Tensor, Tensor]]:
    images, labels = points()
    return list(zip(images.split(size), labels.split(size), strict=True))


def wrong_by_hand(judge: str, attacked: str | None, eps: float) -> list[bool]:
    """Which points `judge` gets wrong after a step of eps against the sign of `attacked`'s weights."""
    a, b, threshold = LINES[judge]
    flags = []
    for (x, y), label in zip(points()[0].flatten(1).tolist(), points()[1].tolist(), strict=True):
        if attacked is not None:
            way = -1 if label == 1 else 1
            p, q, _ = LINES[attacked]
            x = min(1, max(0, x + way * eps * ((p > 0) - (p < 0))))
            y = min(1, max(0, y + way * eps * ((q > 0) - (q < 0))))
        flags.append((a * x + b * y > threshold) != (label == 1))
    return flags


def wilson_by_hand(errors: int, n: int) -> tuple[float, float]:
    z = 1.959963984540054
    rate = errors / n
    middle, half = rate + z * z / (2 * n), z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


SOURCES, TARGETS = ("across", "down"), ("up", "both", "across")
ATTACKS: dict[str, Any] = {"small": {"name": "fgsm", "eps": 0.05}, "large": {"name": "FGSM", "eps": EPS}}
EPS_OF = {"small": 0.05, "large": EPS}


def measure(**options: Any) -> Any:
    sources, targets = {name: line(name) for name in SOURCES}, {name: line(name) for name in TARGETS}
    return transfer_matrix(sources, targets, ATTACKS, batches(), **options)


def counted_by_hand(source: str, attack: str, target: str, qualified: bool) -> tuple[list[bool], list[bool]]:
    eps = EPS_OF[attack]
    fooled = wrong_by_hand(target, source, eps)
    if not qualified:
        return fooled, [True] * len(fooled)
    clean = [wrong_by_hand(model, None, 0) for model in (source, target)]
    white = [wrong_by_hand(model, model, eps) for model in (source, target)]
    rows = zip(*clean, *white, strict=True)
    return fooled, [not source_wrong and not target_wrong and s and t for source_wrong, target_wrong, s, t in rows]


@pytest.mark.parametrize("qualified", [False, True])
def test_rates_are_those_counted_by_hand(qualified: bool) -> None:
    matrix = measure(qualified=qualified)
    assert (matrix.sources, matrix.attacks, matrix.targets) == (SOURCES, ("small", "large"), TARGETS)
    assert len(matrix.cells) == 12
    counts = set()
    for cell in matrix.cells:
        fooled, counting = counted_by_hand(cell.source, cell.attack, cell.target, qualified)
        n = sum(counting)
        errors = sum(f and c for f, c in zip(fooled, counting, strict=True))
        counts.add((errors, n))
        assert (cell.errors, cell.n) == (errors, n)
        if n:
            assert cell.rate == pytest.approx(errors / n)
            assert (cell.low, cell.high) == pytest.approx(wilson_by_hand(errors, n), abs=1e-9)
        clean, white = wrong_by_hand(cell.target, None, 0), wrong_by_hand(cell.source, cell.source, EPS_OF[cell.attack])
        assert cell.clean_accuracy == pytest.approx(1 - sum(clean) / 40)
        assert cell.white_box == pytest.approx(sum(white) / 40)
    assert len(counts) > 5
    assert matrix.error("down", "large", "both").n == (40 if not qualified else matrix.cell("down", "large", "both").n)
    assert matrix.config["protocol"] == ("qualified" if qualified else "all")


def test_the_data_need_each_condition_of_the_qualified_protocol() -> None:
    """Without any one of the four, and with the parity that the released code tests, other images would count."""
    mattering = set()
    for source in SOURCES:
        for target in TARGETS:
            clean = [[not flag for flag in wrong_by_hand(model, None, 0)] for model in (source, target)]
            rows = list(zip(*clean, *(wrong_by_hand(model, model, EPS) for model in (source, target)), strict=True))
            count = sum(all(row) for row in rows)
            for left_out in range(4):
                if sum(all(row[:left_out] + row[left_out + 1 :]) for row in rows) > count:
                    mattering.add(left_out)
            if sum(row[0] == row[1] and row[2] and row[3] for row in rows) > count:
                mattering.add("parity")
    assert mattering == {0, 1, 2, 3, "parity"}


@pytest.mark.parametrize("qualified", [False, True])
def test_comparisons_are_on_the_same_images(qualified: bool) -> None:
    matrix = measure(qualified=qualified)
    assert len(matrix.comparisons) == 6
    for comparison in matrix.comparisons:
        assert (comparison.baseline, comparison.source) == ("across", "down")
        first = counted_by_hand("across", comparison.attack, comparison.target, qualified)
        second = counted_by_hand("down", comparison.attack, comparison.target, qualified)
        rows = [(f, s) for f, a, s, b in zip(*first, *second, strict=True) if a and b]
        one, two = sum(f and not s for f, s in rows), sum(s and not f for f, s in rows)
        assert (comparison.n, comparison.only_baseline, comparison.only_source) == (len(rows), one, two)
        if rows:
            assert comparison.difference == pytest.approx((two - one) / len(rows))
            assert comparison.low <= comparison.difference <= comparison.high
        tail = sum(math.comb(one + two, k) for k in range(min(one, two) + 1)) / 2 ** (one + two)
        assert comparison.p_value == pytest.approx(min(1, 2 * tail) if one + two else 1)


@pytest.mark.parametrize(
    ("names", "asked", "chosen"),
    [
        (("up", "vanilla"), None, "vanilla"),
        (("up", "down"), None, "up"),
        (("up", "vanilla"), "up", "up"),
        (("only",), None, "only"),
    ],
)
def test_baseline(names: tuple[str, ...], asked: str | None, chosen: str) -> None:
    sources = {name: line("across") for name in names}
    matrix = transfer_matrix(sources, {"t": line("up")}, ATTACKS, batches(), baseline=asked)
    assert matrix.config["baseline"] == chosen
    assert matrix.baselines == ((chosen,) if len(names) > 1 else ())
    assert {comparison.source for comparison in matrix.comparisons} == set(names) - {chosen}


def test_attacks_by_mapping_and_by_function() -> None:
    attacks = {
        "mapping": {"name": "PGD", "eps": EPS, "alpha": 0.05, "steps": 3, "seed": 7},
        "function": lambda model: create("pgd", model, eps=EPS, alpha=0.05, steps=3, seed=7),
        "by hand": lambda model: Attack(model, EPS, 0.05, 3, seed=7, random_start=True),
        "other": {"name": "PGD", "eps": EPS, "alpha": 0.05, "steps": 3, "seed": 8},
    }
    matrix = transfer_matrix({"s": line("across")}, {"t": line("both")}, attacks, batches())
    cells = {cell.attack: cell for cell in matrix.cells}
    for name in ("function", "by hand"):
        assert (cells[name].errors, cells[name].white_box) == (cells["mapping"].errors, cells["mapping"].white_box)
    assert matrix.config["attacks"]["mapping"] == attacks["mapping"]
    json.dumps(matrix.to_dict(), allow_nan=False)


def test_functions_are_described_by_their_attack() -> None:
    """An address in memory would make two equal runs look different."""

    def attacks() -> dict[str, Any]:
        return {"f": lambda model: create("fgsm", model, eps=EPS), "g": lambda model: create("fgsm", model, eps=0.1)}

    first, second = (
        transfer_matrix({"s": line("up")}, {"t": line("up")}, attacks(), batches()).to_dict() for _ in range(2)
    )
    assert first == second
    assert first["config"]["attacks"]["f"]["eps"] == EPS
    assert first["config"]["attacks"]["g"]["eps"] == 0.1


def test_indices_reach_the_attack_whatever_the_batches() -> None:
    images, labels = points()
    order = torch.arange(40).flip(0) * 3
    spec = {"pgd": {"name": "pgd", "eps": EPS, "alpha": 0.02, "steps": 2}}
    seen: list[list[tuple[Tensor, Tensor]]] = []
    for size in (40, 9, 1):
        data = [Batch(*rows) for rows in zip(images.split(size), labels.split(size), order.split(size), strict=True)]
        shown: list[Tensor] = []
        target = line("up")
        target.module.register_forward_hook(lambda _, args, __, shown=shown: shown.append(args[0]))
        transfer_matrix({"s": line("both")}, {"t": target}, spec, data)
        seen.append(torch.cat(shown))
    assert torch.equal(seen[1], seen[0])
    assert torch.equal(seen[2], seen[0])
    wanted = create("pgd", line("both"), eps=EPS, alpha=0.02, steps=2)(images, labels, indices=order)
    assert torch.equal(seen[0][40:], wanted)


@pytest.mark.parametrize("qualified", [False, True])
def test_prepared_copies_are_attacked_and_models_as_given_are_judged(
    qualified: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies that are another model show where they are used."""
    asked: list[tuple[Classifier, str]] = []

    def prepared(model: Classifier, images: Tensor, precision: str) -> Classifier:
        assert torch.equal(images, batches()[0][0])
        asked.append((model, precision))
        return prepare(line("up"), images, "fp32")

    monkeypatch.setattr(module, "prepared_alike", prepared)
    source, target = line("across"), line("both")
    sources = {"s": source, "again": source}
    matrix = transfer_matrix(
        sources, {"t": target}, ATTACKS, batches(), qualified=qualified, precision="auto", baseline="s"
    )
    assert asked == [(source, "auto")]
    for name in sources:
        for attack, eps in EPS_OF.items():
            cell = matrix.cell(name, attack, "t")
            white_box = wrong_by_hand("across", "up", eps)
            fooled = wrong_by_hand("both", "up", eps)
            assert cell.white_box == pytest.approx(sum(white_box) / 40)
            assert cell.clean_accuracy == pytest.approx(1 - sum(wrong_by_hand("both", None, 0)) / 40)
            if qualified:
                clean = [wrong_by_hand(one, None, 0) for one in ("across", "both")]
                rows = zip(*clean, white_box, wrong_by_hand("both", "both", eps), strict=True)
                counts = [not s and not t and a and b for s, t, a, b in rows]
                assert (cell.errors, cell.n) == (sum(map(int.__mul__, fooled, counts)), sum(counts))
            else:
                assert cell.errors == sum(fooled)
    assert matrix.config["precision"] == "auto"
    assert matrix.config["forms"] == dict.fromkeys(sources, "fp32, contiguous")
    assert matrix.config["sources"] == dict.fromkeys(sources, fingerprint(source))


def test_without_a_precision_nothing_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "prepared_alike", None)
    matrix = transfer_matrix({"s": line("across")}, {"t": line("up")}, ATTACKS, batches())
    assert (matrix.config["precision"], matrix.config["forms"]) == (None, {})


@pytest.mark.filterwarnings("ignore:precision:RuntimeWarning")
def test_ranks_prepare_in_the_precision_that_the_first_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = line("up"), batches()[0][0]
    monkeypatch.setattr(shares, "current", lambda: Ranks(1, 2, 1))
    monkeypatch.setattr(shares, "on_main", lambda work: (work(), "bf16")[1])
    assert form_of(prepared_alike(model, images, "auto")) == "bf16, contiguous"
    assert form_of(prepared_alike(model, images, "fp32")) == "fp32, contiguous"
    monkeypatch.setattr(shares, "on_main", lambda work: work())
    assert form_of(prepared_alike(model, images, "auto")) == "fp32, contiguous"


def test_an_iterator_is_read_once() -> None:
    again = transfer_matrix({"s": line("across")}, {"t": line("up")}, ATTACKS, iter(batches()))
    assert again.to_dict() == transfer_matrix({"s": line("across")}, {"t": line("up")}, ATTACKS, batches()).to_dict()


def test_bare_modules_and_models_in_several_roles() -> None:
    """A model that is source and target has its own white-box rate as its transfer rate."""
    model = Line(*LINES["both"])
    matrix = transfer_matrix({"s": model}, {"t": model, "u": line("up")}, ATTACKS, batches())
    for attack in ATTACKS:
        cell = matrix.cell("s", attack, "t")
        assert cell.rate == cell.white_box > 0


def test_one_module_behind_two_normalisations() -> None:
    """They are two models: the second sees the first's input scaled by four."""
    module = Line(*LINES["both"])
    one, two = Classifier(module, num_classes=2), Classifier(module, (0.0, 0.0), (0.25, 0.25), 2)
    matrix = transfer_matrix({"one": one}, {"one": one, "two": two}, ATTACKS, batches())
    images, labels = points()
    score = images.sum((1, 2, 3))
    for name, scaled in (("one", score), ("two", 4 * score)):
        expected = ((scaled > 1.02).long() == labels).double().mean().item()
        assert matrix.cell("one", "small", name).clean_accuracy == pytest.approx(expected), name


def test_models_of_another_size_are_given_the_images_resized() -> None:
    images, labels = torch.rand((6, 2, 4, 4), generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1] * 3)
    seen: dict[str, list[Tensor]] = {"s": [], "t": []}
    models = {"s": line("across", input_size=(2, 2, 2)), "t": line("up", input_size=(2, 8, 8))}
    for name, model in models.items():
        model.module.register_forward_hook(lambda _, args, __, name=name: seen[name].append(args[0].detach()))
    transfer_matrix({"s": models["s"]}, {"t": models["t"]}, {"a": ATTACKS["large"]}, [(images, labels)])
    small = interpolate(images, size=(2, 2), mode="bilinear", antialias=True)
    large = interpolate(images, size=(8, 8), mode="bilinear", antialias=True).clamp(0, 1)
    torch.testing.assert_close(seen["s"][0], small)
    torch.testing.assert_close(seen["t"][0], large)
    # The adversarial image is made at the source's size and resized from there.
    adv = create("fgsm", line("across"), eps=EPS)(small, labels)
    expected = interpolate(adv, size=(8, 8), mode="bilinear", antialias=True).clamp(0, 1)
    torch.testing.assert_close(seen["t"][-1], expected)


def test_models_and_random_state_are_left_alone() -> None:
    models = {name: line(name).train() for name in SOURCES}
    state, random = copy.deepcopy({k: m.state_dict() for k, m in models.items()}), torch.get_rng_state()
    transfer_matrix(models, models, {"pgd": {"name": "pgd"}}, batches(), qualified=True)
    assert torch.equal(torch.get_rng_state(), random)
    for name, model in models.items():
        assert model.training
        assert all(parameter.grad is None for parameter in model.parameters())
        assert all(torch.equal(value, state[name][key]) for key, value in model.state_dict().items())


def test_config_and_versions() -> None:
    matrix = measure()
    assert matrix.config["images"] == 40
    assert matrix.config["attacks"] == ATTACKS
    assert matrix.config["sources"] == {name: fingerprint(line(name)) for name in SOURCES}
    assert matrix.config["targets"] == {name: fingerprint(line(name)) for name in TARGETS}
    assert matrix.versions["torch"] == version("torch")


MODELS = {"a": line("up")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": {}}, "sources: got none"),
        ({"targets": {}}, "targets: got none"),
        ({"attacks": {}}, "attacks: got none"),
        ({"attacks": {"x": {"name": "mifgms"}}}, r"attack: got 'mifgms' \(did you mean 'mifgsm'\?\)"),
        ({"attacks": ATTACKS | {"x": {"name": "bim", "eps": 0.1, "stepz": 3}}}, "bim: got unknown parameter 'stepz'"),
        ({"attacks": ATTACKS | {"x": {"name": "bim", "eps": 3}}}, "eps: got 3"),
        ({"attacks": {"x": {"eps": 0.1}}}, "attacks: got .* without a name"),
        ({"precision": "fp23"}, r"precision: got 'fp23' \(did you mean 'fp32'\?\)"),
        ({"precision": "fp32", "data": [(torch.zeros(2, 2, 1, 1), torch.tensor([0, 2]))]}, "labels for source counted"),
        ({"baseline": "vanila"}, "baseline: got 'vanila'; allowed is one of counted"),
        ({"data": []}, "data: holds no image"),
        (
            {"data": [(torch.zeros(2, 2, 1, 1), torch.tensor([0, 2]))]},
            r"labels for source counted: values span \[0, 2\]",
        ),
        ({"data": [(torch.zeros(2, 2, 1, 1), torch.tensor([0, -1]))]}, "labels for source counted: values span"),
        ({"data": [(torch.full((2, 2, 1, 1), 7.0), torch.tensor([0, 1]))]}, r"values span .*; allowed is \[0, 1\]"),
        ({"data": [torch.zeros(2, 2, 1, 1)]}, "loader: batch 0 is"),
    ],
)
def test_errors_come_before_anything_runs(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    counted = line("across")
    arguments = {
        "sources": {"counted": counted},
        "targets": {"counted": counted},
        "attacks": ATTACKS,
        "data": batches(),
    }
    parts = tmp_path / "parts"
    with pytest.raises(ValueError, match=message) as raised:
        transfer_matrix(**(arguments | changes), parts=parts)
    assert "\n" not in str(raised.value)
    assert counted.module.calls == 0
    assert not parts.exists()


class Shuffling:
    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = points()
        order = torch.arange(40).roll(self.passes)
        self.passes += 1
        yield images[order], labels[order]


def test_data_that_change_their_order_are_refused() -> None:
    with pytest.raises(ValueError, match="data: the order changes from pass to pass"):
        transfer_matrix({"s": line("up")}, {"t": line("up")}, ATTACKS, Shuffling())


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("qualified", [False, True])
def test_parts_are_taken_up_again(qualified: bool, tmp_path: Path) -> None:
    """An interrupted matrix is finished without repeating an attack, and equals one that was never interrupted."""
    runs: list[tuple[str, str]] = []
    limit = [3]

    def spec(name: str) -> Any:
        def build(model: nn.Module) -> Attack:
            attack = create("fgsm", model, eps=EPS_OF[name])

            class Logged(Attack):
                def __call__(self, images: Tensor, labels: Tensor, *, indices: Tensor | None = None) -> Tensor:
                    if len(runs) == limit[0]:
                        raise Interrupted
                    runs.append((name, fingerprint(model)))
                    return attack(images, labels, indices=indices)

            return Logged(model, attack.eps, attack.alpha, attack.steps)

        return build

    sources, targets = {name: line(name) for name in SOURCES}, {name: line(name) for name in TARGETS}
    attacks = {name: spec(name) for name in ATTACKS}
    data, parts = batches(40), tmp_path / "parts"
    jobs = (len(sources) + (len(targets) if qualified else 0)) * len(attacks)

    def run(**options: Any) -> dict[str, Any]:
        return transfer_matrix(sources, targets, attacks, data, qualified=qualified, **options).to_dict()

    with pytest.raises(Interrupted):
        run(parts=parts)
    assert len(list(parts.iterdir())) == 3
    limit[0] = 10**6
    resumed = run(parts=parts)
    assert len(runs) == jobs
    assert run(parts=parts) == resumed
    assert len(runs) == jobs
    assert run() == resumed
    assert len(runs) == 2 * jobs
    assert len(list(parts.iterdir())) == jobs


@pytest.mark.filterwarnings("ignore:precision:RuntimeWarning")
def test_parts_in_another_form_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources, targets = {"s": line("across")}, {"t": line("both")}
    runs: list[int] = []
    run = Attack.__call__
    monkeypatch.setattr(Attack, "__call__", lambda *args, **options: (runs.append(1), run(*args, **options))[1])
    for precision, expected in ((None, 6), ("fp32", 12), ("fp32", 12), ("bf16", 18), (None, 24)):
        transfer_matrix(sources, targets, ATTACKS, batches(), precision=precision, parts=tmp_path)
        assert len(runs) == expected


def test_parts_of_other_data_are_not_taken(tmp_path: Path) -> None:
    sources, targets = {"s": line("across")}, {"t": line("both")}
    transfer_matrix(sources, targets, ATTACKS, batches(), parts=tmp_path)
    fewer = transfer_matrix(sources, targets, ATTACKS, batches()[:2], parts=tmp_path)
    assert fewer.to_dict() == transfer_matrix(sources, targets, ATTACKS, batches()[:2]).to_dict()


def test_parts_of_other_targets_are_not_taken(tmp_path: Path) -> None:
    first, more = {"t": line("both")}, {"t": line("both"), "u": line("up")}
    for targets in (first, more, first):
        matrix = transfer_matrix({"s": line("across")}, targets, ATTACKS, batches(), parts=tmp_path)
        assert matrix.to_dict() == transfer_matrix({"s": line("across")}, targets, ATTACKS, batches()).to_dict()


def test_part_names_stay_in_their_folder(tmp_path: Path) -> None:
    """Names are the user's own, and two that differ only in odd characters are two."""
    parts = tmp_path / "parts"
    sources = {"../s": line("across"), "..+s": line("up"), "a/b": line("both")}
    attacks = {"x/../../y": ATTACKS["large"], "x+y": ATTACKS["small"]}
    matrix = transfer_matrix(sources, {"t": line("up")}, attacks, batches(), parts=parts)
    assert [path.name for path in tmp_path.iterdir()] == ["parts"]
    assert len(list(parts.iterdir())) == 6
    assert matrix.to_dict() == transfer_matrix(sources, {"t": line("up")}, attacks, batches(), parts=parts).to_dict()


def test_progress_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    model = line("across")
    matrix = transfer_matrix({"s": model}, {"s": model, "t": line("up")}, ATTACKS, batches(), progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    # Two distinct models when clean, and two attacks, in three batches each.
    assert captured.err.startswith("transfer: 12/12 batches, ")
    assert captured.err.count("\n") == 1
    transfer_matrix({"s": model}, {"t": line("up")}, ATTACKS, batches())
    assert capsys.readouterr() == ("", "")
    assert len(matrix.cells) == 4


def test_progress_counts_what_is_taken_from_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        transfer_matrix({"s": line("up")}, {"t": line("up")}, ATTACKS, batches(), parts=tmp_path, progress=True)
    assert "12/12 batches" in capsys.readouterr().err.splitlines()[1]


def test_parts_of_another_attack_or_model_are_not_taken(tmp_path: Path) -> None:
    targets = {"t": line("up")}

    def measure(eps: float, source: str, folder: Path | None) -> TransferMatrix:
        attack = {"name": "fgsm", "eps": eps}
        return transfer_matrix({"s": line(source)}, targets, {"a": attack}, batches(), parts=folder)

    before = measure(0.0, "across", tmp_path)
    assert measure(0.5, "across", None).cells != before.cells
    for eps, source in ((0.5, "across"), (0.5, "up")):
        assert measure(eps, source, tmp_path) == measure(eps, source, None)
