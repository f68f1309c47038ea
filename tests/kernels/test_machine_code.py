"""No kernel spills, moves less than 16 bytes at a time where it could, or leaves half of a multiprocessor idle."""

import re
from dataclasses import replace

import pytest

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.compiler import ASTSource

from alignfast.kernels import aot, machine_code
from alignfast.kernels.machine_code import MachineCode

# What a Triton kernel reads and writes as a whole, by kernel and perhaps a word of its case: T is a tensor of the op's
# dtype, W one of the dtype that is computed in. All of it has to be moved 16 bytes at a time.
MOVED = {
    "linf": ("TTT", "T"),
    "linf momentum": ("TTTT", "TT"),
    "l1": ("T", ""),
    "l2_direction": ("T", ""),
    "l2_direction momentum": ("TT", "T"),
    "l2_length": ("T", ""),
    "l2_move": ("TTT", "T"),
    "l2_project": ("TT", "T"),
    "divergences": ("TTTT", ""),
    "divergences jsd": ("TTTTTT", ""),
    "gradient": ("TT", "W"),
    "backward": ("W", "T"),
    "columns": ("T", "W"),
    # What it reads, a neighbour at a time, starts anywhere.
    "rows": ("", "T"),
    "copy": ("T", "T"),
    "copy mixing": ("TT", "T"),
    # Into memory that a second kernel resizes from.
    "copy enlarge": ("T", "W"),
    # Channel by channel into memory that has the channels side by side.
    "copy channels_last": ("T", ""),
    "copy channels_last mixing": ("TT", ""),
    "adjoint normalise": ("T", "T"),
    "philox_uniform": ("", "W"),
}
# Kernels without such tensors.
NOTHING_MOVED = {
    "resize": "takes a pixel at a time from where the taps point",
    "adjoint": "takes a pixel at a time from where the taps point",
    "forward_taps": "a table of a few thousand numbers",
    "adjoint_taps": "a table of a few thousand numbers",
    "combine": "a few numbers a sample",
}
# What keeps these from half, with the reason.
LOW_OCCUPANCY = {"adjoint_taps": "double precision, over a table that takes no time"}

# How many accesses of 16 bytes the kernels of the CUDA library have at least: loads, and stores. A kernel that is told
# the dtype when it runs has those of every dtype.
PACKS = {"double": 1, "float": 2, "Half": 1, "BFloat16": 1}
CUDA_ACCESSES = {
    pattern.format(name): (loads * packs, stores * packs)
    for name, packs in PACKS.items()
    for pattern, (loads, stores) in {
        r"sign_step_l1<{}, true>": (1, 0),
        r"sign_step_linf<{}, true, false>": (3, 1),
        r"sign_step_linf<{}, true, true>": (4, 2),
        # The momentum or the gradient, and where there is a momentum the gradient too.
        r"sign_step_l2_direction<{}, true>": (3, 1),
        r"sign_step_l2_length<{}, true>": (2, 0),
        r"sign_step_l2_move<{}, true>": (4, 1),
        r"sign_step_l2_project<{}, true>": (2, 1),
    }.items()
}
CUDA_ACCESSES |= {
    # Student and teacher, and the gradient so far: float32, of as many elements as 16 bytes of logits have.
    r"kl_div_with_logits<(BFloat16|Half), \w+, 128, true>": (2 + 2, 2),
    r"kl_div_with_logits<float, \w+, 256, true>": (2 + 1, 1),
    # The same in every pass over a row.
    r"kl_div_with_logits<(BFloat16|Half), false, 512, false>": (6 + 2, 2),
    r"kl_div_with_logits<(BFloat16|Half), true, 512, false>": (8 + 2, 2),
    r"kl_div_with_logits<(float|double), false, 512, false>": (6 + 1, 1),
    r"kl_div_with_logits<(float|double), true, 512, false>": (8 + 1, 1),
    # Packs of eight: 2 of float32, 1 of each half precision, 4 of float64; and in double precision packs of two.
    r"kl_div_with_logits_backward<float>": (2, 8),
    r"kl_div_with_logits_backward<double>": (1, 1),
    r"diversify_(adjoint_)?plain<float>": (2 * 8, 8),
    r"diversify_(adjoint_)?plain<double>": (2, 1),
    # The table of columns; pixels are taken from where the taps point.
    r"diversify_resized<float>": (2, 8),
    r"diversify_resized<double>": (3, 1),
    r"diversify_adjoint_resized<float>": (4, 8),
    r"diversify_adjoint_resized<double>": (4, 1),
    r"diversify_taps<float>": (0, 2),
    r"diversify_taps<double>": (0, 3),
    r"diversify_sources<float>": (0, 2),
    r"diversify_sources<double>": (0, 4),
    r"smooth_tile<(BFloat16|Half), \d, true>": (1, 1),
    r"smooth_tile<float, \d, true>": (1, 2),
    r"philox_uniform<true>": (0, 1),
}
CUDA_NARROW = {
    r"sign_step_\w+<\w+, false(, \w+)?>": "for tensors of any strides",
    r"smooth_tile<\w+, \d, false>": "for rows that do not start at multiples of 16 bytes",
    r"philox_uniform<false>": "for rows that do not start at multiples of 16 bytes",
    r"smooth_(columns|rows)<\w+>": "for sizes of kernel that are rare, an element a thread",
    r"kl_div_with_logits_loss<\w+, \w+>": "a number a sample and witness",
}


