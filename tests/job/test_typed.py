"""What a person types: each slip gets one line that says what would be right."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fedsparse import run
from fedsparse.job.advice import no_key, no_option
from fedsparse.job.command import one_line
from fedsparse.job.typed import arranged, check_typed, given_twice

ALL = "--cfg job lists all keys with their values"
SLIPS = [  # the argument, and what is said of it
    (["sparsity=0.8"], "there is no sparsity=0.8; write sparsity.ratio=0.8 or sparsity=s80"),
    (["sparsity=0.85"], "there is no sparsity=0.85; write sparsity.ratio=0.85"),
    (["optimizer=0.1"], "there is no optimizer=0.1; write optimizer.lr=0.1 or optimizer=sgdm"),
    (["optimizer=null"], "there is no optimizer=null; optimizer is one of adam, adamw, sgdm"),
    (["sampling=true"], "there is no sampling=True; sampling is one of everyone, uniform"),
    (["--mask_rule=random"], "--mask_rule=random is no flag; write mask_rule=random"),
    (["seed=1", "-x"], "-x is no flag; --help lists them"),
    (["--cfg=jobb"], "argument --cfg/-c: invalid choice: 'jobb' (choose from 'job', 'hydra', 'all')"),
    (["sampling"], "sampling has no value; it is one of everyone, uniform: write sampling=<one of them>"),
    (["random"], "random has no key; write mask_rule=random"),
    (["quick"], "quick has no value; write quick=<value>"),
    (["=5"], "=5 has no key; write key=value, or key=null for none"),
    (["resume="], "resume= has no value; write key=value, or key=null for none"),
    (["hydra.run.dir="], "hydra.run.dir= has no value; write key=value, or key=null for none"),
    (["mask_rule = random"], "write mask_rule=random, without spaces around the equals sign"),
    (["mask_rule", "=", "random"], "write mask_rule=random, without spaces around the equals sign"),
    (["mask_rule", "=random"], "write mask_rule=random, without spaces around the equals sign"),
    (["mask_rule=", "random"], "write mask_rule=random, without spaces around the equals sign"),
    (["exchange.fraction=10%"], "exchange.fraction=10%: write 0.1 for 10%"),
    (["sparsity.ratio=12.5%"], "sparsity.ratio=12.5%: write 0.125 for 12.5%"),
    (["seed=0,1"], "seed=0,1 are several values: add -m to run each, or write seed=[0,1] for a list"),
    (["-m", "sparsity=0.8,0.9"], "there is no sparsity=0.8; write sparsity.ratio=0.8 or sparsity=s80"),
    (["seed=[0"], "seed=[0 cannot be read as key=value; quote a value with spaces or brackets: 'key=\"a b\"'"),
    (
        ["federation=default"],
        "there is no federation=default: federation has keys alone, such as federation.num_clients; leave it out",
    ),
    (["trainer"], "trainer is no key; it has keys, such as trainer.accelerator"),
    (["~calibration"], "~calibration: a run needs the keys of calibration"),
    (["~sampling"], "~sampling: a run needs a sampling; it is one of everyone, uniform"),
]
NO_KEY = {
    "mask_rul": "did you mean mask_rule?",
    "clients_per_round": "did you mean federation.clients_per_round?",
    "lr": "did you mean explore.lr, optimizer.lr or server.lr?",
    "batch_size": "did you mean data.batch_size?",
    "gpus": "did you mean trainer.devices?",
    "devices": "did you mean trainer.devices?",
    "learning_rate": "did you mean optimizer.lr?",
    "optimizer.momentun": "did you mean optimizer.momentum?",
    "federation.round": "did you mean federation.rounds?",
    "hidden": "did you mean model.hidden?",
}
NO_OPTION = {
    ("partition", "noniid_nc3"): "write partition=noniid_nc1 partition.nc=3",
    ("partition", "dirichlet03"): "write partition=dirichlet01 partition.beta=0.3",
    ("model", "vit_small_patch16_224"): "write model=timm model.name=vit_small_patch16_224",
    ("mask_rule", "topk"): "did you mean exchange=topk?",
    ("server", "adam"): "did you mean optimizer=adam?",
    ("data", "cifar"): "did you mean data=cifar10 or data=cifar100?",
    ("experiment", "corse"): "did you mean experiment=course?",
}


@pytest.mark.parametrize(("arguments", "says"), SLIPS, ids=[" ".join(arguments) for arguments, _ in SLIPS])
def test_a_slip_on_the_command_line(arguments, says):
    with pytest.raises(ValueError, match=r"\S") as caught:
        arranged(arguments)
    assert str(caught.value) == says


@pytest.mark.parametrize("key", NO_KEY)
def test_a_key_that_there_is_not(key):
    assert no_key(key) == f"there is no key {key}; {NO_KEY[key]} {ALL}"


MOVED = {
    "model.net.hidden": "model.hidden",
    "model.net.source": "model.tokenizer",
    "data.source.split_seed": "data.split_seed",
    "optimizer.build._target_": "optimizer._target_",
    "server.optimizer.momentum": "server.momentum",
    "exchange.build.rule.fraction": "exchange.fraction",
    "exchange.build.filters.attack.clients": "exchange.attackers",
    "exchange.build": "exchange",
}


@pytest.mark.parametrize("key", MOVED)
def test_a_key_that_has_moved(run_in, key):
    line = f"there is no key {key}; it is {MOVED[key]} now"
    assert no_key(key) == line
    with pytest.raises(ValueError, match=f"^{line}$"):
        run_in("run", f"{key}=4")


def test_a_key_of_another_option_and_one_that_resembles_nothing():
    having = "exchange=randomk and exchange=topk have it"
    assert no_key("exchange.fraction") == f"there is no key exchange.fraction with this exchange; {having}; {ALL}"
    assert no_key("xyzzy") == f"there is no key xyzzy; {ALL}"


@pytest.mark.parametrize(("group", "option"), NO_OPTION)
def test_an_option_that_there_is_not(group, option):
    assert no_option(group, option) == f"there is no {group}={option}; {NO_OPTION[group, option]}"


def test_flags_may_stand_anywhere():
    assert arranged(["seed=0,1", "-m", "model=mlp"]) == ["seed=0,1", "model=mlp", "-m"]
    assert arranged(["--cfg", "job", "seed=1", "--info", "defaults", "model=mlp"]) == [
        *("seed=1", "model=mlp"),
        *("--cfg", "job", "--info", "defaults"),
    ]


def test_what_is_right_passes():
    check_typed(["seed=1", "mask_rule=random", "exchange.names=[a.*]", "+x='a b'", "~phases.head", "data.root=/a b"])
    check_typed(["seed=0,1", "optimizer.lr=tag(log,interval(0.01,0.3))"], sweeps=True)


def test_a_key_that_is_given_twice():
    assert given_twice(["model=mlp", "seed=1", "model=conv"]) == ["model is given twice; model=conv counts"]


RAISED = {  # of Hydra's parser, its composition, OmegaConf, a builder, a callback
    "seed=[": "seed=[ cannot be read as key=value",
    "mask_rule=foo": "there is no mask_rule=foo; mask_rule is one of autoflip",
    "experiment=corse": "there is no experiment=corse; did you mean experiment=course?",
    "rounds=5": "there is no key rounds; did you mean calibration.rounds, federation.rounds",
    "optimizer.lr=${nope}": "optimizer.lr: Interpolation key 'nope' not found",
    "sparsity.ratio=2": "sparsity.ratio is 2; it must be a finite number of 0 or more and below 1",
    "seed=18446744073709551616": "seed is 18446744073709551616; it must be a whole number from 0 to 18446744",
    "seed=-1": "seed is -1; it must be a whole number from 0 to",
    "seed=1.0": "seed is 1.0; it must be a whole number from 0 to",
    "seed=true": "seed is True; it must be a whole number from 0 to",
    "-m": "-m is for the command line only",
}


@pytest.mark.parametrize("typed", RAISED)
def test_run_raises_value_errors_of_the_command_lines_line(run_in, typed, capsys):
    with pytest.raises(ValueError, match=r"\S") as caught:
        run_in("run", "mask_rule=random", typed)
    assert str(caught.value).startswith(RAISED[typed])
    assert one_line(caught.value) == str(caught.value)
    assert "Error executing job" not in capsys.readouterr().err


def test_the_largest_seed_runs(run_in):
    assert run_in("run", "mask_rule=random", f"seed={2**64 - 1}", "federation.rounds=1")[0]["rounds"] == 1


def test_a_used_folder_is_a_value_error_without_the_programs_name(run_in):
    _, folder = run_in("run", "mask_rule=random", "federation.rounds=1")
    with pytest.raises(ValueError, match=r"^\S+ already holds a run; continue it with resume="):
        run([f"hydra.run.dir={folder}"])


UNREAD = {
    "+exchange.x=1": "exchange.x",
    "+optimizer.lrr=1": "optimizer.lrr",
    "+mask_rule.x=1": "mask_rule.x",
    "+schedule.x=1": "schedule.x",
    "+trainer.x=1": "trainer.x",
    "+model.hiden=1": "model.hiden",
    "+data.x=1": "data.x",
    "+data.x=1 seed=${data.x}": "data.x",
    "+model.depth_=3": "model.depth_",
    "+client.x=1": "client.x",
    "+server.x=1": "server.x",
    "+sede=3": "sede",
    "+federation.round=3": "federation.round",
}


@pytest.mark.parametrize("typed", UNREAD)
def test_a_key_that_nothing_reads_is_refused(run_in, typed):
    with pytest.raises(ValueError, match=f"^there is no key {UNREAD[typed]}[; ]"):
        run_in("run", "mask_rule=random", *typed.split())


def test_a_key_that_something_reads_is_not(run_in):
    """A key of one's own that another takes its value from, and an argument that the shipped YAML leaves out."""
    own = ["+mine=0.2", "optimizer.lr=${mine}", "+server.maximize=false"]
    assert run_in("run", "mask_rule=random", *own, "federation.rounds=1")[0]["lr"] == 0.2


@pytest.mark.slow
def test_no_line_of_hydras_stands_above_ours(tmp_path):
    """One run, the cells of a sweep, and cells in processes of their own."""
    base = ["model=mlp", "logger=csv", "federation.rounds=0"]
    for more in ([], ["-m", "seed=0,1"], ["seed=0,1", "-m", "hydra/launcher=joblib"]):
        command = [sys.executable, "-m", "fedsparse.train", *base, *more]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ})
        assert done.returncode == 1
        assert "Error executing job" not in done.stdout + done.stderr
        assert "federation.rounds is 0; it must be a whole number of 1 or more" in done.stderr
