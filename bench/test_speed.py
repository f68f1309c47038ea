"""The cases under pytest-benchmark: `python -m pytest bench`, with `-m "slow or not slow"` for all, `-k` for some.

What is timed is ours; ratios to the other sides, measured in alternation before, are in `extra_info`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import pytest
import torch

from alignfast.bench.clock import clock_of
from alignfast.bench.harness import Result, alternate
from alignfast.bench.registry import MODELS, Case, select

CPU = torch.device("cpu")
SECONDS = 0.3


class Benchmark(Protocol):
    extra_info: dict[str, Any]

    def __call__(self, function: Any) -> Any: ...


def parameters(case: Case) -> Any:
    heavy = case.group in MODELS or case.extended
    marks = [pytest.mark.benchmark(group=case.subject), *([pytest.mark.slow] if heavy else [])]
    return pytest.param(case, id=case.name, marks=marks)


@pytest.mark.parametrize("case", [parameters(case) for case in select()])
def test_speed(case: Case, benchmark: Benchmark) -> None:
    if (reason := case.lacks(CPU)) is not None:
        pytest.skip(reason)
    subject = case.subject_on(CPU)
    calls, fault = subject.prepare(compiled=False)
    assert fault is None
    result = Result(case, subject.cost, measured=alternate(calls, seconds=SECONDS, clock=clock_of(CPU)))
    benchmark.extra_info["ratios"] = {side: dataclasses.asdict(ratio) for side, ratio in result.ratios.items()}
    benchmark(calls["ours"])
