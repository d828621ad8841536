# Every verb does its own set-up, once: a virtual environment in .venv with the versions of deploy/constraints.txt.
# Needed beforehand: Python 3.11 or newer, and make.
#
#   make PYTHON=python3.12 ...        another interpreter
#   make PIP_ARGS="..." ...           extra arguments of every `pip install`, for example an index with CPU builds of torch

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
PIP_ARGS ?=
# Extra arguments of the verb's own command, for example `make test ARGS="tests/cache -x"`.
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CONSTRAINTS := deploy/constraints.txt
PIP_INSTALL = $(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) --constraint $(CONSTRAINTS)
TORCH := $(shell grep '^torch==' $(CONSTRAINTS))

.PHONY: help setup demo test test-slow lint serve protos cubins bench soak clean

help:  ## Show the verbs
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1|\2/p' Makefile | while IFS='|' read -r verb text; do printf '  make %-9s %s\n' "$$verb" "$$text"; done

# torch goes first and without its dependencies: a build for CUDA, gigabytes of libraries that nothing here uses, is then
# refused by name before pip follows it.
$(READY): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=..."; exit 1; }
	@echo "Setting up $(VENV) (once)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) --upgrade pip
	@$(PIP_INSTALL) --no-deps '$(TORCH)'
	@$(BIN)/python deploy/check_torch.py
	@$(PIP_INSTALL) --editable '.[dev]'
	@touch $@

setup: $(READY)  ## Only the set-up: virtual environment, pinned dependencies, editable install

demo: $(READY)  ## Eight agents over one document, shared and not, on a cluster of two workers
	@$(BIN)/forkkv demo $(ARGS)

# Further runs, left out where ARGS choose tests: Triton kernels in the interpreter, which is chosen before Triton is imported;
# the references, which serve where there is no compiler and on other devices.
test: $(READY)  ## The tests, without those marked slow or gpu
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -m "not slow and not gpu and not interpreter" $(ARGS)
	@test -n "$(ARGS)" || TRITON_INTERPRET=1 OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -q \
		-m "interpreter and not slow and not gpu" tests/kernels tests/engine/gpu
	@test -n "$(ARGS)" || FORKKV_CPU_KERNELS=0 OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -q \
		tests/engine/test_parity_matrix.py tests/engine/test_merged_keys_in_engine.py tests/engine/test_qwen3.py

test-slow: $(READY)  ## The tests marked slow: the state machines for many more steps, others on each run
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -m "slow and not gpu and not interpreter" $(ARGS)

lint: $(READY)  ## ruff, mypy, and whether generated files are fresh
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python protos/generate.py --check
	@$(BIN)/python deploy/generate.py --check

serve: $(READY)  ## The embedded cluster on loopback: gRPC 9000, HTTP 8000
	@$(BIN)/forkkv serve $(ARGS)

protos: $(READY)  ## Write forkkv_cluster/api from protos/
	@$(BIN)/python protos/generate.py

cubins: $(READY)  ## Every variant of every Triton kernel for every card: registers, shared memory, spills (ARGS="--arch 90")
	@$(BIN)/python kernels/compile_all.py $(ARGS)

bench: $(READY)  ## The trace written by hand, against the engine in this process
	@$(BIN)/forkkv bench trace loadtests/traces/hand.jsonl --target offline $(ARGS)

soak: $(READY)  ## Half an hour of random agents on an engine with too little memory (ARGS="--minutes 3 --seed 1")
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/forkkv bench soak $(ARGS)

clean:  ## Remove the virtual environment, caches and local state
	@rm -rf $(VENV) build dist *.egg-info .forkkv .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
