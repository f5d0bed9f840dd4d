"""Cohorts of small networks reach Lightning in bundles, of a size that follows from the time that they take."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from small import Small, small_data, small_net, uneven_parts

from fedsparse.data.datamodule import CohortLoader, FederatedDataModule
from fedsparse.data.rounds import Bundle, LocalWork
from fedsparse.simulation.module import ClientModule
from fedsparse.simulation.precision import DoublePrecision


def built(**options):
    return Small(small_net(), small_data(), uneven_parts(), **options)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_every_cohort_is_in_one_bundle_in_order(size):
    cohorts = built().plan.cohorts(0)
    loader = CohortLoader(cohorts, size)
    bundles = list(loader)
    assert len(loader) == len(bundles) == math.ceil(5 / size)
    assert [cohort for bundle in bundles for cohort in bundle.cohorts] == cohorts
    assert all(len(bundle.cohorts) == size for bundle in bundles[:-1])
    assert list(loader) == bundles  # again


@pytest.mark.parametrize(
    ("bundle", "pace", "sizes"),
    [(0.02, 0.03, [1] * 5), (0.02, 0.02, [1] * 5), (0.02, 0.007, [3, 2]), (0.02, 1e-4, [5]), (0.0, 1e-4, [1] * 5)],
)
def test_a_bundle_takes_at_least_so_long(bundle, pace, sizes):
    small = built()
    data = FederatedDataModule(small.dataset, small.plan, bundle=bundle)
    assert [len(b.cohorts) for b in data.train_dataloader()] == [1] * 5  # nothing has been measured
    data.paced(pace)
    assert [len(b.cohorts) for b in data.train_dataloader()] == sizes


def test_a_bundle_moves_its_cohorts():
    cohort = built(cohort=3).plan.cohorts(0)[0]
    bundle = Bundle((cohort, replace(cohort, clients=(4, -1, -1)))).to("meta")
    assert [c.samples.device.type for c in bundle.cohorts] == ["meta", "meta"]
    assert [c.clients for c in bundle.cohorts] == [cohort.clients, (4, -1, -1)]


class Listed(ClientModule):
    """Lists how many cohorts each batch had."""

    def training_step(self, bundle, batch_idx):
        self.seen = [*getattr(self, "seen", []), len(bundle.cohorts)]
        return super().training_step(bundle, batch_idx)


def test_bundles_change_no_bit(tmp_path):
    one, all_at_once = (
        built(client=Listed, work=LocalWork(8, None, 2), data={"bundle": seconds}).fit(3, tmp_path)
        for seconds in (0.0, 1e9)
    )
    assert one.module.seen == [1] * 15
    assert all_at_once.module.seen == [1] * 5 + [5, 5]  # the first round is measured
    assert torch.equal(one.row, all_at_once.row)
    assert one.federation.ledger.figures() == all_at_once.federation.ledger.figures()


def test_the_server_computes_in_the_dtype_of_its_rows(tmp_path):
    """Lightning's autocast is around the whole training step; only the clients want it."""
    found = []

    class Noting(ClientModule):
        def losses(self, forward, x, y):
            found.append(("client", torch.is_autocast_enabled("cpu")))
            return super().losses(forward, x, y)

    def note(federation):
        take = federation.aggregation.add

        def add(*arguments):
            found.append(("server", torch.is_autocast_enabled("cpu")))
            return take(*arguments)

        federation.aggregation.add = add

    small = Small(small_net(torch.float32), small_data(dtype=torch.float32), uneven_parts(), client=Noting)
    small.once_made(note)
    small.fit(1, tmp_path, precision="bf16-mixed")
    assert set(found) == {("client", True), ("server", False)}


def test_a_double_network_finds_double_as_default(tmp_path):
    found = []

    class Noting(ClientModule):
        def losses(self, forward, x, y):
            found.append(torch.get_default_dtype())
            return super().losses(forward, x, y)

    built(client=Noting).fit(1, tmp_path, plugins=[DoublePrecision()])
    assert set(found) == {torch.float64}
    assert torch.get_default_dtype() == torch.float32
