"""What the harness makes of times and results; the clock is set by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from alignfast.bench import harness, sides
from alignfast.bench.harness import Result, Round, Spread, alternate, measure
from alignfast.bench.registry import Case
from alignfast.bench.roofline import Gpu
from alignfast.bench.sides import Tensors, Work, error, find_fault
from alignfast.bench.subject import Cost

ONES = torch.ones(2, 3)


class Clock:
    """Moves on only when told to; remembers who told it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def side(self, name: str, *seconds: float) -> Callable[[], None]:
        """A call that lasts so long, the last of `seconds` from then on."""
        durations = list(seconds)

        def call() -> None:
            self.order.append(name)
            self.now += durations.pop(0) if len(durations) > 1 else durations[0]

        return call


def work_of(ours: Tensors, eager: Tensors = (ONES,), *, tolerance: float = 1e-3, slack: float | None = 0.1) -> Work:
    return Work(
        ours=lambda: ours,
        expression=lambda: eager,
        bind=lambda expression: expression,
        expected=lambda: (ONES,),
        tolerance=tolerance,
        slack=slack,
        moved=800,
        device=torch.device("cpu"),
    )


def case_of(work: Work, **targets: float) -> Case:
    return Case("ops", "sign_step", "made up", "fp32", (2, 3), lambda shape, dtype, device: work, targets)


def measured(seconds: dict[str, list[float]], waited: list[float | None] | None = None) -> list[Round]:
    rounds = [dict(zip(seconds, values, strict=True)) for values in zip(*seconds.values(), strict=True)]
    return [Round(*both) for both in zip(rounds, waited or [None] * len(rounds), strict=True)]


def fault_of(work: Work) -> str | None:
    return find_fault(work, sides.make_sides(work, compiled=False))


def test_spread() -> None:
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 2.0, 4.0, 1.0)


def test_sides_take_turns_at_being_first() -> None:
    clock = Clock()
    calls = {name: clock.side(name, 1.0) for name in ("ours", "eager", "copy")}
    rounds = alternate(calls, seconds=0.0, clock=clock, least=4)
    assert [one.seconds for one in rounds] == [dict.fromkeys(calls, 1.0)] * 4
    warm_up, timed = clock.order[:9], clock.order[9:]
    assert warm_up == ["ours"] * 3 + ["eager"] * 3 + ["copy"] * 3
    turns = [timed[first : first + 3] for first in range(0, 12, 3)]
    assert turns == [
        ["ours", "eager", "copy"],
        ["eager", "copy", "ours"],
        ["copy", "ours", "eager"],
        ["ours", "eager", "copy"],
    ]


def test_warm_up_is_not_counted() -> None:
    clock = Clock()
    rounds = alternate({"ours": clock.side("ours", 1.9, 1.5, 1.5, 1.0)}, seconds=0.0, clock=clock, least=5)
    assert [one.seconds for one in rounds] == [{"ours": 1.0}] * 5


def test_a_long_call_is_tried_once() -> None:
    clock = Clock()
    rounds = alternate({"ours": clock.side("ours", 100.0, 10.0)}, seconds=0.0, clock=clock, least=5)
    assert [one.seconds for one in rounds] == [{"ours": 10.0}] * 5
    assert len(clock.order) == 1 + 5


def test_short_calls_are_timed_together_after_one_that_is_not_timed() -> None:
    clock = Clock()
    block = math.ceil(harness.BLOCK_SECONDS / 0.001)
    # Three to see how long a call lasts, one that finds the cache of another side, and the block.
    calls = {"ours": clock.side("ours", *[0.001] * 3, 7.0, *[0.002] * block)}
    (only,) = alternate(calls, seconds=0.0, clock=clock, least=1)
    assert only.seconds["ours"] == pytest.approx(0.002)
    assert len(clock.order) == 3 + 1 + block


def test_a_slow_warm_up_does_not_make_blocks_short_for_good() -> None:
    clock = Clock()
    calls = {"ours": clock.side("ours", *[1.0] * 4, 0.001)}
    rounds = alternate(calls, seconds=0.0, clock=clock, least=3)
    assert [one.seconds["ours"] for one in rounds] == pytest.approx([1.0, 0.001, 0.001])
    assert len(clock.order) == 3 + 1 + 1 + (1 + math.ceil(harness.BLOCK_SECONDS / 0.001))


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 5), (22.0, 8), (1e9, 20)])
def test_rounds_go_on_until_the_time_is_spent(seconds: float, rounds: int) -> None:
    """A round lasts 2 seconds, and the warm-up 6."""
    clock = Clock()
    calls = {"ours": clock.side("ours", 0.5), "eager": clock.side("eager", 1.5)}
    assert len(alternate(calls, seconds=seconds, clock=clock, least=5, most=20)) == rounds


