# `make train` and `make test` do everything on a fresh machine with Python >= 3.10 and a C++ compiler.
#
#   make train       the demo: ways to train on coarse drawings of MNIST digits, under four minutes on two cores
#   make test        the test suite
#   make bench       speed and memory of the operator on this CPU, under five minutes; make bench-full: every case, under an hour
#   make tune        how the one setting of the demo that is tuned was chosen
#   make check-cuda  nvcc over every CUDA kernel: registers and spills; needs nvcc, no GPU (also part of test-kernels)
#   make test-slow   the rest of make test: tests that take longer than about three seconds each, with training or processes
#   make test-kernels   and: CUDA kernels in an emulator and through nvcc, Triton's in its interpreter and compiler; what has not
#                    changed since it passed is left out, ARGS=--again runs it
#   make test-gpu    the operator's tests on a GPU, and what only a GPU can get wrong (tests/gpu/README.md)
#   make bench-gpu   the same on a GPU, about eight minutes; fails where there is no GPU
#   make bench-step  a 1024x2048 training step by each formulation of the loss, and the largest image that fits; 15 minutes
#   make lint        ruff, mypy, clang-format        make format: apply them
#
# TORCH overrides the torch that a new .venv gets, PYTHON the interpreter it is made from.
#
# In an environment that has everything (torch with CUDA, the package installed with `pip install --no-build-isolation
# --no-deps -e .`), and where pip reaches no registry: name its interpreter, and nothing is installed.
#
#   make test-gpu RUN=python3

PYTHON ?= python3
# Of `make test` and `make test-slow`: whole files to each of two processes, by name, which ends with many short ones.
# WORKERS= runs one test after another.
WORKERS ?= -n 2 --dist loadfile --no-loadscope-reorder
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN = $(VENV)/bin
# The interpreter that runs things, and what has to be there before it can: RUN=... needs nothing.
ifdef RUN
READY =
else
RUN = $(BIN)/python
READY = $(VENV)/installed
endif
CXX_FILES = $(shell git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'tests/*.h')
CXX_DEPENDENCIES = $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu) setup.py pyproject.toml

.PHONY: train test check-cuda test-gpu bench bench-full bench-gpu bench-step tune lint format clean

train: $(READY)
	$(RUN) -m coarse_train demo $(ARGS)

.PHONY: test-slow test-kernels
test-slow: $(READY)
	$(RUN) -m pytest -m "slow and not kernels" --durations=10 $(WORKERS) $(ARGS)

test-kernels: $(READY)
	$(RUN) -m tests.kernels $(ARGS)

test: $(READY)
	$(RUN) -m pytest -m "not slow and not kernels" --durations=10 --durations-min=3 $(WORKERS) $(ARGS)

check-cuda: $(READY)
	$(RUN) -m tests.check_cuda $(ARGS)

test-gpu: $(READY)
	$(RUN) -m pytest tests/gpu -rs $(ARGS)

bench: $(READY)
	$(RUN) -m benchmarks $(ARGS)

bench-full: $(READY)
	$(RUN) -m benchmarks --full $(ARGS)

bench-gpu: $(READY)
	$(RUN) -m benchmarks --device cuda --budget-seconds 480 $(ARGS)

bench-step: $(READY)
	$(RUN) -m benchmarks.step $(ARGS)

tune: $(READY)
	$(RUN) -m coarse_train demo --tune $(ARGS)

lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy coarse_kernels coarse_train benchmarks
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# torch first and pinned: unpinned, or as a dependency of a build environment, it comes with gigabytes of CUDA. The build
# uses this very torch, hence no isolation.
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)" "setuptools>=64" wheel pybind11 ninja
	touch $@

$(VENV)/installed: $(VENV)/torch $(CXX_DEPENDENCIES)
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[train,test]"
	$(BIN)/python -m coarse_kernels.env_report
	touch $@

$(VENV)/lint: $(VENV)/installed
	$(BIN)/python -m pip install --quiet -e ".[lint]" --no-build-isolation
	touch $@

clean:
	rm -rf build $(VENV) coarse_kernels/*.so *.egg-info
