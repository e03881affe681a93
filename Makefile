# `make` alone lists the targets. Everything runs in .venv, which `setup` makes from requirements.lock.
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3,$(if $(shell command -v $(name)),$(name))))
BIN := .venv/bin
ROOT ?= runs

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-cluster chaos lint format bench ui lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/installed: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or 3.12 is needed; call make PYTHON=python3.11") if not (3, 11) <= sys.version_info[:2] <= (3, 12) else 0'
	@echo "Setting up .venv: about 7 GB, two minutes or a few, once."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "$$(grep '^uv==' requirements.lock)"
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --requirement requirements.lock
	@touch $@

setup: .venv/installed ## make .venv with everything that is needed

demo: setup ## train a small Würstchen on this machine and draw pictures (5 to 30 minutes)
	$(BIN)/python -m pipeline run conf=stage_c root=$(ROOT)
	$(BIN)/python -m pipeline report conf=stage_c root=$(ROOT) out=report.html
	@echo "MLflow with all pictures and figures: make ui"

test: setup ## run the test suite
	$(BIN)/python -m pytest

.cluster-packages/installed: .venv/installed requirements-cluster.lock # those of clusters that the tests do without
	grep -vxFf requirements.lock requirements-cluster.lock | grep -v '^ray' | $(BIN)/uv pip install --quiet --no-deps \
		--python $(BIN)/python --target .cluster-packages --requirement -
	@touch $@

test-cluster: .cluster-packages/installed ## take drivers, ranks, nodes and stores away from runs and trainings (20 to 30 minutes)
	$(BIN)/python -m pytest -m cluster -n 2 --dist loadfile

chaos: setup ## kill runs inside each step and workers at 600 random points, and compare what is left (about 15 minutes)
	$(BIN)/python -m pytest -m chaos -n 0

lint: setup ## check style, types and layers; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## put the code into the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## measure the loop, reader, encoding, download, plan and models against plain ones
	$(BIN)/python -m tests.bench

ui: setup ## open MLflow on the runs of this checkout
	$(BIN)/python -m pipeline ui root=$(ROOT)

lock: setup ## resolve requirements.lock anew from pyproject.toml
	$(BIN)/uv pip compile pyproject.toml --group test --group lint --universal --python-version 3.11 \
		--no-emit-index-url --no-emit-find-links --no-annotate --no-header --upgrade -o requirements.lock
	$(BIN)/uv pip compile pyproject.toml --group cluster --universal --python-version 3.11 --constraint requirements.lock \
		--no-emit-index-url --no-emit-find-links --no-annotate --no-header -o requirements-cluster.lock

clean: ## delete .venv and caches; never runs
	rm -rf .venv .cluster-packages .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
