"""Error feedback: nothing that a client changed is lost, and nothing counts more than once."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from plain import replay
from plain_sparse import best, train
from small import Small, small_data, small_net, uneven_parts

from fedsparse.data.rounds import LocalWork
from fedsparse.federation.client.drift import FedProx, NoCorrection, Scaffold
from fedsparse.federation.exchange.exchange import Exchange, Full
from fedsparse.federation.exchange.filters import (
    RESIDUAL,
    ErrorFeedback,
    Quantize,
    SignFlip,
    feedback,
    precision,
    sign_flip,
)
from fedsparse.federation.exchange.sparsifiers import RandomK, Threshold, TopK
from fedsparse.federation.exchange.update import Update
from fedsparse.federation.server.aggregation import FedNova, Robust, WeightedMean
from fedsparse.federation.server.robust import krum, median, multi_krum
from fedsparse.federation.stores.store import MemoryStore
from fedsparse.job.checks import check_sizes, check_together
from fedsparse.optim.sgdm import SparseSGDM

N = 600


def exchange_of(rule, *filters, size=N, **options):
    every = torch.ones(size, dtype=torch.bool)
    named = {str(i): new for i, new in enumerate(filters)}
    return (Exchange if rule else Exchange)(every, ~every, rule=rule, filters=named, **options)


def update_of(rows, round=0, weight=None, clients=None):
    count = len(rows)
    clients = tuple(range(count)) if clients is None else clients
    weight = (1.0,) * count if weight is None else weight
    return Update(clients, rows, rows.new_zeros(count, 0), weight, (0.0,) * count, round=round)


def random_rows(round, dtype=torch.float32, count=3, size=N):
    g = torch.Generator().manual_seed(round)
    return (torch.randn(count, size, generator=g) * 10.0 ** torch.randint(-6, 3, (count, size), generator=g)).to(dtype)


def carried_of(exchange, count=3, size=N):
    rows = exchange.stores[RESIDUAL].rows
    return torch.stack([rows.get(client, torch.zeros(size)) for client in range(count)])


def sent(exchange, update):
    """Send an update, and store what is kept of it as the federation would; what arrives."""
    payload = exchange.encode(update)
    exchange.stores[RESIDUAL].write(*payload.kept[RESIDUAL])
    return exchange.decode(payload)


def exchange_rounds(exchange, rounds, decay=1.0, dtype=torch.float32):
    """Yield (carried + change, what arrived, what is kept) of each round, as the federation would store it."""
    for r in range(rounds):
        rows = random_rows(r, dtype)
        wanted = rows + decay * carried_of(exchange).to(dtype)
        payload = exchange.encode(update_of(rows, r))
        arrived = exchange.decode(payload).rows
        clients, kept = payload.kept[RESIDUAL]
        assert clients == (0, 1, 2)
        exchange.stores[RESIDUAL].write(clients, kept)
        yield wanted, arrived, kept


RULES = {
    "topk": TopK(fraction=0.1),
    "randomk": RandomK(0.1),
    "threshold": Threshold(0.01),
    "tensor": TopK(scope="tensor"),
}


@pytest.mark.parametrize("decay", [1.0, 0.5])
@pytest.mark.parametrize("rule", list(RULES))
def test_sent_and_kept_are_carried_and_changed_to_the_bit(rule, decay):
    exchange = exchange_of(RULES[rule], ErrorFeedback(decay))
    for wanted, arrived, kept in exchange_rounds(exchange, 4, decay):
        assert torch.equal(arrived + kept, wanted)
        assert not (arrived.bool() & kept.bool()).any()  # each value went one way whole
        assert arrived.any()
        assert kept.any()


@pytest.mark.parametrize("rule", [None, *RULES])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_what_rounding_takes_is_kept_within_a_float32_rounding(rule, dtype):
    exchange = exchange_of(RULES.get(rule), ErrorFeedback(), Quantize(dtype))
    for wanted, arrived, kept in exchange_rounds(exchange, 4):
        assert torch.equal(kept, wanted - arrived)
        error = (arrived.double() + kept.double() - wanted.double()).abs()
        assert bool((error <= 2.0**-24 * torch.maximum(wanted.abs(), arrived.abs()).double()).all())
        assert kept.any()


def test_after_all_rounds_nothing_is_lost():
    """The sum of all changes is the sum of all that arrived and what is left."""
    exchange, changed, heard = exchange_of(TopK(fraction=0.05), ErrorFeedback()), 0.0, 0.0
    for r in range(20):
        rows = random_rows(r).double()
        arrived = sent(exchange, update_of(rows, r)).rows
        changed, heard = changed + rows, heard + arrived
    torch.testing.assert_close(heard + carried_of(exchange), changed, rtol=0, atol=1e-9)


def test_three_rounds_of_one_coordinate_by_hand():
    """Changes (3, 2, 1) each round; one of three is sent: 3; then of (3, 4, 2) the 4; then of (6, 2, 3) the 6."""
    exchange = exchange_of(TopK(fraction=1 / 3), ErrorFeedback(), size=3)
    rows, heard = torch.tensor([[3.0, 2.0, 1.0]]), []
    for r in range(3):
        heard.append(sent(exchange, update_of(rows, r)).rows[0].tolist())
    assert heard == [[3, 0, 0], [0, 4, 0], [6, 0, 0]]
    assert exchange.stores[RESIDUAL].rows[0].tolist() == [0, 2, 3]


class InTurn:
    """One client in ten sends, all that it has; each its turn."""

    shared = False

    def mark(self, theta, start, layout, sender):
        return torch.full_like(theta, sender.round % 10 == sender.client, dtype=torch.bool)


def speed(denominator, rule, size=1, rounds=100, changes=0.1):
    """Mean way of the model in a round, of the later half, if ten clients want to go 0.1."""
    exchange, mean = exchange_of(rule, ErrorFeedback(), size=size), WeightedMean(denominator)
    gone = torch.zeros(size, dtype=torch.float64)
    rows = torch.full((10, size), changes, dtype=torch.float64)
    for r in range(rounds):
        tally = mean.zero(1, size, 0, torch.device("cpu"), exchange.per_coordinate)
        mean.add(tally, sent(exchange, update_of(rows, r)), [0] * 10)
        gone += mean.finish(tally).rows[0] if r >= rounds // 2 else 0.0
    return gone / (rounds - rounds // 2)


def test_ten_clients_that_send_in_turn_go_as_far_as_all_want_and_not_ten_times():
    """In turn, each sends 10 x 0.1 = 1.0: over ten participants 0.1; over the one sender 1.0, which is refused."""
    assert speed("participants", InTurn()).tolist() == pytest.approx([0.1], abs=1e-12)
    assert speed("senders", InTurn()).tolist() == pytest.approx([1.0], abs=1e-12)


def test_ten_coordinates_of_which_one_is_sent_go_as_far_as_all_want():
    """Top-1 of ten: whoever is left out grows until it is its turn, so that each goes 0.1 a round on average."""
    assert speed("participants", TopK(fraction=0.1), size=10).tolist() == pytest.approx([0.1] * 10, abs=1e-9)


def test_three_rounds_of_a_federation_equal_a_plain_loop(tmp_path):
    small = Small(
        small_net(),
        small_data(),
        uneven_parts(),
        work=LocalWork(8, None, 2),
        lr=0.1,
        cohort=3,
        aggregation=partial(WeightedMean, "participants"),
        exchange=lambda **given: Exchange(**given, rule=TopK(fraction=0.1), filters={"feedback": ErrorFeedback(0.9)}),
    )
    row, left = small.row.clone(), {}
    for r, clients in enumerate(replay(small.plan, 3)):
        total, change = sum(w for _, w in clients), torch.zeros_like(row)
        for client, (batches, weight) in zip(small.plan.sample(r), clients, strict=True):
            after = train(small.net, row, small.dataset.train, batches, lr=0.1, momentum=0.9)
            wanted = after - row + 0.9 * left.get(client, torch.zeros_like(row))
            sent = torch.zeros_like(row)
            for place in best(wanted.abs().tolist(), 0.1):
                sent[place] = wanted[place]
            left[client] = wanted - sent
            change += weight * sent / total
        row = row + change
    small.fit(3, tmp_path)
    torch.testing.assert_close(small.row, row, rtol=0, atol=1e-9)
    kept = small.federation.stores[RESIDUAL].rows
    assert set(kept) == set(left)
    for client, rest in left.items():
        torch.testing.assert_close(kept[client], rest, rtol=0, atol=1e-9)


def test_a_dropped_client_keeps_its_residual():
    exchange = exchange_of(TopK(fraction=0.1), ErrorFeedback())
    sent(exchange, update_of(random_rows(0)))
    before = carried_of(exchange).clone()
    rows = random_rows(1)
    rows[1] = 0.0  # as the federation hands over what was not finite
    payload = exchange.encode(update_of(rows, 1, weight=(1.0, 0.0, 1.0)))
    clients, kept = payload.kept[RESIDUAL]
    exchange.stores[RESIDUAL].write(clients, kept)
    assert clients == (0, 2)
    assert torch.equal(carried_of(exchange)[1], before[1])
    assert not torch.equal(carried_of(exchange)[0], before[0])


def test_padding_keeps_nothing_and_local_coordinates_are_not_carried():
    every = torch.ones(4, dtype=torch.bool)
    local = torch.tensor([False, True, False, False])
    exchange = Exchange(every, local, rule=TopK(fraction=1 / 3), filters={"feedback": ErrorFeedback()})
    rows = torch.tensor([[1.0, 9.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    payload = exchange.encode(update_of(rows, weight=(1.0, 0.0), clients=(5, -1)))
    assert exchange.decode(payload).rows.tolist() == [[0, 0, 3, 0], [0, 0, 0, 0]]
    clients, kept = payload.kept[RESIDUAL]
    assert (clients, kept.tolist()) == ((5,), [[1, 0, 0, 2]])


def test_what_is_held_back_is_kept_where_the_exchange_is_told():
    made = {}
    exchange = exchange_of(TopK(fraction=0.5), Quantize("float16"), ErrorFeedback(), size=2)
    exchange.keep_in(lambda name: made.setdefault(name, MemoryStore()))
    assert list(made) == [RESIDUAL]
    assert exchange.stores == made
    made[RESIDUAL].write([0], torch.tensor([[0.0, 4.0]]))  # carried over from another round
    assert exchange.decode(exchange.encode(update_of(torch.tensor([[3.0, 1.0]])))).rows.tolist() == [[0, 5]]


def test_an_attack_is_carried_as_it_is_sent():
    """The attack comes first in the YAML: what the attacker would have sent, -3 times its change, is carried."""
    exchange = exchange_of(TopK(fraction=0.5), SignFlip([1], 3.0), ErrorFeedback(), size=2)
    rows = torch.tensor([[2.0, 1.0], [2.0, 1.0]])
    payload = exchange.encode(update_of(rows))
    assert exchange.decode(payload).rows.tolist() == [[2, 0], [-6, 0]]
    assert payload.kept[RESIDUAL][1].tolist() == [[0, 1], [0, -3]]


def test_filters_that_are_not_asked_for_are_none():
    assert (feedback(None), precision(None), sign_flip(None, 10.0)) == (None, None, None)
    for wrong in (0, -1, 1.1, True, "1"):
        with pytest.raises(ValueError, match="exchange.feedback"):
            feedback(wrong)
    with pytest.raises(ValueError, match="exchange.precision is 'int4'; it must be null, float16, bfloat16 or int8"):
        precision("int4")


sgdm = SparseSGDM([torch.zeros(1)], lr=0.1)


def together(rule=None, *filters, aggregation=WeightedMean, objective=NoCorrection, **options):
    return lambda: check_together(exchange_of(rule, *filters, size=4, **options), aggregation(), objective(), sgdm)


def own_masks(clients):
    return torch.ones(len(clients), 4, dtype=torch.bool)


scaffold = partial(Scaffold, 4)
original = TopK(compat="original")
participants = partial(WeightedMean, "participants")
REFUSED = {
    "feedback over senders": (together(TopK(), ErrorFeedback()), "aggregation.denominator=participants"),
    "feedback of a median": (together(TopK(), ErrorFeedback(), aggregation=partial(Robust, median)), "coordinate_mean"),
    "feedback of fednova": (together(TopK(), ErrorFeedback(), aggregation=FedNova), "coordinate_mean"),
    "feedback of values": (
        together(TopK(), ErrorFeedback(), aggregation=participants, payload="value"),
        "exchange.payload=change",
    ),
    "original over participants": (
        together(original, payload="value", compat="original", aggregation=participants),
        "aggregation=coordinate_mean",
    ),
    "original of a median": (
        together(original, payload="value", compat="original", aggregation=partial(Robust, median)),
        "aggregation=coordinate_mean",
    ),
    "original of fednova": (
        together(original, payload="value", compat="original", aggregation=FedNova),
        "aggregation=coordinate_mean",
    ),
    "original of changes": (together(original, compat="original"), "exchange.payload=value"),
    "scaffold of a rule": (together(TopK(), objective=scaffold), "exchange=full or exchange=masked"),
    "scaffold of own masks": (together(None, objective=scaffold, masks=own_masks), "one mask for all clients"),
}


@pytest.mark.parametrize("pair", list(REFUSED))
def test_what_does_not_go_together_is_refused_in_one_line(pair):
    check, says = REFUSED[pair]
    with pytest.raises(ValueError, match=says) as error:
        check()
    assert "\n" not in str(error.value)


GO = {
    "feedback": together(TopK(), ErrorFeedback(), aggregation=participants),
    "feedback of rounding": together(None, ErrorFeedback(), Quantize("int8"), aggregation=participants),
    "original": together(original, payload="value", compat="original"),
    "scaffold": together(None, objective=scaffold),
    "scaffold of halves": together(None, Quantize("float16"), objective=scaffold),
    "fedprox": together(TopK(), objective=FedProx, aggregation=FedNova),
}


@pytest.mark.parametrize("pair", list(GO))
def test_what_goes_together_is_let_through(pair):
    GO[pair]()


@pytest.mark.parametrize("average", [krum, multi_krum])
@pytest.mark.parametrize(
    ("attackers", "taking_part", "fits"), [(1, 4, True), (1, 3, False), (2, 4, False), (-1, 9, False)]
)
def test_attackers_must_be_few(average, attackers, taking_part, fits):
    aggregation = Robust(partial(average, attackers=attackers))
    says = f"of {taking_part} clients in a round, is .*; it must be a whole number from 0 to {taking_part - 3}"
    with nullcontext() if fits else pytest.raises(ValueError, match=says):
        check_sizes(exchange_of(None), aggregation, [True] * 20, taking_part)


def test_a_list_of_fractions_must_fit_the_clients():
    check_sizes(exchange_of(TopK(fraction=[0.1, 0.2])), WeightedMean(), [True] * 2, 2)
    with pytest.raises(ValueError, match="exchange.fraction lists 2 clients; there are 3"):
        check_sizes(exchange_of(TopK(fraction=[0.1, 0.2])), WeightedMean(), [True] * 3, 3)


def test_full_sends_frozen_zeros_in_any_precision():
    trained = torch.tensor([True, False, True, False])
    update = update_of(torch.tensor([[1.0, -2.0]]))
    for dtype, each in (("float16", 2), ("bfloat16", 2), ("int8", 1)):
        exchange = Full(trained, torch.zeros(4, dtype=torch.bool), filters={"precision": Quantize(dtype)})
        payload = exchange.encode(update)
        assert payload.sizes[0].values == 4 * each + (4 if dtype == "int8" else 0)  # a scale for the block
        torch.testing.assert_close(exchange.decode(payload).rows, update.rows, rtol=1e-2, atol=0)
