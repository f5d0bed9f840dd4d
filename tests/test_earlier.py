"""A run folder of an earlier version goes on as it began."""

from __future__ import annotations

import pytest
import yaml

from fedsparse import run
from fedsparse.job.earlier import KEYS, TARGETS, renewed
from fedsparse.job.trust import shipped

NC2 = ["partition=noniid_nc2", "federation.num_clients=8", "mask_rule=random"]


def test_a_run_of_before_clients_were_even_keeps_its_clients(run_in):
    """Its configuration has no partition.even; today's default deals one class of these clients otherwise."""
    whole, _ = run_in("whole", *NC2, "partition.even=false")
    even, _ = run_in("even", *NC2)
    assert even["global_sha256"] != whole["global_sha256"]
    _, folder = run_in("old", *NC2, "partition.even=false", "federation.rounds=2")
    stored = folder / ".hydra" / "config.yaml"
    cfg = yaml.safe_load(stored.read_text(encoding="utf-8"))
    del cfg["partition"]["even"]
    stored.write_text(yaml.safe_dump(cfg, sort_keys=False), encoding="utf-8")
    assert run([f"resume={folder}", "federation.rounds=3"])["global_sha256"] == whole["global_sha256"]


def test_what_was_stored_wins():
    stored = {
        "partition": {"_target_": "fedsparse.data.partition.classes_per_client", "even": True},
        "list": [{"a": 1}],
    }
    assert renewed(stored) == stored


@pytest.mark.parametrize(("then", "now"), [(32, "32-true"), ("bf16", "bf16-mixed"), ("16-mixed", "16-mixed")])
def test_lightnings_short_names_of_a_precision_are_read(then, now):
    assert renewed({"_target_": "lightning.Trainer", "precision": then})["precision"] == now


def test_a_run_of_before_exchanges_were_one_class_goes_on(run_in):
    """Then a sparse exchange was a class of its own, and its rules stood in another file."""
    options = ["mask_rule=dense", "aggregation=coordinate_mean", "exchange=topk", "exchange.fraction=0.1"]
    whole, _ = run_in("whole", *options)
    _, folder = run_in("old", *options, "federation.rounds=2")
    stored = folder / ".hydra" / "config.yaml"
    text = stored.read_text(encoding="utf-8")
    old = text.replace("federation.exchange.Exchange", "federation.exchange.Sparse")
    old = old.replace("federation.exchange.TopK", "federation.selection.TopK")
    assert old.count("exchange.Sparse\n") == old.count("selection.TopK\n") == 1
    stored.write_text(old, encoding="utf-8")
    assert run([f"resume={folder}", "federation.rounds=3"])["global_sha256"] == whole["global_sha256"]


def test_the_names_of_now_are_those_of_conf():
    for target, keys in KEYS.items():
        assert set(keys) <= shipped().arguments[target]
    assert set(TARGETS.values()) <= set(shipped().arguments)
