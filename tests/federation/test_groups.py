"""Several global rows: two departments in one federation are two federations, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from pair import fit, in_processes
from small import Small, small_data, small_net, uneven_parts
from torch import nn

from fedsparse.core import parallel
from fedsparse.federation.client.drift import Scaffold
from fedsparse.federation.exchange.exchange import Exchange
from fedsparse.federation.exchange.filters import RESIDUAL, ErrorFeedback
from fedsparse.federation.exchange.ledger import Traffic
from fedsparse.federation.exchange.sparsifiers import TopK
from fedsparse.federation.server.aggregation import FedNova, Robust, WeightedMean
from fedsparse.federation.server.robust import median
from fedsparse.optim.fedopt import FedAdam

ROUNDS = 4
SERVERS = {"sgd": partial(torch.optim.SGD, lr=1.0), "momentum": partial(torch.optim.SGD, lr=0.7, momentum=0.9)}
SERVERS["adam"] = partial(FedAdam, lr=0.05)


@dataclass(frozen=True)
class Parity:
    """Clients of even ids share one model, those of odd ids another."""

    groups: int = 2

    def group(self, clients):
        return tuple(client % 2 if client >= 0 else 0 for client in clients)


def topk(trained, local, space, **_):
    return Exchange(trained, local, rule=TopK(fraction=0.3), filters={"feedback": ErrorFeedback(0.9)}, space=space)


participants = partial(WeightedMean, "participants")
EXCHANGES = {"masked": {}, "topk": {"exchange": topk, "aggregation": participants}}


def department(keep, **options):
    """One of the two departments as a federation of its own."""
    small = Small(small_net(), small_data(), uneven_parts(), **options)
    sample = small.plan.sample
    small.plan.sample = lambda round: [client for client in sample(round) if client % 2 == keep]
    small.plan.cohort_size = lambda clients: options.get("cohort", 1)
    return small


def mask_of(share):
    return torch.rand(small_size(), generator=torch.Generator().manual_seed(3)) < share


def small_size():
    return sum(p.numel() for p in small_net().parameters())


@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize("server", list(SERVERS))
@pytest.mark.parametrize("exchange", list(EXCHANGES))
def test_two_departments_are_two_federations(exchange, server, share, tmp_path):
    options = {**EXCHANGES[exchange], "server": SERVERS[server], "mask": mask_of(share)}
    both = Small(small_net(), small_data(), uneven_parts(), topology=Parity(), **options).fit(ROUNDS, tmp_path / "both")
    alone = [department(keep, **options).fit(ROUNDS, tmp_path / str(keep)) for keep in (0, 1)]
    assert_equal(both, alone)
    assert not torch.equal(*both.federation.server.rows)
    figures = [one.federation.ledger.figures() for one in alone]
    assert both.federation.ledger.figures() == {key: sum(f[key] for f in figures) for key in figures[0]}
    for name, store in both.federation.stores.items():
        kept = {client: row for one in alone for client, row in one.federation.stores[name].rows.items()}
        assert {c: r.tolist() for c, r in store.rows.items()} == {c: r.tolist() for c, r in kept.items()}
    assert (RESIDUAL in both.federation.stores) == (exchange == "topk")


def assert_equal(both, alone):
    """Global rows, moments, and who holds what, group by group."""
    for group, one in enumerate(alone):
        server, own = both.federation.server, one.federation.server
        assert torch.equal(server.rows[group], own.rows[0])
        moments, wanted = (s.optimizer.state.get(s.parameters[g], {}) for s, g in ((server, group), (own, 0)))
        assert moments.keys() == wanted.keys()
        assert all(torch.equal(torch.as_tensor(moments[key]), torch.as_tensor(wanted[key])) for key in moments)
        down, own_down = both.federation.bytes.downlinks[group], one.federation.bytes.downlinks[0]
        assert down.holds == own_down.holds
        assert torch.equal(torch.as_tensor(down.moved), torch.as_tensor(own_down.moved))


@pytest.mark.parametrize("aggregation", [FedNova, partial(Robust, median)], ids=["fednova", "median"])
def test_other_averages_keep_departments_apart(aggregation, tmp_path):
    options = {"aggregation": aggregation}
    both = Small(small_net(), small_data(), uneven_parts(), topology=Parity(), **options).fit(ROUNDS, tmp_path / "both")
    assert_equal(both, [department(keep, **options).fit(ROUNDS, tmp_path / str(keep)) for keep in (0, 1)])


def test_stacked_clients_of_both_departments_agree_to_rounding(tmp_path):
    both = Small(small_net(), small_data(), uneven_parts(), topology=Parity(), cohort=3).fit(ROUNDS, tmp_path / "both")
    for keep in (0, 1):
        alone = department(keep).fit(ROUNDS, tmp_path / str(keep))
        torch.testing.assert_close(both.federation.server.rows[keep], alone.federation.server.rows[0])


@pytest.mark.parametrize("server", ["sgd", "adam"])
def test_a_resume_has_the_rows_and_moments_of_both(server, tmp_path):
    options = {"server": SERVERS[server], "topology": Parity(), **EXCHANGES["topk"]}
    whole = Small(small_net(), small_data(), uneven_parts(), **options).fit(ROUNDS, tmp_path / "whole")
    again = resumed(options, tmp_path)
    assert torch.equal(again.rounds.federation.federation.server.rows, whole.federation.server.rows)


@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize("exchange", list(EXCHANGES))
def test_a_resume_of_two_departments_counts_the_bytes_of_two_federations(exchange, share, tmp_path):
    """Line by line of traffic.csv: each client of each round, down and up, as if nothing had been interrupted."""
    options = {**EXCHANGES[exchange], "mask": mask_of(share)}
    again = resumed({**options, "topology": Parity()}, tmp_path)
    found = lines_of(tmp_path / "first.csv") + lines_of(tmp_path / "again.csv")
    whole = listed(Small(small_net(), small_data(), uneven_parts(), topology=Parity(), **options), tmp_path / "whole")
    alone = [listed(department(keep, **options), tmp_path / str(keep)) for keep in (0, 1)]
    for small, name in zip([whole, *alone], ["whole", "0", "1"], strict=True):
        small.fit(ROUNDS, tmp_path / name)
    assert found == lines_of(tmp_path / "whole.csv")
    assert found == sorted((line for keep in (0, 1) for line in lines_of(tmp_path / f"{keep}.csv")), key=by_round)
    figures = [one.federation.ledger.figures() for one in alone]
    assert again.federation.federation.ledger.figures() == {key: sum(f[key] for f in figures) for key in figures[0]}
    for group, one in enumerate(alone):
        down = again.federation.federation.bytes.downlinks[group]
        assert down.holds == one.federation.bytes.downlinks[0].holds
        assert torch.equal(torch.as_tensor(down.moved), torch.as_tensor(one.federation.bytes.downlinks[0].moved))
    later = [downlink_of(line) for line in found if by_round(line)[0] > RESUMED]
    assert any(later)
    if exchange == "topk":  # what moved since depends on when a client last took part, and in which department
        assert len({size for size in later if size}) > 2


RESUMED = 2  # rounds before the resume


def resumed(options, folder):
    """A federation that goes on from a checkpoint of the first rounds; both write down what their clients received."""
    first = listed(Small(small_net(), small_data(), uneven_parts(), **options), folder / "first")
    first.fit(RESUMED, folder / "first")
    again = listed(Small(small_net(), small_data(), uneven_parts(), **options), folder / "again")
    again.net.load_state_dict(first.net.state_dict())
    again.rounds.load_state_dict(torch.load(saved(first, folder / "state.pt"), weights_only=True))
    again.plan.cohorts = lambda round, rows=None, cohorts=again.plan.cohorts: cohorts(round + RESUMED, rows)
    opened = again.rounds.federate
    again.rounds.federate = lambda clients: Later(opened(clients), RESUMED)
    return again.fit(ROUNDS - RESUMED, folder / "again")


def listed(small, path):
    """Let a federation write traffic.csv beside a folder."""
    small.given["traffic"] = Traffic(path.with_suffix(".csv"))
    return small


def lines_of(path):
    return path.read_text().splitlines()[1:]


def by_round(line):
    return tuple(map(int, line.split(",")[:2]))


def downlink_of(line):
    return sum(map(int, line.split(",")[5:8]))


class Later:
    """A federation whose rounds are counted from a later one."""

    def __init__(self, federation, by):
        self.federation, self.by = federation, by

    def open(self, number):
        return self.federation.open(number + self.by)

    def __getattr__(self, name):
        return getattr(self.federation, name)


def saved(small, path):
    torch.save(small.rounds.state_dict(), path)
    return path


def with_batchnorm(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()


def test_float_buffers_are_averaged_by_department(tmp_path):
    both = Small(with_batchnorm(), small_data(), uneven_parts(), topology=Parity()).fit(ROUNDS, tmp_path / "both")
    for keep in (0, 1):
        alone = Small(with_batchnorm(), small_data(), uneven_parts())
        sample = alone.plan.sample
        alone.plan.sample = lambda round, s=sample, k=keep: [client for client in s(round) if client % 2 == k]
        alone.fit(ROUNDS, tmp_path / str(keep))
        assert torch.equal(both.federation.buffers.values[keep], alone.federation.buffers.values[0])
        assert torch.equal(both.federation.server.rows[keep], alone.federation.server.rows[0])


def test_a_department_without_clients_in_a_round_stays_as_it_is(tmp_path):
    """Its moments too: with Adam the others' step must not be its own."""
    adam = partial(torch.optim.Adam, lr=0.05)
    small = Small(small_net(), small_data(), uneven_parts(), topology=Parity(), server=adam)
    sample = small.plan.sample
    small.plan.sample = lambda round: [client for client in sample(round) if client % 2 == 0]
    begin = small.row.clone()
    small.fit(2, tmp_path)
    assert torch.equal(small.federation.server.rows[1], begin)
    assert not torch.equal(small.federation.server.rows[0], begin)
    assert small.federation.server.parameters[1] not in small.federation.server.optimizer.state


