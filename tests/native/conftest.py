import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "alignfast" / "libalignfast_ops.so"


@pytest.fixture(scope="session")
def library() -> Path:
    return LIBRARY


@pytest.fixture(scope="session")
def build_folder() -> Path:
    """The CMake folder that the library in use was built in."""
    built = LIBRARY.read_bytes()
    for path in sorted(ROOT.glob("build/cmake-*/libalignfast_ops.so"), key=os.path.getmtime, reverse=True):
        if path.read_bytes() == built:
            return path.parent
    pytest.fail(f"{LIBRARY} is not from a folder under build/: run make build", pytrace=False)
