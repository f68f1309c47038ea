"""Builds the CUDA kernels for the CPU: csrc/cuda/*.cu as C++, run by the emulation in tests/native/emulation.

    python -m tests.native.emulated [--sanitize]

prints the path of the library, which registers its ops for tensors on the CPU. It is under build/emulated, named after
all that it is made from, and is built where it is not there yet.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "emulated"
EMULATION = ROOT / "tests" / "native" / "emulation"
COMPILER = os.environ.get("CXX", "g++")
# Without contraction the arithmetic is that of the CPU's kernels and of what nvcc makes; nvcc knows no strict aliasing.
FLAGS = ["-std=c++20", "-DALIGNFAST_EMULATION", "-ffp-contract=off", "-fno-math-errno", "-fno-strict-aliasing"]
FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-fPIC", "-fvisibility=hidden"]
FLAGS += [f"-I{ROOT / 'csrc'}", f"-I{EMULATION}"]
FAST = ["-O2"]
SANITIZED = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
JOBS = 2


def op_library(*, sanitize: bool = False) -> Path:
    """The path of the library; subprocess.CalledProcessError where it does not compile."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    torch = Path(spec.origin).parent
    flags = [*FLAGS, *(SANITIZED if sanitize else FAST), "-DTORCH_TARGET_VERSION=0x020d000000000000"]
    flags += ["-isystem", str(torch / "include")]
    library = FOLDER / f"libalignfast_emulated-{key_of(flags)}{'-sanitized' if sanitize else ''}.so"
    if not library.exists():
        build(library, flags, [str(torch / "lib" / "libtorch_cpu.so")])
    return library


def sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def key_of(flags: list[str]) -> str:
    """A hash of what the library is made from."""
    version = subprocess.run([COMPILER, "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256("\n".join([COMPILER, *flags]).encode() + version)
    folders = [ROOT / "csrc", EMULATION]
    for path in sorted(path for folder in folders for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def build(library: Path, flags: list[str], linked: list[str]) -> None:
    """One object a source, some at a time, linked under a temporary name, so that there is no library by halves."""
    objects = library.parent / f"{library.stem}.{os.getpid()}"
    objects.mkdir(parents=True)

    def compiled(source: Path) -> Path:
        made = objects / f"{source.stem}.o"
        subprocess.run([COMPILER, *flags, "-x", "c++", "-c", source, "-o", made], check=True)
        return made

    with ThreadPoolExecutor(JOBS) as pool:
        made = list(pool.map(compiled, sources()))
    linking = objects / library.name
    sanitizers = [flag for flag in flags if flag.startswith("-fsanitize")]
    # Python has loaded torch by the time that it loads this, hence no path to its libraries.
    subprocess.run([COMPILER, "-shared", *sanitizers, *made, *linked, "-o", linking], check=True)
    linking.replace(library)
    for path in made:
        path.unlink()
    objects.rmdir()


if __name__ == "__main__":
    print(op_library(sanitize="--sanitize" in sys.argv[1:]))
