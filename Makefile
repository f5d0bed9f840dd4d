# Sets itself up; what is already there is not made again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup train test test-slow soak fuzz mutate lint format docs bench bench-peers deploy-demo grid exchange attack autoflip fedland landscapes lora departments weights weights-text wheel clean

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

PURELIB := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'

# files go to two processes as they become free
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile

test: $(READY) ## the tests
	$(PYTEST) -m "not slow and not gpu"

test-slow: $(READY) ## the tests that take longer
	$(PYTEST) -m "slow and not gpu and not soak"

soak: $(READY) ## slow tests of whose kind others are in make test-slow, and checks of seconds
	$(PYTEST) -m soak

fuzz: $(READY) ## damaged files, messages and configurations: all attempts, where make test makes a tenth of them
	FEDSPARSE_FUZZ=full $(PYTEST) -m fuzz

SEED ?= 0
N ?= 300
JOBS ?= 2
mutate: $(READY) ## random one-token mutants of the core: how many the tests notice; N=100, SEED=1, JOBS=1, ARGS='--at FILE:LINES --tests FILES'
	PYTHONPATH=tests $(BIN)/python -m mutation --number $(N) --seed $(SEED) --jobs $(JOBS) $(ARGS)

lint: $(READY) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## put the code in its usual form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# the packages of .venv stand behind mkdocs's own, so that the site is written from the code as it runs
.docs-venv/.ready: docs/requirements.txt $(READY)
	$(BIN)/python -m venv --clear --without-pip .docs-venv
	$(BIN)/python $(PURELIB) > "$$(.docs-venv/bin/python $(PURELIB))/main.pth"
	.docs-venv/bin/python -m pip install --quiet --disable-pip-version-check --no-warn-script-location --no-deps -r $<
	@touch $@

docs: .docs-venv/.ready ## the documentation site, in build/site; a broken link or a public name without a docstring fails
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. .docs-venv/bin/python -m mkdocs build --strict
	@echo "file://$(CURDIR)/build/site/index.html"

bench: $(READY) ## a round's time, memory and bytes beside a hand-written loop's, and the peers' that are installed
	$(BIN)/python -m fedsparse.bench $(ARGS)

# the packages of .venv stand behind a peer's own, so that torch is the same build and there once
bench-peers: $(addprefix .peers/,$(addsuffix /.ready,pfl flwr fedlab fedjax)) ## environments of the peers, for make bench

.peers/%/.ready: fedsparse/bench/peers/%.txt $(READY)
	$(BIN)/python -m venv --clear --without-pip .peers/$*
	$(BIN)/python $(PURELIB) > "$$(.peers/$*/bin/python $(PURELIB))/main.pth"
	.peers/$*/bin/python -m pip install --quiet --disable-pip-version-check --no-warn-script-location --no-deps -r $<
	@touch $@

# in the environment of Flower; what it starts is ended, also by Ctrl-C
deploy-demo: .peers/flwr/.ready ## server and four nodes over Flower with TLS on this machine, three rounds, and the simulator beside them
	PYTHONPATH="$(CURDIR)" OMP_NUM_THREADS=1 .peers/flwr/bin/python -m fedsparse.deploy.demo $(ARGS)

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

# what a client sends is chosen anew each round, from all weights; masks and dense training beside it, all at one rate
EXCHANGE_RULES ?= largest_change,largest_final
FRACTIONS ?= 0.01,0.1,0.3,1
LR ?= 0.1
DOCS_LR ?= 0.1
EXCHANGE_AT = runs/exchange
DIGITS = $(SWEEP) pictures=false data=digits model=$(MODEL) seed=0,1,2,3,4 optimizer.lr=$(LR) federation.eval_every=2
DOCS = $(SWEEP) pictures=false data=stdlib_docs model=bert_tiny data.max_length=48 seed=0,1,2 optimizer.lr=$(DOCS_LR) \
	federation.rounds=20 federation.local_steps=16 federation.eval_every=5
