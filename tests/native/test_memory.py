"""No op needs more memory than its outputs and a little for every thread."""

import json
import os
import sys

import pytest

from tests.native.test_compilers import ROOT, check_run, compiler_of
from tests.native.test_isa import OPS

ALLOWED = 64 * 1024
# A depthwise convolution also holds what a row of its result is summed from: rows that go in, widened, clipped and
# padded once for all rows of the result. Of these images and kernels they are three, of 58 pixels and 144 channels.
# A batch normalisation holds two sums in float64 of each channel of every stretch of 64 KiB of its images, for all
# threads together: here as many as the float32 images have, an eighteenth of them.
# An inverted residual holds the float32 sums of an image that comes out, 32 channels of 56 x 56 pixels, one that
# goes in if it has to be widened, four rows of 48 channels, and for both threads two bits for each value that
# is not stored.
# Attention holds at most, of a head of 197 tokens and 64 channels: queries, keys, values, gradients, two of them
# across, sums for two, and two blocks of 64 queries' products with all tokens.
# A convolution by minimal filtering holds, of 64 channels, 36 values for each pair of them, for both threads together,
# and for each of 16 tiles 36 of every channel that goes in and comes out.
# A basic block holds both transformed weights at a time, tiles of 16 at a time for each thread, and images between its
# convolutions: one of 56 x 56 pixels for each thread; besides the bits, two for each value, for both together.
EXTRA = {
    "winograd_conv2d": 36 * (64 * 64 + 16) * 4 // 2 + 2 * 36 * (16 * 64 + 16) * 4,
    "basic_block": 36 * (64 * 64 + 16) * 4
    + 2 * 36 * (16 * 64 + 16) * 4
    + 56 * 56 * 64 * 4
    + 16 * 56 * 56 * 64 // 4 // 2,
    "attention": (8 * 208 * 64 + 2 * 64 * 208) * 4,
    "depthwise_conv2d": 3 * 58 * 144 * 4,
    "batch_norm": -(-16 * 56 * 56 // 113) * 2 * 144 * 8 // 2,
    "inverted_residual": 56 * 56 * (32 + 24) * 4 + 4 * 58 * 48 * 4 + 2 * 16 * 56 * 56 * 144 // 8 // 2,
}


@pytest.fixture(scope="module")
def counted(build_folder, tmp_path_factory):
    """The allocator that counts, and the variables that preload it."""
    library = tmp_path_factory.mktemp("counted") / "counted_malloc.so"
    source = ROOT / "tests" / "native" / "counted_malloc.c"
    check_run(compiler_of(build_folder), "-x", "c", "-O2", "-shared", "-fPIC", source, "-o", library)
    return {**os.environ, "LD_PRELOAD": str(library)}


def test_every_op_and_pass(counted):
    peaks = json.loads(check_run(sys.executable, "-m", "tests.native.peak_memory", env=counted))
    assert {op_of(name) for name in peaks} == OPS
    assert {name: peak for name, peak in peaks.items() if peak > ALLOWED + EXTRA.get(op_of(name), 0)} == {}


def op_of(name):
    return name.split()[0]


def test_memory_that_is_needed_for_a_while_is_seen(counted):
    """A sum of two products holds one of them besides its output."""
    code = (
        "import torch; from tests.native.peak_memory import THREADS, beyond_outputs; x = torch.rand(1 << 20);"
        "print(beyond_outputs(lambda: [x * 2 + x * 3]) * THREADS)"
    )
    assert float(check_run(sys.executable, "-c", code, env=counted)) >= 4 << 20
