"""Runs the tests of the ops under the address and undefined-behaviour sanitizers, on both kinds of kernels.

    python tests/native/sanitize.py [ARGUMENTS OF PYTEST]

On a copy of the package that is built with them, build/sanitize; what is built in place stays. At the same time on the
CUDA kernels, run by the emulation. Says so and succeeds where the compiler has no sanitizers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from alignfast import _C

ROOT = Path(__file__).resolve().parents[2]
COPY = ROOT / "build" / "sanitize"
PARTS = ["alignfast", "bench", "csrc", "kernels", "tests"]
PARTS += ["setup.py", "CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE"]
FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1"]
# Python loads the runtimes last, but they have to come first; the C++ library as well, since they wrap its throw.
RUNTIMES = ["libasan.so", "libubsan.so", "libstdc++.so"]
# What is about torch's compiler says nothing about kernels; to emulated ones that launch thousands of times it adds.
CHOICE = ["-k", "not compiles"]
EMULATED = ["-p", "tests.native.emulated_plugin", "-m", "not slow and not cpu_only"]
EMULATED += ["-k", "not compiles and not gradcheck"]


def main() -> int:
    compiler = os.environ.get("CXX", "c++")
    runtimes = [runtime_of(compiler, name) for name in RUNTIMES]
    if None in runtimes or not compiles(compiler):
        print(f"sanitize: SKIPPED, {compiler} is not here or has no address and undefined-behaviour sanitizers")
        return 0
    copy_sources()
    cmake = f"{os.environ.get('CMAKE_ARGS', '')} -DALIGNFAST_CUDA=OFF -DCMAKE_CXX_COMPILER={compiler}"
    # Compiled in a third of the time, and what the sanitizers look for is the same; they look at the kernels that serve
    # on this processor.
    unused = ";".join(isa for isa in _C.usable_cpu_isas() if isa != _C.cpu_isa())
    cmake += f" -DALIGNFAST_KERNEL_OPTIMISATION=-O1 '-DALIGNFAST_UNUSED_ISAS={unused}'"
    cmake += f" '-DCMAKE_CXX_FLAGS={' '.join(FLAGS)}'"
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(build, cwd=COPY, env=os.environ | {"CMAKE_ARGS": cmake}, stdout=subprocess.DEVNULL, check=True)
    emulated = [sys.executable, "-m", "tests.native.emulated", "--sanitize"]
    made = subprocess.run(
        emulated, cwd=ROOT, env=os.environ | {"CXX": compiler}, stdout=subprocess.PIPE, text=True, check=True
    )
    environment = environment_of(runtimes)
    runs = [
        (COPY, environment, CHOICE),
        (ROOT, environment | {"ALIGNFAST_EMULATED": made.stdout.strip()}, EMULATED),
    ]
    with ThreadPoolExecutor(len(runs)) as pool:
        outcomes = list(pool.map(run_tests, *zip(*runs, strict=True)))
    for outcome in outcomes:
        print(outcome.stdout)
    return max(abs(outcome.returncode) for outcome in outcomes)


def run_tests(folder: Path, environment: dict[str, str], arguments: list[str]) -> subprocess.CompletedProcess[str]:
    # -s, because a process that a sanitizer ends takes with it what pytest has captured.
    pytest = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", *arguments, "tests/ops"]
    run = [*pytest, *sys.argv[1:]]
    return subprocess.run(
        run,
        cwd=folder,
        env=environment | {"PYTHONPATH": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def environment_of(runtimes: list[Path | None]) -> dict[str, str]:
    return os.environ | {
        "LD_PRELOAD": " ".join(map(str, runtimes)),
        # Python keeps some memory to its end, and its own allocator would hide what lies next to a block.
        # New memory is NaN, and what lies between two blocks of it is wide enough for a row that is missed.
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:abort_on_error=1:redzone=512:"
        "malloc_fill_byte=255:max_malloc_fill_size=1073741824",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "OMP_WAIT_POLICY": "passive",
        "OMP_NUM_THREADS": "1",
    }


def runtime_of(compiler: str, name: str) -> Path | None:
    if shutil.which(compiler) is None:
        return None
    command = [compiler, f"-print-file-name={name}"]
    path = Path(subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip())
    return path if path.is_absolute() and path.exists() else None


def compiles(compiler: str) -> bool:
    command = [compiler, *FLAGS, "-x", "c++", "-", "-o", os.devnull]
    return subprocess.run(command, input=b"int main() {}", capture_output=True, check=False).returncode == 0


def copy_sources() -> None:
    """With their times, so that only what changed is compiled again."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for part in PARTS:
        source, copy = ROOT / part, COPY / part
        if source.is_dir():
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(source, copy, ignore=ignore)
        else:
            COPY.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)


if __name__ == "__main__":
    sys.exit(main())