TOPK = mask_rule=dense exchange=topk exchange.fraction=$(FRACTIONS) exchange.by=$(EXCHANGE_RULES)
RANDOMK = mask_rule=dense exchange=randomk exchange.fraction=$(FRACTIONS)
# without feedback a coordinate is averaged over those that sent it; what feedback holds back counts as zero until it is sent
SENDERS := aggregation=coordinate_mean aggregation.denominator=senders
FEEDBACK := aggregation=coordinate_mean aggregation.denominator=participants exchange.feedback=1.0
HALF := $(SENDERS) exchange.precision=float16
MASKED := exchange=masked mask_rule=random sparsity=s80
FULL := exchange=full mask_rule=dense

exchange: $(READY) ## sparse exchanges, masked and dense training: accuracy against bytes; MODEL=vit_digits, FRACTIONS=0.1, LR=0.03
	@echo "With all rules and fractions 202 runs, JOBS=$(JOBS) at a time: 190 on digits (nine lines of four fractions, masked, dense; five seeds), 12 on the documentation of Python's library (three seeds)"
	@echo "What is finished in $(EXCHANGE_AT) is skipped, what was stopped goes on."
	$(DIGITS) $(TOPK) $(SENDERS) hydra.sweep.dir=$(EXCHANGE_AT)/$(MODEL)/topk
	$(DIGITS) $(TOPK) $(FEEDBACK) hydra.sweep.dir=$(EXCHANGE_AT)/$(MODEL)/topk_feedback
	$(DIGITS) $(TOPK) $(HALF) hydra.sweep.dir=$(EXCHANGE_AT)/$(MODEL)/topk_half
	$(DIGITS) $(RANDOMK) $(SENDERS) hydra.sweep.dir=$(EXCHANGE_AT)/$(MODEL)/randomk
	$(DIGITS) $(RANDOMK) $(FEEDBACK) hydra.sweep.dir=$(EXCHANGE_AT)/$(MODEL)/randomk_feedback
	$(DIGITS) $(RANDOMK) $(HALF) hydra.sweep.dir=$(EXCHANGE_AT)/$(MODEL)/randomk_half
	$(DIGITS) $(MASKED) hydra.sweep.dir=$(EXCHANGE_AT)/$(MODEL)/masked
	$(DIGITS) $(FULL) hydra.sweep.dir=$(EXCHANGE_AT)/$(MODEL)/dense
	$(DOCS) mask_rule=dense exchange=topk exchange.by=largest_change exchange.fraction=0.1 $(SENDERS) hydra.sweep.dir=$(EXCHANGE_AT)/docs/topk
	$(DOCS) mask_rule=dense exchange=randomk exchange.fraction=0.1 $(SENDERS) hydra.sweep.dir=$(EXCHANGE_AT)/docs/randomk
	$(DOCS) $(MASKED) hydra.sweep.dir=$(EXCHANGE_AT)/docs/masked
	$(DOCS) $(FULL) hydra.sweep.dir=$(EXCHANGE_AT)/docs/dense
	$(BIN)/python -m fedsparse.report $(EXCHANGE_AT) --out $(EXCHANGE_AT)/report

ATTACK = $(SWEEP) pictures=false experiment=byzantine_digits model=$(MODEL) seed=0,1,2,3,4 exchange.attackers=null,4
UNDER = runs/attack/$(MODEL)

attack: $(READY) ## robust averages under sign-flipping clients, five seeds; MODEL=vit_digits for the default model
	@echo "80 runs of 10 rounds and 20 clients each, JOBS=$(JOBS) at a time: on two idle cores about three minutes for mlp, a quarter of an hour for vit_digits"
	@echo "What is finished in $(UNDER) is skipped, what was stopped goes on."
	$(ATTACK) aggregation=weighted_mean,median,geometric_median hydra.sweep.dir=$(UNDER)/plain
	$(ATTACK) aggregation=trimmed_mean aggregation.average.trim=0.2,0.25 hydra.sweep.dir=$(UNDER)/trim
	$(ATTACK) aggregation=krum aggregation.average.attackers=4 hydra.sweep.dir=$(UNDER)/krum
	$(ATTACK) aggregation=multi_krum aggregation.average.attackers=4 hydra.sweep.dir=$(UNDER)/multi_krum
	$(BIN)/python -m fedsparse.studies.attack $(UNDER)

