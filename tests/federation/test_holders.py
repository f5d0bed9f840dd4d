"""Clients that hold no data: nothing counts them where those that take part are meant."""

from __future__ import annotations

import re
from typing import ClassVar

import numpy as np
import pytest
import torch
from test_bad_input import KRUM, refused

from fedsparse.federation.client import drift

HOLD = [2, 3, 5, 7, 11, 13]  # of 20


@pytest.fixture
def six_of_twenty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = [np.arange(40 * k, 40 * k + 30) if k in HOLD else np.arange(0) for k in range(20)]
    monkeypatch.setattr("fedsparse.data.partition.iid", lambda **_: parts)


SCAFFOLD = ["objective=scaffold", "federation.clients_per_round=4", "mask_rule=random"]


class Noted(drift.Scaffold):
    """Scaffold, of which a test sees what a run has made."""

    made: ClassVar[list[drift.Scaffold]] = []

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.made.append(self)


def test_scaffolds_c_is_the_mean_over_the_clients_that_hold_data(run_in, six_of_twenty):
    one, _ = run_in("one", *SCAFFOLD, f"objective._target_={__name__}.Noted")
    last = Noted.made[-1]
    kept = torch.stack([last.stores[drift.VARIATES].rows[client] for client in HOLD])  # all have taken part by now
    torch.testing.assert_close(last.mean, kept.double().sum(0) / 6, rtol=0, atol=1e-6)
    six, _ = run_in("six", *SCAFFOLD, "objective.num_clients=6")
    twenty, _ = run_in("twenty", *SCAFFOLD, "objective.num_clients=20")
    assert one["global_sha256"] == six["global_sha256"] != twenty["global_sha256"]


@pytest.mark.parametrize("options", [[], ["objective=fedprox"], ["objective=scaffold"], ["optimizer=adam"]])
def test_every_objective_starts_with_a_measured_cohort(run_in, options):
    summary, _ = run_in("auto", "federation.cohort=auto", *options, "mask_rule=random", "federation.rounds=2")
    assert summary["rounds"] == 2
    wanted, _ = run_in(
        "same", f"federation.cohort={summary['cohort']}", *options, "mask_rule=random", "federation.rounds=2"
    )
    assert summary["global_sha256"] == wanted["global_sha256"]  # what was tried has left nothing behind


@pytest.mark.parametrize("given", ["4", "[3,4,6]"])
def test_attackers_that_hold_no_data_would_attack_nobody(six_of_twenty, given):
    line = refused(f"exchange.attackers={given}")
    first = HOLD[: 4 if given == "4" else 3]
    idle = "0, 1" if given == "4" else "4, 6"
    assert line.startswith(f"exchange.attackers: {idle} of these clients hold no data and never take part; ")
    assert line.endswith(f"the first that do are exchange.attackers={first}")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (f"{KRUM}.attackers=4", "of 6 clients in a round, is 4; it must be a whole number from 0 to 3"),
        (f"{KRUM}.attackers=4 sampling=everyone federation.clients_per_round=2", "of 6 clients in a round, .* 0 to 3"),
        (
            f"{KRUM}.attackers=1 +phases.learn.clients=3",
            "of 3 clients in a round, is 1; it must be a whole number from 0 to 0",
        ),
    ],
)
def test_a_robust_mean_is_checked_by_those_that_will_take_part(six_of_twenty, options, says):
    assert re.search(says, refused(options))


def test_everyone_takes_part_whatever_the_share(run_in, six_of_twenty):
    """Two would be too few for three attackers; all six are sampled."""
    options = ["sampling=everyone", "federation.clients_per_round=2", "aggregation=krum", "mask_rule=random"]
    assert run_in("run", *options, "aggregation.average.attackers=3")[0]["rounds"] == 3
