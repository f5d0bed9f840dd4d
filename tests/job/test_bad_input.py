"""Bad input gets one line that says what is wrong and what would be right; nothing is overwritten."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fedsparse import run
from fedsparse.job import execute
from fedsparse.job.command import one_line

BASE = ["model=mlp", "logger=csv", "federation.rounds=1", "calibration.head_steps=1", "pictures=false"]
BAD = [
    ("mask_rule=lest_sensitive", "there is no mask_rule=lest_sensitive; did you mean mask_rule=least_sensitive"),
    (
        "federation.round=3",
        "there is no key federation.round; did you mean federation.rounds.* --cfg job lists all keys",
    ),
    ("+federation.round=3", "there is no key federation.round; did you mean federation.rounds"),
    ("+sede=3", "there is no key sede"),
    (
        "experiment=sparse_exchange_ag_news exchange=full",
        "sets exchange.by and exchange.fraction, which exchange=full does not .* add ~exchange.by ~exchange.fraction",
    ),
    (
        "experiment=sparse_exchange_ag_news partition=iid",
        "experiment=sparse_exchange_ag_news sets partition.beta .* add ~partition.beta ~partition.sample_fraction",
    ),
    ("+calibration.batchs=3", "batchs"),
    ("sparsity.ratio=1.0", "sparsity.ratio"),
    ("sparsity.ratio=-0.1", "sparsity.ratio"),
    ("sparsity.ratio=much", "sparsity.ratio"),
    ("sparsity.ratio=nan", "sparsity.ratio"),
    ("sparsity.mode=melt", "sparsity.mode is 'melt'; it must be freeze or prune"),
    ("sparsity.min_density=0.5", "sparsity.min_density=0.5 is more than the density"),
    (
        "sparsity.min_density=much",
        "sparsity.min_density is .much.; it must be a finite number of 0 or more",
    ),
    ("sparsity.schedule=cubic", "sparsity.schedule is .*; it must be null or a node of initial, begin, every, steps"),
    ("sparsity.schedule={inital:0}", "sparsity.schedule is .*; it must be null or a node of initial"),
    (
        "sparsity=gradual80 sparsity.schedule.steps=0",
        "sparsity.schedule.steps is .*; it must be a whole number of 1 or more",
    ),
    ("sparsity=gradual80 sparsity.schedule.initial=0.9", "sparsity.schedule.initial=0.9 is more than sparsity.ratio"),
    ("sparsity.renew_every=0", "sparsity.renew_every is 0; it must be a whole number of 1 or more"),
    (
        "mask_rule=autoflip mask_rule.normalise=zscore",
        "mask_rule.normalise is .*; it must be minmax, robust, rank or none",
    ),
    ("mask_rule=autoflip mask_rule.compat=paper", "mask_rule.compat is 'paper'; it must be null or original"),
    ("mask_rule=synflow mask_rule.iterations=0", "mask_rule.iterations is 0; it must be a whole number of 1 or more"),
    ("mask_rule=movement", "mask_rule=movement .* sparsity=gradual80"),
    ("mask_rule=talos sparsity=gradual80", "Talos chooses once, .*sparsity.schedule and sparsity.renew_every must be"),
    ("mask_rule=from_file mask_rule.path=x sparsity.renew_every=2", "takes the mask of the file for the whole run"),
    ("mask_rule=talos sparsity.renew_every=2", "Talos chooses once, .*sparsity.schedule and sparsity.renew_every"),
    ("mask_rule=autoflip mask_rule.refine=maybe", "mask_rule.refine is 'maybe'; it must be true or false"),
    ("sparsity.scope=layer", "sparsity.scope"),
    ("federation.num_clients=0", "federation.num_clients is 0; it must be a whole number of 1 or more"),
    ("federation.num_clients=2.5", "federation.num_clients is 2.5"),
    ("federation.num_clients=5000", "5000"),
    ("federation.rounds=0", "federation.rounds is 0"),
    ("federation.local_steps=0", "federation.local_steps is 0"),
    ("federation.local_epochs=2", "local_steps or federation.local_epochs"),
    ("federation.compile=maybe", "federation.compile is 'maybe'; it must be true or false"),
    ("trainer.devices=two", "trainer.devices=two, trainer.num_nodes=1 cannot be had here"),
    ("trainer.num_nodes=2", "trainer.num_nodes=2 needs torchrun or srun"),
    ("federation.cohort=some", "federation.cohort is 'some'; it must be (null|auto), .*or a whole number of 1 or more"),
    ("federation.graph=maybe", "federation.graph is 'maybe'; it must be true or false"),
    ("federation.channels_last=1", "federation.channels_last is 1; it must be true or false"),
    ("federation.tf32=maybe", "federation.tf32 is 'maybe'; it must be true or false"),
    ("trainer.deterministic=maybe", "trainer.deterministic is 'maybe'; it must be true or false"),
    ("federation.cohort=0", "federation.cohort is 0"),
    ("federation.clients_per_round=0", "clients_per_round is 0; it must be a count from 1 to 20"),
    ("federation.clients_per_round=0.0", "clients_per_round is 0.0"),
    ("federation.clients_per_round=21", "clients_per_round is 21"),
    ("federation.clients_per_round=1.5", "clients_per_round is 1.5"),
    ("federation.weight=heavy", "federation.weight is 'heavy'"),
    ("federation.buffers=drop", "federation.buffers is 'drop'"),
    ("data.batch_size=0", "data.batch_size is 0"),
    ("data.workers=-1", "data.workers is -1; it must be a whole number of 0 or more"),
    ("data.workers=1.5 data.stream=true", "data.workers is 1.5"),
    ("data.stream=disk", "data.stream is 'disk'; it must be true or false"),
    ("evaluation=all", "there is no evaluation=all; evaluation is one of global, per_client"),
    (
        "evaluation=per_client evaluation.metrics=[top1,top2]",
        r"is \['top1', 'top2'\]; it must be a list of some of loss, top1",
    ),
    ("evaluation=per_client evaluation.metrics=[]", r"evaluation.metrics is \[\]; it must be a list"),
    ("evaluation=per_client evaluation.metrics=null", "evaluation.metrics is None; it must be a list"),
    (
        "evaluation=per_client evaluation.who=everyone",
        "evaluation.who is 'everyone'; it must be a list of",
    ),
    (
        "evaluation=per_client evaluation.average=mean",
        "average is 'mean'; it must be weighted, macro or micro",
    ),
    ("evaluation=per_client evaluation.every=0", "evaluation.every is 0; it must be a whole number of 1 or more"),
    (
        "evaluation=per_client evaluation.fraction=1.5",
        "evaluation.fraction is 1.5; it must be .* above 0 and at most 1",
    ),
    ("evaluation=per_client evaluation.fraction=nan", "evaluation.fraction is nan"),
    ("evaluation=per_client evaluation.when=now", "evaluation.when"),
    ("evaluation.every=2", "evaluation.every"),
    ("+evaluation.every=2", "evaluation.every needs evaluation=per_client"),
    ("evaluation=per_client +evaluation.when=now", "there is no key evaluation.when"),
    ("optimizer.lr=0", "optimizer.lr is 0; it must be a finite number above 0"),
    ("optimizer.lr=-1", "optimizer.lr is -1"),
    ("optimizer.lr=inf", "optimizer.lr is inf"),
    ("optimizer.lr=fast", "optimizer.lr is 'fast'"),
    ("optimizer.momentum=1.5", "optimizer.momentum"),
    ("optimizer.clip_norm=0", "optimizer.clip_norm is 0"),
    ("partition=noniid_nc50", "50.*10"),
    ("partition.nc=11 partition=noniid_nc1", "11.*10"),
    ("partition=natural", "user"),
    ("partition=dirichlet partition.beta=0", "beta"),
    ("calibration.where=moon", "calibration.where is 'moon'"),
    ("calibration.head_steps=-1", "calibration.head_steps is -1"),
    ("calibration.fisher=exact", "calibration.fisher"),
    ("model.trainable=last_blocks:9 model=vit_digits", "last_blocks"),
    ("model.trainable=nothing.*", "nothing"),
    ("mask_rule=from_file", "mask_rule.path"),
    ("mask_rule=from_file mask_rule.path=absent.safetensors", "absent.safetensors"),
    ("data=arrays data.root=absent", "absent"),
    ("trainer.precision=bf16-true", "bf16-mixed"),
    ("seed=-1", "seed is -1"),
    ("data.augment=randaugment", "data.augment=randaugment needs pixels"),
    ("data.augment=blur", "data.augment is 'blur'"),
    ("head.init=warm", "head.init is 'warm'"),
    ("head.ridge=-1", "head.ridge is -1"),
    ("+head.rigde=1", "there is no key head.rigde"),
    ("head.frozen=true mask_rule=random sparsity.unit=output sparsity.ratio=0.999", "lets no weight train"),
    ("federation.store=disk", "federation.store is 'disk'; it must be memory or file"),
    ("mask.owner=everyone", "mask.owner is 'everyone'"),
    ("mask.owner=client exchange=full", "mask.owner=client and lora.ranks need exchange=masked"),
    ("mask_rule=talos mask_rule.score=loss", "mask_rule.score"),
    ("model=timm model.name=resnet_18 model.pretrained=false", "close to it are"),
    ("model.checkpoint=absent.safetensors model=vit_digits", "absent.safetensors"),
]


TOPK, KRUM = "exchange=topk", "aggregation=krum aggregation.average"
FEEDBACK = f"{TOPK} exchange.feedback=1.0"
PARTICIPANTS = "aggregation=coordinate_mean aggregation.denominator=participants"
COMPAT = f"{TOPK} exchange.compat=original"
LAYERS = "exchange=layers exchange.percentage=null exchange.threshold"
FLIP = "mask_rule=autoflip"
BAD_PHASES = [
    (f"{FLIP} phases=default", "AutoFLIP chooses by an exploration that informs it: set phases=explore"),
    (f"{FLIP} phases.explore=null", "AutoFLIP chooses by an exploration that informs it: set phases=explore"),
    ("phases=explore mask_rule=random", "Random takes nothing from .* phases=default, or explore.keep_model=true"),
    (f"{FLIP} phases.explore.informs_mask=false", "neither informs the mask nor updates the model does nothing"),
    (f"{FLIP} mask.owner=client", "masks that change need mask.owner=global"),
    ("mask_rule=random sparsity.renew_every=2 mask.owner=client", "masks that change need mask.owner=global"),
    ("mask_rule=random sparsity.mode=prune mask.owner=client", "sparsity.mode=prune needs mask.owner=global"),
    ("mask_rule=random sparsity.mode=prune exchange=full", "exchange=full would send .* as zeros: set exchange=masked"),
    (f"{FLIP} sparsity.mode=prune exchange=full", "exchange=full would send .* as zeros: set exchange=masked"),
    ("mask_rule=random sparsity.renew_every=2 federation.store=file", "anew need federation.store=memory"),
    ("sparsity=gradual80 mask_rule=random federation.store=file", "anew need federation.store=memory"),
    (f"{FLIP} explore.patience=2", "explore.patience counts epochs: set explore.epochs, and steps to null"),
    (f"{FLIP} explore.epochs=2", "give either explore.steps or explore.epochs, and set the other to null"),
    (f"{FLIP} explore.steps=0", "explore.steps is 0; it must be null, or a whole number of 1"),
    (f"{FLIP} explore.steps=many", "explore.steps is 'many'; it must be null, or a whole number of 1"),
    (
        f"{FLIP} explore.steps=null explore.epochs=2 explore.patience=0",
        "explore.patience is 0; it must be null, or a whole number of 1",
    ),
    (f"{FLIP} explore.clients=0", "explore.clients is 0; it must be a count from 1 to 20"),
    (f"{FLIP} explore.clients=21", "explore.clients is 21; it must be a count from 1 to 20"),
    (f"{FLIP} explore.weight=heavy", "explore.weight is 'heavy'; it must be null, held, processed or equal"),
    (f"{FLIP} explore.lr=-1", "explore.lr is -1; it must be null, or a finite number above 0"),
    (f"{FLIP} explore.lr=nan", "explore.lr is nan; it must be null, or a finite number above 0"),
    (f"{FLIP} explore.keep_model=maybe", "phases.explore.updates_model is 'maybe'; it must be true or false"),
    (f"{FLIP} explore.save=maybe", "explore.save is 'maybe'; it must be true or false"),
    (f"{FLIP} explore.how=3", "there is no key explore.how"),
    (f"{FLIP} phases.explore.how=3", "there is no key phases.explore.how"),
    (f"{FLIP} phases.explore.rounds=0", "phases.explore.rounds is 0; it must be a whole number of 1 or more"),
    ("phases.learn=5", "phases.learn is 5; it must be null or a node of rounds, kind, updates_model"),
    ("phases.learn=null", "phases need one in which clients learn: add phases.learn.rounds"),
    ("phases.learn.rounds=0", "phases.learn.rounds is 0"),
    ("phases.learn.updates_model=false", "phases.learn.updates_model is false: clients that do not learn explore"),
    ("phases=fine_tune phases.fine_tune.lr=0", "phases.fine_tune.lr is 0; it must be null, or a finite number above 0"),
    ("phases=fine_tune phases.fine_tune.rounds=-1", "phases.fine_tune.rounds is -1"),
    ("phases.calibrate=null mask_rule=least_sensitive", "Fisher needs the phase calibrate, which phases leaves out"),
    ("phases.calibrate=null mask_rule=synflow", "SynFlow needs the phase calibrate, which phases leaves out"),
]
ADDED_PHASES = [  # what is not in the configuration is added
    ("+phases.learn.patience=2", "phases.learn.patience counts epochs: set phases.learn.local_epochs"),
    ("+phases.learn.weight=heavy", "phases.learn.weight is 'heavy'; it must be null, held, processed or equal"),
    ("+phases.learn.clients=99", "phases.learn.clients is 99; it must be a count from 1 to 20"),
    ("+phases.learn.how=3", "phases.learn is .* must be null or a node of rounds, kind, .*|no key phases.learn.how"),
    ("+phases.late={rounds:2,kind:explore}", "they must come as head, calibrate, explore, learn, each at most once"),
    (
        "+phases.late={rounds:1,kind:tune}",
        "phases.late.kind is 'tune'; it must be null, head, calibrate, explore or learn",
    ),
]
BAD_EXCHANGE = [
    (f"{TOPK} exchange.by=largest", "exchange.by is 'largest'; it must be .*largest_change.* or smallest_increase"),
    (f"{TOPK} exchange.fraction=0", "exchange.fraction is 0; it must be above 0"),
    (f"{TOPK} exchange.fraction=1.5", "exchange.fraction is 1.5; it must be above 0 and at most 1"),
    (f"{TOPK} exchange.fraction=many", "exchange.fraction is 'many'"),
    (f"{TOPK} exchange.fraction=[0.1,0.2]", "exchange.fraction lists 2 clients; there are 20"),
    (f"{TOPK} exchange.fraction={{3:0.1}}", r"exchange.fraction is \{3: 0.1\}; .*such as \{0: 0.5"),
    (f"{TOPK} exchange.fraction={{0:0.1,x:0.2}}", "exchange.fraction is .*'x'"),
    (f"{TOPK} exchange.scope=layer", "exchange.scope is 'layer'; it must be global or tensor"),
    (f"{TOPK} exchange.compat=fl4health", "exchange.compat is 'fl4health'"),
    ("exchange=randomk exchange.fraction=0", "exchange.fraction is 0"),
    ("exchange=threshold exchange.threshold=abc", "exchange.threshold is 'abc'; it must be a finite number"),
    ("exchange=threshold exchange.by=largest", "exchange.by is 'largest'"),
    ("exchange=layers exchange.threshold=0.1", "either exchange.threshold or exchange.percentage"),
    ("exchange=layers exchange.percentage=some", "exchange.percentage is 'some'"),
    (f"{LAYERS}=abc", "exchange.threshold is 'abc'; it must be null, or a finite number of 0 or more"),
    ("exchange=layers exchange.more=some", "exchange.more is 'some'; it must be true or false"),
    ("exchange=pattern exchange.names=[nothing.*]", r"exchange.names=\['nothing.\*'\] matches no tensor .*head.weight"),
    ("exchange=pattern exchange.names=[head.*] head.frozen=true", "exchange.names=.* matches no tensor"),
    ("exchange=pattern exchange.names=[head.*] model.local=[head.*]", "exchange.names=.* matches no tensor"),
    ("exchange=pattern exchange.names=null", "exchange.names is None"),
    ("exchange=pattern exchange.names=[]", r"exchange.names is \[\]"),
    ("exchange.payload=values", "exchange.payload is 'values'; it must be change or value"),
    ("exchange.precision=float8", "exchange.precision is 'float8'; it must be null, float16, bfloat16 or int8"),
    ("exchange.feedback=2", "exchange.feedback is 2; it must be a finite number above 0 and at most 1"),
    (FEEDBACK, "exchange.feedback carries .* aggregation.denominator=participants"),
    (f"{FEEDBACK} aggregation=median", "exchange.feedback carries .* aggregation.denominator=participants"),
    (f"{FEEDBACK} {PARTICIPANTS} exchange.payload=value", "exchange.feedback carries .* exchange.payload=change"),
    (COMPAT, "exchange.compat=original sends values: set exchange.payload=value"),
    (f"{COMPAT} exchange.payload=value {PARTICIPANTS}", "exchange.compat=original averages over senders"),
    ("exchange.attackers=-1", "exchange.attackers is -1; it must be null, how many clients attack"),
    ("exchange.attackers=21", "exchange.attackers are clients 0 to 20; there are 20 clients"),
    ("exchange.attackers=[0,25]", "exchange.attackers are clients 0 to 25; there are 20"),
    ("exchange.attackers=some", "exchange.attackers is 'some'"),
    ("exchange.attackers=1.5", "exchange.attackers is 1.5"),
    ("exchange.attackers=2 exchange.attack_scale=big", "exchange.attack_scale is 'big'; it must be a finite number"),
    (f"objective=scaffold {TOPK}", "objective=scaffold needs exchange=full or exchange=masked, with one mask"),
    ("objective=scaffold mask.owner=client", "objective=scaffold needs .* one mask for all clients"),
    (
        "aggregation=fednova optimizer=adam",
        "aggregation=fednova and .* need optimizer=sgdm: their step weights are those",
    ),
    ("objective=scaffold optimizer=adamw", "objective=scaffold need optimizer=sgdm"),
    (
        "optimizer=adam optimizer.betas=[0.9,1]",
        "optimizer.betas is .*; it must be two numbers of 0 or more and below 1",
    ),
    ("optimizer=adamw optimizer.eps=0", "optimizer.eps is 0.*; it must be a finite number above 0"),
    ("model.local=[hiden.*]", r"model.local=hiden.\* matches no parameter of the model, such as "),
    ("objective=fedprox objective.mu=-1", "objective.mu is -1; it must be a finite number of 0 or more"),
    (f"{KRUM}.attackers=8", "attackers, of 10 clients in a round, is 8; it must be a whole number from 0 to 7"),
    (f"{KRUM}.attackers=1.5", "aggregation.average.attackers, of 10 clients in a round, is 1.5"),
    (f"{KRUM}.attackers=null", "aggregation.average.attackers, of 10 clients in a round, is None"),
    (
        "aggregation=multi_krum aggregation.average.keep=0",
        "average.keep, of 10 clients in a round, is 0; .* 1 to 10",
    ),
    (
        "aggregation=trimmed_mean aggregation.average.trim=0.6",
        "aggregation.average.trim is 0.6; it must be a finite number of 0 or more and below 0.5",
    ),
    ("aggregation=trimmed_mean aggregation.average.trim=much", "aggregation.average.trim is 'much'"),
    ("aggregation=coordinate_mean aggregation.denominator=all", "aggregation.denominator is 'all'; it must be senders"),
    ("server.untouched=maybe", "server.untouched is 'maybe'; it must be step, hold or freeze"),
    ("server=fedadam server.tau=-1", "server.tau is -1.*; it must be a finite number above 0"),
    ("server=fedyogi server.betas=[0.9,1.5]", "server.betas is .*; it must be two numbers"),
    ("link.up=0", "link.up is 0; it must be a finite number of 1e-09 or more"),
    ("objective=fedprox objective.mu=1e39", "objective.mu is 1e.39; it must be a finite number of 0 or more"),
    (
        "objective=scaffold objective.num_clients=0",
        "objective.num_clients is 0; it must be a whole number of 1",
    ),
    ("objective=scaffold objective.num_clients=1.5", "objective.num_clients is 1.5; it must be a whole number"),
    ("aggregation=geometric_median +aggregation.average.steps=0", "average.steps is 0; it must be a whole number of 1"),
    (
        "aggregation=geometric_median +aggregation.average.smoothing=nan",
        "average.smoothing is nan; .* below 1",
    ),
    ("exchange.attackers=[true]", r"exchange.attackers is \[True\]"),
    (
        "exchange.attackers=1000000000000000000000",
        "exchange.attackers are clients 0 to 9{21}; there are",
    ),
    (f"{LAYERS}=inf", "exchange.threshold is inf; it must be null, or a finite number of 0 or more"),
    ("exchange=pattern exchange.names=5", "exchange.names is 5; it must be glob patterns"),
    ("server.lr=1e39", "server.lr is 1e.39; it must be a finite number above 0"),
    ("server=fedavgm server.momentum=5", "server.momentum is 5; it must be .* and below 1"),
    ("server=fedadam server.tau=1e39", "server.tau is 1e.*; it must be a finite number"),
    ("calibration.head_lr=1e39", "calibration.head_lr is 1e.39; it must be a finite number above 0"),
    ("calibration.cache=5", "calibration.cache is 5; it must be a folder, or null"),
    ("mask_rule=autoflip explore.lr=1e39", "explore.lr is 1e.39; it must be null, or a finite number above 0"),
    ("link=4g link.latency=-1", "link.latency is -1; it must be a finite number of 0 or more"),
]


def refused(options):
    """Run in vain: the one line that says why."""
    with pytest.raises(Exception) as caught:  # noqa: PT011  (Hydra's and our own)
        run([*BASE, *options.split()])
    line = one_line(caught.value)
    assert "\n" not in line
    assert len(line) < 400
    assert "HYDRA_FULL_ERROR" not in line, line
    return line


@pytest.mark.parametrize(("options", "says"), BAD, ids=[options for options, _ in BAD])
def test_one_line_says_what_is_wrong(tmp_path, monkeypatch, options, says):
    monkeypatch.chdir(tmp_path)
    line = refused(options)
    assert re.search(says, line), line


@pytest.mark.parametrize(("options", "says"), BAD_EXCHANGE, ids=[options for options, _ in BAD_EXCHANGE])
def test_what_is_sent_and_averaged_is_checked_before_anything_is_prepared(tmp_path, monkeypatch, options, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(execute, "prepare", lambda *_: pytest.fail("it was prepared"))
    line = refused(options)
    assert re.search(says, line), line


def _rows(listed, every):
    """Rows of a test, all but each of so many slow: they go the same way."""
    return [row if i % every == 0 else pytest.param(*row, marks=pytest.mark.slow) for i, row in enumerate(listed)]


@pytest.mark.parametrize(("options", "says"), _rows(BAD_PHASES + ADDED_PHASES, 2), ids=lambda o: o[:60])
def test_phases_are_checked_before_anything_is_prepared(tmp_path, monkeypatch, options, says):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    line = refused(f"{options} hydra.run.dir={folder}")
    assert re.search(says, line), line
    written = {path.name for path in folder.rglob("*") if path.is_file() and path.parent.name != ".hydra"}
    assert written <= {"run.log", ".lock"}


@pytest.mark.soak
@pytest.mark.slow
def test_a_head_start_is_refused_in_two_processes(tmp_path):
    options = ["mask_rule=autoflip", "explore.keep_model=true", "trainer.accelerator=cpu", "trainer.devices=2"]
    done = command(*options, f"hydra.run.dir={tmp_path / 'run'}")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("fedsparse: explore.keep_model=true lets one client go on from the other, so it needs one")
    assert not (tmp_path / "run/summary.json").exists()


def test_attackers_are_counted_among_the_clients_that_hold_data(tmp_path, monkeypatch):
    """Of 20 clients 4 have samples: Krum can never have more rows, whatever clients_per_round asks for."""
    monkeypatch.chdir(tmp_path)
    parts = [np.arange(8 if k < 4 else 0) for k in range(20)]
    monkeypatch.setattr("fedsparse.data.partition.iid", lambda **_: parts)
    assert "attackers, of 4 clients in a round, is 2; it must be a whole number from 0 to 1" in refused(
        f"{KRUM}.attackers=2"
    )


def test_an_own_mask_that_leaves_a_client_nothing_of_the_names_that_are_sent(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = ["mask.owner=client", "sparsity.ratio=0.999", "mask_rule=random", "sparsity.always_train=[]"]
    assert run([*BASE, *few, "exchange=pattern", "exchange.names=[head.bias]"])["rounds"] == 1


def command(*options, **env):
    return subprocess.run(
        [sys.executable, "-m", "fedsparse.train", *BASE, *options],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
    )


@pytest.mark.slow
def test_the_command_line_prints_it_without_a_traceback(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = command("federation.rounds=0")
    assert done.returncode != 0
    lines = done.stderr.strip().splitlines()
    assert lines[-1] == "fedsparse: federation.rounds is 0; it must be a whole number of 1 or more"
    assert len(lines) <= 2
    assert "Traceback" in command("federation.rounds=0", HYDRA_FULL_ERROR="1").stderr


def test_a_used_run_folder_is_not_written(tmp_path):
    folder = tmp_path / "used"
    run([*BASE, f"hydra.run.dir={folder}"])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="already holds a run; continue it with resume="):
        run([*BASE, f"hydra.run.dir={folder}", "seed=1"])
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_run_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file") as caught:
        run([*BASE, f"hydra.run.dir={tmp_path / 'file' / 'run'}"])
    assert one_line(caught.value).endswith("Not a directory")


LIMITED = """
import resource, signal, sys
from fedsparse.train import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (7000, 7000))
sys.argv[0] = "train"
main()
"""


@pytest.mark.slow
def test_a_full_disk(tmp_path):
    """A limit on the size of files stands in for a full disk: the mask cannot be written."""
    folder = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *BASE, f"hydra.run.dir={folder}"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("fedsparse: ")
    assert not (folder / "summary.json").exists()


def write_arrays(folder, **changes):
    """A data set of the user's own, with something wrong in it."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for name, n in (("train", 80), ("val", 20), ("test", 20)):
        split = {"x": rng.normal(size=(n, 1, 8, 8)).astype("float32"), "y": np.arange(n) % 10}
        if name == "train":
            split |= {key: change(split[key].copy()) for key, change in changes.items()}
        np.savez(folder / f"{name}.npz", **split)
    return ["data=arrays", f"data.root={folder}", "federation.num_clients=4", "mask_rule=random"]