# federation.rounds follows from 1200 client steps in all, whatever a rule's preparation takes of them; two seeds that are not
# reported choose the learning rate of each cell by validation
AUTOFLIP_AT ?= runs/autoflip
AUTOFLIP_RULES ?= random,highest_magnitude,snip,autoflip
RATES ?= 0.01,0.03,0.1,0.3,1,3
AUTOFLIP = $(SWEEP) pictures=false experiment=autoflip_digits partition=iid,noniid_nc2 federation.eval_every=5
RATE = seed=10,11 optimizer.lr=$(RATES)
RATIOS := sparsity.ratio=0.5,0.7,0.9
STARTED := phases=explore explore.keep_model=true
GUIDANCE = $(SWEEP) pictures=false experiment=autoflip_digits partition=iid,noniid_nc2 seed=0,1,2,3,4 federation.rounds=1 explore.save=true

autoflip: $(READY) ## mask rules at equal client steps with and without AutoFLIP's head start, five seeds; and what its deviations measure
	@echo "986 runs of 1200 client steps each and 40 explorations, JOBS=$(JOBS) at a time; a run took 0.3 to 0.9 s beside other work"
	@echo "(58 cells: 696 runs choose learning rates, 290 are reported.) What is finished in $(AUTOFLIP_AT) is skipped, what was stopped goes on."
	$(AUTOFLIP) $(RATE) mask_rule=dense hydra.sweep.dir=$(AUTOFLIP_AT)/rates/dense
	$(AUTOFLIP) $(RATE) mask_rule=$(AUTOFLIP_RULES) $(RATIOS) hydra.sweep.dir=$(AUTOFLIP_AT)/rates/rules
	$(AUTOFLIP) $(RATE) mask_rule=autoflip explore.steps=4 $(RATIOS) hydra.sweep.dir=$(AUTOFLIP_AT)/rates/short
	$(AUTOFLIP) $(RATE) mask_rule=dense $(STARTED) hydra.sweep.dir=$(AUTOFLIP_AT)/rates/dense_started
	$(AUTOFLIP) $(RATE) mask_rule=$(AUTOFLIP_RULES) $(STARTED) $(RATIOS) hydra.sweep.dir=$(AUTOFLIP_AT)/rates/rules_started
	OMP_NUM_THREADS=1 $(BIN)/python -m fedsparse.repeat $(AUTOFLIP_AT)/rates --seeds 0 1 2 3 4 --into $(AUTOFLIP_AT)/runs --jobs $(JOBS)
	$(BIN)/python -m fedsparse.report $(AUTOFLIP_AT)/runs --out $(AUTOFLIP_AT)/report
	$(GUIDANCE) optimizer.lr=0.1 hydra.sweep.dir=$(AUTOFLIP_AT)/guidance/sgdm
	$(GUIDANCE) optimizer=adam hydra.sweep.dir=$(AUTOFLIP_AT)/guidance/adam
	$(GUIDANCE) model=vit_digits head.init=probe optimizer.lr=0.1 hydra.sweep.dir=$(AUTOFLIP_AT)/guidance/vit_sgdm
	$(GUIDANCE) model=vit_digits head.init=probe optimizer=adam hydra.sweep.dir=$(AUTOFLIP_AT)/guidance/vit_adam
	$(BIN)/python -m fedsparse.studies.correlations $(AUTOFLIP_AT)/guidance

# ten clients, all in every round; central: one that holds everything and takes as many steps
FEDLAND_AT ?= runs/fedland
FEDLAND = $(SWEEP) pictures=false experiment=fedland_digits
CENTRAL = $(SWEEP) pictures=false experiment=fedland_digits_central
QUEUE = $(FEDLAND_AT)/$(MODEL)

