# Needs Python 3.11 or newer with its headers, a C++20 compiler and a package index. VENV may name an environment that
# exists; if torch is in it, that torch stays.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
TORCH ?= 2.14.1
TORCHVISION ?= 0.29.1
TIMM ?= 1.0.31
TORCHATTACKS ?= 3.5.1
# Processes that share the tests, a file to each at a time; one thread each, since two of them fighting for a core take longer.
JOBS ?= 2
EXTRAS ?= test dev imagenet-lite formats bench site
ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help build test sanitize demo bench machine-code site format clean FORCE

PY := $(VENV)/bin/python
# Through the interpreter, as its script is elsewhere where VENV inherits packages.
CLANG_FORMAT := $(PY) -c 'import clang_format; clang_format.clang_format()'
# An environment can hold the editable installation of one checkout only, hence a stamp for each checkout.
STAMPS := $(VENV)/.alignfast
DEPENDENCIES := $(STAMPS)/dependencies
BUILT := $(STAMPS)/built-$(firstword $(shell pwd | cksum))
NATIVE_SOURCES := $(shell find csrc -type f)
CLANG_FORMATTED := $(filter %.cpp %.h %.cu %.cuh,$(NATIVE_SOURCES)) $(wildcard tests/native/*.cpp tests/native/emulation/*)

help:
	@echo 'make test     linters, type checker and tests, also under the sanitizers'
	@echo 'make sanitize all tests of the ops under the address and undefined-behaviour sanitizers (ARGS goes to pytest)'
	@echo 'make demo     train small models, align, attack and report into demo/ (ARGS="..." adds arguments)'
	@echo 'make bench    ops, models, attacks, alignment and files against their peers and the hardware, in under 20 minutes (ARGS="--quick" is short)'
	@echo 'make machine-code  registers, spills, access widths and occupancy of every GPU kernel (ARGS="--json FILE")'
	@echo 'make site     the documentation as a web site in site/ (to search it: python -m http.server --directory site)'
	@echo 'make build    environment, dependencies and native module; the targets above do this by themselves'
	@echo 'make format   format Python and C++'
	@echo 'make clean    remove what was built (an environment other than .venv stays)'
	@echo 'Variables: VENV=$(VENV) PYTHON=$(PYTHON) TORCH=$(TORCH) TORCHVISION=$(TORCHVISION) TIMM=$(TIMM)'

build: $(BUILT)

# glibc hands large freed blocks back to the kernel, and every tensor is then faulted in anew; this keeps them, as
# alignfast's own commands do by themselves.
test sanitize: export MALLOC_MMAP_THRESHOLD_ ?= 1073741824
test sanitize: export MALLOC_TRIM_THRESHOLD_ ?= 17179869184

test: $(BUILT)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(CLANG_FORMAT) --dry-run --Werror $(CLANG_FORMATTED)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadfile $(ARGS)
	$(PY) tests/native/sanitize.py -p tests.covering

sanitize: $(BUILT)
	$(PY) tests/native/sanitize.py $(ARGS)

demo: $(BUILT)
	$(VENV)/bin/alignfast demo --out demo $(ARGS)

bench: $(BUILT)
	$(VENV)/bin/alignfast bench $(ARGS)

machine-code: $(BUILT)
	$(PY) -m alignfast.kernels.machine_code $(ARGS)

site: $(BUILT)
	$(PY) -m mkdocs build --strict $(ARGS)

format: $(BUILT)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(CLANG_FORMAT) -i $(CLANG_FORMATTED)

clean:
	rm -rf .venv build dist site *.egg-info alignfast/*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f $(BUILT)

$(PY):
	$(PYTHON) -m venv $(VENV)

# Requirements are printed by what pyproject.toml declares, so that pip resolves them all at once and before the build,
# which needs some of them.
define PRINT_REQUIREMENTS
import sys, tomllib
from importlib.metadata import PackageNotFoundError, version

def installed(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None

pins = dict(pin.split("==") for pin in "torch==$(TORCH) torchvision==$(TORCHVISION) timm==$(TIMM)".split())
kept = {name: installed(name) for name in pins}
with open("pyproject.toml", "rb") as file:
    declared = tomllib.load(file)
project = declared["project"]
wanted = declared["build-system"]["requires"] + project["dependencies"]
for extra in "$(EXTRAS)".split():
    wanted += project["optional-dependencies"][extra]
wanted += [f"{name}=={found}" for name, found in (kept if kept["torch"] else pins).items() if found]
print(*(line for line in wanted if not line.startswith(project["name"] + "[")), sep="\n")
endef
export PRINT_REQUIREMENTS

$(DEPENDENCIES): pyproject.toml | $(PY)
	@mkdir -p $(STAMPS)
	$(PY) -c "$$PRINT_REQUIREMENTS" > $(STAMPS)/requirements.txt
	$(PY) -m pip install -r $(STAMPS)/requirements.txt
	$(PY) -m pip install --no-deps torchattacks==$(TORCHATTACKS)
	@touch $@

$(BUILT): $(DEPENDENCIES) pyproject.toml setup.py CMakeLists.txt $(NATIVE_SOURCES) $(if $(and $(wildcard alignfast/_C.*.so),$(wildcard alignfast/lib*.so)),,FORCE)
	@rm -f $(STAMPS)/built-*
	$(PY) -m pip install --no-deps --no-build-isolation -e .
	@touch $@
