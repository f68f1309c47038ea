"""Every instruction set that this processor has serves the ops when it is forced, with the same bits."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from alignfast import _C

ROOT = Path(__file__).resolve().parents[2]
FORCED = "ALIGNFAST_CPU_ISA"
USABLE = _C.usable_cpu_isas()
EVERY_OP = "tests/native/every_op.py"
# Threads that wait in a loop slow each other down many times over where other work shares the processor.
PATIENT = {"OMP_WAIT_POLICY": "passive"}
# Those that GPUs have kernels of too, and all.
GPU_OPS = {"kl_div_with_logits", "diversify", "sign_step", "smooth", "philox_uniform"}
OPS = GPU_OPS | {"depthwise_conv2d", "inverted_residual", "winograd_conv2d", "basic_block", "attention", "batch_norm"}


def run_python(*arguments, isa=None):
    environment = {name: value for name, value in os.environ.items() if name != FORCED}
    environment |= {"PYTHONPATH": str(ROOT), **PATIENT}
    if isa is not None:
        environment[FORCED] = isa
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@functools.cache
def results(isa=None, *, threads=None):
    run = run_python(EVERY_OP, *([] if threads is None else [str(threads)]), isa=isa)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def by_default():
    found = results()
    assert set(found) == OPS
    assert all(len(hashes) >= 10 for hashes in found.values())
    return found


def differences(found, wanted):
    assert {op: set(hashes) for op, hashes in found.items()} == {op: set(hashes) for op, hashes in wanted.items()}
    return [(op, case) for op in wanted for case in wanted[op] if found[op][case] != wanted[op][case]]


@pytest.mark.parametrize("isa", USABLE)
def test_results_are_the_same_bits_on_every_instruction_set(isa, by_default):
    assert differences(results(isa), by_default) == []


def test_results_are_the_same_bits_on_one_thread(by_default):
    assert differences(results(threads=1), by_default) == []


# Few combinations of parameters, with every value of each, or all of them.
CHOICES = [
    pytest.param(["-p", "tests.covering"], id="covering"),
    pytest.param([], id="all", marks=pytest.mark.slow),
]


# The widest set is what the tests of the ops use by themselves.
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("isa", USABLE[:-1])
def test_the_op_tests_pass_on_the_narrower_instruction_sets(isa, choice):
    run = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", *choice, "tests/ops", isa=isa)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


def serving(isa):
    # The module by itself, since the package takes seconds to import.
    program = f"import sys; sys.path.append({str(ROOT / 'alignfast')!r}); import _C; print(_C.cpu_isa())"
    return run_python("-c", program, isa=isa).stdout.strip()


@pytest.mark.parametrize("isa", USABLE)
def test_the_forced_instruction_set_serves(isa):
    assert serving(isa) == isa


@pytest.mark.parametrize("isa", [None, ""])
def test_the_widest_usable_instruction_set_serves_by_default(isa):
    assert serving(isa) == USABLE[-1]


@pytest.mark.parametrize("isa", ["avx1024", "AVX2"])
def test_an_unknown_instruction_set_is_an_import_error_that_names_what_is_allowed(isa):
    run = run_python("-c", "import alignfast.ops", isa=isa)
    assert run.returncode != 0
    message = run.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: ")
    assert f'{FORCED}: got "{isa}"; allowed on this processor is ' in message
    assert set(message.rpartition(" is ")[2].split(", ")) == set(USABLE)
