"""Exploration and masks that change in two processes against one: who hears whom when is an implementation detail."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from pair import fit, in_processes
from staged import staged
from test_parallel import PAIR

from fedsparse import run
from fedsparse.core import parallel
from fedsparse.data.rounds import LocalWork
from fedsparse.federation.client.drift import Scaffold
from fedsparse.federation.exchange.exchange import Exchange
from fedsparse.federation.exchange.filters import ErrorFeedback
from fedsparse.federation.exchange.sparsifiers import TopK
from fedsparse.federation.phases import Phase
from fedsparse.federation.server.aggregation import WeightedMean
from fedsparse.masks import Mask, Sparsity
from fedsparse.masks.gradual import Gradual
from fedsparse.masks.rules import AutoFLIP, Magnitude, Movement

EXPLORE = Phase("explore", rounds=2, updates_model=False, local_epochs=3, patience=1, weight="held", lr=0.5)
LEARN = Phase("learn", rounds=4)
GRADUAL = Gradual(steps=3)
FEEDBACK = {
    "exchange": lambda **given: Exchange(**given, rule=TopK(fraction=0.3), filters={"feedback": ErrorFeedback()}),
    "aggregation": partial(WeightedMean, "participants"),
}
CASES = {
    "explore": ([EXPLORE, LEARN], AutoFLIP, Sparsity(0.7), {"work": LocalWork(8, None, 1)}),
    "refined, pruned": (
        [EXPLORE, LEARN],
        partial(AutoFLIP, refine=True),
        Sparsity(0.7, mode="prune", schedule=GRADUAL),
        {"server": partial(torch.optim.Adam, lr=0.05)},
    ),
    "movement, feedback": ([LEARN], Movement, Sparsity(0.6, schedule=GRADUAL), FEEDBACK),
    "magnitude, scaffold": (
        [LEARN],
        partial(Magnitude, True),
        Sparsity(0.6, mode="prune", schedule=GRADUAL),
        {"objective": partial(Scaffold, 7), "momentum": 0.0, "lr": 0.05},
    ),
    "explorers that diverge": ([EXPLORE, LEARN], AutoFLIP, Sparsity(0.7), {}),
}


def build(case, **place):
    phases, rule, sparsity, options = CASES[case]
    small = staged(phases, rule(), sparsity, **options, **place)
    if "diverge" in case:
        for client in (2, 6):
            small.dataset.train.x[small.parts[client]] = float("nan")
    return small, sum(phase.rounds for phase in phases)


def outcome(small):
    stores = {name: dict(store.rows) for name, store in small.federation.stores.items()}
    choice, ledger = small.federation.choice, small.federation.ledger
    whole = [small.row, torch.as_tensor(small.module.mask), choice.observed, choice.updates]
    counted = [ledger.figures(), ledger.client_steps, ledger.has_mask, ledger.has_model]
    return whole, stores, [*counted, sorted((d.round, d.client) for d in small.federation.dropped)]


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")

    def work():
        place = {"processes": parallel.processes(), "process": parallel.process()}
        found = {}
        for case in CASES:
            small, rounds = build(case, **place)
            found[case] = outcome(fit(small, rounds, folder / str(place["process"])))
        return found

    return in_processes(work, 2, folder)


@pytest.mark.filterwarnings("ignore:.*of the scores tie")
@pytest.mark.parametrize("cohort", [1, 3])
@pytest.mark.parametrize("case", list(CASES))
def test_two_processes_equal_one(tmp_path, several, case, cohort):
    small, rounds = build(case, cohort=cohort)
    whole, stores, counted = outcome(small.fit(rounds, tmp_path))
    assert 0 < int(whole[1].sum()) < small.space.size
    for process in several:
        others, kept, counts = process[case]
        for mine, other in zip(whole, others, strict=True):
            assert (mine is None) == (other is None)
            if mine is not None:
                torch.testing.assert_close(other, mine, rtol=0, atol=1e-9)
        assert counts == counted
        assert {name: set(rows) for name, rows in kept.items()} == {name: set(rows) for name, rows in stores.items()}
        for name, rows in stores.items():
            for client, wanted in rows.items():
                torch.testing.assert_close(kept[name][client], wanted, rtol=0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["mask_rule=autoflip", "phases.explore.rounds=2"],
        pytest.param(["mask_rule=autoflip", "sparsity=gradual80", "mask_rule.refine=true"], marks=pytest.mark.soak),
    ],
    ids=["explore", "renewals"],
)
def test_a_run_in_two_processes_leaves_what_one_leaves_and_goes_on_as_one(run_in, options):
    options = [*options, "sparsity.mode=prune", "sparsity.ratio=0.7", "explore.steps=3", "pictures=false"]
    (one, alone), (two, both) = (
        run_in(name, *place, *options, "calibration.cache=null") for name, place in (("one", PAIR[2:]), ("two", PAIR))
    )
    assert (one["processes"], two["processes"]) == (1, 2)
    assert {key: one[key] for key in one if "bytes" in key} == {key: two[key] for key in two if "bytes" in key}
    assert (alone / "traffic.csv").read_text() == (both / "traffic.csv").read_text()
    assert one["client_steps"] == two["client_steps"]
    assert one["num_nonzero"] == two["num_nonzero"]
    masks = [Mask.load(folder / "mask.safetensors") for folder in (alone, both)]
    assert masks[0].metadata == masks[1].metadata
    assert all(torch.equal(mask, masks[1].tensors[name]) for name, mask in masks[0].tensors.items())
    _, part = run_in("part", *PAIR, *options, "calibration.cache=null", "federation.rounds=1")
    more = run([f"resume={part}", "federation.rounds=3"])
    assert more["global_sha256"] == two["global_sha256"]
    assert (part / "traffic.csv").read_text() == (both / "traffic.csv").read_text()
