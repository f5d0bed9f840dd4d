# The studies of docs/studies/replications.md. SIZE=small is what its tables show; SIZE=full is as long as the sources ran,
# and no machine of ours has run it. Data lie below data/, or are downloaded (CIFAR-10, MNIST); AG News and Shakespeare
# need AG_NEWS and SHAKESPEARE, the folders that data.root of data=ag_news and data=shakespeare take.

SIZE ?= full
REPLICATIONS_AT ?= runs/replications
AG_NEWS ?= data/ag_news
SHAKESPEARE ?= data/shakespeare
REPLICATE = $(SWEEP) pictures=false
SEEDS = 0 1 2
AGAIN = OMP_NUM_THREADS=1 $(BIN)/python -m fedsparse.repeat --seeds $(SEEDS) --jobs $(JOBS)
SKIPPED = @echo "What is finished in $(1) is skipped, what was stopped goes on."
REPORT = $(BIN)/python -m fedsparse.report $(1) --out $(1)/report --save $(1)/runs.csv.gz

.PHONY: replicate-autoflip replicate-exchange replicate-fedavg replicate-methods replicate-masks

# every row has the same client steps, exploration included; the rate of all is that of dense training on seed 10, IID.
# Two classes a client (patho), as the source has them, is learned by nothing within SIZE=small, so there it is two rules.
CIFAR_FLIP = $(REPLICATIONS_AT)/$(SIZE)/autoflip
CIFAR_LR_full ?= 3e-4
CIFAR_LR_small ?= 3e-3
CIFAR_FLIP_full = federation.local_epochs=null federation.local_steps=30 'federation.rounds=$${rounds_for_steps:48000}' explore.epochs=null explore.steps=900 explore.patience=null
CIFAR_FLIP_small = data.batch_size=32 model.hidden=8 federation.local_epochs=null federation.local_steps=20 'federation.rounds=$${rounds_for_steps:5000}' explore.epochs=null explore.steps=20 explore.patience=null
CIFAR_FLIP_RUN = $(REPLICATE) experiment=autoflip_cifar10 evaluation=global federation.eval_every=10 $(CIFAR_FLIP_$(SIZE))
CIFAR_FLIP_SEEDS = $(CIFAR_FLIP_RUN) seed=0,1,2 optimizer.lr=$(CIFAR_LR_$(SIZE))

replicate-autoflip: $(READY) ## AutoFLIP in its own setting on CIFAR-10, with and without its head start; SIZE=small
	@echo "42 runs, JOBS=$(JOBS) at a time. SIZE=small: 5,000 client steps of 32 images each; SIZE=full: 48,000 of 350, for a GPU"
	$(call SKIPPED,$(CIFAR_FLIP))
	$(CIFAR_FLIP_RUN) mask_rule=dense partition=iid seed=10 optimizer.lr=3e-4,1e-3,3e-3 hydra.sweep.dir=$(CIFAR_FLIP)/rates
	$(CIFAR_FLIP_SEEDS) mask_rule=dense partition=iid,patho hydra.sweep.dir=$(CIFAR_FLIP)/runs/dense
	$(CIFAR_FLIP_SEEDS) mask_rule=autoflip,random partition=iid,patho hydra.sweep.dir=$(CIFAR_FLIP)/runs/rules
	$(CIFAR_FLIP_SEEDS) mask_rule=snip,highest_magnitude partition=iid hydra.sweep.dir=$(CIFAR_FLIP)/runs/more
	$(CIFAR_FLIP_SEEDS) mask_rule=dense partition=iid $(STARTED) hydra.sweep.dir=$(CIFAR_FLIP)/runs/dense_started
	$(CIFAR_FLIP_SEEDS) mask_rule=autoflip,snip,highest_magnitude,random partition=iid $(STARTED) hydra.sweep.dir=$(CIFAR_FLIP)/runs/rules_started
	$(call REPORT,$(CIFAR_FLIP)/runs)

# the rate of each cell by validation on seed 10, which is not reported
NEWS = $(REPLICATIONS_AT)/$(SIZE)/ag_news
NEWS_full = model=bert_base optimizer.lr=1e-5,5e-5,1e-4
NEWS_CENTRAL_full = federation.local_steps=3000
NEWS_small = model=bert_tiny data.max_length=64 federation.local_steps=40 optimizer.lr=1e-3,3e-3
NEWS_CENTRAL_small = federation.local_steps=120
NEWS_RUN = $(REPLICATE) experiment=sparse_exchange_ag_news data.root=$(AG_NEWS) federation.eval_every=2 seed=10 $(NEWS_$(SIZE))

