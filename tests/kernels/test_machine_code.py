"""No kernel spills, reads narrowly where it could read widely, or leaves half of a multiprocessor idle."""

import pytest

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.compiler import ASTSource

from alignfast.kernels import aot, machine_code

# Kernels whose loads are narrow, or whose registers are many, with the reason.
GATHERS = {
    "resize": "takes pixels from where the taps point",
    "adjoint": "takes pixels from where the taps point",
    "forward_taps": "a table of a few thousand numbers",
    "adjoint_taps": "a table of a few thousand numbers",
    "rows": "along a row, neighbours of 16 bytes start anywhere (smooth)",
    "philox_uniform": "reads two indices a program",
}
# Widths that single numbers have beside the tensors: partial sums and indices, and means, deviations or factors.
NUMBERS = {4, 8}


def faults(code):
    """What is wrong with a kernel."""
    found = []
    if code.spills:
        found.append("spills")
    if code.kernel not in GATHERS and code.loads and code.widest_load < 16:
        found.append("no load of 16 bytes")
    if code.kernel not in GATHERS and set(code.loads) - NUMBERS - {16}:
        found.append("narrow loads")
    if code.occupancy < 0.5 and code.kernel not in LOW_OCCUPANCY:
        found.append(f"occupancy {code.occupancy:.0%}")
    return found


# What keeps these from half, with the reason.
LOW_OCCUPANCY = {"adjoint_taps": "double precision, over a table that takes no time"}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def test_triton_kernels_on_sm_90():
    codes = list(machine_code.triton_kernels(["sm_90"], ["float32"]))
    assert len(codes) > 30
    assert {f"{code.kernel}, {code.case}": faults(code) for code in codes if faults(code)} == {}


def test_the_cuda_library():
    path = machine_code.library()
    if path is None:
        pytest.skip("the CUDA library is not built")
    codes = list(machine_code.read_cuda(path))
    assert {code.arch for code in codes} == {"sm_80", "sm_90"}
    wrong = {f"{code.kernel}, {code.arch}": (code.spills, code.occupancy) for code in codes}
    assert {name: found for name, found in wrong.items() if found[0] or found[1] < 0.5} == {}


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


def test_narrow_loads_are_seen(tmp_path):
    code = read(_narrow_kernel, 1024, tmp_path)
    assert code.loads == {4: 8}
    assert faults(code) == ["no load of 16 bytes"]


def test_spills_and_low_occupancy_are_seen(tmp_path):
    code = read(_greedy_kernel, 2**15, tmp_path, maxnreg=168)
    assert code.spills > 0
    assert {"spills", "occupancy 19%"} <= set(faults(code))


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