def test_ratios_are_those_of_medians_with_quartiles_of_rounds() -> None:
    rounds = {
        "ours": [1.0, 2.0, 4.0, 1.0, 1.0],
        "eager": [6.0, 6.0, 12.0, 2.0, 50.0],
        "copy": [0.5, 0.5, 0.5, 0.5, 0.5],
    }
    case = case_of(work_of((ONES,)), eager=6.5, compiled=2.0, copy=0.5)
    result = Result(case, Cost(moved=3_000_000_000), measured=measured(rounds))
    assert result.seconds["ours"] == Spread(1.0, 1.0, 2.0, 1.0)
    # Within rounds: 6, 3, 3, 2, 50.
    assert result.ratios == {"eager": Spread(6.0, 3.0, 6.0, 2.0), "copy": Spread(0.5, 0.25, 0.5, 0.125)}
    assert result.gigabytes_per_second == 3.0
    # What was not measured cannot be missed, and reaching a target is enough.
    assert result.missed == ["eager"]


@pytest.mark.parametrize(
    ("ours", "fault"),
    [
        ((ONES + 5e-4,), None),
        ((ONES.bfloat16(),), None),
        ((ONES + 0.01,), "ours: result 0 is off by 0.005, allowed is 0.001"),
        ((torch.tensor([[1.0, 1, 1], [1, math.nan, 1]]),), "ours: result 0 is off by nan"),
        ((ONES * math.inf,), "ours: result 0 is off by inf"),
        ((ONES[:1],), r"ours: results have shapes [[1, 3]], expected [[2, 3]]"),
        ((ONES, ONES), r"ours: results have shapes [[2, 3], [2, 3]], expected [[2, 3]]"),
        ((), r"ours: results have shapes [], expected [[2, 3]]"),
    ],
)
def test_a_wrong_result_is_a_fault(ours: Tensors, fault: str | None) -> None:
    found = fault_of(work_of(ours))
    assert found is None if fault is None else found is not None and found.startswith(fault)


def test_the_expression_is_checked_too_unless_it_draws_its_own_numbers() -> None:
    assert fault_of(work_of((ONES,), (ONES * 1.1,))) is None
    assert fault_of(work_of((ONES,), (ONES * 1.5,))) == "eager: result 0 is off by 0.25, allowed is 0.1"
    assert fault_of(work_of((ONES,), (ONES * 1.5,), slack=None)) is None
    assert fault_of(work_of((ONES,), (ONES[:1],), slack=None)) is not None


def test_error_is_relative_to_the_element_and_to_the_whole() -> None:
    wanted = torch.tensor([0.0, 3.0, 0.0, -4.0])
    # The root mean square is 2.5.
    assert error(wanted + torch.tensor([0.5, 0, 0, 0]), wanted) == pytest.approx(0.2)
    assert error(wanted + torch.tensor([0, 0, 0, 0.65]), wanted) == pytest.approx(0.1)
    assert error(1e-20 * wanted * 1.1, 1e-20 * wanted) == pytest.approx(0.4 / 6.5)
    assert error(torch.tensor(2.0), torch.tensor(1.0)) == 0.5
    assert error(torch.zeros(3), torch.zeros(3)) == 0.0
    assert error(torch.ones(3), torch.zeros(3)) > 1.0
    assert error(torch.empty(0, 3), torch.empty(0, 3)) == 0.0


def test_error_is_found_wherever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sides, "CHECKED_AT_ONCE", 7)
    for row in range(5):
        result = torch.ones(5, 3)
        result[row, 1] = 2.0
        assert error(result, torch.ones(5, 3)) == 0.5
        result[row, 1] = math.nan
        assert math.isnan(error(result, torch.ones(5, 3)))


def test_what_is_wrong_or_raises_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def alternate(*arguments: object, **settings: object) -> None:
        pytest.fail("was timed")

    def raises() -> Tensors:
        raise RuntimeError("no such\nkernel")

    monkeypatch.setattr(harness, "alternate", alternate)
    wrong = measure(case_of(work_of((ONES + 1,)), eager=5.0), compiled=False)
    assert wrong.fault == "ours: result 0 is off by 0.5, allowed is 0.001"
    broken = measure(case_of(replace(work_of((ONES,)), ours=raises)), compiled=False)
    assert broken.fault == "RuntimeError: no such kernel"
    for result in (wrong, broken):
        shown = result.to_dict()
        assert shown["wrong"] == result.fault
        assert (shown["seconds"], shown["ratios"], shown["gigabytes_per_second"]) == ({}, {}, None)
        assert not result.missed


def test_what_is_right_is_timed_beside_a_copy() -> None:
    result = measure(case_of(work_of((ONES,))), compiled=False, seconds=0.0)
    assert result.fault is None
    assert list(result.rounds) == ["ours", "eager", "copy"]
    assert all(value > 0 for values in result.rounds.values() for value in values)


def test_the_copy_moves_the_bytes_of_the_op() -> None:
    copied = sides.copy_of(800, torch.device("cpu"))()
    assert isinstance(copied, torch.Tensor)
    assert 2 * copied.nbytes == 800
    assert torch.equal(copied, torch.ones(100))


def test_rounds_that_were_disturbed_are_left_out() -> None:
    rounds = {"ours": [1.0, 9.0, 1.0, 9.0, 1.0, 1.0, 1.0], "copy": [2.0, 2.0, 2.0, 3.0, 2.0, 2.0, 2.0]}
    result = Result(
        case_of(work_of((ONES,))), Cost(moved=1), measured=measured(rounds, [0.0, 0.06, 0.04, 1.0, 0.0, 0.0, 0.0])
    )
    assert not result.disturbed
    assert result.rounds == {"ours": [1.0] * 5, "copy": [2.0] * 5}
    assert result.to_dict()["rounds"] == {"measured": 7, "quiet": 5}


def test_too_few_quiet_rounds_are_a_disturbance() -> None:
    rounds = {"ours": [1.0, 9.0, 1.0, 9.0, 1.0, 1.0]}
    result = Result(
        case_of(work_of((ONES,))), Cost(moved=1), measured=measured(rounds, [0.0, 0.06, 0.0, 1.0, 0.0, 0.0])
    )
    assert result.disturbed
    assert result.rounds == rounds


def test_shares_of_the_peak_and_the_cache_are_those_of_the_gpu() -> None:
    gpu = Gpu("made up", 1e9, {"fp32": 1e12, "tf32": 4e12}, cache=2**20)
    rounds = measured({"ours": [4.0] * 5})
    case = case_of(work_of((ONES,)))
    large, small, run = (
        Result(case, cost, measured=rounds, gpu=gpu)
        for cost in (Cost(moved=2 * 10**9), Cost(moved=2**20), Cost(flops=8 * 10**12))
    )
    assert (large.limit, large.of_peak, large.cached) == ("memory", 0.5, False)
    assert small.cached
    assert (run.limit, run.of_peak, run.cached) == ("tf32", 0.5, False)
    assert (run.gigabytes_per_second, run.teraflops_per_second) == (None, 2.0)
    assert run.to_dict()["expected"]["A100"]["bf16"] == pytest.approx(8 / 312)
    unknown = Result(case, Cost(flops=1), measured=rounds, gpu=Gpu("unknown", None))
    assert unknown.of_peak is None
    on_cpu = Result(case, Cost(moved=1), measured=rounds)
    assert (on_cpu.of_peak, on_cpu.cached, on_cpu.to_dict()["expected"]) == (None, False, {})


def test_the_share_of_waiting_is_over_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    told = iter([1.0, 1.5, 2.0, 2.0, None, None])
    monkeypatch.setattr(harness, "waiting", lambda: next(told))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    clock = Clock()
    rounds = alternate({"ours": clock.side("ours", 1.0)}, seconds=0.0, clock=clock, least=3)
    assert [(one.waited, one.quiet) for one in rounds] == [(0.25, False), (0.0, True), (None, True)]


def test_waiting_is_that_of_all_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "SCHEDULED", tmp_path)
    assert harness.waiting() is None
    for thread, waited in ((1, 2_000_000_000), (2, 500_000_000)):
        folder = tmp_path / str(thread)
        folder.mkdir()
        (folder / "schedstat").write_text(f"777 {waited} 42\n")
    assert harness.waiting() == 2.5
