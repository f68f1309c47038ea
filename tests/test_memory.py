"""Freed memory stays in the process when it is asked to, and only then; page faults tell."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest

from alignfast import _C, cli, doctor, memory
from alignfast.memory import KERNEL_HUGE_PAGES, MALLOC, SWITCH, TORCH_HUGE_PAGES, keep_memory, memory_state

OURS = (*MALLOC, "GLIBC_TUNABLES", "LD_PRELOAD", SWITCH, TORCH_HUGE_PAGES)
needs_glibc = pytest.mark.skipif(not _C.allocator().startswith("glibc "), reason="malloc is not glibc's here")
needs_huge_pages = pytest.mark.skipif(
    not memory._kernel_has_huge_pages(), reason="the kernel gives no huge pages, or does not say so"
)
# `faults` are those of filling a tensor of so many MB, after a few others: of the first blocks that are kept, some miss
# by a few bytes what the next needs, until what is cut off to align them has filled malloc's own cache.
PRELUDE = """
import json, os, resource, torch, alignfast
def faults(megabytes=64, repeats=12):
    counts = []
    for _ in range(repeats):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(megabytes * 1_000_000, dtype=torch.uint8).fill_(1)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return sorted(counts[-3:])[1]
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20
"""
# Pages of any size; in huge pages, those of a block's ends.
MANY, FEW = 100, 8


def run(program: str, **environment: str) -> Any:
    """What a process of its own prints as JSON; of what memory depends on, it has nothing but `environment`."""
    clean = {name: value for name, value in os.environ.items() if name not in OURS}
    process = subprocess.run(
        [sys.executable, "-c", PRELUDE + program],
        env=clean | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """What malloc is told in place of doing it, with a clean environment and nothing known of this process."""
    made: list[bool] = []

    def told(keep: bool) -> bool:
        made.append(keep)
        return True

    for name in OURS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_C, "keep_freed_memory", told)
    memory._why_no_huge_pages.cache_clear()
    yield made
    memory._why_no_huge_pages.cache_clear()
    assert not memory._kept


@needs_glibc
def test_kept_then_undone() -> None:
    """Importing changes nothing; kept, no page of a tensor is faulted in anew; undone, all are; and once more.

    What is undone is seen in tensors that do not fit into gaps of the heap.
    """
    found = run(
        """
asked = "THP_MEM_ALLOC_ENABLE" in os.environ
counts = [faults(repeats=3)]
kept = alignfast.keep_memory()
counts.append(faults())
kept.undo()
counts.append(faults(200, repeats=3))
with alignfast.keep_memory() as again:
    counts.append(faults())
counts.append(faults(200, repeats=3))
print(json.dumps({"counts": counts, "kept": [kept.kept, again.kept], "reason": kept.reason, "asked": asked}))
"""
    )
    imported, kept, undone, again, after = found["counts"]
    assert min(imported, undone, after) > MANY
    assert max(kept, again) < FEW
    assert found["kept"] == [True, True]
    assert found["asked"] is False
    if KERNEL_HUGE_PAGES.exists() and "[madvise]" in KERNEL_HUGE_PAGES.read_text():
        assert found["reason"] == "torch did not find THP_MEM_ALLOC_ENABLE=1 when it first allocated"


@needs_glibc
@needs_huge_pages
def test_huge_pages_in_time_and_a_small_process_afterwards() -> None:
    """In time, since no module that a command imports makes a tensor."""
    found = run(
        """
import alignfast.cli
kept = alignfast.keep_memory()
asked = os.environ.get("THP_MEM_ALLOC_ENABLE")
start, count = resident(), faults()
blocks = [torch.ones(1 << 20) for _ in range(64)]
pin = bytearray(1 << 17)
del blocks
sizes = [resident() - start]
kept.undo()
sizes.append(resident() - start)
left = "THP_MEM_ALLOC_ENABLE" in os.environ
print(json.dumps({"huge": kept.huge_pages, "reason": kept.reason, "asked": asked, "left": left,
                  "count": count, "sizes": sizes}))
"""
    )
    # A machine under load may have none to give.
    assert found["huge"] or found["reason"] == "the kernel had no huge pages left"
    assert (found["asked"], found["left"]) == ("1", False)
    assert found["count"] < FEW
    large, small = found["sizes"]
    assert large > 200
    assert small < 50


@needs_glibc
def test_what_the_user_set_for_malloc_stays() -> None:
    program = """
kept = alignfast.keep_memory()
counts = [faults()]
kept.undo()
print(json.dumps({"counts": counts + [faults()], "kept": kept.kept, "reason": kept.reason}))
"""
    found = run(program, MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_="17179869184")
    assert max(found["counts"]) < FEW
    assert found["kept"] is True
    assert "the environment decides with MALLOC_MMAP_MAX_" in found["reason"]


@pytest.mark.parametrize(("later", "stays"), [(0, True), (16384, False)])
def test_the_first_blocks_do_not_decide_whether_freed_ones_stay(
    later: int, stays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = chain([16384, 512], repeat(later))
    monkeypatch.setattr(memory, "_faults_of_a_block", lambda: next(counts))
    assert memory._freed_block_stays.__wrapped__() is stays


@needs_glibc
@pytest.mark.parametrize(
    ("name", "value", "setting"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "131072", "MALLOC_TRIM_THRESHOLD_"),
        ("GLIBC_TUNABLES", "glibc.malloc.mmap_max=3", "glibc.malloc.mmap_max"),
        ("GLIBC_TUNABLES", "glibc.malloc.check=0:glibc.malloc.mmap_threshold=9", "glibc.malloc.mmap_threshold"),
    ],
)
def test_settings_of_malloc_that_decide(
    name: str, value: str, setting: str, calls: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with keep_memory() as kept:
        assert f"the environment decides with {setting}" in str(kept.reason)
    assert calls == []


@needs_glibc
def test_other_tunables_decide_nothing(calls: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.tcache_count=7")
    with keep_memory():
        assert calls == [True]


@needs_glibc
def test_another_allocator_is_left_as_it_is(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or pytest.skip("there is no C compiler here")
    library = tmp_path / "libother.so"
    source = Path(__file__).parent / "native" / "counted_malloc.c"
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", source, "-o", library], check=True)
    program = """
