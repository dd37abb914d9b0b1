# The workshop: `make` lists what there is. Every target sets up .venv first; a second call installs nothing.

PYTHON ?= python3
# Where to take torch from, if not from pip's own index, whose torch is a CUDA build of some gigabytes (it runs without
# a GPU as well): the address of an index of CPU wheels, or a folder with one (TORCH_INDEX=…).
TORCH_INDEX ?=
# What `make train` and the tests pass on: make train ARGS="model=tiny budget.steps=200"
ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup browser train test test-slow test-long test-kernels test-slurm test-pythons lint format check golden bench gpu

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|' 2>/dev/null \
	  || grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST)

setup: $(STAMP) ## .venv with the exact versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing: apt-get install python3 python3-venv"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "$$($(PYTHON) --version) is not supported, 3.11 to 3.13 are: make PYTHON=python3.11 …"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "venv is missing: apt-get install python3-venv"; exit 2; }
	@command -v $${CXX:-g++} >/dev/null || echo "g++ is missing, training will be slow: apt-get install g++"
	$(PYTHON) -m venv $(VENV)
ifneq ($(TORCH_INDEX),)
	$(RUN) -m pip install --quiet --index-url "$(TORCH_INDEX)" "$$(grep '^torch==' constraints.txt)"
endif
	$(RUN) -m pip install --quiet -c constraints.txt -e '.[test,dev]'
	@touch $@

BROWSERS := chromium-headless-shell chromium google-chrome

browser: setup ## a Chromium for the tests that open reports: Debian's where apt-get may install it, else playwright's
	@for name in $(BROWSERS); do command -v $$name >/dev/null && exit 0; done; \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq \
	    && apt-get install -y -qq --no-install-recommends chromium-headless-shell >/dev/null; then exit 0; fi; \
	  $(RUN) -m playwright install --only-shell chromium \
	    || { echo "no browser for the reports' tests: apt-get install chromium-headless-shell"; exit 2; }

train: setup ## the default run: a byte-level RWKV-4 on the Python library's sources, about ten minutes on two cores
	$(RUN) train.py $(ARGS)

# Three processes on two cores, since nearly half of the tests' time is waiting; those that bound seconds come after them, one by one.
QUICK := not slow and not long and not gpu and not kernels and not slurm
JOBS ?= 3

# They write bytecode, whatever the shell says: else each process compiles the sources and the tests again.
PYTEST := PYTHONDONTWRITEBYTECODE= $(RUN) -m pytest

test: browser ## all quick tests
	$(PYTEST) -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "$(QUICK) and not alone" $(ARGS) \
	  || [ $$? = 5 ]  # 5: ARGS selects none of these
	$(PYTEST) -m "$(QUICK) and alone" $(or $(ARGS),$$(grep -rl --include=test_*.py pytest.mark.alone tests)) || [ $$? = 5 ]

test-slow: browser ## the slow tests
	$(PYTEST) -m "slow and not gpu and not kernels and not slurm" $(ARGS)

test-long: setup ## tests of several minutes each for a quiet machine: twenty kills, memory at a start and after a resume
	$(RUN) -m pytest -m long --timeout=1200 $(ARGS)

test-kernels: setup ## the CUDA kernels on a CPU: every shape, planted errors, nvcc's figures; at most 10 minutes
	$(RUN) -m pytest -m kernels $(ARGS)

test-slurm: setup ## a SLURM of six nodes on this machine, installed if it is missing (root, Debian); at most 7 minutes
	$(RUN) -m pytest -m slurm $(ARGS)

test-pythons: setup ## install, train, prepare and export on each other Python that we support and this machine has
	TORCH_INDEX="$(TORCH_INDEX)" $(RUN) scripts/pythons.py $(ARGS)

lint: setup ## format, lint, types, spelling, import layers
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(VENV)/bin/codespell
	$(VENV)/bin/lint-imports

format: setup ## format the sources as `make lint` requires
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

check: lint test ## lint and quick tests, which every change must pass

golden: setup ## recompute tests/golden (give the reason in the commit)
	$(RUN) -m tests.golden.make

bench: setup ## every benchmark in its quick form
	@set -e; for script in benchmarks/*.py; do echo "== $$script"; $(RUN) $$script --quick; done

# Torch with CUDA is all it needs: the environment of `make setup` if that has it, else python3's own.
GPU_PYTHON ?= $(shell $(RUN) -c 'import torch; torch.cuda.is_available() or exit(1)' 2>/dev/null && echo $(RUN) || echo $(PYTHON))

gpu: ## the tests and benchmarks that need a GPU: correctness, speed, complete steps; 12 minutes, ARGS=--quick 3
	$(GPU_PYTHON) scripts/gpu.py $(ARGS)
