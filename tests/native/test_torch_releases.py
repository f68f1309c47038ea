"""One build of the library serves several releases of torch.

ALIGNFAST_OTHER_TORCH names Python programs, separated by colons, whose torch is of another release than the one here;
their version of Python has to be this one's.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from tests.native.test_isa import EVERY_OP, OPS, PATIENT, differences, results

ROOT = Path(__file__).resolve().parents[2]
OTHERS = [python for python in os.environ.get("ALIGNFAST_OTHER_TORCH", "").split(":") if python]


@pytest.mark.skipif(not OTHERS, reason="ALIGNFAST_OTHER_TORCH names no Python with another torch")
@pytest.mark.parametrize("python", OTHERS)
def test_the_library_gives_the_same_bits_under_another_torch(python, library):
    def run(*arguments):
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | PATIENT
        done = subprocess.run(
            [python, *arguments], cwd="/", env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("-c", "import torch; print(torch.__version__)").strip() != torch.__version__
    before = library.read_bytes()
    found = json.loads(run(str(ROOT / EVERY_OP)))
    assert set(found) == OPS
    assert differences(found, results()) == []
    assert library.read_bytes() == before
