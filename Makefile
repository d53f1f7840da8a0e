SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
OUT ?= out/gpu
CHIP ?= sm_90
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq -c constraints.txt
PYTEST := $(BIN)/pytest -q -n 2 --durations=12 -m "not gpu and not slow"

.PHONY: help test test-slow emulated bench demo gpu lint clean

help: ## this list
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)$$/make \1\t\2/p' Makefile
	@echo "variables: PYTHON=$(PYTHON) (makes the environment; for gpu: runs it), VENV=$(VENV), OUT=$(OUT), CHIP=$(CHIP), ARGS"

# Torch goes first and alone, so that nothing can pull in another build of it.
$(READY): setup.py constraints.txt
	@echo "-- making $(VENV) (a few minutes, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) torch
	@$(PIP) torch -e '.[test,bench,hf]'
	@touch $@

test: lint ## everything that needs no GPU: lint, types, numerics in the interpreter, cross-compilation, packaging
	@echo "-- tests (Triton kernels interpreted)"
	@TRITON_INTERPRET=1 $(PYTEST) tests
	@echo "-- tests (Triton kernels compiled for other chips)"
	@TRITON_INTERPRET=0 $(PYTEST) tests/compile tests/emulator

test-slow: $(READY) ## the long tests: fuzzing, kills at every moment, whole training runs, the demo, every launch, speed (12 minutes)
	@TRITON_INTERPRET=1 $(BIN)/pytest -q -n 2 -m "slow and not gpu" --ignore tests/test_eager_speed.py tests
	@echo "-- speed, by itself"
	@$(BIN)/pytest -q -m slow tests/test_eager_speed.py

emulated: $(READY) ## the kernels' tests on what Triton compiles for CHIP (sm_80, sm_90, sm_90.sass), run on a CPU, accesses checked (an hour)
	@LCF_FAST_TEST_DEVICE=$(CHIP) $(BIN)/pytest -q -n 2 -m "not gpu" $(or $(ARGS),tests/kernels)

bench: $(READY) ## the main job: errors and times of every op on real caches (ARGS=--quick ends within two minutes)
	@$(BIN)/python -m bench $(ARGS)

demo: $(READY) ## two small agents trained on the spot, and what crosses between them (ARGS=--quick: nothing is learned)
	@$(BIN)/lcf-fast demo $(ARGS)

gpu: ## what needs a CUDA GPU, with PYTHON as it is, into OUT; then again with ARGS="--only sweep latency"
	@$(PYTHON) tests/gpu --out '$(OUT)' $(ARGS)

lint: $(READY) ## ruff and mypy
	@echo "-- ruff"
	@$(BIN)/ruff check --quiet .
	@echo "-- mypy"
	@$(BIN)/mypy --no-error-summary

clean: ## remove the environment and everything built
	@rm -rf $(VENV) build dist out *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
