"""How many rows go through the model together."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from alignfast.attacks import Attack, Neighbors, Scales, VarianceTuning, chunks
from alignfast.attacks.chunks import Chunks, ChunksByShape
from tests.attacks.samples import CLASSES, Halving, labels_of, photos

ROW = 2 * 8 * 8 * 8  # bytes of an image in float64


class Squares(nn.Module):
    """Keeps so many tensors of a row's size for its backward pass."""

    def __init__(self, kept: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(100, 100, dtype=torch.float64))
        self.kept = kept
        self.batches: list[int] = []

    def forward(self, rows: Tensor) -> Tensor:
        self.batches.append(len(rows))
        for _ in range(self.kept):
            rows = rows.square()
        return rows.flatten(1)[:, :CLASSES] * self.weight[0, 0]


def measured(model: nn.Module, memory: int) -> Chunks:
    found, leaf = Chunks(None, memory), photos(3).requires_grad_()
    with found.measuring(model, leaf):
        torch.autograd.grad(model(leaf).sum(), leaf)
    return found


def test_what_a_row_keeps_is_measured_without_the_weights() -> None:
    """The images and two squares of them are kept, the last square only as a part; twice as much is allowed for."""
    rows = measured(Squares(3), 1000 * ROW).rows
    assert rows is not None
    assert 1000 / (2 * 4) <= rows <= 1000 / (2 * 3)
    assert measured(Squares(3), 1).rows == 1


def test_a_second_pass_is_not_measured() -> None:
    found = measured(Squares(3), 1000 * ROW)
    before = found.rows
    with found.measuring(Squares(50), photos(3)):
        pass
    assert found.rows == before


@pytest.mark.parametrize(
    ("rows", "each", "wanted", "expected"), [(None, 4, 9, 1), (12, 4, 9, 3), (12, 4, 2, 2), (3, 4, 9, 1), (12, 0, 9, 9)]
)
def test_how_many_units_go_together(rows: int | None, each: int, wanted: int, expected: int) -> None:
    assert Chunks(rows, None).most(each, wanted) == expected


def test_samples_and_views_share_the_budget() -> None:
    """First views of a sample together, then samples; never less than the images."""
    model = Halving()
    attack = Attack(model, 0.1, 0.05, 2, transforms=[Scales(4)], estimator=VarianceTuning(3), max_batch=16)
    attack(photos(2), labels_of(2))
    # The views of the point; those of two samples, and of the third; and the point of the second step.
    assert model.batches == [8, 16, 8, 8]
    model.batches.clear()
    Attack(model, 0.1, 0.05, 1, transforms=[Scales(4)], max_batch=6)(photos(2), labels_of(2))
    assert model.batches == [6, 2]


@pytest.mark.parametrize("max_batch", [1, 2, 5, 8, 13, 1000])
def test_sums_are_the_same_bit_by_bit(max_batch: int) -> None:
    def attack(model: nn.Module, most: int | None) -> Tensor:
        made = Attack(
            model,
            0.1,
            0.03,
            3,
            transforms=[Scales(3), Neighbors(2, 0.05)],
            estimator=VarianceTuning(3),
            max_batch=most,
        )
        return made(photos(3), labels_of(3))

    assert torch.equal(attack(Halving(), max_batch), attack(Halving(), None))


def test_a_small_budget_is_kept_and_changes_nothing() -> None:
    small, large = Squares(4), Squares(4)
    options = {"transforms": [Neighbors(16, 0.05)]}
    adv = Attack(small, 0.1, 0.03, 2, memory=60 * ROW, **options)(photos(2), labels_of(2))
    expected = Attack(large, 0.1, 0.03, 2, memory=10**9, **options)(photos(2), labels_of(2))
    assert torch.equal(adv, expected)
    # The first pass has one view of each image; then so many as fit.
    assert large.batches == [2, 30, 32]
    assert small.batches[0] == 2
    assert 2 < max(small.batches) <= 60 // (2 * 4) + 1
    assert sum(small.batches) == 64


def test_each_shape_and_dtype_is_measured_for_itself() -> None:
    by_shape = ChunksByShape()
    first = by_shape.of(photos(2), None, None)
    assert by_shape.of(photos(5), None, None) is first
    assert by_shape.of(photos(2).float(), None, None) is not first
    assert by_shape.of(photos(2)[..., :4], None, None) is not first
    for other in (copy.deepcopy(by_shape), pickle.loads(pickle.dumps(by_shape))):
        assert isinstance(other, ChunksByShape)
        assert other.of(photos(2), None, None) is not first


def test_the_budget_is_a_part_of_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemFree: 1000 kB\nMemAvailable: 4000000 kB\n")
    monkeypatch.setattr(chunks, "MEMORY", tmp_path / "meminfo")
    assert chunks._budget(torch.device("cpu")) == int(chunks.SHARE_OF_FREE * 4000000 * 1024)
    monkeypatch.setattr(chunks, "MEMORY", tmp_path / "elsewhere")
    assert chunks._budget(torch.device("cpu")) == chunks.LEAST
    assert chunks._budget(torch.device("meta")) == chunks.LEAST


@pytest.mark.parametrize("name", ["max_batch", "memory"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "1"])
def test_bad_numbers(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name}: got"):
        Attack(Halving(), 0.1, 0.05, 1, **{name: value})
