# What a user types. Every target sets up what it needs first; repeated set-ups take under a second.
#
#   make setup  [DEVICE=cpu|gpu] [PYTHON=python3.12]     the environment alone, in .venv
#   make test   [ARGS="-k routing"]                      set-up and the test suite
#   make test-slurm [ARGS="-k crash"]                    the tests on a real Slurm, started here for them
#   make quickstart [ALGORITHM=srpo|grpo|sdpo|mix] [SEED=0] [ARGS="--run.iterations 20"]
#   make compare    [SEEDS=3] [JOBS=1]                   four methods, several seeds, one figure
#
# Paths are relative, so that a checkout in a folder with a space in its name works.

PYTHON ?=
DEVICE ?= auto
ALGORITHM ?= srpo
SEED ?= 0
SEEDS ?= 3
JOBS ?= 1
ARGS ?=
MINUTES ?= 60

VENV_PYTHON := .venv/bin/python
MAKEFLAGS += --no-print-directory

.DEFAULT_GOAL := help
.PHONY: help setup test test-slow test-gpu test-slurm quickstart compare soak lint format doctor

help:  ## this list
	@echo "megatron_srpo. Start with: make quickstart"
	@sed -n 's/^\([a-z-]*\):.*## /  make \1|/p' Makefile | while IFS='|' read -r name what; do printf '%-18s %s\n' "$$name" "$$what"; done

setup:  ## the environment: .venv with the pinned requirements (DEVICE=cpu|gpu, PYTHON=...)
	@python='$(PYTHON)'; \
	test -z "$$python" || "$$python" -c '' 2>/dev/null || { echo "set-up: PYTHON=$$python is not a Python that runs; say which Python 3.11 or newer: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }; \
	for candidate in .venv/bin/python python3.11 python3.12 python3.13 python3; do \
	  test -z "$$python" || break; \
	  "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && python="$$candidate"; \
	done; \
	test -n "$$python" || { echo "set-up: no Python 3.11 or newer found; install one, or say which: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }; \
	"$$python" tools/setup_env.py --device '$(DEVICE)'

test: setup  ## set-up, then all tests (ARGS="-k name" for some)
	@$(VENV_PYTHON) -m pytest -q $(ARGS)

test-slow: setup  ## the long proofs: more layouts, real servers killed, resumed runs (hours on two cores)
	@$(VENV_PYTHON) -m pytest -q -m slow $(ARGS)

test-gpu: setup  ## the tests of the GPU path: kernels, losses and policy on one GPU
	@$(VENV_PYTHON) -m pytest -q -rs -m gpu tests/distributed $(ARGS)

test-slurm: setup  ## tests on a real Slurm of two pretend nodes on this machine; installs Debian's packages where it may
	@sh tools/install_slurm.sh
	@$(VENV_PYTHON) -m pytest -q -rs -m slurm tests/slurm $(ARGS)

quickstart: setup  ## warm start, training, evaluation in minutes (ALGORITHM=srpo|grpo|sdpo|mix, SEED=0)
	@$(VENV_PYTHON) -m examples.quickstart.run --algorithm '$(ALGORITHM)' --seed '$(SEED)' $(ARGS)

compare: setup  ## GRPO, SDPO, SRPO and mix side by side over seeds (SEEDS=3, JOBS=1)
	@$(VENV_PYTHON) -m examples.worksheet.compare --seeds '$(SEEDS)' --jobs '$(JOBS)' $(ARGS)

doctor: setup  ## what is installed, which device path will be taken, what is missing
	@$(VENV_PYTHON) -m megatron_srpo doctor

soak: setup  ## the tiny job with faults injected at random; what was lost: nothing (MINUTES=60)
	@$(VENV_PYTHON) tools/soak.py --minutes '$(MINUTES)' $(ARGS)

lint: setup  ## ruff: rules and formatting; mypy: types of megatron_srpo
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m ruff format --check .
	@$(VENV_PYTHON) -m mypy

format: setup  ## ruff: apply the formatting
	@$(VENV_PYTHON) -m ruff format .
	@$(VENV_PYTHON) -m ruff check --fix .
