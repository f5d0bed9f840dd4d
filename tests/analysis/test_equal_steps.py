"""Equal client steps: the arithmetic of budgets, and the tables of made-up run folders, by hand."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf
from test_experiments import composed
from test_report import a_run, edit, table_of

from fedsparse import repeat
from fedsparse.analysis import equal_steps
from fedsparse.analysis.baseline import dense_of
from fedsparse.job.budget import preparation, rounds_within, steps_of_round

FEDERATION = {"num_clients": 20, "clients_per_round": 0.5, "local_steps": 4, "rounds": "${rounds_for_steps:1200}"}
EXPLORE = {"updates_model": "${explore.keep_model}", "rounds": 1}
LEARN = {"rounds": "${federation.rounds}", "updates_model": True}

# ---- the budget


@pytest.mark.parametrize(
    ("overrides", "before", "rounds"),
    [
        (["mask_rule=dense"], 0, 30),
        (["mask_rule=random"], 0, 30),
        (["mask_rule=autoflip"], 20 * 20, 20),
        (["mask_rule=autoflip", "explore.steps=4"], 20 * 4, 28),
        (["mask_rule=autoflip", "explore.clients=5", "explore.steps=10"], 50, 28),  # 1150 / 40 = 28.75
        (["mask_rule=snip"], 10 * 2, 29),
        (["mask_rule=snip", "calibration.rounds=3"], 60, 28),
        (["mask_rule=snip", "calibration.where=server"], 0, 30),
        (["mask_rule=synflow"], 0, 30),  # asks no client
        (["mask_rule=dense", "phases=explore", "explore.keep_model=true"], 400, 20),
        (["mask_rule=snip", "phases=explore", "explore.keep_model=true"], 420, 19),
        (["mask_rule=random", "head.init=probe"], 10 * 20, 25),
        (["mask_rule=random", "federation.local_steps=8", "federation.clients_per_round=3"], 0, 50),
    ],
)
def test_rounds_are_what_preparation_leaves_of_1200_steps(overrides, before, rounds):
    cfg, _ = composed("experiment=autoflip_digits", *overrides)
    assert preparation(cfg) == before
    assert cfg.federation.rounds == rounds
    assert cfg.phases.learn.rounds == rounds
    assert 1200 - steps_of_round(cfg) < before + rounds * steps_of_round(cfg) <= 1200


def test_a_budget_that_leaves_nothing_or_counts_epochs_says_so():
    with pytest.raises(ValueError, match="100 client steps leave no round: 90 go before, and a round takes 40"):
        rounds_within(100, 90, 40)
    for override, said in (("federation.local_epochs=1", "local_steps"), ("explore.epochs=1", r"explore\.steps")):
        steps = override.split("_")[0].replace("epochs=1", "steps=null")
        steps = "federation.local_steps=null" if "federation" in override else steps
        cfg, _ = composed("experiment=autoflip_digits", override, steps)
        with pytest.raises(Exception, match=said):
            _ = cfg.federation.rounds


def test_a_foreign_rule_is_not_imported_to_count_its_steps():
    cfg, _ = composed("experiment=autoflip_digits", "mask_rule=dense")
    OmegaConf.update(cfg, "mask_rule._target_", "nowhere.at.all.Rule")
    assert cfg.federation.rounds == 30


@pytest.mark.parametrize(
    ("more", "steps"),
    [
        (["mask_rule=autoflip"], 1200),
        (["mask_rule=snip"], 1180),
        (["mask_rule=dense", "phases=explore", "explore.keep_model=true"], 1200),
    ],
)
def test_a_run_takes_the_steps_that_were_planned(run_in, more, steps):
    options = ["experiment=autoflip_digits", "logger=csv", "pictures=false", "calibration.cache=null", "partition=iid"]
    summary, _ = run_in("run", *options, *more, "federation.eval_every=10", fast=False)
    assert summary["client_steps"] == steps


# ---- the tables


def explored(folder, rule, steps=1200, keep=None, ratio=0.5, **figures):
    """A run as autoflip_digits leaves it; ``keep`` is None where no client explores."""
    phases = {"learn": LEARN} | ({} if keep is None else {"explore": EXPLORE})
    groups = {"federation": FEDERATION, "phases": phases, "explore": {"keep_model": bool(keep), "steps": 20}}
    a_run(folder, rule, sparsity={"ratio": ratio}, **groups, **figures)
    edit(folder, client_steps=steps)
    return folder


TESTS = {  # rule, head start: test accuracies by seed
    ("dense", None): [0.90, 0.92],
    ("random", None): [0.80, 0.84],
    ("snip", None): [0.82, 0.88],
    ("autoflip", False): [0.86, 0.87],
    ("autoflip", True): [0.88, 0.93],
    ("dense", True): [0.93, 0.97],
    ("random", True): [0.85, 0.87],
}


@pytest.fixture
def sweep(tmp_path):
    for (rule, keep), tests in TESTS.items():
        for seed, test in enumerate(tests):
            steps = 1180 if rule == "snip" else 1200
            explored(tmp_path / f"{rule}{keep}{seed}", rule, steps, keep, seed=seed, test=test)
    return tmp_path


def cells(table):
    return {line[0]: dict(zip(table.head, line, strict=True)) for line in table.body}


def test_paired_differences_at_equal_steps_by_hand(sweep):
    plain, _ = equal_steps.section(table_of(sweep))
    (table,) = plain.blocks
    assert [line[0] for line in table.body] == ["dense", "autoflip", "snip", "random"]
    found = cells(table)
    # two values: half the interval is 12.706 times half their distance
    assert found["autoflip"]["test accuracy, %"] == "86.5 ± 6.4"  # half of 1.0 point
    assert found["autoflip"]["difference to dense, points"] == "-4.5 ± 6.4"  # -4.0 and -5.0
    assert found["autoflip"]["difference to random, points"] == "+4.5 ± 19.1"  # +6.0 and +3.0
    assert found["snip"]["difference to random, points"] == "+3.0 ± 12.7"  # +2.0 and +4.0
    assert found["snip"]["client steps"] == "1180"
    assert found["random"]["difference to dense, points"] == "-9.0 ± 12.7"  # -10.0 and -8.0
    assert found["random"]["difference to random, points"] == found["dense"]["difference to dense, points"] == "–"  # noqa: RUF001
    assert (found["autoflip"]["density"], found["autoflip"]["all traffic, MB"]) == ("50 %", "3.00")


def test_the_head_start_is_compared_with_those_that_have_it_and_with_the_rule_itself(sweep):
    _, started = equal_steps.section(table_of(sweep))
    found = cells(started.blocks[0])
    assert set(found) == {"dense", "random", "autoflip"}
    gained = {name: line["gained by the head start, points"] for name, line in found.items()}
    # dense +3.0 and +5.0, random +5.0 and +3.0, autoflip +2.0 and +6.0
    assert gained == {"dense": "+4.0 ± 12.7", "random": "+4.0 ± 12.7", "autoflip": "+4.0 ± 25.4"}
    assert found["autoflip"]["difference to dense, points"] == "-4.5 ± 6.4"  # -5.0 and -4.0
    assert found["autoflip"]["difference to random, points"] == "+4.5 ± 19.1"  # +3.0 and +6.0


def test_dense_training_of_another_length_is_no_reference(sweep):
    """A round takes 10 x 4 steps: dense training of 1241 steps is beyond one round, of 1240 it is not."""
    for path in sweep.glob("denseNone*"):
        edit(path, client_steps=1241)
    rule = next(row for row in table_of(sweep) if row.name == "random")
    assert equal_steps.of_round(rule) == 40
    assert equal_steps.counterpart(rule, table_of(sweep), "dense") is None
    for path in sweep.glob("denseNone*"):
        edit(path, client_steps=1240)
    assert equal_steps.counterpart(rule, table_of(sweep), "dense").name == "dense"


def test_other_densities_are_no_reference(sweep):
    explored(sweep / "sparser", "random", ratio=0.9)
    table = table_of(sweep)
    (row,) = [row for row in table if row.sparsity == 0.9]
    (auto,) = [row for row in table if row.settings["mask_rule"] == "autoflip" and not row.head_start]
    assert equal_steps.counterpart(auto, table, "random").sparsity == 0.5
    assert equal_steps.counterpart(row, table, "dense").dense


def test_a_head_start_is_compared_with_the_exploration_of_the_same_length(sweep):
    shorter = {"federation": FEDERATION, "phases": {"learn": LEARN, "explore": EXPLORE}}
    explore = {"keep_model": False, "steps": 100}  # "100" stands before "20"
    a_run(sweep / "s", "autoflip", test=0.5, sparsity={"ratio": 0.5}, explore=explore, **shorter)
    edit(sweep / "s", client_steps=1200)
    plain, started = equal_steps.section(table_of(sweep))
    assert {"autoflip, explore.steps=20", "autoflip, explore.steps=100"} <= set(cells(plain.blocks[0]))
    assert cells(started.blocks[0])["autoflip"]["gained by the head start, points"] == "+4.0 ± 25.4"


def test_names_and_dense_references_tell_a_head_start_apart(sweep):
    table = {row.name: row for row in table_of(sweep)}
    assert set(table) == {
        *("dense", "dense, phases=explore", "random", "random, phases=explore", "snip"),
        *("autoflip, explore.keep_model=false", "autoflip, explore.keep_model=true"),
    }
    references = {name: dense_of(row, list(table.values())).name for name, row in table.items()}
    for name in ("random", "snip", "autoflip, explore.keep_model=false"):
        assert references[name] == "dense"
    for name in ("random, phases=explore", "autoflip, explore.keep_model=true"):
        assert references[name] == "dense, phases=explore"


def test_a_folder_without_exploration_has_no_such_section(tmp_path):
    edit(a_run(tmp_path / "a"), client_steps=400)
    a_run(tmp_path / "old", "dense")
    assert not list(equal_steps.section(table_of(tmp_path)))


def test_a_run_that_does_not_count_its_steps_is_not_compared(sweep):
    for path in sweep.glob("snip*"):
        edit(path, client_steps="gone")
    plain, _ = equal_steps.section(table_of(sweep))
    assert "snip" not in cells(plain.blocks[0])


def test_repetitions_may_go_into_a_folder_of_their_own(sweep, tmp_path):
    for path in sweep.glob("*/.hydra"):
        (path / "overrides.yaml").write_text(f"[mask_rule={path.parent.name.rstrip('01')}, seed=0]")
    listed = list(repeat.cells(sweep, [5, 6], tmp_path / "apart"))
    assert len(listed) == 2 * len(TESTS)
    assert {folder.parent for _, folder in listed} == {tmp_path / "apart"}