def faults(code):
    """What is wrong with a Triton kernel."""
    found = ["spills"] if code.spills else []
    if code.occupancy < 0.5 and code.kernel not in LOW_OCCUPANCY:
        found.append(f"occupancy {code.occupancy:.0%}")
    moved = moved_by(code)
    if moved is None:
        return found if code.kernel in NOTHING_MOVED else [*found, "not listed in MOVED"]
    for kind, tensors, accesses in zip(("loads", "stores"), moved, (code.loads, code.stores), strict=True):
        needed = sum(itemsize(code, tensor) for tensor in tensors) * code.elements_per_thread
        if 16 * accesses.get(16, 0) < needed:
            found.append(f"narrow {kind}")
    return found


def moved_by(code):
    """By the longest name of which all words are said of the kernel."""
    said = {code.kernel, *code.case.split()}
    names = [name for name in MOVED if name.split()[0] == code.kernel and said.issuperset(name.split())]
    return MOVED[max(names, key=lambda name: len(name.split()))] if names else None


def itemsize(code, tensor):
    return {"T": aot.DTYPES[code.case.split()[-1]].itemsize, "W": 8 if code.case.endswith("float64") else 4}[tensor]


def cuda_faults(code):
    """What is wrong with a kernel of the CUDA library."""
    found = ["spills"] if code.spills else []
    if code.occupancy < 0.5:
        found.append(f"occupancy {code.occupancy:.0%}")
    if listed(code.kernel, CUDA_NARROW) is not None:
        return found
    needed = listed(code.kernel, CUDA_ACCESSES)
    if needed is None:
        return [*found, "not listed in CUDA_ACCESSES"]
    for kind, count, accesses in zip(("loads", "stores"), needed, (code.loads, code.stores), strict=True):
        if accesses.get(16, 0) < count:
            found.append(f"narrow {kind}")
    return found


def listed(name, table):
    return next((value for pattern, value in table.items() if re.fullmatch(pattern, name)), None)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def wrong(codes, judge):
    return {f"{code.kernel}, {code.case}, {code.arch}": judge(code) for code in codes if judge(code)}


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_triton_kernels_on_sm_90(dtype):
    codes = list(machine_code.triton_kernels(["sm_90"], [dtype]))
    assert len(codes) > 30
    assert wrong(codes, faults) == {}


@pytest.mark.slow
def test_triton_kernels_on_sm_80():
    assert wrong(machine_code.triton_kernels(["sm_80"], ["float32", "bfloat16"]), faults) == {}


