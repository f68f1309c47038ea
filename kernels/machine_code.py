"""Reads what kernels were compiled to: registers, spills, shared memory, barriers, widths of accesses, occupancy.

    python -m alignfast.kernels.machine_code [--json FILE] [--arch sm_90] [--dtype float32]

prints tables of the Triton kernels and of the CUDA library, where it is built. Nothing here needs a GPU, and no time is
measured: `roofline` is how long the least traffic of a launch takes at the memory's full bandwidth.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.compiler import CompiledKernel

from alignfast import native
from alignfast.kernels import aot
from alignfast.kernels.aot import Variant

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Chip:
    """What a multiprocessor has, and what the memory of the card delivers."""

    card: str
    bytes_per_second: float
    shared_bytes: int
    registers: int = 65536
    warps: int = 64
    blocks: int = 32


CHIPS = {
    "sm_80": Chip("A100", 2039e9, 167936),
    "sm_90": Chip("H100", 3352e9, 233472),
}
WARP = 32
# Registers are handed out to a warp, and shared memory to a block, in pieces.
REGISTERS_PIECE, SHARED_PIECE, SHARED_RESERVED = 256, 128, 1024


@dataclass(frozen=True)
class MachineCode:
    """One kernel for one architecture. Widths are of global accesses in bytes, with how many instructions have them."""

    backend: str
    kernel: str
    case: str
    arch: str
    threads: int
    registers: int
    spills: int
    shared_bytes: int
    barriers: int
    loads: dict[int, int]
    stores: dict[int, int]
    occupancy: float
    # Of a tensor that a Triton kernel reads or writes as a whole.
    elements_per_thread: float | None = None
    bytes_per_element: float | None = None
    roofline_us: float | None = None


def occupancy(arch: str, threads: int, registers: int, shared_bytes: int) -> float:
    """The share of a multiprocessor's warps that are in flight when blocks of this kernel fill it."""
    chip = CHIPS[arch]
    warps = -(-threads // WARP)
    per_warp = -(-registers * WARP // REGISTERS_PIECE) * REGISTERS_PIECE
    by_registers = chip.registers // per_warp // warps if registers else chip.blocks
    block_bytes = -(-shared_bytes // SHARED_PIECE) * SHARED_PIECE + SHARED_RESERVED
    resident = min(chip.blocks, chip.warps // warps, by_registers, chip.shared_bytes // block_bytes)
    return resident * warps / chip.warps


@dataclass(frozen=True)
class Instructions:
    """What of a function's instructions is looked at."""

    loads: dict[int, int]
    stores: dict[int, int]
    spills: int
    barriers: int


# Without a width an access has 4 bytes.
_ACCESS = re.compile(r"\b(LDG|STG)\.([A-Z0-9_.]+)")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
_SPILL = re.compile(r"\b(LDL|STL)\b")
_BARRIER = re.compile(r"\bBAR\.(SYNC|RED|ARV)")


def instructions_of(sass: str) -> Instructions:
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    for kind, suffixes in _ACCESS.findall(sass):
        width = next((_WIDTHS[part] for part in suffixes.split(".") if part in _WIDTHS), 4)
        (loads if kind == "LDG" else stores)[width] += 1
    return Instructions(dict(loads), dict(stores), len(_SPILL.findall(sass)), len(_BARRIER.findall(sass)))


_FUNCTION = re.compile(r"Function\s*:?\s*(\S+?):?\s*$", re.MULTILINE)
_ARCH = re.compile(r"^arch = (sm_\d+)", re.MULTILINE)


def read_cuda(path: Path, threads: int | None = None) -> Iterator[MachineCode]:
    """The kernels of a cubin or of a library, for every architecture in it.

    threads: of a block; where it is None the kernels have to say themselves (__launch_bounds__).

    Raises:
        ValueError: the tools found no kernel in the file, or one that does not say how large its blocks are.
    """
    resources = _resources(_tool("cuobjdump", "--dump-resource-usage", path))
    bounds = _launch_bounds(_tool("cuobjdump", "--dump-elf", path)) if threads is None else {}
    found = 0
    for arch, name, sass in _functions(_tool("cuobjdump", "--dump-sass", path)):
        if arch not in CHIPS:
            continue
        usage = resources[arch, name]
        block = threads if threads is not None else bounds.get((arch, name))
        if block is None:
            raise ValueError(f"path: {path} has {name} without launch bounds; allowed is a kernel that has them")
        code = instructions_of(sass)
        shared = usage["SHARED"]
        if arch == "sm_90" and shared:
            # Counted here and not for the older architecture; occupancy() adds it to both.
            shared -= SHARED_RESERVED
        yield MachineCode(
            backend="cuda",
            kernel=demangled(name),
            case="",
            arch=arch,
            threads=block,
            registers=usage["REG"],
            spills=code.spills,
            shared_bytes=shared,
            barriers=code.barriers,
            loads=code.loads,
            stores=code.stores,
            occupancy=occupancy(arch, block, usage["REG"], shared),
        )
        found += 1
    if not found:
        raise ValueError(f"path: {path} has no kernel for {', '.join(CHIPS)}; allowed is a cubin or a library of them")


def _tool(name: str, *arguments: str | Path) -> str:
    # cuobjdump finds nvdisasm by the search path.
    environment = os.environ | {"PATH": f"{TOOLS}{os.pathsep}{os.environ.get('PATH', '')}"}
    command = [TOOLS / name, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def _by_arch(text: str) -> Iterator[tuple[str, str]]:
    """What the tool says of each architecture's part of a file."""
    marks = list(_ARCH.finditer(text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    for mark, end in zip(marks, ends[: len(marks)], strict=True):
        yield mark[1], text[mark.end() : end]


def _functions(text: str) -> Iterator[tuple[str, str, str]]:
    """Architecture, name and instructions of every function that was disassembled."""
    marks = [(m.start(), m[1]) for m in re.finditer(r"^\s*code for (sm_\d+)", text, re.MULTILINE)]
    functions = [(m.start(), m.end(), m[1]) for m in _FUNCTION.finditer(text)]
    ends = [start for start, _, _ in functions[1:]] + [len(text)]
    for (start, begin, name), end in zip(functions, ends[: len(functions)], strict=True):
        arch = max(((at, arch) for at, arch in marks if at < start), default=(0, ""))[1]
        yield arch, name, text[begin:end]


def _resources(text: str) -> dict[tuple[str, str], dict[str, int]]:
    parts = list(_by_arch(text)) or [("", text)]
    found = {}
    for arch, part in parts:
        for name, usage in re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", part):
            found[arch, name] = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", usage)}
    return _AnyArch(found)


class _AnyArch(dict[tuple[str, str], dict[str, int]]):
    """Of a bare cubin the tool does not name the architecture, as there is one."""

    def __missing__(self, key: tuple[str, str]) -> dict[str, int]:
        return self["", key[1]] if key[0] else dict.__missing__(self, key)  # type: ignore[attr-defined,no-any-return]


def _launch_bounds(text: str) -> dict[tuple[str, str], int]:
    found = {}
    for arch, part in _by_arch(text):
        for section in re.split(r"^\.nv\.info\.", part, flags=re.MULTILINE)[1:]:
            bounds = re.search(r"EIATTR_MAX_THREADS.*?Value:\s*0x(\w+) 0x(\w+) 0x(\w+)", section, re.DOTALL)
            if bounds:
                x, y, z = (int(value, 16) for value in bounds.groups())
                found[arch, section.split()[0]] = x * y * z
    return found


def demangled(name: str) -> str:
    """A C++ name as it is written, without the parameters of the function; other names as they are."""
    runtime = ctypes.CDLL("libstdc++.so.6")
    runtime.__cxa_demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    text = runtime.__cxa_demangle(name.encode(), None, None, ctypes.byref(status))
    if status.value != 0 or not text:
        return name
    try:
        written = ctypes.string_at(text).decode()
    finally:
        ctypes.CDLL(None).free(ctypes.c_void_p(text))
    return re.sub(r"^void |\(.*|alignfast::", "", written.replace("(bool)", "").replace("(int)", ""))


def read_amdgcn(assembly: str) -> Instructions:
    widths = {"ubyte": 1, "sbyte": 1, "ushort": 2, "sshort": 2, "short": 2, "byte": 1}
    widths |= {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
    kinds = re.findall(r"\b(?:global|buffer)_(load|store)_(\w+)", assembly)
    found = {
        kind: Counter(widths[size.removesuffix("_d16_hi").removesuffix("_d16")] for k, size in kinds if k == kind)
        for kind in ("load", "store")
    }
    # Scalar registers spill to lanes of vector registers, and only these to memory.
    spills = sum(int(count) for count in re.findall(r"\.vgpr_spill_count:\s*(\d+)", assembly))
    return Instructions(dict(found["load"]), dict(found["store"]), spills, len(re.findall(r"\bs_barrier\b", assembly)))


def triton_kernels(archs: list[str], dtypes: list[str]) -> Iterator[MachineCode]:
    """Every Triton kernel, compiled for these architectures, kernels of equal code once."""
    variants = list(aot.variants({name: aot.DTYPES[name] for name in dtypes}))
    for arch in archs:
        seen: set[str] = set()
        for variant in variants:
            kernel = aot.compiled(variant.launch, aot.TARGETS[arch])
            if kernel.hash in seen:
                continue
            seen.add(kernel.hash)
            yield read_triton(kernel, arch, variant)


def read_triton(kernel: CompiledKernel, arch: str, variant: Variant) -> MachineCode:
    per_element = variant.bytes / variant.elements
    if "amdgcn" in kernel.asm:
        return _read_hip(kernel, arch, variant, per_element)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        (code,) = read_cuda(path, kernel.metadata.num_warps * WARP)
    measures = {
        "elements_per_thread": variant.block / code.threads,
        "bytes_per_element": per_element,
        "roofline_us": 1e6 * variant.bytes / CHIPS[arch].bytes_per_second,
    }
    shared = max(code.shared_bytes, kernel.metadata.shared)
    full = occupancy(arch, code.threads, code.registers, shared)
    named = {"backend": "triton", "kernel": variant.kernel, "case": variant.case}
    return MachineCode(**{**asdict(code), **named, **measures, "shared_bytes": shared, "occupancy": full})


def _read_hip(kernel: CompiledKernel, arch: str, variant: Variant, per_element: float) -> MachineCode:
    assembly = kernel.asm["amdgcn"]
    code = read_amdgcn(assembly)

    def said(pattern: str) -> int:
        found = re.search(pattern, assembly)
        if found is None:
            raise ValueError(f"assembly: {variant.kernel} does not say {pattern}; allowed is what Triton's LLVM writes")
        return int(found[1])

    return MachineCode(
        backend="triton",
        kernel=variant.kernel,
        case=variant.case,
        arch=arch,
        threads=kernel.metadata.num_warps * 64,
        registers=said(r"\.vgpr_count:\s*(\d+)"),
        spills=code.spills,
        shared_bytes=said(r"\.group_segment_fixed_size:\s*(\d+)"),
        barriers=code.barriers,
        loads=code.loads,
        stores=code.stores,
        # Of eight wavefronts a SIMD unit.
        occupancy=said(r"; Occupancy: (\d+)") / 8,
        elements_per_thread=variant.block / (kernel.metadata.num_warps * 64),
        bytes_per_element=per_element,
    )


def library() -> Path | None:
    """The CUDA library of the package, where it is built, which it is where there was an nvcc."""
    return native.CUDA_PATH if native.CUDA_PATH.exists() else None


COLUMNS = ["backend", "kernel", "case", "arch", "threads", "registers", "spills", "shared", "barriers"]
COLUMNS += ["loads", "stores", "occupancy", "bytes/element", "roofline"]


def table(codes: list[MachineCode]) -> str:
    """In Markdown; an access of 16 bytes that a kernel has three times is `3x16`."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for code in codes:
        cells = [code.backend, f"`{code.kernel}`", code.case, code.arch, code.threads, code.registers, code.spills]
        cells += [code.shared_bytes, code.barriers, _widths(code.loads), _widths(code.stores), f"{code.occupancy:.0%}"]
        cells.append("" if code.bytes_per_element is None else f"{code.bytes_per_element:.1f}")
        cells.append("" if code.roofline_us is None else f"{code.roofline_us:.1f} us ({CHIPS[code.arch].card})")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _widths(accesses: dict[int, int]) -> str:
    return " ".join(f"{count}x{width}" for width, count in sorted(accesses.items(), reverse=True))


def main() -> None:
    parser = argparse.ArgumentParser(description="What the kernels were compiled to.")
    parser.add_argument("--json", type=Path, help="also write everything there")
    parser.add_argument("--arch", nargs="+", default=["sm_80", "sm_90", "gfx942"], choices=["sm_80", "sm_90", "gfx942"])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    arguments = parser.parse_args()
    codes = list(triton_kernels(arguments.arch, arguments.dtype))
    path = library()
    if path is None:
        print(f"{native.CUDA_PATH.name} is not built, so the kernels in CUDA C++ are left out.\n")
    else:
        codes += [code for code in read_cuda(path) if code.arch in arguments.arch]
    print(table(codes))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(code) for code in codes], indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
