"""The emulation of CUDA computes what a GPU would and tells what a GPU would not survive."""

import ctypes
import os
import re
import subprocess
from itertools import product

import numpy as np
import pytest
import torch

from tests import cases
from tests.native import emulated
from tests.native.test_compilers import check_run

SOURCE = emulated.EMULATION / "kernels.cpp"
ORDERS = ["forward", "reverse", "shuffle"]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    built = tmp_path_factory.mktemp("emulation") / "kernels.so"
    check_run(emulated.COMPILER, *emulated.FLAGS, "-Werror", "-O1", "-shared", SOURCE, "-o", built)
    loaded = ctypes.CDLL(str(built))
    loaded.run.restype = ctypes.c_char_p
    return loaded


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    built = tmp_path_factory.mktemp("emulation") / "kernels"
    check_run(emulated.COMPILER, *emulated.FLAGS, *emulated.SANITIZED, SOURCE, "-o", built)
    return built


@pytest.fixture
def run(library):
    """run(kernel, grid, block, in, out, count) in forward order, unless it is given."""

    def launch(kernel, grid, block, given=None, out=None, count=0, order="forward"):
        library.set_order(ORDERS.index(order))
        sizes = [(ctypes.c_uint * 3)(*size, *[1] * (3 - len(size))) for size in (grid, block)]
        data = [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in (given, out)]
        error = library.run(kernel.encode(), *sizes, *data, count)
        assert library.alive() == 0
        if error is not None:
            raise RuntimeError(error.decode())
        return out

    yield launch
    library.set_order(0)


@pytest.mark.parametrize("order", ORDERS)
def test_sums_by_shuffles_and_shared_memory(run, order):
    values = torch.arange(5 * 256, dtype=torch.float32)
    sums = run("block_sum", (5,), (256,), values, torch.empty(5), order=order)
    assert torch.equal(sums, values.view(5, 256).sum(1))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("grid", "block"), [((2, 3, 4), (5, 3, 2)), ((7, 1, 1), (1, 1, 64)), ((1, 1, 1), (1024, 1, 1))]
)
def test_indices_in_three_dimensions(run, grid, block, order):
    found = run(
        "indices", grid, block, out=torch.empty((*grid[::-1], *block[::-1], 12), dtype=torch.int32), order=order
    )
    places = [torch.arange(size, dtype=torch.int32) for size in (*grid[::-1], *block[::-1])]
    block_z, block_y, block_x, thread_z, thread_y, thread_x = torch.meshgrid(places, indexing="ij")
    assert torch.equal(found[..., :6], torch.stack([thread_x, thread_y, thread_z, block_x, block_y, block_z], -1))
    assert torch.equal(found[..., 6:], torch.tensor([*block, *grid], dtype=torch.int32).expand(found[..., 6:].shape))


def shuffled(kind, lane, number, width):
    """The lane that a lane reads, as the CUDA C++ Programming Guide has it."""
    first, last = lane - lane % width, lane - lane % width + width - 1
    source = {
        "direct": first + number % width,
        "up": lane - number if lane - number >= first else lane,
        "down": lane + number if lane + number <= last else lane,
        # Lanes of earlier parts may be read, of later ones not.
        "xor": lane ^ number if lane ^ number <= last else lane,
    }
    return source[kind]


