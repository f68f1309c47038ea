"""The cases under pytest-benchmark, the op beside eager PyTorch: `python -m pytest bench -k sign_step`.

One side is timed after the other here; `python -m bench` alternates, and is what ratios are to be taken from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from . import harness
from .registry import CASES, Case

Benchmark = Callable[[Callable[[], object]], Any]
PARAMETERS = [pytest.param(case, id=case.name, marks=pytest.mark.benchmark(group=case.name)) for case in CASES]


@pytest.mark.parametrize("side", ["ours", "eager"])
@pytest.mark.parametrize("case", PARAMETERS)
def test_speed(case: Case, side: str, benchmark: Benchmark) -> None:
    work = case.work()
    sides = harness.make_sides(work, compiled=False)
    assert harness.find_fault(work, sides) is None
    benchmark(sides[side])
