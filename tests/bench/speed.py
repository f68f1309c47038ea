"""Ops under pytest-benchmark, beside eager PyTorch: `python -m pytest tests/bench/speed.py -k sign_step`.

One side is timed after the other here; `alignfast bench` alternates, and is what ratios are to be taken from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from alignfast.bench.registry import OP_CASES, Case

Benchmark = Callable[[Callable[[], object]], Any]
PARAMETERS = [pytest.param(case, id=case.name, marks=pytest.mark.benchmark(group=case.name)) for case in OP_CASES]


@pytest.mark.parametrize("side", ["ours", "eager"])
@pytest.mark.parametrize("case", PARAMETERS)
def test_speed(case: Case, side: str, benchmark: Benchmark) -> None:
    calls, fault = case.subject_on("cpu").prepare(compiled=False)
    assert fault is None
    benchmark(calls[side])