@pytest.mark.slow
def test_triton_kernels_on_amd():
    codes = list(machine_code.triton_kernels(["gfx942"], ["float32"]))
    assert len(codes) > 30
    assert {code.case: code.spills for code in codes if code.spills} == {}


def test_the_cuda_library():
    path = machine_code.library()
    if path is None:
        pytest.skip("the CUDA library is not built, as there was no nvcc")
    codes = list(machine_code.read_cuda(path))
    assert {code.arch for code in codes} == {"sm_80", "sm_90"}
    assert wrong(codes, cuda_faults) == {}
    for table in (CUDA_ACCESSES, CUDA_NARROW):
        unused = [pattern for pattern in table if not any(re.fullmatch(pattern, code.kernel) for code in codes)]
        assert unused == []


LINF = MachineCode("triton", "linf", "sign_step linf float32", "sm_90", 128, 32, 0, 0, 0, {16: 6}, {16: 2}, 1.0, 8.0)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, []),
        ({"loads": {16: 4, 4: 8}}, ["narrow loads"]),
        ({"stores": {4: 8}}, ["narrow stores"]),
        ({"spills": 1, "occupancy": 0.49}, ["spills", "occupancy 49%"]),
        ({"kernel": "other"}, ["not listed in MOVED"]),
        ({"kernel": "linf", "case": "sign_step linf momentum float32"}, ["narrow loads", "narrow stores"]),
        ({"case": "sign_step linf bfloat16", "loads": {16: 3}, "stores": {16: 1}}, []),
    ],
)
def test_faults_of_triton_kernels(change, fault):
    assert faults(replace(LINF, **change)) == fault


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, []),
        ({"loads": {16: 5, 4: 4}, "stores": {4: 8}}, ["narrow loads", "narrow stores"]),
        ({"kernel": "sign_step_linf<float, false, false>", "loads": {4: 24}, "occupancy": 0.25}, ["occupancy 25%"]),
        ({"kernel": "other<float>", "spills": 2}, ["spills", "not listed in CUDA_ACCESSES"]),
    ],
)
def test_faults_of_cuda_kernels(change, fault):
    code = replace(LINF, backend="cuda", kernel="sign_step_linf<float, true, false>", case="")
    assert cuda_faults(replace(code, **change)) == fault


@triton.jit
def _narrow_kernel(x, y, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK) * 3
    tl.store(y + index, tl.load(x + index))


@triton.jit
def _greedy_kernel(x, y, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    value = tl.load(x + index)
    total = tl.sum(value)
    tl.store(y + index, value * total)


def read(kernel, block, tmp_path, **options):
    source = ASTSource(kernel, {"x": "*fp32", "y": "*fp32", "BLOCK": "constexpr"}, {"BLOCK": block})
    built = triton.compile(source, target=aot.TARGETS["sm_90"], options={"num_warps": 4, **options})
    path = tmp_path / "kernel.cubin"
    path.write_bytes(built.asm["cubin"])
    (code,) = machine_code.read_cuda(path, 128)
    return code


def test_widths_are_read(tmp_path):
    code = read(_narrow_kernel, 1024, tmp_path)
    assert (code.loads, code.stores) == ({4: 8}, {4: 8})


def test_spills_and_low_occupancy_are_read(tmp_path):
    code = read(_greedy_kernel, 2**15, tmp_path, maxnreg=168)
    assert code.spills > 0
    assert code.occupancy < 0.2


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "share"),
    [(128, 32, 0, 1.0), (128, 64, 0, 0.5), (256, 128, 0, 0.25), (32, 16, 0, 0.5), (128, 16, 100_000, 0.0625)],
)
def test_occupancy(threads, registers, shared, share):
    assert machine_code.occupancy("sm_80", threads, registers, shared) == share


def test_names_are_demangled():
    name = machine_code.demangled("_ZN9alignfast14philox_uniformILb1EEEvNS_11PhiloxDrawsE")
    assert name == "philox_uniform<true>"
    assert machine_code.demangled("_l1_kernel") == "_l1_kernel"
