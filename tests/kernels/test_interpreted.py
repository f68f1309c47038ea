"""The tests of the ops, on the Triton kernels in Triton's interpreter."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path.relative_to(ROOT) for path in (ROOT / "tests" / "ops").glob("test_*.py"))
# Of this op are half of all launches.
LONGEST = "test_diversify.py"


def start(*arguments):
    """A run of pytest on one thread, as no kernel uses more."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.kernels.interpreted_plugin", "-p", "no:cacheprovider"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    return subprocess.Popen(
        [*command, "-m", "not slow and not cpu_only", *map(str, arguments)],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_all(*arguments):
    """In two processes side by side; what they print."""
    halves = [[path for path in FILES if (path.name == LONGEST) is longest] for longest in (True, False)]
    assert all(halves)
    running = [start(*half, *arguments) for half in halves]
    outputs = [process.communicate()[0] for process in running]
    for process, output in zip(running, outputs, strict=True):
        assert process.returncode == 0, output[-5000:]
    return outputs


def counts(outputs, pattern):
    return [int(number) for output in outputs for number in re.findall(pattern, output)]


def test_some_tests_of_every_kind_pass():
    outputs = run_all()
    print(*re.findall("interpreted: .*", "".join(outputs)), sep="\n")
    chosen = counts(outputs, r"interpreted: (\d+) of")
    assert counts(outputs, r"(\d+) passed") == chosen
    assert sum(chosen) > 300


@pytest.mark.slow
def test_every_test_passes():
    run_all("--every-test")


def test_a_run_that_collects_nothing_fails():
    process = start("tests/ops/test_smooth.py", "-k", "no_such_test")
    process.communicate()
    assert process.returncode != 0
