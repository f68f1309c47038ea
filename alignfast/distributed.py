"""The processes that torchrun starts, one a device, and what they tell each other.

All ranks come to the same calls of this module in the same order, or wait for each other. None waits for ever: a rank
that raises leaves `process_group`, which closes its connections, and its process ends, whereupon torchrun ends the
others. One that waits for it in the meantime raises `RankError`, at once where it finds the connection closed, and
else after the group's timeout. `on_main` gives an error of rank 0 to all ranks, so that all of them end alike.

Objects travel by pickle between processes of one run, which trust each other.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Ranks wait for the slowest, which may have a batch more than they, and for what rank 0 does alone.
TIMEOUT = timedelta(minutes=30)


class RankError(OSError):
    """Another rank ended, or did not answer within the group's timeout."""


@dataclass(frozen=True)
class Ranks:
    """rank: of this process, from 0. world: number of processes. local: rank among those of this machine."""

    rank: int
    world: int
    local: int


def current() -> Ranks:
    """From the initialised process group; rank 0 of 1 without."""
    if not _initialised():
        return Ranks(0, 1, 0)
    rank = dist.get_rank()
    return Ranks(rank, dist.get_world_size(), int(os.environ.get("LOCAL_RANK", rank)))


def main() -> bool:
    """Whether this is rank 0, which alone prints and writes what there is one of."""
    return current().rank == 0


@contextmanager
def process_group(device: torch.device | str, timeout: timedelta = TIMEOUT) -> Iterator[Ranks]:
    """A process group from torchrun's variables, for as long as the block lasts.

    Without RANK and WORLD_SIZE in the environment, and where a group is initialised already, nothing is made or
    destroyed. Ranks leave the block together, unless by an exception.

    Args:
        device: "cpu" for gloo alone; "cuda" for nccl, with gloo for what lies on the CPU, and device LOCAL_RANK as
            the current one. Not "cuda:N", which would put all ranks of a machine on one device.
        timeout: of a wait for other ranks; for nccl too.

    Raises:
        ValueError: a variable is missing or no number, or there is no such device. RankError: not all ranks came.
    """
    device = torch.device(device)
    if _initialised() or not {"RANK", "WORLD_SIZE"} & os.environ.keys():
        yield current()
        return
    local = _variables()["LOCAL_RANK"]
    if device.type == "cuda":
        _use_device(device, local)
    with _answers():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    try:
        yield current()
        # Rank 0 may hold the store that the others still use.
        barrier()
    except BaseException:
        # Collectives that the others never join would keep the group from being destroyed.
        group = dist.group.WORLD
        if group is not None:
            group.abort()
        raise
    finally:
        dist.destroy_process_group()


def gather(value: T) -> list[T]:
    """What each rank gives, by rank, on every rank; [value] alone. Raises RankError, and waits for all ranks."""
    if not _initialised():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    with _answers():
        dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait until all ranks are here; raises as `gather`. Work that a device still has to do is not waited for."""
    gather(None)


def any_rank(flag: bool) -> bool:
    """Whether the flag is true on at least one rank, on every rank; raises and waits as `gather`."""
    return any(gather(bool(flag)))


def on_main(work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, which alone calls it, on every rank; what it raises is raised on every rank.

    Raises RankError besides, and waits for rank 0.
    """
    if current().world == 1:
        return work()
    outcome: list[Any] = [None, None]
    if main():
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = _portable(error)
    with _answers():
        dist.broadcast_object_list(outcome)
    value, failure = outcome
    if failure is not None:
        raise failure
    result: T = value
    return result


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def _variables() -> dict[str, int]:
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing:
        raise ValueError(f"environment: lacks {', '.join(missing)}; allowed are all of torchrun's variables or none")
    try:
        return {name: int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    except ValueError as error:
        raise ValueError(f"environment: RANK, WORLD_SIZE and LOCAL_RANK are whole numbers ({error})") from error


def _use_device(device: torch.device, local: int) -> None:
    if device.index is not None:
        raise ValueError(f"device: got {device}; allowed with several processes is cuda, of which each takes its own")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local >= count:
        raise ValueError(f"device: no CUDA device for local rank {local}; this machine has {count}")
    torch.cuda.set_device(local)


def _portable(error: Exception) -> Exception:
    """The error, or where it does not survive pickling, one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@contextmanager
def _answers() -> Iterator[None]:
    try:
        yield
    # torch's own errors for a closed connection and for a timeout are of this type.
    except RuntimeError as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise RankError(f"another rank ended or did not answer in time ({reason})") from error
