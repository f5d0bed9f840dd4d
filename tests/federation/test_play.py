"""A federation played by the plain loop of ``federation.round`` gives the bits of the Lightning run."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from small import Small, small_data, small_net, uneven_parts
from staged import staged
from test_exchange_contract import AGGREGATIONS, EXCHANGES, build
from torch import nn

from fedsparse.core.space import ParamSpace
from fedsparse.data.datamodule import FederatedDataModule
from fedsparse.federation.client.drift import VARIATES, FedProx, Scaffold
from fedsparse.federation.exchange.update import Payload, Update
from fedsparse.federation.federation import Federation
from fedsparse.federation.phases import Phase, Phases
from fedsparse.federation.round import play
from fedsparse.masks import Sparsity
from fedsparse.masks.rules import AutoFLIP, Random

ROUNDS = 3


def played(small, rounds=ROUNDS):
    """Play so many rounds without a Trainer: the federation."""
    small.given.setdefault("phases", Phases([Phase("learn", rounds=rounds)]))
    clients = small.module.form(FederatedDataModule(small.dataset, small.plan).fetch)
    federation = Federation(clients, **small.given)
    small.net.train()
    for number in range(rounds):
        play(federation, clients, small.plan.cohorts(number), number)
    return federation


def assert_same(federation, small):
    """The same rows, bytes, and things that clients keep."""
    assert torch.equal(federation.server.rows, small.federation.server.rows)
    assert federation.ledger.figures() == small.federation.ledger.figures()
    assert federation.dropped == small.federation.dropped
    for name, store in small.federation.stores.items():
        kept = federation.stores[name].rows
        assert kept.keys() == store.rows.keys()
        assert all(torch.equal(kept[client], row) for client, row in store.rows.items())


@pytest.mark.parametrize("cohort", [1, 3])
@pytest.mark.parametrize("exchange", list(EXCHANGES))
def test_every_exchange(exchange, cohort, tmp_path):
    aggregation = "participants" if "feedback" in exchange else "senders"
    assert_same(
        played(build(exchange, aggregation, cohort=cohort)),
        build(exchange, aggregation, cohort=cohort).fit(ROUNDS, tmp_path),
    )


@pytest.mark.parametrize("aggregation", list(AGGREGATIONS))
def test_every_average(aggregation, tmp_path):
    assert_same(played(build("masked", aggregation)), build("masked", aggregation).fit(ROUNDS, tmp_path))


@pytest.mark.parametrize("objective", [partial(Scaffold, 7), partial(FedProx, 0.1)], ids=["scaffold", "fedprox"])
@pytest.mark.parametrize("cohort", [1, 3])
def test_objectives(objective, cohort, tmp_path):
    assert_same(*[f(build(objective=objective, cohort=cohort)) for f in (played, partial(fitted, folder=tmp_path))])


def fitted(small, folder):
    return small.fit(ROUNDS, folder)


def with_dropout():
    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(12, 16), nn.Dropout(0.3), nn.BatchNorm1d(16), nn.Linear(16, 3)
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("buffers", ["average", "local", "frozen"])
def test_dropout_and_buffers(buffers, tmp_path):
    pair = [Small(with_dropout(), small_data(), uneven_parts(), buffers=buffers) for _ in range(2)]
    federation = played(pair[0])
    assert_same(federation, pair[1].fit(ROUNDS, tmp_path))
    assert torch.equal(federation.buffers.values, pair[1].federation.buffers.values)


def test_coordinates_that_stay_with_the_clients(tmp_path):
    pair = [
        Small(net, small_data(), uneven_parts(), space=ParamSpace.of(net, local="3.*"))
        for net in (small_net(), small_net())
    ]
    assert_same(played(pair[0]), pair[1].fit(ROUNDS, tmp_path))
    assert pair[1].federation.stores["clients"].rows


PHASES = {
    "explored": [Phase("explore", 2, "explore", updates_model=False, local_epochs=2), Phase("learn", 2)],
    "explored with a head start": [Phase("explore", 1, "explore", local_steps=2, lr=0.1), Phase("learn", 2)],
    "with patience": [
        Phase("explore", 1, "explore", updates_model=False, local_epochs=4, patience=1),
        Phase("learn", 2),
    ],
    "renewed": [Phase("learn", 4)],
}


@pytest.mark.parametrize("mode", ["freeze", "prune"])
@pytest.mark.parametrize("name", list(PHASES))
def test_phases_and_masks_that_change(name, mode, tmp_path):
    phases, pair = PHASES[name], []
    rule, renew = (Random(), 1) if name == "renewed" else (AutoFLIP(), None)
    for _ in range(2):
        pair.append(staged(phases, rule, Sparsity(0.5, mode=mode, renew_every=renew)))
    rounds = sum(phase.rounds for phase in phases)
    federation = played(pair[0], rounds)
    assert_same(federation, pair[1].fit(rounds, tmp_path))
    assert not bool(federation.server.subspace.mask.all())


def played_from_bytes(small, rounds=ROUNDS):
    """Play, but hand the server nothing of an update but its bytes, and what it knows without them."""
    small.given.setdefault("phases", Phases([Phase("learn", rounds=rounds)]))
    clients = small.module.form(FederatedDataModule(small.dataset, small.plan).fetch)
    federation = Federation(clients, **small.given)
    small.net.train()
    for number in range(rounds):
        round = federation.open(number)
        for cohort in small.plan.cohorts(number):
            start = round.send(cohort)
            update = clients.train(start, cohort)
            payload = round.encode(update)
            written = tuple(federation.exchange.messages(payload))
            assert tuple(map(len, written)) == tuple(size.total for size in payload.sizes)
            nothing = torch.full_like(update.rows, torch.nan)
            known = Update(
                cohort.clients,
                nothing,
                torch.full_like(update.buffers, torch.nan),
                (0.0,) * len(cohort.clients),
                (0.0,) * len(cohort.clients),
                start=start.values,
                variates=nothing if federation.objective.messages else None,
                round=number,
                kept={name: kept for name, kept in update.kept.items() if name != VARIATES},  # the clients' own
            )
            round.receive(cohort, Payload(known, payload.sizes, written, payload.kept))
        round.close()
    return federation


@pytest.mark.parametrize("exchange", list(EXCHANGES))
def test_every_exchange_is_read_from_its_bytes(exchange):
    pair = [build(exchange, "participants" if "feedback" in exchange else "senders", cohort=3) for _ in range(2)]
    one, other = played(pair[0]), played_from_bytes(pair[1])
    assert torch.equal(one.server.rows, other.server.rows)
    assert one.ledger.figures() == other.ledger.figures()


@pytest.mark.parametrize("options", [{"aggregation": "fednova"}, {"objective": partial(Scaffold, 7)}], ids=str)
@pytest.mark.parametrize("cohort", [1, 3])
def test_steps_and_variates_are_read_from_bytes(options, cohort):
    one, other = played(build(cohort=cohort, **options)), played_from_bytes(build(cohort=cohort, **options))
    assert torch.equal(one.server.rows, other.server.rows)
    assert_kept(one, other)


def assert_kept(one, other):
    for name, store in one.stores.items():
        assert store.rows.keys() == other.stores[name].rows.keys()
        assert all(torch.equal(row, other.stores[name].rows[client]) for client, row in store.rows.items())


def test_averaged_buffers_are_read_from_bytes():
    pair = [Small(with_dropout(), small_data(), uneven_parts()) for _ in range(2)]
    one, other = played(pair[0]), played_from_bytes(pair[1])
    assert torch.equal(one.server.rows, other.server.rows)
    assert torch.equal(one.buffers.values, other.buffers.values)