def test_scaffold_keeps_one_mean_for_all_departments(tmp_path):
    """c is the mean of all c_i, of whatever department."""
    small = Small(small_net(), small_data(), uneven_parts(), topology=Parity(), objective=partial(Scaffold, 7))
    small.fit(ROUNDS, tmp_path)
    variates = small.federation.stores["variates"].rows
    mean = sum(row.double() for row in variates.values()) / 7
    torch.testing.assert_close(small.federation.objective.mean, mean, rtol=1e-12, atol=1e-15)


def test_a_mask_that_changes_needs_one_group():
    from fedsparse.federation.federation import _check_groups
    from fedsparse.federation.phases import Phase, Phases

    class Changing:
        changes = True

    with pytest.raises(ValueError, match="needs topology=flat"):
        _check_groups(Parity(), Changing(), Phases([Phase("learn")]))
    _check_groups(Parity(), None, Phases([Phase("learn")]))


@pytest.mark.parametrize("exchange", list(EXCHANGES))
def test_two_processes_train_both_departments(exchange, tmp_path):
    """One client at a time, with Adam on the server, in float32, whose sums in float64 are exact: as one process."""
    given = small_net(torch.float32), small_data(dtype=torch.float32), uneven_parts()
    options = {**EXCHANGES[exchange], "server": SERVERS["adam"], "topology": Parity()}

    def work():
        place = {"processes": parallel.processes(), "process": parallel.process()}
        small = fit(Small(*given, **options, **place), ROUNDS, tmp_path / "two")
        return (
            small.federation.server.rows,
            small.federation.ledger.figures(),
            [downlink.holds for downlink in small.federation.bytes.downlinks],
        )

    alone = Small(small_net(torch.float32), *given[1:], **options).fit(ROUNDS, tmp_path / "one").federation
    for rows, figures, holds in in_processes(work, 2, tmp_path):
        assert torch.equal(rows, alone.server.rows)
        assert figures == alone.ledger.figures()
        assert holds == [downlink.holds for downlink in alone.bytes.downlinks]
