# memopt: every target sets up what it needs, from python3 (3.11 or newer) alone.
PYTHON ?= python3
RECIPE ?= digits
BENCH  ?= $(patsubst tests/benchmarks/bench_%.py,%,$(wildcard tests/benchmarks/bench_*.py))
SECONDS ?= 60
SEED   ?= 0
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.memopt-setup
SOURCES := runtimes models exporter
# TensorRT's Python classes without the library, of the oldest and newest releases that one adapter serves: for tests.
TRT_RELEASES := tensorrt-cu12-bindings==10.3.0 tensorrt-cu12-bindings==10.16.1.11 tensorrt-cu13-bindings==11.4.0.106
BINDINGS := $(VENV)/trt-bindings/.done

.DEFAULT_GOAL := help
.PHONY: help setup export test check lint types pytest fix fuzz bench gpu clean

help: ## this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

setup: $(STAMP) ## make .venv and install memopt with all it needs

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "memopt: error: $(PYTHON) is older than 3.11; hint: make PYTHON=python3.11" >&2; exit 5; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(BINDINGS): $(STAMP) Makefile
	@for each in $(TRT_RELEASES); do \
	    $(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --target $(@D)/$${each##*==} "$$each" \
	    || echo "memopt: note: no $$each for this Python, its test is skipped" >&2; done
	@touch $@

export: $(STAMP) ## the main job: train, prune, distill, export, quantize, build, pack, compare (RECIPE=digits)
	@$(BIN)/memopt-export pipeline $(RECIPE)

test: lint types pytest ## ruff, mypy --strict, pytest with doctests
check: test ## the same as test: what CI runs

lint: $(STAMP)
	$(BIN)/ruff check $(SOURCES) tests
	$(BIN)/ruff format --check $(SOURCES) tests

types: $(STAMP)
	$(BIN)/mypy

pytest: $(STAMP) $(BINDINGS)
	$(BIN)/pytest

fix: $(STAMP) ## repair what ruff can repair
	$(BIN)/ruff check --fix $(SOURCES) tests
	$(BIN)/ruff format $(SOURCES) tests

fuzz: $(STAMP) ## fuzz the bundle reader and the pre-flight (SECONDS=600, SEED=1)
	$(BIN)/python tests/fuzz/fuzz.py --seconds $(SECONDS) --seed $(SEED)

bench: $(STAMP) ## the benchmarks and their marks, JSON in build/bench (BENCH=quantize: one of them)
	@status=0; for name in $(BENCH); do $(BIN)/python tests/benchmarks/bench_$$name.py || status=1; done; exit $$status

gpu: $(STAMP) ## the tests that need an NVIDIA GPU; without one they skip with the reason
	$(BIN)/pytest -m gpu -rs

clean: ## remove what export and test made; the .venv stays
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache
