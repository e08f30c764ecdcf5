# `make train` and `make test` do everything on a fresh machine with Python >= 3.10 and a C++ compiler.
#
#   make train       the demo: ways to train on coarse drawings of MNIST digits, under four minutes on two cores
#   make test        the test suite, under three minutes on two cores: all but what the next two run
#   make test-slow   the tests that take longer than about three seconds each: training, processes
#   make test-kernels   CUDA kernels in an emulator and through nvcc, Triton's in its interpreter and compiler; what has not changed
#                    since it passed is left out, ARGS=--again runs it
#   make fuzz        problems drawn at random, each held to float64: ARGS="--seconds 3600 --seed 0"
#   make sanitize    native code under ASan and UBSan, its threads under TSan
#   make test-large  more than 2^31 elements, a million images: minutes, and up to 14 GB
#   make test-kill   a run killed at 50 moments, and full disks (needs the right to mount)
#   make bench       speed and memory of the operator on this CPU, under five minutes; make bench-full: every case, under an hour
#   make tune        how the one setting of the demo that is tuned was chosen
#   make check-cuda  nvcc over every CUDA kernel: registers and spills; needs nvcc, no GPU (also part of test-kernels)
#   make test-gpu    the operator's tests on a GPU, and what only a GPU can get wrong (tests/gpu/README.md)
#   make bench-gpu   the same on a GPU, about eight minutes; fails where there is no GPU
#   make bench-step  a 1024x2048 training step by each formulation of the loss, and the largest image that fits; 15 minutes
#   make docs        the pages of docs/ as HTML in build/docs, search included; needs no network to be read
#   make lint        ruff, mypy, clang-format        make format: apply them
#   make release-check  sdist and wheel as strangers get them, from a fresh clone, into dist/ (CONTRIBUTING.md); ten minutes
#   make licences    docs/licences.md; and of everything in .venv dist/LICENCES.md, and a bill of materials, dist/sbom.json
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
CXX_FILES = $(shell git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'tests/*.h' 'tests/*.cpp')
CXX_DEPENDENCIES = $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu) setup.py pyproject.toml

.PHONY: train test test-slow test-kernels fuzz sanitize test-large test-kill check-cuda test-gpu bench bench-full bench-gpu bench-step tune \
	docs lint format release-check licences clean

train: $(READY)
	$(RUN) -m coarse_train demo $(ARGS)

test: $(READY)
	$(RUN) -m pytest -m "not slow and not kernels" --durations=10 --durations-min=3 $(WORKERS) $(ARGS)

test-slow: $(READY)
	$(RUN) -m pytest -m "slow and not kernels" --durations=10 $(WORKERS) $(ARGS)

test-kernels: $(READY)
	$(RUN) -m tests.kernels $(ARGS)

fuzz: $(READY)
	$(RUN) -m tests.fuzz $(ARGS)

sanitize: $(READY)
	$(RUN) -m tests.sanitize $(ARGS)

test-large: $(READY)
	$(RUN) -m pytest tests/large.py -rs $(ARGS)

test-kill: $(READY)
	$(RUN) -m pytest tests/kill.py -rs $(ARGS)

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

docs: $(VENV)/docs
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs
	$(BIN)/python -m tests.offline_pages build/docs
	@echo build/docs/index.html

lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy coarse_kernels coarse_train benchmarks
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

release-check: $(VENV)/release
	$(BIN)/python -m tests.release_check --torch "$(TORCH)" $(ARGS)

licences: $(VENV)/release $(VENV)/docs $(VENV)/lint
	$(BIN)/python -m tests.licences
	$(BIN)/python -c "import sys; from tests import release_check as check; check.licences(sys.executable, check.DIST)"

# torch first and pinned: unpinned, or as a dependency of a build environment, it comes with gigabytes of CUDA. The build
# uses this very torch, hence no isolation.
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)" "setuptools>=77.0.3" "pybind11>=2.13" ninja
	touch $@

$(VENV)/installed: $(VENV)/torch $(CXX_DEPENDENCIES)
	PYTHONWARNINGS="ignore:Editable installation" $(BIN)/python -m pip install --quiet --no-build-isolation -e ".[train,test]"
	$(BIN)/python -m coarse_kernels.env_report
	touch $@

# What is compiled stays as it is.
$(VENV)/lint $(VENV)/release $(VENV)/docs: $(VENV)/%: $(VENV)/installed
	COARSE_KERNELS_BUILD=0 PYTHONWARNINGS="ignore:Editable installation" $(BIN)/python -m pip install --quiet --no-build-isolation -e ".[$*]"
	touch $@

clean:
	rm -rf build dist $(VENV) coarse_kernels/*.so coarse_kernels/not_built.json *.egg-info