@pytest.mark.parametrize("number", [0, 1, 2, 5, 16, 31])
@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [("int", torch.int32), ("float", torch.float32), ("double", torch.float64), ("long", torch.int64)],
)
def test_shuffles(run, kernel, dtype, number):
    found = run(f"shuffle_{kernel}", (1,), (32,), out=torch.empty((6, 4, 32), dtype=dtype), count=number)
    for i, (j, kind) in product(range(6), enumerate(["direct", "up", "down", "xor"])):
        assert found[i, j].tolist() == [shuffled(kind, lane, number, 1 << i) - 7 for lane in range(32)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("votes", [[0] * 32, [1] * 32, [1] * 16 + [0] * 15 + [2]])
def test_votes(run, votes, order):
    given = torch.tensor(votes, dtype=torch.int32)
    found = run("votes", (1,), (32,), given, torch.empty((32, 6), dtype=torch.int32), order=order)
    block = [sum(vote != 0 for vote in votes), int(any(votes)), int(all(votes))]
    for first in (0, 16):
        half = votes[first : first + 16]
        bits = sum(1 << (first + i) for i, vote in enumerate(half) if vote)
        for lane in range(first, first + 16):
            assert found[lane].tolist() == [np.int32(np.uint32(bits)), int(any(half)), int(all(half)), *block]


@pytest.mark.parametrize("order", ORDERS)
def test_atomics(run, order):
    count = 3 * 64
    out = run("atomics", (3,), (64,), out=torch.zeros(11, dtype=torch.int64), order=order)
    numbers = count * (count - 1) // 2
    found = out.view(torch.int32)
    assert [int(found[0]), int(found[2]), int(out[2])] == [-numbers, numbers, numbers << 32]
    assert [float(out.view(torch.float32)[6]), float(out.view(torch.float64)[4])] == [count / 2, count / 4]
    assert [int(found[10]), int(found[12]), int(out[7])] == [4 - count, count - 1, (count - 1) << 40]
    assert int(out[8]) + int(out[9]) == numbers + count
    assert int(found[20]) == count


def test_every_half_is_widened(run):
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    found = run("widen_halves", (256,), (256,), bits, torch.empty((1 << 16, 2)))
    for column, dtype in enumerate([torch.float16, torch.bfloat16]):
        wanted = bits.view(dtype).float()
        same_bits = found[:, column].view(torch.int32) == wanted.view(torch.int32)
        assert bool((same_bits | (found[:, column].isnan() & wanted.isnan())).all())


def rounding_cases(dtype):
    """Every value of the type, the ones halfway to the next, and what is nearest to either in float32."""
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype).float()
    finite = values[values.isfinite()].unique()
    middles = (finite[1:].double() + finite[:-1].double()).div(2).float()
    exact = torch.cat([values, middles, torch.tensor([65519.996, 65520.0, 3.4e38, 2.0**-149, -(2.0**-25)])])
    infinity = torch.tensor(torch.inf)
    return torch.cat([exact, exact.nextafter(infinity), exact.nextafter(-infinity)])


@pytest.mark.parametrize("cases_of", cases.HALF_DTYPES)
def test_roundings_to_half(run, cases_of):
    values = torch.cat([rounding_cases(cases_of), cases.normal((50000,), 1, torch.float32)])
    blocks = -(-len(values) // 128)
    out = torch.empty((len(values), 2), dtype=torch.uint16)
    run("narrow_to_halves", (blocks,), (128,), values, out, len(values))
    for column, dtype in enumerate([torch.float16, torch.bfloat16]):
        found, wanted = out[:, column].contiguous().view(dtype), values.to(dtype)
        same_bits = found.view(torch.int16) == wanted.view(torch.int16)
        assert bool((same_bits | (found.isnan() & wanted.isnan())).all())


def test_arithmetic(run):
    found = run("arithmetic", (1,), (1,), torch.tensor([7.0]), torch.empty(8, dtype=torch.float64))
    assert found.tolist() == [-1, 2, 1, 4, 0xFFFFFFFD, 0.125, 0.75, 7]


@pytest.mark.parametrize("order", ORDERS)
def test_shared_memory_that_nobody_wrote_is_nan(run, order):
    assert bool(run("uninitialised", (3,), (32,), out=torch.zeros(96), order=order).isnan().all())


def test_shared_memory_up_to_the_limit(run):
    assert float(run("as_much_shared_as_there_is", (1,), (32,), out=torch.zeros(1))) == 2


def results(run, kernel, size):
    return [run(kernel, (3,), (64,), out=torch.zeros(size, dtype=torch.int32), order=o).tolist() for o in ORDERS]


def test_no_race_no_difference(run):
    assert results(run, "reverse", 64) == [[*range(63, -1, -1)]] * 3


@pytest.mark.parametrize(("kernel", "size"), [("racing_reverse", 64), ("racing_rounds", 64), ("racing_blocks", 1)])
def test_a_race_makes_results_depend_on_the_order(run, kernel, size):
    forward, reverse, _ = results(run, kernel, size)
    assert forward != reverse


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (
            "ended_before_barrier",
            r"thread \(0, 0, 0\): __syncthreads at kernels.cpp:\d+: thread \(40, 0, 0\) has ended",
        ),
        (
            "two_barriers",
            r"thread \(33, 0, 0\): __syncthreads at kernels.cpp:\d+: thread \(0, 0, 0\) waits in __syncthreads at k",
        ),
        ("lane_outside_its_mask", r"thread \(0, 0, 0\): __ballot_sync at .*: mask 0xfffffffe is without lane 0"),
        (
            "ended_before_shuffle",
            r"thread \(32, 0, 0\): __shfl_xor_sync at .*: lane 3 of mask 0xffffffff has ended",
        ),
        (
            "shuffle_in_two_places",
            r"thread \(0, 0, 0\): __shfl_xor_sync at .*: lane 1 of mask 0xffffffff waits in __shfl_xor_sync at .* with",
        ),
        (
            "reads_beyond_its_mask",
            r"thread \(8, 0, 0\): __shfl_down_sync at .*: reads lane 16, which is not in mask 0xf",
        ),
        ("odd_width", r"thread \(0, 0, 0\): __shfl_sync at .*: got width 12; allowed is a power of two up to 32"),
        ("too_much_shared", r"thread \(0, 0, 0\): shared memory: got 49156 bytes; allowed is up to 49152"),
    ],
)
def test_faults_are_told(run, kernel, message):
    with pytest.raises(RuntimeError, match=rf"^{kernel}: block \(0, 0, 0\), {message}"):
        run(kernel, (2,), (64,), out=torch.zeros(64))
    values = torch.ones(256)
    assert float(run("block_sum", (1,), (256,), values, torch.empty(1))) == 256