replicate-exchange: $(READY) ## sparse tensor exchange on AG News, as published and with what it lacks; SIZE=small
	@echo "26 runs choose learning rates, 39 are reported, JOBS=$(JOBS) at a time. SIZE=small: bert_tiny, 720 local steps of 16; SIZE=full: BERT, 18,000, for a GPU"
	$(call SKIPPED,$(NEWS))
	$(NEWS_RUN) exchange.by=largest_change,largest_final exchange.fraction=0.01,0.1,0.3,1.0 hydra.sweep.dir=$(NEWS)/rates/topk
	$(NEWS_RUN) exchange.compat=original exchange.fraction=0.01,0.1,0.3 hydra.sweep.dir=$(NEWS)/rates/original
	$(NEWS_RUN) exchange.fraction=1.0 model.trainable=head hydra.sweep.dir=$(NEWS)/rates/head
	$(NEWS_RUN) exchange.fraction=1.0 federation.num_clients=1 $(NEWS_CENTRAL_$(SIZE)) partition=iid '~partition.beta' '~partition.sample_fraction' hydra.sweep.dir=$(NEWS)/rates/central
	$(AGAIN) $(NEWS)/rates --into $(NEWS)/runs
	$(BIN)/python -m fedsparse.studies.text_baselines --ag-news $(AG_NEWS)
	$(call REPORT,$(NEWS)/runs)

FEDAVG = $(REPLICATIONS_AT)/$(SIZE)/fedavg
MNIST_full = federation.rounds=300
MNIST_small = model.hidden=8 federation.rounds=40
PLAYS_full = federation.clients_per_round=10 federation.rounds=200 federation.local_steps=null
PLAYS_few_full = federation.local_epochs=1
PLAYS_many_full = federation.local_epochs=5
PLAYS_small = federation.clients_per_round=5
PLAYS_few_small = federation.rounds=100 federation.local_steps=4 federation.eval_every=4
PLAYS_many_small = federation.rounds=20 federation.local_steps=20
FEDAVG_RUN = $(REPLICATE) mask_rule=dense head.init=random data.batch_size=10
MNIST_RUN = $(FEDAVG_RUN) data=mnist model=two_cnn federation.num_clients=100 federation.clients_per_round=0.1 federation.local_steps=null federation.local_epochs=1,5 $(MNIST_$(SIZE))
PLAYS_RUN = $(FEDAVG_RUN) data=shakespeare data.root=$(SHAKESPEARE) model=next_char_lstm partition=natural federation.num_clients=227 federation.eval_share=0.02 optimizer.momentum=0 $(PLAYS_$(SIZE))

replicate-fedavg: $(READY) ## FedAvg as published: MNIST with two classes per client, Shakespeare by roles, local epochs 1 and 5; SIZE=small
	@echo "12 runs choose learning rates, 12 on MNIST and 6 on Shakespeare are reported, JOBS=$(JOBS) at a time"
	$(call SKIPPED,$(FEDAVG))
	$(MNIST_RUN) partition=iid,noniid_nc2 seed=10 optimizer.lr=0.03,0.1 hydra.sweep.dir=$(FEDAVG)/rates/mnist
	$(AGAIN) $(FEDAVG)/rates/mnist --into $(FEDAVG)/mnist
	$(PLAYS_RUN) $(PLAYS_few_$(SIZE)) seed=10 optimizer.lr=1.0,3.0 hydra.sweep.dir=$(FEDAVG)/rates/shakespeare/few
	$(PLAYS_RUN) $(PLAYS_many_$(SIZE)) seed=10 optimizer.lr=1.0,3.0 hydra.sweep.dir=$(FEDAVG)/rates/shakespeare/many
	$(AGAIN) $(FEDAVG)/rates/shakespeare --into $(FEDAVG)/shakespeare
	$(call REPORT,$(FEDAVG)/mnist) --reach 0.9
	$(call REPORT,$(FEDAVG)/shakespeare) --reach 0.2

# clients keep no momentum, as in the methods' papers; an epoch of what each client has, so that their steps differ (FedNova);
# the rate of each method by validation on seed 10, which is not reported
METHODS = $(REPLICATIONS_AT)/$(SIZE)/methods
METHODS_full = federation.rounds=1000 federation.eval_every=50
METHODS_small = model.hidden=8 federation.rounds=40 federation.eval_every=10
METHODS_RUN = $(REPLICATE) mask_rule=dense head.init=random data=cifar10 data.batch_size=32 model=two_cnn partition=dirichlet01 federation.num_clients=100 federation.clients_per_round=10 federation.local_steps=null federation.local_epochs=2 optimizer.momentum=0 optimizer.lr=0.01,0.03,0.1,0.3 seed=10 $(METHODS_$(SIZE))

