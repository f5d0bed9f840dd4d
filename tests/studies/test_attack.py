"""Sign-flipping clients: the mean collapses, robust averages do not; and the table that says so."""

from __future__ import annotations

import json

import pytest
import yaml

from fedsparse.studies import attack

FIGURES = {"val/acc": 0.5, "trainable_fraction": 1.0, "bytes_up": 1, "bytes_total": 1}
MEAN = {"_target_": "fedsparse.federation.server.WeightedMean"}
ROBUST = "fedsparse.federation.server.robust."


def write(folder, aggregation, attackers, seed, accuracy):
    """A finished run, as far as the table reads it."""
    place = folder / f"{len(list(folder.glob('*')))}"
    (place / ".hydra").mkdir(parents=True)
    config = {"aggregation": aggregation, "exchange": {"attackers": attackers}, "optimizer": {"lr": 0.1}}
    (place / ".hydra" / "config.yaml").write_text(yaml.safe_dump(config))
    named = {"mask_rule": "dense", "partition": "iid", "seed": seed, "test/acc": accuracy}
    (place / "summary.json").write_text(json.dumps(FIGURES | named))


def robust(name, **options):
    return {"_target_": "fedsparse.federation.server.Robust", "average": {"_target_": ROBUST + name, **options}}


def cell(line):
    return [part.strip() for part in line.strip("|\n").split("|")]


def test_the_table_by_hand(tmp_path, capsys):
    for seed, (clean, broken, near, far) in enumerate([(0.90, 0.1, 0.89, 0.86), (0.92, 0.1, 0.90, 0.88)]):
        write(tmp_path, MEAN, None, seed, clean)
        write(tmp_path, MEAN, 4, seed, broken)
        write(tmp_path, robust("trimmed_mean", trim=0.2), 4, seed, near)
        write(tmp_path, robust("krum", attackers=4), 4, seed, far)
        write(tmp_path, robust("krum", attackers=4), None, seed, clean)
    attack.main([str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    # two values: half the interval is 12.706 times half their distance
    assert cell(lines[2]) == ["trimmed_mean, trim=0.2", "–", "89.5 ± 6.4", "-1.5 ± 6.4", "yes"]  # noqa: RUF001
    assert cell(lines[3]) == ["krum, attackers=4", "91.0 ± 12.7", "87.0 ± 12.7", "-4.0 ± 0.0", "**no**"]
    assert cell(lines[4])[:3] == ["WeightedMean", "91.0 ± 12.7", "10.0 ± 0.0"]
    assert cell(lines[4])[4] == "not claimed"


def test_a_table_needs_fedavg_without_attackers(tmp_path):
    write(tmp_path, robust("median"), 4, 0, 0.9)
    with pytest.raises(SystemExit, match="no run of aggregation=weighted_mean without attackers"):
        attack.main([str(tmp_path)])


NEAR = {
    "median": ["aggregation=median"],
    "trimmed_mean": ["aggregation=trimmed_mean", "aggregation.average.trim=0.2"],
    "multi_krum": ["aggregation=multi_krum", "aggregation.average.attackers=4"],
    "geometric_median": ["aggregation=geometric_median"],
}


@pytest.mark.slow
def test_the_mean_collapses_and_robust_averages_stay_near_the_clean_run(run_in):
    options = ["experiment=byzantine_digits", "logger=csv", "pictures=false"]

    def accuracy(name, *more):
        return run_in(name, *options, *more, fast=False)[0]["test/acc"]

    clean = accuracy("clean", "exchange.attackers=null")
    assert clean > 0.9
    assert accuracy("mean") < 0.2  # ten classes
    for name, rule in NEAR.items():
        assert accuracy(name, *rule) > clean - 0.03, name
