# Two commands do all set-up on a fresh machine: `make demo` and `make test`.
# PYTHON=python3.13 takes another interpreter, TORCH=2.11.0 another torch than the pinned one (with the triton it asks for
# and a numpy that the interpreter of triton 3.6 takes),
# VENV=DIR keeps such an environment beside the usual one.
PYTHON ?= python3
TORCH ?=
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PINS := $(VENV)/constraints.txt
CXX_SOURCES := $(wildcard csrc/*.h csrc/*.cuh csrc/*.cpp csrc/*.cu csrc/*/*.h csrc/*/*.cuh csrc/*/*.cpp csrc/*/*.cu tests/*.cpp)
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test test-all test-torch-2.11 gradcheck bench gpu lint clean

demo: $(READY)  ## render clips, encode, train, fine-tune with DPO and PG-DPO, write out/demo/report.html
	$(BIN)/pgdpo-fast demo

test: $(READY)  ## the suite, two workers; of the sweeps over hostile inputs, kills, damage and GPU targets a few of every kind
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q -m 'not sweep'

test-all: $(READY)  ## the whole suite and all of the sweeps
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q

test-torch-2.11:  ## opt-in: all compiled code built, loaded and checked with the oldest torch, a CUDA build (5 GB); needs nvcc, no GPU
	$(MAKE) VENV=.venv-2.11 TORCH=2.11.0 .venv-2.11/.ready
	OMP_NUM_THREADS=1 .venv-2.11/bin/python -m pytest -q tests/test_cuda_build.py tests/test_native.py tests/test_fused.py

gradcheck: $(READY)  ## parity and gradcheck tests of the loss alone
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q tests/test_objectives.py tests/test_loss.py tests/test_fused.py tests/test_native.py

bench: $(READY)  ## fused loss against eager and torch.compile on this machine
	$(BIN)/pgdpo-fast bench --quick

gpu:  ## everything that needs a GPU: correctness, then speed; uses the environment's own torch and triton
	$(PYTHON) bench/gpu.py --require triton native

lint: $(READY)  ## style, format of Python and C++, types: all that .pre-commit-config.yaml runs, on the whole tree
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .venv-2.11 out build *.egg-info

# The venv counts as ready only once everything is installed; a broken install is redone.
$(READY): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	sed -e '' $(if $(TORCH),-e 's/^torch==.*/torch==$(TORCH)/' -e '/^triton==/d' -e 's/^numpy==.*/numpy<2.4/') constraints.txt > $(PINS)
	$(PIP) install --quiet --constraint $(PINS) torch 'setuptools>=77' wheel
	$(PIP) install --quiet --constraint $(PINS) --no-build-isolation --editable '.[train,bench,dev]'
	touch $@