def with_nan(x):
    x[3, 0, 2, 2] = np.nan
    return x


def test_good_arrays_train(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run([*BASE, *write_arrays(tmp_path / "data")])["rounds"] == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"x": with_nan}, "(?i)nan"),
        ({"y": lambda y: y - 1}, "label"),
        ({"y": lambda y: y[:-1]}, "79"),
        ({"x": lambda x: x[:0], "y": lambda y: y[:0]}, "empty|no samples"),
    ],
)
def test_bad_arrays(tmp_path, monkeypatch, changes, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match=says) as caught:  # noqa: PT011
        run([*BASE, *write_arrays(tmp_path / "data", **changes)])
    assert "HYDRA_FULL_ERROR" not in one_line(caught.value)


def test_a_head_that_is_told_to_be_too_small(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"10 outputs and the data 15 classes; set model.num_classes=15"):
        run([*BASE, *write_arrays(tmp_path / "data", y=lambda y: y + 5), "model.num_classes=10"])


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda path: path.write_bytes(b"not a mask"), "damaged|not a"),
        (lambda path: save_file({"other.weight": torch.ones(3, dtype=torch.bool)}, path), "other.weight"),
    ],
)
def test_a_bad_mask_file(tmp_path, monkeypatch, write, says):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mask.safetensors")
    with pytest.raises(ValueError, match=says):
        run([*BASE, "mask_rule=from_file", f"mask_rule.path={tmp_path / 'mask.safetensors'}"])


