"""Names of rows: options and typed keys that differ, short and never shared; and which folders are runs at all."""

from __future__ import annotations

import pytest
import yaml
from test_report import a_run, edit, printed, table_of

from fedsparse import report
from fedsparse.analysis.folders import read_runs
from fedsparse.analysis.table import once


def chosen(folder, *typed, **options):
    """Write down what was typed, and the option of every group, as train does."""
    choices = {"server": "fedavg", "aggregation": "weighted_mean", "objective": "none", "optimizer": "sgdm"} | options
    (folder / ".hydra/hydra.yaml").write_text(yaml.safe_dump({"hydra": {"runtime": {"choices": choices}}}))
    (folder / ".hydra/overrides.yaml").write_text(yaml.safe_dump([*typed]))
    return folder


SERVERS = {
    "fedavg": {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 1.0},
    "fedadam": {"_target_": "torch.optim.Adam", "_partial_": True, "lr": 0.01, "betas": [0.9, 0.99], "eps": 1e-3},
    "fedavgm": {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 1.0, "momentum": 0.9},
}


def test_a_sweep_over_servers_and_averages_is_named_by_its_options(tmp_path):
    for server, keys in SERVERS.items():
        for average in ("weighted_mean", "median"):
            folder = a_run(tmp_path / f"{server}{average}", server=keys, aggregation={"_target_": average, "block": 1})
            chosen(folder, f"server={server}", f"aggregation={average}", server=server, aggregation=average)
    names = [f"random, {average}, {server}" for average in ("median", "weighted_mean") for server in sorted(SERVERS)]
    assert [row.name for row in table_of(tmp_path)] == sorted(names)


def test_an_option_that_nobody_typed_is_not_named_and_one_that_says_nothing_alone_has_its_group(tmp_path):
    chosen(a_run(tmp_path / "a"))
    chosen(a_run(tmp_path / "b", objective={"mu": 0.1}), "objective=fedprox", objective="fedprox")
    assert [row.name for row in table_of(tmp_path)] == ["random", "random, fedprox"]
    chosen(tmp_path / "a", "objective=none")
    assert [row.name for row in table_of(tmp_path)] == ["random, fedprox", "random, objective=none"]


def test_a_typed_key_within_an_option_stands_behind_it(tmp_path):
    for rate in (0.01, 0.1):
        folder = a_run(tmp_path / f"{rate}", server=SERVERS["fedadam"] | {"lr": rate})
        chosen(folder, "server=fedadam", f"server.lr={rate}", server="fedadam")
    chosen(a_run(tmp_path / "plain", server=SERVERS["fedavg"]), "server=fedavg")
    found = [row.name for row in table_of(tmp_path)]
    assert found == ["random, fedadam, server.lr=0.01", "random, fedadam, server.lr=0.1", "random, fedavg"]


def test_what_only_a_version_has_is_named_where_names_would_clash_and_nowhere_else(tmp_path):
    """New keys that nobody typed tell two rows apart only if nothing else does."""
    chosen(a_run(tmp_path / "old"))
    chosen(a_run(tmp_path / "new", trainer={"fresh": 1}, head={"init": "probe"}), "head.init=probe")
    assert [row.name for row in table_of(tmp_path)] == ["random", "random, head.init=probe"]
    chosen(tmp_path / "new")
    assert [row.name for row in table_of(tmp_path)] == ["random", "random, head.init=probe, trainer.fresh=1"]


def test_names_are_never_shared(tmp_path):
    """An option and a key that are written alike, in rows that differ beyond them, too."""
    options = [{"server": "fedadam"}, {"aggregation": "fedadam"}]
    for i, option in enumerate(options):
        (group,) = option
        folder = chosen(a_run(tmp_path / f"{i}", **{group: {"lr": i}}), f"{group}=fedadam")
        (folder / ".hydra/hydra.yaml").write_text(yaml.safe_dump({"hydra": {"runtime": {"choices": option}}}))
    assert [row.name for row in table_of(tmp_path)] == ["random, fedadam", "random, fedadam (2)"]


def test_pruning_is_in_the_name(tmp_path):
    a_run(tmp_path / "p", sparsity={"ratio": 0.8, "mode": "prune"})
    assert [row.name for row in table_of(tmp_path)] == ["random, prune"]
    a_run(tmp_path / "f", sparsity={"ratio": 0.8, "mode": "freeze"})
    a_run(tmp_path / "d", "dense", sparsity={"ratio": 0.8, "mode": "prune"})
    assert [row.name for row in table_of(tmp_path)] == ["dense", "random", "random, prune"]


@pytest.mark.parametrize(("option", "name"), [("s80", "random"), ("gradual80", "random, gradual80")])
def test_an_option_of_sparsity_that_is_more_than_its_fraction_is_named(tmp_path, option, name):
    chosen(a_run(tmp_path / "a"), sparsity="s50")
    ratio = {"ratio": 0.8, "schedule": {"end": 9} if option == "gradual80" else {}}
    chosen(a_run(tmp_path / "b", seed=1, sparsity=ratio), f"sparsity={option}", sparsity=option)
    assert name in [row.name for row in table_of(tmp_path)]


def test_figures_of_each_client_are_no_other_row(tmp_path):
    a_run(tmp_path / "a", seed=0)
    a_run(tmp_path / "b", seed=1, evaluation={"_target_": "Personal", "every": 1, "metrics": ["top1"]})
    (row,) = table_of(tmp_path)
    assert [run.seed for run in row.runs] == [0, 1]


def test_a_calibration_is_neither_a_run_nor_unfinished(tmp_path, capsys):
    a_run(tmp_path / "a")
    mask = a_run(tmp_path / "mask")
    for name in ("summary.json", "metrics.csv"):
        (mask / name).unlink()
    (mask / "calibration.json").write_text("{}")
    report.main([str(tmp_path)])
    assert "| mask |" not in printed(capsys)
    (mask / "metrics.csv").write_text("round,val/acc\n1,0.5\n")  # a run that began there was stopped
    found, (problem,) = read_runs([tmp_path])
    assert (len(found), problem.name) == (1, "mask")


def test_runs_that_say_what_was_typed_beside_one_that_does_not(tmp_path):
    """One row: of what nobody knows whether it was typed, all that differs is said."""
    chosen(a_run(tmp_path / "a", seed=0, head={"init": "probe"}))
    edit(a_run(tmp_path / "b", seed=1, head={"init": "probe"}))
    chosen(a_run(tmp_path / "c", head={"init": "random"}), "head.init=random")
    assert [row.name for row in table_of(tmp_path)] == ["random, head.init=probe", "random, head.init=random"]
    assert once(read_runs([tmp_path])[0])[1] == 0
