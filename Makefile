# `make demo` and `make test` need only Python 3.11 or later: each first puts what it needs into .venv,
# and a second run finds it ready. BFT_BUILD (see setup.py) says what is compiled. If it is not given,
# the CPU backend is, and the CUDA backend too if there is a GPU, or for the slow tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

RUNS := $(VENV)/.installed-demo
TOOLS := $(VENV)/.installed-dev
HERE := $(if $(shell nvidia-smi -L 2>/dev/null),auto,cpu)
COMPILED := build/.compiled-$(or $(BFT_BUILD),$(HERE))
COMPILED_ALL := build/.compiled-$(or $(BFT_BUILD),auto)
COMPILED_DEMO := build/.compiled-$(or $(BFT_BUILD),cpu)
READY := $(TOOLS) $(COMPILED)
CXX_FILES := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

ACTIVATE := echo 'bft and python are in $(VENV): source $(BIN)/activate'

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow soak lint format format-check types static gpu bench readme-check venv clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(RUNS) $(COMPILED_DEMO)  ## fine-tune a real model on real biomedical questions with BFT
	$(BIN)/bft demo
	@$(ACTIVATE)

# Two processes of one thread each, because most tests are too small for several threads. Tests that
# measure time or memory are marked slow; they run alone, with all threads.
test: $(READY)  ## run the tests, except the slow ones; ARGS="-k name" goes to pytest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not soak" -n 2 --dist worksteal $(ARGS)

test-slow: $(TOOLS) $(COMPILED_ALL)  ## run the slow tests
	$(BIN)/python -m pytest -m "slow and not soak" $(ARGS)

SEEDS ?= 1 2 3 4 5 6 7 8 9 10
soak: $(READY)  ## run the tests that take hours: full matrices, the kernel tests with each of SEEDS
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m soak -n 2 --dist worksteal $(ARGS)
	set -e; for seed in $(SEEDS); do OMP_NUM_THREADS=1 BFT_TEST_SEED=$$seed \
	    $(BIN)/python -m pytest tests/kernels -m "not slow" -n 2 --dist worksteal; done
	$(BIN)/python -m benchmarks static --full

lint: $(TOOLS)  ## look for mistakes
	$(BIN)/ruff check
	$(BIN)/codespell
	$(BIN)/python .ci/file_sizes.py
	$(BIN)/python .ci/words.py

format: $(TOOLS)  ## format Python, C++ and CUDA in place
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

format-check: $(TOOLS)  ## fail if `make format` would change anything
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

types: $(TOOLS)  ## check the type annotations
	$(BIN)/mypy

static: $(READY)  ## compile the kernels for several GPUs, without one; none may spill or grow
	$(BIN)/python -m benchmarks static

# Needs no network: PYTHON's own torch, Triton, numpy and pytest are enough, and it compiles for itself.
gpu:  ## on a GPU, with PYTHON as it is (it needs torch): tests, speed, memory, into benchmarks/results/
	PYTHONPATH=. $(PYTHON) -m benchmarks gpu $(ARGS)

bench: $(READY)  ## compare speed with the saved baselines, in multiples of a GEMM
	$(BIN)/python -m pytest benchmarks --benchmark-columns=min,median,iqr,rounds $(ARGS)

readme-check: $(READY)  ## run the commands and Python snippets of README.md and docs/
	$(BIN)/python tests/readme_check.py

venv: $(READY)  ## make .venv and compile, without running anything
	$(if $(BFT_BUILD)$(filter auto,$(HERE)),,@echo 'No GPU here, so CUDA is left out; to compile it: make venv BFT_BUILD=auto')
	@$(ACTIVATE)

# Pure Python here; the last rule compiles, so that a change in csrc/ does not go through pip.
$(RUNS): pyproject.toml constraints.txt requirements-demo.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	BFT_BUILD=none $(BIN)/pip install -c constraints.txt -e '.[build,demo]'
	$(BIN)/pip install --no-deps -r requirements-demo.txt
	touch $@

$(TOOLS): $(RUNS)
	BFT_BUILD=none $(BIN)/pip install -c constraints.txt -e '.[dev]'
	touch $@

build/.compiled-%: $(RUNS) setup.py $(wildcard csrc/*.py) $(filter csrc/%,$(CXX_FILES))
	BFT_BUILD=$* $(BIN)/python setup.py build_ext --inplace
	touch $@

clean:  ## remove what was built, but not .venv
	rm -rf build dist *.egg-info bft_kernels/*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find bft bft_kernels benchmarks csrc tests -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