def test_a_lane_that_no_thread_has_is_missing(run):
    with pytest.raises(RuntimeError, match=r"thread \(32, 0, 0\): __shfl_down_sync at .*: lane 8 of .* does not exist"):
        run("block_sum", (1,), (40,), torch.ones(40), torch.empty(1))


@pytest.mark.parametrize(("order", "thread"), [("reverse", 63), ("forward", 0)])
def test_the_fault_found_first_depends_on_the_order(run, order, thread):
    with pytest.raises(RuntimeError, match=rf"thread \({thread}, 0, 0\): __syncthreads .* thread \(40, 0, 0\)"):
        run("ended_before_barrier", (1,), (64,), order=order)


@pytest.mark.parametrize(
    ("grid", "block", "message"),
    [
        ((0,), (1,), "got a grid of (0, 1, 1) blocks; allowed is 1 to (2147483647, 65535, 65535)"),
        ((1 << 31,), (1,), "got a grid of (2147483648, 1, 1) blocks"),
        ((1, 65536), (1,), "got a grid of (1, 65536, 1) blocks"),
        ((1, 1, 65536), (1,), "got a grid of (1, 1, 65536) blocks"),
        ((1,), (0,), "got a block of (0, 1, 1) threads; allowed is 1 to (1024, 1024, 64), in all 1024"),
        ((1,), (1025,), "got a block of (1025, 1, 1) threads"),
        ((1,), (32, 33), "got a block of (32, 33, 1) threads"),
        ((1,), (1, 1, 65), "got a block of (1, 1, 65) threads"),
    ],
)
def test_launch_limits(run, grid, block, message):
    with pytest.raises(RuntimeError, match=f"^indices: {re.escape(message)}"):
        run("indices", grid, block)


def test_an_unknown_order_is_refused(sanitized):
    environment = os.environ | {"ALIGNFAST_EMULATION_ORDER": "sideways"}
    run = subprocess.run([sanitized, "reverse", "0"], env=environment, capture_output=True, text=True, check=True)
    message = "ALIGNFAST_EMULATION_ORDER: got sideways; allowed is forward, reverse or shuffle"
    assert run.stdout.strip() == message


def report(sanitized, kernel, count, **options):
    return subprocess.run(
        [sanitized, kernel, str(count)], capture_output=True, text=True, check=False, env=os.environ | options
    )


@pytest.mark.parametrize(
    ("kernel", "count"), [("beyond_shared", 1), ("beyond_shared", -1), ("beyond_global", 1), ("beyond_global", -1)]
)
def test_accesses_beyond_an_array_are_found(sanitized, kernel, count):
    run = report(sanitized, kernel, count)
    assert run.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in run.stderr
    assert kernel in run.stderr


@pytest.mark.parametrize("kernel", ["beyond_shared", "beyond_global"])
def test_accesses_within_an_array_are_none(sanitized, kernel):
    run = report(sanitized, kernel, 0)
    assert (run.returncode, run.stdout) == (0, "done\n"), run.stderr


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kernel", ["ended_before_barrier", "two_barriers", "ended_before_shuffle", "too_much_shared"])
def test_nothing_leaks_from_a_launch_that_failed(sanitized, kernel, order):
    run = report(sanitized, kernel, 0, ALIGNFAST_EMULATION_ORDER=order, ASAN_OPTIONS="detect_leaks=1")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"{kernel}: block ")
