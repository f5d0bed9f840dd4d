# Sets itself up; what is already there is not made again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup train test test-slow lint format bench table weights wheel clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(READY) ## virtual environment with pinned packages

$(READY): pyproject.toml .constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "fedsparse needs Python 3.11 or newer: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .constraints.txt -e '.[dev]'
	@touch $@

train: $(READY) ## the main job on the embedded data
	$(BIN)/python -m fedsparse.train $(ARGS)

test: $(READY) ## the tests
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: $(READY) ## the tests that take longer
	$(BIN)/python -m pytest -m "slow and not gpu"

lint: $(READY) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## put the code in its usual form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## a round's time over that of a hand-written loop, in pairs
	$(BIN)/python -m fedsparse.bench $(ARGS)

TABLE := OMP_NUM_THREADS=1 $(BIN)/python -m fedsparse.train -m hydra/launcher=joblib hydra.launcher.n_jobs=2 \
	logger=csv seed=0,1,2,3,4 optimizer.lr=0.03,0.1,0.3 partition=iid,noniid_nc1
RULES := dense,random,most_sensitive,least_sensitive,highest_magnitude,lowest_magnitude

table: $(READY) ## the README's first table: 210 runs, a quarter of an hour
	$(TABLE) mask_rule=$(RULES) hydra.sweep.dir=runs/table/rules
	$(TABLE) mask_rule=dense model.trainable=head hydra.sweep.dir=runs/table/head
	$(BIN)/python -m fedsparse.report runs/table --pixels

weights: $(READY) ## pre-train the embedded model again
	$(BIN)/python -m fedsparse.pretrain $(ARGS)

wheel: $(READY) ## build the wheel
	$(BIN)/python -m build --wheel

clean: ## remove what was built, not the runs
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