kept = alignfast.keep_memory()
print(json.dumps([kept.allocator, kept.kept, kept.reason, faults(), "THP_MEM_ALLOC_ENABLE" in os.environ]))
"""
    allocator, kept, reason, count, asked = run(program, LD_PRELOAD=str(library))
    assert allocator == "libother.so"
    assert "libother.so serves malloc and is left as it is" in reason
    # Here glibc's own in disguise, whose settings would show if they were changed.
    assert kept is False
    assert count > MANY
    assert asked is False


@needs_glibc
@pytest.mark.parametrize(("switch", "told"), [(None, [True, False]), ("1", [True, False]), ("0", [])])
def test_command_line_keeps_memory_unless_told_not_to(
    switch: str | None,
    told: list[bool],
    calls: list[bool],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(doctor, "self_test", dict)
    if switch is not None:
        monkeypatch.setenv(SWITCH, switch)
    assert cli.run(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["memory"]
    assert set(report) == {"allocator", "kept", "huge_pages", "reason"}
    assert report["allocator"] == os.confstr("CS_GNU_LIBC_VERSION")
    assert calls == told
    assert (f"{SWITCH} is 0" in str(report["reason"])) is (told == [])


def test_switch_that_is_neither(
    calls: list[bool], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(SWITCH, "off")
    with pytest.raises(ValueError, match=f"{SWITCH}: got 'off'; allowed is one of 0, 1"):
        keep_memory()
    assert cli.run(["doctor"]) == 2
    assert capsys.readouterr().err == f"alignfast: {SWITCH}: got 'off'; allowed is one of 0, 1\n"


@needs_glibc
def test_memory_is_kept_until_the_last_call_is_undone(calls: list[bool]) -> None:
    first = keep_memory()
    with keep_memory() as second:
        assert (second.allocator, second.kept) == (first.allocator, first.kept)
        first.undo()
        first.undo()
        assert memory_state().kept is True
        assert calls == [True]
    assert calls == [True, False]
    second.undo()
    assert calls == [True, False]


@needs_glibc
def test_memory_is_undone_after_an_error(calls: list[bool]) -> None:
    with pytest.raises(KeyError), keep_memory():
        raise KeyError
    assert calls == [True, False]


def test_state_without_a_call_says_so(calls: list[bool]) -> None:
    assert "alignfast.keep_memory() was not called" in str(memory_state().reason)


@needs_glibc
def test_refusal_is_reported(calls: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_C, "keep_freed_memory", lambda keep: False)
    with keep_memory() as kept:
        assert kept.kept is False
        assert "mallopt refused" in str(kept.reason)


@needs_glibc
@pytest.mark.parametrize("setting", [None, "always madvise [never]\n"])
def test_kernel_without_huge_pages(
    setting: str | None, calls: list[bool], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "enabled"
    if setting is not None:
        path.write_text(setting)
    monkeypatch.setattr(memory, "KERNEL_HUGE_PAGES", path)
    monkeypatch.setattr(memory, "SMAPS", tmp_path / "smaps")
    with keep_memory() as kept:
        assert TORCH_HUGE_PAGES not in os.environ
    assert kept.huge_pages is False
    assert kept.reason == "the kernel gives no huge pages"


@needs_glibc
@needs_huge_pages
@pytest.mark.parametrize(
    ("flags", "huge", "reason"),
    [
        ("rd wr hg", "65536 kB", None),
        ("rd wr hg", "0 kB", "the kernel had no huge pages left"),
        ("rd wr", "0 kB", "torch did not find THP_MEM_ALLOC_ENABLE=1 when it first allocated"),
    ],
)
def test_huge_pages_are_read_from_the_mapping_of_a_tensor(
    flags: str, huge: str, reason: str | None, calls: list[bool], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Between two mappings that say the opposite."""
    other = "AnonHugePages: {} kB\nVmFlags: {}\n".format(*((0, "rd") if huge != "0 kB" else (99999, "hg")))
    block = memory._written_block(memory.SOME)
    start, end = block.data_ptr() & ~4095, block.data_ptr() + memory.BLOCK
    smaps = tmp_path / "smaps"
    smaps.write_text(
        f"1000-{start:x} rw-p 00000000 00:00 0 [heap]\n{other}"
        f"{start:x}-{end:x} rw-p 00000000 00:00 0 \nAnonHugePages: {huge}\nVmFlags: {flags} \n"
        f"{end:x}-{end + 4096:x} rw-p 00000000 fd:00 12 /usr/lib/a:b-c.so\n{other}"
    )
    monkeypatch.setattr(memory, "SMAPS", smaps)
    monkeypatch.setattr(memory, "_written_block", lambda size: block)
    with keep_memory() as kept:
        assert kept.reason == reason
        assert kept.huge_pages is (reason is None)