replicate-methods: $(READY) ## FedAvgM, FedAdam, FedProx, SCAFFOLD and FedNova beside FedAvg on CIFAR-10, Dirichlet 0.1; SIZE=small
	@echo "24 runs choose learning rates, 18 are reported, JOBS=$(JOBS) at a time. SIZE=small: 40 rounds, 8 channels; SIZE=full: 1,000, for a GPU"
	$(call SKIPPED,$(METHODS))
	$(METHODS_RUN) server=fedavg,fedavgm,fedadam hydra.sweep.dir=$(METHODS)/rates/server
	$(METHODS_RUN) objective=fedprox,scaffold hydra.sweep.dir=$(METHODS)/rates/objective
	$(METHODS_RUN) aggregation=fednova hydra.sweep.dir=$(METHODS)/rates/aggregation
	$(AGAIN) $(METHODS)/rates --into $(METHODS)/runs
	$(call REPORT,$(METHODS)/runs)

# a net pre-trained on one half of the training images is fine-tuned on the other; dense training and the head alone choose
# their rates by validation on seed 10, in each partition and for each number of local steps; every mask takes dense's
MASKS = $(REPLICATIONS_AT)/$(SIZE)/masks
MASKS_full = data.batch_size=32
MASKS_STEPS_full = 20000
MASKS_small = data.batch_size=16
MASKS_HIDDEN_full = 32
MASKS_HIDDEN_small = 8
MASKS_STEPS_small = 1200
MASKS_NET = $(REPLICATE) data=cifar10 model=two_cnn model.hidden=$(MASKS_HIDDEN_$(SIZE)) federation.channels_last=true
MASKS_RUN = $(MASKS_NET) $(MASKS_$(SIZE)) data.part=b model.checkpoint=$(MASKS)/start/model.safetensors federation.num_clients=20 federation.clients_per_round=0.25 'federation.rounds=$${rounds_for_steps:$(MASKS_STEPS_$(SIZE))}' federation.eval_every=20
MASKS_RATES = $(MASKS_RUN) seed=10 partition=$(1) federation.local_steps=4,16 mask_rule=dense optimizer.lr=0.003,0.01,0.03 hydra.sweep.dir=$(MASKS)/rates/$(1)
MASKS_RULES = $(MASKS_RUN) seed=0,1,2,3,4 mask_rule=random,least_sensitive,most_sensitive,talos sparsity.ratio=0.5,0.8,0.95
MASKS_LR_iid_4 ?= 0.01
MASKS_LR_iid_16 ?= 0.01
MASKS_LR_noniid_nc1_4 ?= 0.01
MASKS_LR_noniid_nc1_16 ?= 0.01
MASKS_LR_dirichlet01_4 ?= 0.01
MASKS_LR_dirichlet01_16 ?= 0.01
MASKS_AT = $(MASKS_RULES) partition=$(1) federation.local_steps=$(2) optimizer.lr=$(MASKS_LR_$(1)_$(2)) hydra.sweep.dir=$(MASKS)/runs/$(1)/$(2)

replicate-masks: SEEDS = 0 1 2 3 4
replicate-masks: $(READY) ## masks on a TwoCNN pre-trained on one half of CIFAR-10, fine-tuned on the other; SIZE=small
	@echo "1 run pre-trains, 36 choose learning rates, 420 are reported, JOBS=$(JOBS) at a time. SIZE=small: 1,200 client steps of 16 images; SIZE=full: 20,000 of 32, for a GPU"
	$(call SKIPPED,$(MASKS))
	$(MASKS_NET) data.part=a mask_rule=dense head.init=random data.batch_size=32 partition=iid federation.num_clients=1 federation.local_steps=null federation.local_epochs=1 federation.rounds=12 federation.eval_every=2 seed=10 optimizer.lr=0.01 schedule=cosine hydra.sweep.dir=$(MASKS) hydra.sweep.subdir=start
	$(call MASKS_RATES,iid)/dense
	$(call MASKS_RATES,iid)/head model.trainable=head
	$(AGAIN) $(MASKS)/rates/iid --into $(MASKS)/runs/iid
	$(call MASKS_RATES,noniid_nc1)/dense
	$(call MASKS_RATES,noniid_nc1)/head model.trainable=head
	$(AGAIN) $(MASKS)/rates/noniid_nc1 --into $(MASKS)/runs/noniid_nc1
	$(call MASKS_RATES,dirichlet01)/dense
	$(call MASKS_RATES,dirichlet01)/head model.trainable=head
	$(AGAIN) $(MASKS)/rates/dirichlet01 --into $(MASKS)/runs/dirichlet01
	$(call MASKS_AT,iid,4)
	$(call MASKS_AT,iid,16)
	$(call REPORT,$(MASKS)/runs/iid)
	$(call MASKS_AT,noniid_nc1,4)
	$(call MASKS_AT,noniid_nc1,16)
	$(call REPORT,$(MASKS)/runs/noniid_nc1)
	$(call MASKS_AT,dirichlet01,4)
	$(call MASKS_AT,dirichlet01,16)
	$(call REPORT,$(MASKS)/runs/dirichlet01)
