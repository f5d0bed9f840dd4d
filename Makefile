# Sets itself up; what is already there is not made again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup train test test-slow lint format bench bench-peers grid attack weights wheel clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(READY) ## virtual environment with pinned packages

$(READY): pyproject.toml .constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "fedsparse needs Python 3.11 or newer: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .constraints.txt -e '.[dev]'
	@touch $@

train: $(READY) ## the main job on the embedded data
	$(BIN)/python -m fedsparse.train $(ARGS)

# files go to two processes as they become free
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile

test: $(READY) ## the tests
	$(PYTEST) -m "not slow and not gpu"

test-slow: $(READY) ## the tests that take longer
	$(PYTEST) -m "slow and not gpu"

lint: $(READY) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## put the code in its usual form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## a round's time, memory and bytes beside a hand-written loop's, and the peers' that are installed
	$(BIN)/python -m fedsparse.bench $(ARGS)

# the packages of .venv stand behind a peer's own, so that torch is the same build and there once
PURELIB := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'

bench-peers: $(addprefix .peers/,$(addsuffix /.ready,pfl flwr fedlab)) ## environments of the peers, for make bench

.peers/%/.ready: fedsparse/bench/peers/%.txt $(READY)
	$(BIN)/python -m venv --clear --without-pip .peers/$*
	$(BIN)/python $(PURELIB) > "$$(.peers/$*/bin/python $(PURELIB))/main.pth"
	.peers/$*/bin/python -m pip install --quiet --disable-pip-version-check --no-warn-script-location --no-deps -r $<
	@touch $@

JOBS ?= 2
SWEEP = OMP_NUM_THREADS=1 $(BIN)/python -m fedsparse.train -m hydra/launcher=joblib hydra.launcher.n_jobs=$(JOBS) logger=csv
FIVE := random,least_sensitive,most_sensitive,lowest_magnitude,highest_magnitude
MODEL ?= mlp
RULES ?= $(FIVE),talos
SPARSITY ?= s50,s80,s95
PARTITION ?= iid,noniid_nc1,noniid_nc2,dirichlet01
# one seed finds the learning rate of each cell by validation, the other four repeat it
GRID = $(SWEEP) pictures=false model=$(MODEL) seed=0 optimizer.lr=0.03,0.1,0.3 \
	partition=$(PARTITION) calibration.rounds=4 federation.eval_every=2
REPEAT = OMP_NUM_THREADS=1 $(BIN)/python -m fedsparse.repeat --seeds 1 2 3 4 --jobs $(JOBS)
AT = runs/grid/$(MODEL)

grid: $(READY) ## six rules x three sparsities x four partitions x five seeds; MODEL=vit_digits for the default model
	@echo "With all rules, sparsities and partitions 560 runs (240 find learning rates, 320 repeat the best), JOBS=$(JOBS) at a time: on two idle cores a quarter of an hour for mlp, an hour for vit_digits"
	@echo "What is finished in $(AT) is skipped, what was stopped goes on."
	$(GRID) mask_rule=dense hydra.sweep.dir=$(AT)/dense
	$(GRID) mask_rule=dense model.trainable=head hydra.sweep.dir=$(AT)/head
	$(GRID) mask_rule=$(RULES) sparsity=$(SPARSITY) hydra.sweep.dir=$(AT)/rules
	$(REPEAT) $(AT)/dense
	$(REPEAT) $(AT)/head
	$(REPEAT) $(AT)/rules
	$(BIN)/python -m fedsparse.report $(AT) --out $(AT)/report

ATTACK = $(SWEEP) pictures=false experiment=byzantine_digits model=$(MODEL) seed=0,1,2,3,4 exchange.attackers=null,4
UNDER = runs/attack/$(MODEL)

attack: $(READY) ## robust averages under sign-flipping clients, five seeds; MODEL=vit_digits for the default model
	@echo "80 runs of 10 rounds and 20 clients each, JOBS=$(JOBS) at a time: on two idle cores about three minutes for mlp, a quarter of an hour for vit_digits"
	@echo "What is finished in $(UNDER) is skipped, what was stopped goes on."
	$(ATTACK) aggregation=weighted_mean,median,geometric_median hydra.sweep.dir=$(UNDER)/plain
	$(ATTACK) aggregation=trimmed_mean aggregation.average.trim=0.2,0.25 hydra.sweep.dir=$(UNDER)/trim
	$(ATTACK) aggregation=krum aggregation.average.attackers=4 hydra.sweep.dir=$(UNDER)/krum
	$(ATTACK) aggregation=multi_krum aggregation.average.attackers=4 hydra.sweep.dir=$(UNDER)/multi_krum
	$(BIN)/python -m fedsparse.attack $(UNDER)

weights: $(READY) ## pre-train the embedded model again
	$(BIN)/python -m fedsparse.pretrain $(ARGS)

wheel: $(READY) ## build the wheel
	$(BIN)/python -m build --wheel

clean: ## remove what was built, not the runs
	rm -rf $(VENV) .peers build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