def test_a_loss_that_explodes_everywhere_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["optimizer.lr=1e30", "optimizer.clip_norm=null", "mask_rule=random", f"hydra.run.dir={tmp_path / 'run'}"]
    with pytest.raises(RuntimeError, match="round 1: .* every client became NaN"):
        run([*BASE, *options])
    assert not (tmp_path / "run" / "summary.json").exists()


def test_attackers_are_counted_among_those_who_take_part(run_in):
    """``sampling=everyone`` takes all eight, whatever federation.clients_per_round says."""
    krum = ["mask_rule=dense", "federation.num_clients=8", "aggregation=krum", "aggregation.average.attackers=5"]
    summary, _ = run_in("everyone", *krum, "sampling=everyone", "federation.rounds=1")
    assert summary["rounds"] == 1
    with pytest.raises(
        ValueError, match="attackers, of 4 clients in a round, is .; it must be a whole number from 0 to 1"
    ):
        run_in("half", *krum)


RANGES = [  # schedules, optimizers, masks: each option at and beyond its edge
    ("schedule=step schedule.every=0", "schedule.every is 0; it must be a whole number of 1 or more"),
    ("schedule=step schedule.every=0.5", "schedule.every is 0.5; it must be a whole number of 1 or more"),
    ("schedule=step schedule.gamma=-1", "schedule.gamma is -1.*; it must be a finite number above 0"),
    ("schedule=exponential schedule.gamma=nan", "schedule.gamma is nan.*; it must be a finite number above 0"),
    ("schedule=exponential schedule.gamma=0", "schedule.gamma is 0.*; it must be a finite number above 0"),
    (
        "schedule=exponential schedule.gamma=1e30 federation.rounds=100",
        "the factor of optimizer.lr that schedule gives in round 100 is inf; it must be a finite number of 0 or more",
    ),
    ("schedule=cosine schedule.floor=much", "schedule.floor is 'much'; it must be a finite number of 0 or more"),
    ("schedule=cosine schedule.floor=-3", "schedule.floor is -3; it must be a finite number of 0 or more"),
    ("optimizer.lr=1e308", r"optimizer.lr is 1e\+308; it must be a finite number above 0"),
    (f"optimizer.lr={10**320}", "optimizer.lr is 10+; it must be a finite number above 0"),
    ("optimizer.nesterov=maybe", "optimizer.nesterov is 'maybe'; it must be true or false"),
    ("optimizer.dampening=-1", "optimizer.dampening is -1; it must be a finite number of 0 or more"),
    ("optimizer.weight_decay=inf", "optimizer.weight_decay is inf; it must be a finite number of 0 or more"),
    ("optimizer.clip_norm=inf", "optimizer.clip_norm is inf; it must be null, or a finite number above 0"),
    ("server=fedavgm server.momentum=nan", "server.momentum is nan; it must be a finite number"),
    (
        "server=fedavgm server.momentum=1",
        "server.momentum is 1; it must be a finite number of 0 or more and below 1",
    ),
    ("server=fedavgm_ema server.beta=1", "server.beta is 1; it must be a finite number of 0 or more and below 1"),
    ("server=fedadam server.bias_correction=maybe", "server.bias_correction is 'maybe'; it must be true or false"),
    ("mask_rule=highest_magnitude mask_rule.largest=maybe", "mask_rule.largest is 'maybe'; it must be true or false"),
    ("mask_rule=least_sensitive mask_rule.largest=1", "mask_rule.largest is 1; it must be true or false"),
    (
        "mask_rule=least_sensitive mask_rule.chunk=0",
        "mask_rule.chunk is .*; it must be null, or a whole number of 1 or more",
    ),
    ("mask_rule=talos mask_rule.score=[logit]", "mask_rule.score is .*; it must be logit or logprob"),
    (
        "mask_rule=talos mask_rule.shrink=1.1",
        "mask_rule.shrink is 1.1; it must be a finite number from 0 to 1",
    ),
    (
        "mask_rule=autoflip mask_rule.normalise=[minmax]",
        "mask_rule.normalise is .*; it must be minmax, robust, rank or none",
    ),
    ("mask_rule=from_file mask_rule.path=5", "mask_rule=from_file needs mask_rule.path=<a mask.safetensors file>"),
    ("sparsity.always_train=[head.*,haed.*]", "sparsity.always_train: haed.* matches no parameter; the last of them"),
    ("federation.rounds=1000000000000000000000", "federation.rounds is 10+; it must be a whole number from 1 to 21474"),
    ("data.batch_size=1000000000000", "data.batch_size is 10+; it must be a whole number from 1 to 2147483647"),
    ("trainer.precision=16", "trainer.precision is 16; write trainer.precision=16-mixed"),
    ("trainer.precision=half", "trainer.precision is 'half'; it must be 32-true, 64-true, bf16-mixed or 16-mixed"),
    ("pictures=maybe", "pictures is 'maybe'; it must be true or false"),
]


@pytest.mark.parametrize(("options", "says"), RANGES, ids=lambda o: o[:60])
def test_options_out_of_range_are_refused_before_anything_is_prepared(tmp_path, monkeypatch, options, says):
    monkeypatch.chdir(tmp_path)
    line = refused(options)
    assert re.search(says, line), line


@pytest.mark.parametrize(
    "options",
    [
        "schedule=step schedule.every=1",
        "schedule=exponential schedule.gamma=1",
        "schedule=cosine schedule.floor=0",
        "optimizer.momentum=0",
        "mask_rule=talos mask_rule.shrink=0",
        "sparsity.always_train=[]",
    ],
)
def test_options_at_their_edges_run(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    assert run([*BASE, *options.split()])["rounds"] == 1
