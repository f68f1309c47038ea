"""What compiled files hold, by pyelftools and capstone: symbols, functions, and the loops in them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import capstone
from elftools.elf.elffile import ELFFile
from elftools.elf.relocation import RelocationSection
from elftools.elf.sections import Section, Symbol

EXECUTABLE = 0x4
# Floating-point and integer arithmetic, comparisons and conversions of vectors; loads, stores and shuffles are none.
PACKED_ARITHMETIC = re.compile(
    r"v?(add|sub|mul|div|fn?m(add|sub)\w*|max|min|sqrt|cmp\w*|cvt\w+2|and|andn|or|xor)p[sd]\b"
    r"|v?p(add|sub|mul|mull|mulu|madd|sll|srl|sra|cmp|max|min|and|andn|or|xor|ternlog)\w*"
)


@dataclass(frozen=True, slots=True)
class Instruction:
    address: int
    mnemonic: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where a direct jump or call goes."""
        branches = self.mnemonic.startswith("j") or self.mnemonic == "call"
        return int(self.operands, 0) if branches and self.operands[0].isdigit() else None

    def on(self, register: str) -> bool:
        """Whether an operand is a vector register of this kind: xmm, ymm or zmm."""
        return re.search(rf"\b{register}\d", self.operands) is not None

    @property
    def packed_arithmetic(self) -> bool:
        return PACKED_ARITHMETIC.match(self.mnemonic) is not None


@dataclass
class Function:
    name: str
    is_global: bool
    instructions: list[Instruction]
    # The functions whose code or address it uses.
    uses: set[str] = field(default_factory=set)


def innermost_loops(instructions: Sequence[Instruction]) -> list[list[Instruction]]:
    """The instructions between each jump backward and its target that hold no other such stretch."""
    first = instructions[0].address
    jumps = [
        (i.target, i.address)
        for i in instructions
        if i.mnemonic != "call" and i.target is not None and first <= i.target <= i.address
    ]
    stretches = [
        (start, end)
        for start, end in jumps
        if not any((a, b) != (start, end) and start <= a and b <= end for a, b in jumps)
    ]
    return [[i for i in instructions if start <= i.address <= end] for start, end in stretches]


def vector_loops(instructions: Sequence[Instruction], register: str) -> list[list[Instruction]]:
    """The innermost loops with arithmetic on vectors of that width."""
    loops = innermost_loops(instructions) if instructions else []
    return [loop for loop in loops if any(i.packed_arithmetic and i.on(register) for i in loop)]


def disassembled(code: bytes, address: int = 0) -> list[Instruction]:
    """Every instruction of x86-64 code; ValueError where one is unknown."""
    engine = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    found, end = [], address
    for at, size, mnemonic, operands in engine.disasm_lite(code, address):
        found.append(Instruction(at, mnemonic, operands))
        end = at + size
    if end != address + len(code):
        raise ValueError(f"code: got unknown bytes {code[end - address :][:16].hex(' ')} at {end:#x}")
    return found


def symbols(path: Path, table: str = ".symtab") -> list[Symbol]:
    with path.open("rb") as file:
        section = ELFFile(file).get_section_by_name(table)
        return [] if section is None else list(section.iter_symbols())


def defined_functions(path: Path) -> list[Symbol]:
    return [s for s in symbols(path) if s["st_info"]["type"] == "STT_FUNC" and s["st_shndx"] != "SHN_UNDEF"]


@cache
def functions(path: Path) -> dict[str, Function]:
    """Those that an x86-64 object file defines, by their mangled names."""
    found: dict[str, Function] = {}
    with path.open("rb") as file:
        elf = ELFFile(file)
        table = elf.get_section_by_name(".symtab")
        for index, section in enumerate(elf.iter_sections()):
            if not section["sh_flags"] & EXECUTABLE:
                continue
            own = [s for s in table.iter_symbols() if s["st_info"]["type"] == "STT_FUNC" and s["st_shndx"] == index]
            code = section.data()
            for symbol in own:
                start, size = symbol["st_value"], symbol["st_size"]
                is_global = symbol["st_info"]["bind"] != "STB_LOCAL"
                instructions = disassembled(code[start : start + size], start)
                found[symbol.name] = Function(symbol.name, is_global, instructions)
            _add_direct_uses([found[s.name] for s in own])
        for section in elf.iter_sections():
            if isinstance(section, RelocationSection):
                _add_relocated_uses(elf, section, found)
    return found


def _holder(functions: Sequence[Function], address: int) -> Function | None:
    candidates = [f for f in functions if f.instructions and f.instructions[0].address <= address]
    return max(candidates, key=lambda f: f.instructions[0].address, default=None)


def _add_direct_uses(functions: Sequence[Function]) -> None:
    """Calls and jumps within a section, which need no relocation."""
    for function in functions:
        for i in function.instructions:
            target = None if i.target is None else _holder(functions, i.target)
            if target is not None:
                function.uses.add(target.name)


def _add_relocated_uses(elf: ELFFile, relocations: RelocationSection, found: dict[str, Function]) -> None:
    code = elf.get_section(relocations["sh_info"])
    if not code["sh_flags"] & EXECUTABLE:
        return
    table = elf.get_section(relocations["sh_link"])
    users = _functions_in(elf, code, found)
    for relocation in relocations.iter_relocations():
        user = _holder(users, relocation["r_offset"])
        symbol = table.get_symbol(relocation["r_info_sym"])
        if symbol["st_info"]["type"] == "STT_SECTION":
            section = elf.get_section(symbol["st_shndx"])
            # Relative to the instruction's end, four bytes on.
            target = _holder(_functions_in(elf, section, found), relocation["r_addend"] + 4)
        else:
            target = found.get(symbol.name)
        if user is not None and target is not None:
            user.uses.add(target.name)


def _functions_in(elf: ELFFile, section: Section, found: dict[str, Function]) -> list[Function]:
    table = elf.get_section_by_name(".symtab")
    return [
        found[s.name]
        for s in table.iter_symbols()
        if s["st_info"]["type"] == "STT_FUNC"
        and s["st_shndx"] != "SHN_UNDEF"
        and elf.get_section(s["st_shndx"]).name == section.name
    ]


def reached(functions: dict[str, Function], name: str) -> list[Function]:
    """The function and all that it uses, directly or through others."""
    names, waiting = set(), [name]
    while waiting:
        current = waiting.pop()
        if current not in names:
            names.add(current)
            waiting += functions[current].uses
    return [functions[n] for n in sorted(names)]
