"""What the library and its objects define and need."""

import os
import re
from pathlib import Path

import torch
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection, GNUVerSymSection

from tests.native import objects

# Of C, of the compiler and of the loader: what plain loops are compiled into.
PLAIN = re.compile(r"mem(cpy|move|set|cmp)|__stack_chk_fail|_GLOBAL_OFFSET_TABLE_|__tls_get_addr")
# Working memory, and giving it back where an allocation fails.
MEMORY = re.compile(r"_Zn[aw]mSt11align_val_t|_Zd[al]Pv(m)?St11align_val_t|_Unwind_Resume|__gxx_personality_v0")
# Data that names the function above; the same in every object.
PERSONALITY = "DW.ref.__gxx_personality_v0"
# Of a sum in double precision, where it is to be rounded to float.
LOGARITHM = "log"
# Where the processor has no instruction for it; its result is that of the rounding, so that all variants give the same.
FUSED = {"fma", "fmaf"}
STABLE_ABI = re.compile(r"(aoti_torch|torch)_\w+")
RUNTIME = re.compile(r"(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+")
# Mangled names in one of torch's namespaces, as types of arguments too.
TORCH_CPLUSPLUS = re.compile(r"_Z.*(3c10|2at|5torch|5caffe2|4c10d)")


def kernel_files(build_folder):
    found = sorted(build_folder.glob("CMakeFiles/kernels_*.dir/csrc/cpu/*_kernel.cpp.o"))
    assert found
    return [(path, path.parts[-4].removeprefix("kernels_").removesuffix(".dir")) for path in found]


def is_defined(symbol):
    return symbol["st_shndx"] != "SHN_UNDEF"


def is_weak(symbol):
    """A copy that the linker may take for those of other objects."""
    return is_defined(symbol) and symbol["st_info"]["bind"] in ("STB_WEAK", "STB_LOOS")


def test_kernel_objects_define_kernels_and_nothing_that_others_could_take(build_folder):
    for path, isa in kernel_files(build_folder):
        shared = [s for s in objects.symbols(path) if is_defined(s) and s["st_info"]["bind"] != "STB_LOCAL"]
        shared = [s for s in shared if s.name != PERSONALITY]
        assert shared
        assert not [s.name for s in shared if is_weak(s)], path
        prefix = f"_ZN9alignfast{len(isa)}{isa}"
        assert not [s.name for s in shared if not s.name.startswith(prefix)], path


def test_weak_symbols_are_seen(build_folder):
    """The objects outside the kernels have some: templates of the standard library."""
    paths = build_folder.glob("CMakeFiles/alignfast_ops.dir/csrc/cpu/*.o")
    assert any(is_weak(symbol) for path in paths for symbol in objects.symbols(path))


def test_kernels_bring_their_own_arithmetic(build_folder):
    """No loop waits for libm, which besides picks a variant by the processor, whose last bit may be another."""
    for path, isa in kernel_files(build_folder):
        needed = [s.name for s in objects.symbols(path) if s.name and not is_defined(s)]
        own = f"_ZN9alignfast{len(isa)}{isa}"
        known = [name for name in needed if PLAIN.fullmatch(name) or MEMORY.fullmatch(name) or name.startswith(own)]
        foreign = [name for name in needed if name not in known]
        assert set(foreign) <= {LOGARITHM} | (FUSED if isa == "baseline" else set()), path


def test_the_library_has_the_kernels_of_every_instruction_set(library, build_folder):
    """All that was compiled is linked, under names of its own, and local symbols are kept."""
    linked = {symbol.name for symbol in objects.defined_functions(library)}
    for path, _ in kernel_files(build_folder):
        own = {s.name for s in objects.defined_functions(path) if s["st_info"]["bind"] == "STB_GLOBAL"}
        assert own <= linked
    isas = {isa for _, isa in kernel_files(build_folder)}
    assert isas == ({"baseline", "avx2", "avx512"} if os.uname().machine == "x86_64" else {"baseline"})


def undefined(path):
    """(Name, version or None, weak) of what the loader has to find."""
    with path.open("rb") as file:
        elf = ELFFile(file)
        table = elf.get_section_by_name(".dynsym")
        versions = next(s for s in elf.iter_sections() if isinstance(s, GNUVerSymSection))
        needs = next(s for s in elf.iter_sections() if isinstance(s, GNUVerNeedSection))
        for index, symbol in enumerate(table.iter_symbols()):
            if symbol.name and not is_defined(symbol):
                number = versions.get_symbol(index)["ndx"]
                version = needs.get_version(number)[1].name if isinstance(number, int) and number > 1 else None
                yield symbol.name, version, symbol["st_info"]["bind"] == "STB_WEAK"


def is_foreign(name, version, weak):
    """Neither torch's stable ABI nor the C and C++ runtimes nor an optional hook of the loader."""
    return not (STABLE_ABI.fullmatch(name) or weak or (version is not None and RUNTIME.fullmatch(version)))


def test_torch_is_used_by_its_stable_abi_alone(library):
    found = list(undefined(library))
    assert not [entry for entry in found if is_foreign(*entry)]
    assert not [name for name, _, _ in found if TORCH_CPLUSPLUS.match(name)]
    assert [name for name, _, _ in found if STABLE_ABI.fullmatch(name)]


def test_symbols_beyond_the_stable_abi_are_seen():
    """Torch's own Python library needs torch's C++ symbols."""
    found = list(undefined(Path(torch.__file__).parent / "lib" / "libtorch_python.so"))
    assert [name for name, version, weak in found if is_foreign(name, version, weak)]
    assert [name for name, _, _ in found if TORCH_CPLUSPLUS.match(name)]


def test_the_installed_torch_has_every_symbol_of_its_abi_that_is_used(library):
    with (Path(torch.__file__).parent / "lib" / "libtorch_cpu.so").open("rb") as file:
        exported = ELFFile(file).get_section_by_name(".gnu.hash")
        used = [name for name, _, _ in undefined(library) if STABLE_ABI.fullmatch(name)]
        assert not [name for name in used if exported.get_symbol(name) is None]
        assert exported.get_symbol("torch_no_such_function") is None


def test_the_library_needs_no_torch_library_but_that_of_the_abi(library):
    with library.open("rb") as file:
        tags = ELFFile(file).get_section_by_name(".dynamic").iter_tags("DT_NEEDED")
        needed = {tag.needed for tag in tags}
    assert {name.split(".so")[0] for name in needed} <= {
        *("libtorch_cpu", "libstdc++", "libm", "libgcc_s", "libc"),
        *("libpthread", "libdl", "ld-linux-x86-64", "ld-linux-aarch64"),
    }
