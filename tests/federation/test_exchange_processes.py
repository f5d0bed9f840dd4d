"""Sparse exchange and objectives in two processes against one: who hears whom when is an implementation detail."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from pair import fit, in_processes
from small import Small, small_data, small_net, uneven_parts

from fedsparse.core import parallel
from fedsparse.data.rounds import LocalWork
from fedsparse.federation.client.drift import Scaffold
from fedsparse.federation.exchange.exchange import Exchange
from fedsparse.federation.exchange.filters import ErrorFeedback, Quantize
from fedsparse.federation.exchange.sparsifiers import RandomK, TopK
from fedsparse.federation.server.aggregation import FedNova, Robust, WeightedMean
from fedsparse.federation.server.robust import median
from fedsparse.optim.fedopt import FedYogi


def sparse(rule, *filters, **options):
    return lambda **given: Exchange(**given, rule=rule, filters={str(i): f() for i, f in enumerate(filters)}, **options)


CASES = {
    "feedback": {
        "exchange": sparse(TopK(fraction=0.1), ErrorFeedback, partial(Quantize, "int8")),
        "aggregation": partial(WeightedMean, "participants"),
        "server": partial(FedYogi, lr=0.01),
        "untouched": "freeze",
    },
    "blocks": {"aggregation": partial(WeightedMean, block=2)},
    "fednova": {"exchange": sparse(RandomK(0.2)), "aggregation": FedNova},
    "median": {"exchange": sparse(TopK(fraction=0.3)), "aggregation": partial(Robust, median)},
    "original": {"exchange": sparse(TopK(fraction=0.2, compat="original"), payload="value", compat="original")},
    "scaffold": {"objective": partial(Scaffold, 7)},
    "scaffold, one dropped": {"objective": partial(Scaffold, 7)},
}


def build(case, **place):
    small = Small(small_net(), small_data(), uneven_parts(), work=LocalWork(8, None, 2), lr=0.1, **CASES[case], **place)
    if "dropped" in case:
        small.dataset.train.x[small.parts[small.plan.sample(0)[1]][0]] = float("nan")
    return small


def outcome(small):
    stores = {name: dict(store.rows) for name, store in small.federation.stores.items()}
    mean = getattr(small.module.objective, "mean", None)
    (downlink,), values = small.federation.bytes.downlinks, small.federation.server.values[0]
    down = [downlink.size(client, values, 0) for client in range(7)]
    return small.row, stores, mean, small.federation.ledger.figures(), down, small.federation.dropped


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")

    def work():
        place = {"processes": parallel.processes(), "process": parallel.process()}
        return {case: outcome(fit(build(case, **place), 3, folder / str(place["process"]))) for case in CASES}

    return in_processes(work, 2, folder)


@pytest.mark.parametrize("case", list(CASES))
def test_two_processes_equal_one(tmp_path, several, case):
    row, stores, mean, *counted = outcome(build(case, cohort=3).fit(3, tmp_path))
    for process in several:
        other, kept, other_mean, *others = process[case]
        # blocks are summed in float32, and each process has its own
        torch.testing.assert_close(other, row, rtol=0, atol=1e-6 if case == "blocks" else 1e-9)
        if case != "original":  # in float64 "all say 0" leaves a rounding, which counts as moved
            assert others == counted
        assert (mean is None) == (other_mean is None)
        if mean is not None:
            torch.testing.assert_close(other_mean, mean, rtol=0, atol=1e-9)
        assert {name: set(rows) for name, rows in kept.items()} == {name: set(rows) for name, rows in stores.items()}
        for name, rows in stores.items():
            for client, wanted in rows.items():
                torch.testing.assert_close(kept[name][client], wanted, rtol=0, atol=1e-9)
