"""No op needs more memory than its outputs and a little for every thread."""

import json
import os
import sys

import pytest

from tests.native.test_compilers import ROOT, check_run, compiler_of

ALLOWED = 64 * 1024


@pytest.fixture(scope="module")
def counted(build_folder, tmp_path_factory):
    """The allocator that counts, and the variables that preload it."""
    library = tmp_path_factory.mktemp("counted") / "counted_malloc.so"
    source = ROOT / "tests" / "native" / "counted_malloc.c"
    check_run(compiler_of(build_folder), "-x", "c", "-O2", "-shared", "-fPIC", source, "-o", library)
    return {**os.environ, "LD_PRELOAD": str(library)}


def test_every_op_and_pass(counted):
    peaks = json.loads(check_run(sys.executable, "-m", "tests.native.peak_memory", env=counted))
    ops = {"kl_div_with_logits", "diversify", "sign_step", "smooth", "philox_uniform"}
    assert {name.split()[0] for name in peaks} == ops
    assert {name: peak for name, peak in peaks.items() if peak > ALLOWED} == {}


def test_memory_that_is_needed_for_a_while_is_seen(counted):
    """A sum of two products holds one of them besides its output."""
    code = (
        "import torch; from tests.native.peak_memory import THREADS, beyond_outputs; x = torch.rand(1 << 20);"
        "print(beyond_outputs(lambda: [x * 2 + x * 3]) * THREADS)"
    )
    assert float(check_run(sys.executable, "-c", code, env=counted)) >= 4 << 20
