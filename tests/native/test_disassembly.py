"""Each instruction set's kernels use that set: wide vectors in their inner loops, and nothing of a wider set."""

import os
import re
import shutil
import subprocess

import pytest

from tests.native import objects

pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="x86-64 code is looked at")

REGISTERS = {"baseline": "xmm", "avx2": "ymm", "avx512": "zmm"}
# Registers that only AVX-512 has.
OF_AVX512 = re.compile(r"\b(zmm\d+|[xy]mm(1[6-9]|2\d|3[01])|k[0-7])\b")
FUSED = re.compile(r"vfn?m(add|sub)")


def kernel_files(build_folder, isa):
    found = sorted(build_folder.glob(f"CMakeFiles/kernels_{isa}.dir/csrc/cpu/*_kernel.cpp.o"))
    assert found
    return found


def code_of(paths):
    """(Function name, instruction) of all the files."""
    for path in paths:
        for function in objects.functions(path).values():
            for instruction in function.instructions:
                yield function.name, instruction


def entries(path):
    """Every kernel of a file, with the functions it comes to."""
    functions = objects.functions(path)
    found = {name: objects.reached(functions, name) for name, function in functions.items() if function.is_global}
    assert found
    return found


def wide_loops(path, register):
    return {
        name: sum(len(objects.vector_loops(function.instructions, register)) for function in reached)
        for name, reached in entries(path).items()
    }


@pytest.mark.parametrize("isa", REGISTERS)
def test_every_kernel_has_inner_loops_on_the_vectors_of_its_set(build_folder, isa):
    for path in kernel_files(build_folder, isa):
        loops = wide_loops(path, REGISTERS[isa])
        assert all(loops.values()), f"{path.name}: {loops}"


def test_avx512_vectorises_what_avx2_does(build_folder):
    for narrow, wide in zip(*(kernel_files(build_folder, isa) for isa in ("avx2", "avx512")), strict=True):
        before, after = wide_loops(narrow, "ymm"), wide_loops(wide, "zmm")
        assert len(before) == len(after)
        # Not exactly as many: compilers unroll the two in their own ways.
        for (name, ymm), zmm in zip(sorted(before.items()), [after[n] for n in sorted(after)], strict=True):
            assert 2 * zmm >= ymm, f"{name}: {ymm} loops on ymm, {zmm} on zmm"


def test_baseline_kernels_are_free_of_avx(build_folder):
    found = {(name, i.mnemonic) for name, i in code_of(kernel_files(build_folder, "baseline")) if is_avx(i)}
    assert not found


def test_everything_outside_the_kernels_is_free_of_avx(build_folder):
    paths = sorted(build_folder.glob("CMakeFiles/alignfast_ops.dir/**/*.o"))
    assert len(paths) > 2
    assert not {(name, i.mnemonic) for name, i in code_of(paths) if is_avx(i)}


def is_avx(instruction):
    return instruction.mnemonic.startswith("v") or instruction.on("ymm") or instruction.on("zmm")


def test_avx2_kernels_are_free_of_avx512(build_folder):
    found = {(name, i.operands) for name, i in code_of(kernel_files(build_folder, "avx2")) if is_avx512(i)}
    assert not found


def is_avx512(instruction):
    return OF_AVX512.search(instruction.operands) is not None


# What says itself where it multiplies and adds in one rounding (products.h).
PRODUCTS = ("attention_kernel", "inverted_residual_kernel", "winograd_conv2d_kernel")


@pytest.mark.parametrize("isa", REGISTERS)
def test_nothing_is_contracted_into_fused_multiply_adds(build_folder, isa):
    def fused(paths):
        return {(name, i.mnemonic) for name, i in code_of(paths) if FUSED.match(i.mnemonic)}

    files = kernel_files(build_folder, isa)
    products = [path for path in files if path.name.startswith(PRODUCTS)]
    assert len(products) == len(PRODUCTS)
    assert bool(fused(products)) == (isa != "baseline")
    assert not fused([path for path in files if path not in products])


def test_the_checks_tell_the_sets_apart(build_folder):
    """Each of them finds something in the objects of a wider set, and no loop on vectors that a set lacks."""
    assert any(is_avx(i) for _, i in code_of(kernel_files(build_folder, "avx2")))
    assert any(is_avx512(i) for _, i in code_of(kernel_files(build_folder, "avx512")))
    for isa, register in (("baseline", "ymm"), ("baseline", "zmm"), ("avx2", "zmm")):
        for path in kernel_files(build_folder, isa):
            assert not any(wide_loops(path, register).values())


# for (i = 0; i < 4; ++i) { for (j = 0; j < 9; ++j) zmm0 += zmm1; zmm2 *= zmm0; }
NESTED = bytes.fromhex(
    "31c0"  # 0: xor eax, eax
    "31c9"  # 2: xor ecx, ecx
    "62f17c4858c1"  # 4: vaddps zmm0, zmm0, zmm1
    "83c101"  # a: add ecx, 1
    "83f909"  # d: cmp ecx, 9
    "75f2"  # 10: jne 4
    "62f16c4859d0"  # 12: vmulps zmm2, zmm2, zmm0
    "83c001"  # 18: add eax, 1
    "83f804"  # 1b: cmp eax, 4
    "75e2"  # 1e: jne 2
    "c3"  # 20: ret
)


def test_the_innermost_of_nested_loops_is_found():
    instructions = objects.disassembled(NESTED)
    (loop,) = objects.innermost_loops(instructions)
    assert [i.mnemonic for i in loop] == ["vaddps", "add", "cmp", "jne"]
    assert objects.vector_loops(instructions, "zmm") == [loop]
    assert objects.vector_loops(instructions, "ymm") == []


def test_arithmetic_outside_the_innermost_loop_does_not_count():
    emptied = NESTED.replace(bytes.fromhex("62f17c4858c1"), bytes.fromhex("660f1f440000"))
    instructions = objects.disassembled(emptied)
    assert len(objects.innermost_loops(instructions)) == 1
    assert objects.vector_loops(instructions, "zmm") == []


def test_moves_are_no_arithmetic():
    # vmovups zmm0, [rdi]; vmovups [rsi], zmm0; jmp to the first.
    copy = bytes.fromhex("62f17c481007" + "62f17c481106" + "ebf2")
    assert len(objects.innermost_loops(objects.disassembled(copy))) == 1
    assert objects.vector_loops(objects.disassembled(copy), "zmm") == []


def test_unknown_bytes_are_an_error():
    with pytest.raises(ValueError, match="unknown bytes 06 at 0x1"):
        objects.disassembled(bytes.fromhex("c306"))


def test_a_loop_in_a_function_that_the_entry_calls_is_found(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ on this machine")
    source = tmp_path / "called.cpp"
    source.write_text(
        """
        __attribute__((noinline)) static void work(float* x, long n) {
          for (long i = 0; i < n; ++i) x[i] = x[i] * x[i] + 1;
        }
        void caller(float* x, long n) { work(x, n); work(x + 1, n); }
        void bystander(float* x) { *x = 0; }
        """,
        encoding="utf-8",
    )
    built = tmp_path / "called.o"
    flags = ["-O3", "-fPIC", "-mavx512f", "-mprefer-vector-width=512"]
    subprocess.run([compiler, *flags, "-c", source, "-o", built], check=True)
    loops = wide_loops(built, "zmm")
    assert {name: count > 0 for name, count in loops.items()} == {"_Z6callerPfl": True, "_Z9bystanderPf": False}