fedland: $(READY) ## Fedland's queue on digits: IID, unbalanced and one class a client, five seeds, and central twins; MODEL=vit_digits
	@echo "20 runs of 2200 client steps each, JOBS=$(JOBS) at a time: about 1.2 minutes of CPU time for mlp, 13 for vit_digits"
	@echo "What is finished in $(QUEUE) is skipped, what was stopped goes on."
	$(FEDLAND) partition=iid,ratios_ten,noniid_nc1 model=$(MODEL) seed=0,1,2,3,4 hydra.sweep.dir=$(QUEUE)/federated
	$(CENTRAL) model=$(MODEL) seed=0,1,2,3,4 hydra.sweep.dir=$(QUEUE)/central
	$(BIN)/python -m fedsparse.report $(QUEUE) --out $(QUEUE)/report

LANDSCAPES_AT ?= runs/landscapes
LANDSCAPES_OF = model=mlp,vit_digits seed=0,1,2 trajectory=global

landscapes: $(READY) ## landscapes of mlp and vit_digits over their rounds: IID, one class a client, central, three seeds
	@echo "18 runs of 2200 client steps each and 72 landscapes, JOBS=$(JOBS) at a time: about 45 minutes of CPU time, so 25 on two idle cores"
	@echo "What is finished in $(LANDSCAPES_AT) is skipped, what was stopped goes on."
	$(FEDLAND) partition=iid,noniid_nc1 $(LANDSCAPES_OF) hydra.sweep.dir=$(LANDSCAPES_AT)/federated
	$(CENTRAL) $(LANDSCAPES_OF) hydra.sweep.dir=$(LANDSCAPES_AT)/central
	OMP_NUM_THREADS=1 $(BIN)/python -m fedsparse.studies.landscapes $(LANDSCAPES_AT) --rounds 1 3 10 25 --jobs $(JOBS)
	$(BIN)/python -m fedsparse.report $(LANDSCAPES_AT) --out $(LANDSCAPES_AT)/report

# exports that are there already stay
LORA_AT ?= runs/lora
LORA = $(SWEEP) pictures=false experiment=departments_docs topology=departments

lora: $(READY) ## low-rank adapters in four departments: methods, their figures on each department's data, and exports for PEFT
	@echo "What is finished in $(LORA_AT) is skipped, what was stopped goes on."
	$(LORA) method=local,fedit,fedsa hydra.sweep.dir=$(LORA_AT)
	for run in $(LORA_AT)/*method-*; do $(BIN)/python -m fedsparse.adapters "$$run" evaluate && $(BIN)/python -m fedsparse.adapters "$$run" export || exit 1; done
	$(BIN)/python -m fedsparse.report $(LORA_AT) --out $(LORA_AT)/report

DEPARTMENTS_AT ?= runs/departments
DEPARTMENTS = OMP_NUM_THREADS=1 $(BIN)/python -m fedsparse.train -m experiment=departments_docs hydra/launcher=joblib hydra.launcher.n_jobs=$(JOBS) logger=csv pictures=false seed=0,1,2

departments: $(READY) ## adapters' methods with own and shared codes of answers, and which representation finds departments alike
	@echo "30 runs of 20 rounds and 12 of 10, JOBS=$(JOBS) at a time: about 55 minutes of CPU time"
	@echo "What is finished in $(DEPARTMENTS_AT) is skipped, what was stopped goes on."
	$(DEPARTMENTS) method=local,fedit,fedsa,ffa,flora data.code=own,shared hydra.sweep.dir=$(DEPARTMENTS_AT)/methods
	$(DEPARTMENTS) method=fedit topology=departments mixing=clusters mixing.k=3 mixing.share=0 mixing.of=A,A-start,B,BA federation.rounds=10 hydra.sweep.dir=$(DEPARTMENTS_AT)/clusters
	$(BIN)/python -m fedsparse.report $(DEPARTMENTS_AT) --out $(DEPARTMENTS_AT)/report

# CIFAR-10, AG News, MNIST and Shakespeare
include docs/studies/replications.mk

weights: $(READY) ## pre-train the embedded model again; weights-text: that of texts
	$(BIN)/python -m fedsparse.studies.pretrain $(ARGS)

weights-text: $(READY) ## pre-train the embedded model of texts again
	$(BIN)/python -m fedsparse.studies.pretrain_text $(ARGS)

wheel: $(READY) ## build the wheel
	$(BIN)/python -m build --wheel

clean: ## remove what was built, not the runs
	rm -rf $(VENV) .peers .docs-venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
