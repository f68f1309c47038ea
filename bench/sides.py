"""The sides of an op's case, and whether they agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .subject import Call, Cost

Tensors = tuple[Tensor, ...]
Run = Callable[[], Tensors]
Expression = Callable[..., Any]

# Elements whose errors are found together; float64 copies of a whole batch would be larger than the batch.
CHECKED_AT_ONCE = 2**22


@dataclass(frozen=True)
class Work:
    """One computation on inputs that are already there.

    ours: the op. It is checked at its first call; an op that works in place goes on from there in later ones, as in
        an attack, so that nothing has to be restored between timed calls.
    expression: what is written without the op.
    bind: makes of the expression, or of what a compiler made of it, a call that returns the results.
    expected: the results that `ours` and the expression must come near, found with more precision.
    tolerance, slack: the errors allowed to `ours` and to the expression, as `error` counts them; a slack of None is
        for an expression that draws random numbers of its own.
    moved: the bytes that any implementation reads and writes at the least.
    device: where the inputs are.
    compiles: False where what torch.compile makes of the expression would take minutes a call.
    """

    ours: Run
    expression: Expression
    bind: Callable[[Expression], Run]
    expected: Run
    tolerance: float
    slack: float | None
    moved: int
    device: torch.device
    compiles: bool = True

    @property
    def cost(self) -> Cost:
        return Cost(moved=self.moved)

    def prepare(self, *, compiled: bool) -> tuple[dict[str, Call], str | None]:
        """The sides "ours", "eager", perhaps "compiled", and "copy", which moves as many bytes; what is wrong."""
        sides = make_sides(self, compiled=compiled)
        return {**sides, "copy": copy_of(self.moved, self.device)}, find_fault(self, sides)


def make_sides(work: Work, *, compiled: bool) -> dict[str, Run]:
    sides = {"ours": work.ours, "eager": work.bind(work.expression)}
    if compiled and work.compiles:
        sides["compiled"] = work.bind(_compile(work.expression))
    return sides


def find_fault(work: Work, sides: Mapping[str, Run]) -> str | None:
    """Calls every side once; which of them is wrong and by how much, or None."""
    expected = work.expected()
    for side, run in sides.items():
        tolerance = work.tolerance if side == "ours" else work.slack
        results = run()
        shapes = [[list(tensor.shape) for tensor in tensors] for tensors in (results, expected)]
        if shapes[0] != shapes[1]:
            return f"{side}: results have shapes {shapes[0]}, expected {shapes[1]}"
        if tolerance is None:
            continue
        for index, (result, wanted) in enumerate(zip(results, expected, strict=True)):
            found = error(result, wanted)
            # Written so that NaN is a fault too.
            if not found <= tolerance:
                return f"{side}: result {index} is off by {found:.2g}, allowed is {tolerance:.2g}"
    return None


def error(result: Tensor, wanted: Tensor) -> float:
    """The largest |result - wanted| / (|wanted| + root mean square of wanted); NaN where a result is."""
    if wanted.numel() == 0:
        return 0.0
    scale = float(torch.linalg.vector_norm(wanted, dtype=torch.float64)) / math.sqrt(wanted.numel())
    tiny = torch.finfo(torch.float32).tiny
    worst = 0.0
    for got, want in zip(_pieces(result), _pieces(wanted), strict=True):
        want = want.double()
        found = float(((got.double() - want).abs() / (want.abs() + scale + tiny)).max())
        if math.isnan(found):
            return found
        worst = max(worst, found)
    return worst


def copy_of(moved: int, device: torch.device) -> Call:
    """A copy that reads and writes `moved` bytes in all."""
    source = torch.ones(max(1, moved // 8), device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    rows = tensor.reshape(1) if tensor.ndim == 0 else tensor
    pieces: tuple[Tensor, ...] = rows.split(max(1, CHECKED_AT_ONCE * len(rows) // rows.numel()))
    return pieces


def _compile(expression: Expression) -> Expression:
    # What was compiled before for other shapes would count toward a limit beyond which nothing is compiled.
    torch.compiler.reset()
    compiled: Expression = torch.compile(expression, fullgraph=True, dynamic=False)
    return compiled
