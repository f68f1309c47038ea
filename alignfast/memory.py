"""Freed memory stays in the process, in huge pages where they are to be had, so that tensors are not faulted in anew.

glibc hands large blocks back to the kernel when they are freed, and a pass of a model then waits for as many page
faults as its activations have pages. Importing this package changes nothing about that; `keep_memory` does, and the
command line calls it. What the environment says comes first: ALIGNFAST_KEEP_MEMORY=0 leaves everything as it is, and so
do another allocator than glibc's, MALLOC_* or GLIBC_TUNABLES for the settings in question, and THP_MEM_ALLOC_ENABLE for
huge pages.
"""

from __future__ import annotations

import os
import resource
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from alignfast import _C
from alignfast.checks import check_choice

SWITCH = "ALIGNFAST_KEEP_MEMORY"
# With 1, torch asks for huge pages for blocks from 2 MiB. It reads this once, when it first allocates.
TORCH_HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
SMAPS = Path("/proc/self/smaps")
KERNEL_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# What a user may have set of that which keep_memory would set.
MALLOC = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
TUNABLES = ("glibc.malloc.mmap_max", "glibc.malloc.mmap_threshold", "glibc.malloc.trim_threshold")
# Above the largest block that glibc may come to keep by itself.
BLOCK = 64 << 20
# A part of it with a few huge pages.
SOME = 8 << 20
PAGE = 4096
# Faults of the interpreter itself; a block has hundreds, also in huge pages, as its ends do not fill one.
FEW = 16
TRIES = 6


@dataclass(frozen=True, eq=False)
class Memory:
    """What a call of `keep_memory` did; `undo`, or the end of a `with` block, takes it back.

    allocator: what serves malloc, "glibc 2.36" or the name of a file such as "libjemalloc.so.2".
    kept: large blocks stay in the process when they are freed.
    huge_pages: large tensors lie in huge pages.
    reason: None where both hold by this call, else why not, or what else saw to it.
    """

    allocator: str
    kept: bool
    huge_pages: bool
    reason: str | None

    def undo(self) -> None:
        """Large blocks go back to the kernel again when freed, and what is free by now does at once. Twice is harmless.

        Does nothing until the last of several calls of `keep_memory` is undone. Some of it stays. glibc adjusts its
        thresholds to what is freed until they are first set, and now they are fixed where that ends, at 32 MiB for a
        block and 64 MiB for the end of the heap. Gaps in a heap that has grown go on serving blocks that fit there.
        And torch goes on asking for huge pages.
        """
        with _lock:
            if self in _kept:
                _kept.remove(self)
                if not _kept:
                    _changes.close()

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()


_lock = Lock()
_kept: set[Memory] = set()
# How to take back what was changed for those.
_changes = ExitStack()


def keep_memory() -> Memory:
    """Keep freed memory in this process, until the result is undone: as a plain call, or as `with keep_memory():`.

    The process then stays as large as it once was. Best called before the first tensor is made, since torch decides
    about huge pages there. Calls may be nested. Threads other than the first keep blocks below 64 MiB only.

    Nothing is changed, and `reason` says why, where malloc is not glibc's (musl, macOS, a preloaded allocator) or
    ALIGNFAST_KEEP_MEMORY is 0; no more than huge pages are asked for where malloc's own variables decide the rest.

    Raises:
        ValueError: ALIGNFAST_KEEP_MEMORY is neither 0 nor 1.
    """
    wanted = check_choice(SWITCH, os.environ.get(SWITCH, "1"), ("0", "1")) == "1"
    with _lock:
        memory = replace(next(iter(_kept))) if _kept else _keep(wanted)
        _kept.add(memory)
        return memory


def memory_state() -> Memory:
    """What holds in this process at present; changes nothing, but allocates a tensor."""
    with _lock:
        return replace(next(iter(_kept))) if _kept else _as_it_is("alignfast.keep_memory() was not called")


def _keep(wanted: bool) -> Memory:
    allocator = _C.allocator()
    if not wanted:
        return _as_it_is(f"{SWITCH} is 0")
    if not allocator.startswith("glibc "):
        return _as_it_is(f"{allocator} serves malloc and is left as it is")
    if TORCH_HUGE_PAGES not in os.environ and _kernel_has_huge_pages():
        os.environ[TORCH_HUGE_PAGES] = "1"
        _changes.callback(os.environ.pop, TORCH_HUGE_PAGES, None)
    if given := _malloc_settings():
        return _as_it_is(f"the environment decides with {given}")
    # Before blocks are kept, of which one would be this.
    no_huge_pages = _why_no_huge_pages()
    _changes.callback(_C.keep_freed_memory, False)
    kept = _C.keep_freed_memory(True)
    return Memory(allocator, kept, not no_huge_pages, _joined("" if kept else "mallopt refused", no_huge_pages))


def _as_it_is(reason: str) -> Memory:
    no_huge_pages = _why_no_huge_pages()
    return Memory(_C.allocator(), _freed_block_stays(), not no_huge_pages, _joined(reason, no_huge_pages))


def _joined(*reasons: str) -> str | None:
    return "; ".join(filter(None, reasons)) or None


def _malloc_settings() -> str:
    """The first setting of malloc by the environment that stands against this module's, or nothing."""
    tunables = [one.partition("=")[0] for one in os.environ.get("GLIBC_TUNABLES", "").split(":")]
    given = [name for name in MALLOC if name in os.environ] + [name for name in TUNABLES if name in tunables]
    return given[0] if given else ""


@cache
def _freed_block_stays() -> bool:
    """Whether it does where nothing is changed: seen by writing to a block after one of its size was freed.

    More than once, since the first that are freed may miss by a few bytes what the next needs, to be aligned.
    """
    _written_block(BLOCK)
    return any(_faults_of_a_block() < FEW for _ in range(TRIES))


def _faults_of_a_block() -> int:
    before = _page_faults()
    _written_block(BLOCK)
    return _page_faults() - before


def _page_faults() -> int:
    # Of this thread, where the system tells threads apart.
    return resource.getrusage(getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)).ru_minflt


def _written_block(size: int) -> Tensor:
    """A new block with its first `size` bytes in memory."""
    block = torch.empty(BLOCK, dtype=torch.uint8, device="cpu")
    # Every page is written to, by so few bytes that torch starts no threads for them.
    block[:size:PAGE].fill_(0)
    return block


@cache
def _why_no_huge_pages() -> str:
    """Why large tensors do not lie in huge pages, or nothing; seen once, as torch decides once."""
    block = _written_block(SOME)
    mapping = _mapping(block.data_ptr() + SOME)
    if int(mapping.get("AnonHugePages", "0").split()[0]) << 10 >= SOME // 2:
        return ""
    if not _kernel_has_huge_pages():
        return "the kernel gives no huge pages"
    if "hg" in mapping.get("VmFlags", "").split():
        return "the kernel had no huge pages left"
    return f"torch did not find {TORCH_HUGE_PAGES}=1 when it first allocated"


def _kernel_has_huge_pages() -> bool:
    try:
        return "[never]" not in KERNEL_HUGE_PAGES.read_text()
    except OSError:
        return False


def _mapping(address: int) -> dict[str, str]:
    """What the kernel says about the mapping of an address by name, such as {"AnonHugePages": "2048 kB"}."""
    try:
        lines = SMAPS.read_text().splitlines()
    except OSError:
        return {}
    found: dict[str, str] = {}
    inside = False
    for line in lines:
        name, _, value = line.partition(":")
        if "-" in name:
            first, _, end = name.split()[0].partition("-")
            inside = int(first, 16) <= address < int(end, 16)
        elif inside:
            found[name] = value
    return found
