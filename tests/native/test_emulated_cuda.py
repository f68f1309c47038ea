"""The CUDA kernels, run by the emulation, pass the tests of the ops and do not depend on the order of threads.

tests/native/sanitize.py runs them under the sanitizers.
"""

import functools
import json
import os
import re
import subprocess
import sys

import pytest

from tests.native import emulated
from tests.native.test_emulation import ORDERS
from tests.native.test_isa import CHOICES, EVERY_OP, GPU_OPS, OPS, PATIENT, ROOT, differences, results

PYTEST = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.native.emulated_plugin"]


@pytest.fixture(scope="module")
def library():
    return emulated.op_library()


def run_python(library, *arguments, order="forward"):
    environment = os.environ | PATIENT | {"PYTHONPATH": str(ROOT), "ALIGNFAST_EMULATED": str(library)}
    environment["ALIGNFAST_EMULATION_ORDER"] = order
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_every_op_that_is_not_for_the_cpu_alone_has_kernels():
    assert {source.stem for source in emulated.sources()} == GPU_OPS


# Under the sanitizers, where `make test` runs a choice of them, they find the same and more.
@pytest.mark.slow
@pytest.mark.parametrize("choice", CHOICES)
def test_the_op_tests_pass(library, choice):
    run = run_python(library, *PYTEST, *choice, "-m", "not slow and not cpu_only", "tests/ops")
    assert run.returncode == 0, (run.stdout + run.stderr)[-8000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 100


@functools.cache
def emulated_results(library, order):
    run = run_python(library, EVERY_OP, order=order)
    assert run.returncode == 0, run.stderr[-8000:]
    return json.loads(run.stdout)


# A shuffle finds what an order does not; so the other one is for those who look for a race.
@pytest.mark.parametrize(
    "order", [ORDERS[-1], *(pytest.param(order, marks=pytest.mark.slow) for order in ORDERS[1:-1])]
)
def test_the_order_of_threads_changes_no_bit(library, order):
    wanted = emulated_results(library, ORDERS[0])
    assert set(wanted) == OPS
    assert all(len(hashes) >= 10 for hashes in wanted.values())
    assert differences(emulated_results(library, order), wanted) == []


def test_draws_have_the_bits_of_the_cpu(library):
    assert emulated_results(library, ORDERS[0])["philox_uniform"] == results()["philox_uniform"]


def test_kernels_that_fail_to_load_fail_the_run(library, tmp_path):
    run = run_python(tmp_path / "missing.so", *PYTEST, "tests/ops/test_philox_uniform.py")
    assert run.returncode != 0
    assert "missing.so" in run.stdout + run.stderr


def test_a_failed_launch_names_the_kernel_the_grid_and_the_sizes(library):
    """An order that the emulation does not know is refused at the launch."""
    run = run_python(library, EVERY_OP, order="sideways")
    assert run.returncode != 0
    message = r"RuntimeError: \w+: launch of \d+ blocks of \d+ threads for a tensor of \[\d[\d, ]*\] failed: "
    assert re.search(message + "ALIGNFAST_EMULATION_ORDER: got sideways", run.stderr)


def test_a_library_of_other_kernels_is_refused(library):
    """Else the tests of the ops would pass without any kernel of csrc/cuda."""
    run = run_python(ROOT / "alignfast" / "libalignfast_ops.so", *PYTEST, "tests/ops/test_philox_uniform.py")
    assert run.returncode != 0
    assert "allowed is a kernel of csrc/cuda" in run.stdout + run.stderr
