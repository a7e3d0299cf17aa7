# The commands of this project. Every target sets up what it needs first; a repeated setup takes less than a second.
#
#   make setup  [DEVICE=cpu|gpu] [PYTHON=python3.12]     creates the environment in .venv and nothing else
#   make wheelhouse [DEVICE=cpu|gpu] [WHEELHOUSE=folder]  collects every wheel; make setup WHEELHOUSE=folder needs no network
#   make test   [WORKERS=2] [ARGS="-k losses"]           runs the default tests
#   make test-slurm [ARGS="-k crash"]                    runs the tests on a real Slurm, which it starts on this machine
#   make quickstart [ALGORITHM=srpo|grpo|sdpo|mix] [SEED=0] [ARGS="--run.iterations 20"]
#   make study      [ARGS="--minutes 60"]                continues the study of all algorithms on three small tasks
#   make compare    [SEEDS=3] [JOBS=1]                   compares four algorithms over several seeds in one figure
#
# Paths are relative, so a checkout in a folder with a space in its name works.

PYTHON ?=
DEVICE ?= auto
ALGORITHM ?= srpo
SEED ?= 0
SEEDS ?= 3
JOBS ?= 1
WORKERS ?= 2
ARGS ?=
MINUTES ?= 60
WHEELHOUSE ?=
PYTHON312 ?= python3.12
# All tests of ranks but those of vLLM, whose CPU build is for another torch than pip's for Python 3.12 may be; and what
# a torch for CUDA alone can show of NCCL.
MEGATRON_TESTS := --ignore-glob='tests/distributed/test_rollout_*' tests/distributed tests/unit/test_bridge_weight_stream.py

VENV_PYTHON := .venv/bin/python
MAKEFLAGS += --no-print-directory

.DEFAULT_GOAL := help
.PHONY: help setup wheelhouse test test-slow test-gpu-versions test-gpu test-slurm quickstart compare study soak lint format doctor

help:  ## list all targets
	@echo "megatron_srpo. Start with: make quickstart"
	@sed -n 's/^\([a-z0-9-]*\):.*## /  make \1|/p' Makefile | while IFS='|' read -r name what; do printf '%-25s %s\n' "$$name" "$$what"; done

setup:  ## create .venv with the pinned requirements (DEVICE=cpu|gpu, PYTHON=...)
	@python='$(PYTHON)'; \
	test -z "$$python" || "$$python" -c '' 2>/dev/null || { echo "set-up: PYTHON=$$python is not a Python that runs; say which Python 3.11 or newer: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }; \
	least=11; test '$(DEVICE)' != gpu || least=12; \
	for candidate in .venv/bin/python python3.11 python3.12 python3.13 python3; do \
	  test -z "$$python" || break; \
	  "$$candidate" -c "import sys; sys.exit(sys.version_info < (3, $$least))" 2>/dev/null && python="$$candidate"; \
	done; \
	test -n "$$python" || { echo "set-up: no Python 3.$$least or newer found; install one, or say which: make setup PYTHON=/path/to/python3.$$least" >&2; exit 1; }; \
	"$$python" tools/setup_env.py --device '$(DEVICE)' $(SETUP_OPTIONS)

setup: SETUP_OPTIONS = $(if $(WHEELHOUSE),--wheelhouse '$(WHEELHOUSE)')

wheelhouse:  ## collect a wheel of every package in WHEELHOUSE=folder, for make setup WHEELHOUSE=folder without a network
	@$(MAKE) setup WHEELHOUSE= SETUP_OPTIONS="--make-wheelhouse '$(or $(WHEELHOUSE),wheelhouse)'"

test: setup  ## run the default tests, WORKERS=2 files at a time, and print the slowest ten (ARGS="-k name" selects some)
	@$(VENV_PYTHON) -m pytest -q -n '$(WORKERS)' --dist loadfile --no-loadscope-reorder --durations=10 $(ARGS)

test-slow: setup  ## run the slow tests: more layouts, killed servers, resumed runs (hours on two cores)
	@$(VENV_PYTHON) -m pytest -q -m slow $(ARGS)

test-gpu: setup  ## run the tests of kernels, losses and policy on one GPU
	@$(VENV_PYTHON) -m pytest -q -rs -m gpu tests/distributed $(ARGS)

test-gpu-versions:  ## run all tests of ranks with Megatron Core 0.19 on Python 3.12, in .venv312 (PYTHON312=python3.12)
	@sh tools/megatron_019.sh '$(PYTHON312)'
	@.venv312/bin/python -m pytest -q -p no:cacheprovider -m 'not gpu and not slurm' $(MEGATRON_TESTS) $(ARGS)

test-slurm: setup  ## run the tests on a real Slurm with two pretend nodes; installs Debian's packages if it may
	@sh tools/install_slurm.sh
	@$(VENV_PYTHON) -m pytest -q -rs -m slurm tests/slurm $(ARGS)

quickstart: setup  ## train and evaluate a tiny model in minutes (ALGORITHM=srpo|grpo|sdpo|mix, SEED=0)
	@$(VENV_PYTHON) -m examples.quickstart.run --algorithm '$(ALGORITHM)' --seed '$(SEED)' $(ARGS)

compare: setup  ## compare GRPO, SDPO, SRPO and mix over several seeds (SEEDS=3, JOBS=1)
	@$(VENV_PYTHON) -m examples.worksheet.compare --seeds '$(SEEDS)' --jobs '$(JOBS)' $(ARGS)

study: setup  ## continue the study of all algorithms on three small tasks, then write its tables (ARGS="--minutes 60")
	@$(VENV_PYTHON) -m benchmarks.study run $(ARGS)
	@$(VENV_PYTHON) -m benchmarks.study table

doctor: setup  ## print what is installed, which device will be used, and what is missing
	@$(VENV_PYTHON) -m megatron_srpo doctor

soak: setup  ## train a tiny job with random faults and check that nothing is lost (MINUTES=60)
	@$(VENV_PYTHON) tools/soak.py --minutes '$(MINUTES)' $(ARGS)

lint: setup  ## check rules and formatting with ruff, and the types of megatron_srpo with mypy
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m ruff format --check .
	@$(VENV_PYTHON) -m mypy

format: setup  ## apply ruff's formatting and fixes
	@$(VENV_PYTHON) -m ruff format .
	@$(VENV_PYTHON) -m ruff check --fix .
