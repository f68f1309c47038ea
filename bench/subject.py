"""What a case gives the harness to measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

Call = Callable[[], object]


@dataclass(frozen=True)
class Cost:
    """What any implementation has to do: bytes that it moves, or floating-point operations of models' passes."""

    moved: int = 0
    flops: int = 0


class Subject(Protocol):
    @property
    def cost(self) -> Cost: ...

    def prepare(self, *, compiled: bool) -> tuple[dict[str, Call], str | None]:
        """The sides by name, "ours" first, and what is wrong with their results, or None.

        compiled: also what torch.compile makes of the expression, for an op.
        """
        ...


class EndToEnd(Subject, Protocol):
    """One whose sides can be had without running them, to see what memory a first call takes."""

    def sides(self) -> dict[str, Call]: ...
