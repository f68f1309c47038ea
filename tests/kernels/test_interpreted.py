"""The tests of the ops, on the Triton kernels in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
OPS = sorted(path.stem.removeprefix("test_") for path in (ROOT / "tests" / "ops").glob("test_*.py"))


def run(*arguments):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.kernels.interpreted_plugin", "-p", "no:cacheprovider"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("op", OPS)
def test_the_tests_of_the_op_pass(op):
    done = run(f"tests/ops/test_{op}.py")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_a_run_that_collects_nothing_fails():
    assert run("tests/ops/test_smooth.py", "-k", "no_such_test").returncode != 0
