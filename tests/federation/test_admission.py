"""What the server takes from clients: values that are finite, and claims that can be true. Else it is as if silent."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from small import Small, small_data, small_net, uneven_parts

from fedsparse.data.rounds import LocalWork
from fedsparse.federation.client.drift import VARIATES, Scaffold
from fedsparse.federation.diverged import Diverged
from fedsparse.federation.exchange.exchange import Exchange, Filter
from fedsparse.federation.exchange.filters import ErrorFeedback, Quantize, SignFlip
from fedsparse.federation.exchange.sparsifiers import RandomK, Threshold, TopK
from fedsparse.federation.exchange.update import (
    NOT_FINITE,
    Update,
    admit,
    counted,
    finite,
    finite_rows,
    of_those,
    refuse,
)
from fedsparse.federation.exchange.wire.message import encode
from fedsparse.federation.phases import Phase
from fedsparse.federation.reports import Dropped, EveryUpdateDropped, named
from fedsparse.federation.server import robust
from fedsparse.federation.server.aggregation import Robust

NAN, INF, K, SIZE, MOST = float("nan"), float("inf"), 3, 24, torch.finfo(torch.float32).max
HELD = (10.0, 20.0, 30.0)


def an_update(buffers=2, **changes):
    g = torch.Generator().manual_seed(0)
    rows, start, more = (torch.randn(K, n, generator=g) for n in (SIZE, SIZE, buffers))
    return replace(Update((4, 9, 2), rows, more, HELD, (0.1, -0.2, 0.3), start=start, round=1), **changes)


def exchange(rule=None, **options):
    return Exchange(torch.ones(SIZE, dtype=torch.bool), torch.zeros(SIZE, dtype=torch.bool), rule=rule, **options)


# --- pure: finite, admit


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["rows", "buffers", "loss"])
def test_one_value_that_is_not_finite_takes_its_client_out(where, bad):
    update = an_update()
    if where == "loss":
        update = replace(update, loss=(0.1, bad, 0.3))
    else:
        getattr(update, where)[1, 0] = bad
    found = finite(update)
    assert found.refused == {1: NOT_FINITE}
    assert found.weight == (10.0, 0.0, 30.0)
    assert found.loss == (0.1, 0.0, 0.3)
    assert not found.rows[1].any()
    assert not found.buffers[1].any()
    assert torch.equal(found.rows[[0, 2]], update.rows[[0, 2]])
    assert counted(found) == [0, 2]


@pytest.mark.parametrize("known", [True, False])
def test_a_client_that_is_refused_ends_where_it_started_or_at_zero_if_nobody_knows(known):
    update = an_update(values=torch.ones(K, SIZE))
    if not known:
        update = replace(update, start=None)
    found = refuse(update, {1: "late"})
    assert torch.equal(found.values[1], update.start[1] if known else torch.zeros(SIZE))
    assert torch.equal(found.values[[0, 2]], torch.ones(2, SIZE))


def test_values_whose_sum_is_beyond_the_dtype_are_finite():
    rows = torch.full((4, 100), MOST)
    rows[1], rows[2, 50:], rows[3, 7] = -MOST, -MOST, INF
    assert finite_rows(rows) == [True, True, True, False]
    assert finite_rows(torch.zeros(2, 0), torch.tensor([[MOST, MOST], [MOST, NAN]])) == [True, False]
    assert finite(an_update(rows=rows[:3])).refused == {}


@pytest.mark.parametrize("weight", [1e308, 1e300, 20.0001, 0.0, -1.0, -INF, INF, NAN])
def test_a_weight_that_cannot_be_is_refused_and_named(weight):
    received = replace(an_update(), weight=(10.0, weight, 30.0))
    found = admit(received, HELD, between=True)
    assert found.weight == (10.0, 0.0, 30.0)
    assert found.refused == {1: f"a weight of {weight:g}, where at most 20 can be"}
    assert torch.equal(found.rows[[0, 2]], received.rows[[0, 2]])


@pytest.mark.parametrize("weight", [5e-324, 1.0, 20.0])
def test_a_weight_up_to_the_known_one_is_the_clients_own_affair(weight):
    found = admit(replace(an_update(), weight=(10.0, weight, 30.0)), HELD, between=True)
    assert found.refused == {}
    assert found.weight == (10.0, weight, 30.0)


def test_nobody_counts_who_did_not_before():
    """Padding, and what was refused earlier, for its own reason."""
    known = replace(an_update(), clients=(4, 9, -1), weight=(10.0, 0.0, 0.0), refused={1: "late"})
    found = admit(replace(known, weight=(10.0, 5.0, 5.0)), known.weight, between=True)
    assert found.weight == (10.0, 0.0, 0.0)
    assert found.refused[1] == "late"


def test_what_clients_keep_is_finite_and_of_those_who_count():
    kept = {"a": ((4, 9, 2), torch.tensor([[1.0], [2.0], [INF]])), "b": ((9,), torch.ones(1, 2))}
    found = of_those(kept, replace(an_update(), weight=(10.0, 0.0, 30.0)))
    assert {name: (ids, rows.tolist()) for name, (ids, rows) in found.items()} == {"a": ((4,), [[1.0]]), "b": ((), [])}


# --- messages


def forged(payload, k, **says):
    """The payload with another message of client k."""
    written = exchange().messages(payload)
    written[k] = encode(torch.zeros(SIZE), **says)
    return replace(payload, written=tuple(written))


@pytest.mark.parametrize(
    ("says", "why"),
    [
        ({"weight": 1e308}, "a weight of 1e+308, where at most 20 can be"),
        ({"weight": 0.0}, "a weight of 0, where at most 20 can be"),
        ({"loss": NAN}, NOT_FINITE),
        ({"loss": -INF}, NOT_FINITE),
        ({"buffers": torch.zeros(3)}, "3 buffer values, where the model has 2"),
        ({"buffers": torch.zeros(0)}, "0 buffer values, where the model has 2"),
        ({"buffers": torch.tensor([1.0, NAN])}, NOT_FINITE),
        ({"buffers": torch.zeros(3), "weight": 1e9}, "3 buffer values, where the model has 2"),
    ],
)
def test_a_message_is_judged_by_what_both_sides_know(says, why):
    travels = exchange()
    payload = travels.encode(an_update(dtype=torch.float16))
    found = travels.decode(forged(payload, 1, **{"buffers": torch.zeros(2), "weight": 20.0, **says}))
    assert found.refused == {1: why}
    assert counted(found) == [0, 2]
    assert not found.rows[1].any()
    assert found.rows[[0, 2]].all()


def test_undeclared_buffers_of_a_model_without_any():
    travels = exchange()
    payload = travels.encode(an_update(buffers=0, dtype=torch.float16))
    found = travels.decode(forged(payload, 2, weight=30.0, buffers=torch.ones(1)))
    assert found.refused == {2: "1 buffer values, where the model has 0"}
    assert found.buffers.shape == (K, 0)


class Claims(Filter):
    """Some clients say something of themselves that is not so."""

    def __init__(self, says, clients):
        super().__init__()
        self.says, self.clients = says, clients

    def __call__(self, update, send, exchange):
        lies = {
            name: tuple(
                says if c in self.clients else v for c, v in zip(update.clients, getattr(update, name), strict=True)
            )
            for name, says in self.says.items()
        }
        return send(replace(update, **lies))


# --- rounds


def build(rule=None, filters=(), payload="change", cohort=1, **options):
    def make(**given):
        return Exchange(**given, rule=rule, payload=payload, filters={str(i): new() for i, new in enumerate(filters)})

    options = {"work": LocalWork(8, None, 2), "lr": 0.1, "cohort": cohort, **options}
    return Small(small_net(torch.float32), small_data(dtype=torch.float32), uneven_parts(), exchange=make, **options)


def without(small, victims):
    """The same federation, of which these clients never take part."""
    sample = small.plan.sample
    small.plan.sample = lambda r: [c for c in sample(r) if c not in victims]
    return small


VICTIMS = {0, 1, 2}  # at least one of them takes part in each round


def as_if_silent(tmp_path, caplog, make, attack):
    bad, muted = make([attack]), without(make([], cohort=1), VICTIMS)
    with caplog.at_level(logging.WARNING, "fedsparse"):
        bad.fit(2, tmp_path)
    muted.fit(2, tmp_path)
    wanted = {(r, c) for r in range(2) for c in bad.plan.sample(r) if c in VICTIMS}
    assert {(d.round, d.client) for d in bad.federation.dropped} == wanted
    assert len(wanted) >= 2
    torch.testing.assert_close(bad.row, muted.row, rtol=0, atol=2e-6)
    for name, store in muted.federation.stores.items():
        assert set(bad.federation.stores[name].rows) == set(store.rows)
    return bad, [record.getMessage() for record in caplog.records if record.name == "fedsparse"]


@pytest.mark.parametrize("cohort", [1, 3])
@pytest.mark.parametrize("precision", [None, "float16"])
@pytest.mark.parametrize("says", [{"weight": 1e308}, {"weight": 1e300}, {"loss": NAN}])
def test_a_client_whose_claims_cannot_be_true_is_as_if_silent_and_named(tmp_path, caplog, says, precision, cohort):
    more = [] if precision is None else [partial(Quantize, precision)]

    def make(filters, cohort=cohort):
        return build(filters=[*filters, *more], cohort=cohort)

    _, lines = as_if_silent(tmp_path, caplog, make, partial(Claims, says, VICTIMS))
    why = NOT_FINITE if "loss" in says else f"a weight of {says['weight']:g}, where "
    assert len(lines) >= 2
    assert all(re.match(r"round [12]: (client|clients) [012, ]+ (is|are) left out: ", line) for line in lines)
    assert all(why in line for line in lines)


WAYS = {
    "masked": {},
    "values": {"payload": "value"},
    "topk": {"rule": TopK(fraction=0.2)},
    "randomk": {"rule": RandomK(0.5)},
    "threshold of values": {"rule": Threshold(0.01, "largest_final"), "payload": "value"},
    "half": {"last": [partial(Quantize, "float16")]},
    "int8": {"last": [partial(Quantize, "int8")]},
    "topk int8": {"rule": TopK(fraction=0.2), "last": [partial(Quantize, "int8")]},
    "feedback": {"rule": TopK(fraction=0.2), "last": [ErrorFeedback]},
    "feedback of int8": {"last": [ErrorFeedback, partial(Quantize, "int8")]},
}


@pytest.mark.parametrize(("way", "cohort"), [(way, (1, 3)[i % 2]) for i, way in enumerate(WAYS)])
def test_an_attack_that_overflows_is_dropped_after_it_was_sent(tmp_path, caplog, way, cohort):
    """1e45 is infinite in float32, and times a change of 0 it is NaN."""
    options = dict(WAYS[way])
    last = options.pop("last", [])

    def make(filters, cohort=cohort):
        return build(filters=[*filters, *last], cohort=cohort, **options)

    small, _ = as_if_silent(tmp_path, caplog, make, partial(SignFlip, sorted(VICTIMS), 1e45))
    assert all(d.why == NOT_FINITE for d in small.federation.dropped)
    for store in small.federation.stores.values():
        assert all(row.isfinite().all() for row in store.rows.values())


def test_if_all_are_dropped_after_they_were_sent_the_server_does_not_step(tmp_path):
    small = build(filters=[partial(SignFlip, 7, 1e45)])
    before = small.row.clone()
    with pytest.raises(EveryUpdateDropped, match="round 1: the loss or update of every client became NaN or infinite"):
        small.fit(1, tmp_path)
    assert torch.equal(small.federation.server.rows[0], before)


def test_if_all_claim_too_much_the_line_says_so(tmp_path):
    small = build(filters=[partial(Claims, {"weight": 1e9}, range(7))])
    with pytest.raises(EveryUpdateDropped, match="round 1: no update counts, .* client .: a weight of 1e"):
        small.fit(1, tmp_path)


def test_a_residual_that_overflows_is_not_kept(tmp_path):
    """Carried and changed are finite, their sum is not."""
    travels, update = exchange(TopK(fraction=0.5), filters={"f": ErrorFeedback()}), an_update(0)
    (store,) = travels.stores.values()
    carried = torch.zeros(SIZE)
    carried[3] = update.rows[1, 3] = MOST
    store.write((9,), carried.unsqueeze(0))
    payload = travels.encode(update)
    assert travels.decode(payload, update.weight).refused == {1: NOT_FINITE}
    assert payload.kept["residuals"][0] == (4, 2)


def test_a_variate_that_overflows_is_not_kept(tmp_path):
    """At a rate so small that the change, divided by it, is beyond float32."""
    small = build(objective=partial(Scaffold, 7), lr=1e-44)
    small.net[1].weight.data.zero_()  # there the change of 1e-44 is seen
    small.fit(1, tmp_path)
    assert small.module.objective.mean.isfinite().all()
    assert all(row.isfinite().all() for row in small.federation.stores[VARIATES].rows.values())


def test_a_server_step_that_overflows_names_its_own_rate(tmp_path):
    small = build(server=partial(torch.optim.SGD, lr=1e38), lr=100.0)
    with pytest.raises(Diverged, match="round 1: the server's step made the model NaN .* smaller server.lr"):
        small.fit(1, tmp_path)


@pytest.mark.parametrize(
    ("phase", "key"),
    [
        (Phase("explore", lr=0.1), "explore.lr"),
        (Phase("learn"), "optimizer.lr"),
        (Phase("tune", lr=0.1), "phases.tune.lr"),
    ],
)
def test_the_advice_names_the_rate_of_the_phase(phase, key):
    assert phase.lr_key == key
    assert f"try a smaller {key}, or" in str(EveryUpdateDropped.of(4, [Dropped(4, 1)], phase.lr_key))


def test_who_was_dropped_is_named_by_reason():
    dropped = [Dropped(0, 9, "it is late"), Dropped(0, 4), Dropped(0, 2, "it is late")]
    assert named(dropped) == ["clients 2, 9 are left out: it is late", f"client 4 is left out: {NOT_FINITE}"]


@pytest.mark.parametrize("rule", [robust.krum, robust.multi_krum])
def test_krum_goes_on_when_clients_diverge(tmp_path, rule):
    """Five clients of whom two may attack: one or two that are lost leave fewer rows than attackers + 3."""
    small = build(filters=[partial(SignFlip, 3, 1e45)], aggregation=partial(Robust, partial(rule, attackers=2)))
    small.fit(2, tmp_path)
    assert 2 <= len(small.federation.dropped) <= 6
    assert small.row.isfinite().all()
