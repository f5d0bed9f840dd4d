"""What every exchange and every aggregation must hold to: one row of a table each."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from plain import replay
from plain_sparse import original_mean, rounds_of, top_change_mean
from small import Small, small_data, small_net, uneven_parts

from fedsparse.core.space import ParamSpace
from fedsparse.core.subspace import Subspace
from fedsparse.data.rounds import LocalWork
from fedsparse.federation.client.training import LOCAL
from fedsparse.federation.exchange.exchange import Exchange, Full
from fedsparse.federation.exchange.filters import ErrorFeedback, Quantize, SignFlip
from fedsparse.federation.exchange.scores import SCORES
from fedsparse.federation.exchange.sparsifiers import Layers, Pattern, RandomK, Threshold, TopK
from fedsparse.federation.exchange.update import Update
from fedsparse.federation.server import robust
from fedsparse.federation.server.aggregation import FedNova, Robust, WeightedMean
from fedsparse.federation.server.server import Server
from fedsparse.masks import top_fraction

ROUNDS, SIZE = 3, ParamSpace.of(small_net()).size
SILENT = Threshold(1e9)  # nobody's change is so large


def sparse(rule, **options):
    return lambda **given: Exchange(**given, rule=rule, **options)


def filtered(make, *filters):
    """Filters keep things: each exchange has its own."""
    return lambda **given: make(**given, filters={str(i): new() for i, new in enumerate(filters)})


half, whole8 = partial(Quantize, "float16"), partial(Quantize, "int8")
EXACT = {
    "full": Full,
    "masked": Exchange,
    "masked values": partial(Exchange, payload="value"),
    **{by: sparse(TopK(by, 0.1)) for by in SCORES},
    "topk of values": sparse(TopK(fraction=0.1), payload="value"),
    "topk of each tensor": sparse(TopK(fraction=0.1, scope="tensor")),
    "topk of each client": sparse(TopK(fraction=[0.02 * (c + 1) for c in range(7)])),
    "topk from a round on": sparse(TopK(fraction={0: 0.5, 1: 0.05})),
    "topk of one": sparse(TopK(fraction=1e-9)),
    "randomk": sparse(RandomK(0.1)),
    "randomk values": sparse(RandomK(0.1), payload="value"),
    "threshold": sparse(Threshold(0.02)),
    "silent": sparse(SILENT),
    "layers": sparse(Layers(percentage=0.5)),
    "layers that drift less": sparse(Layers(percentage=0.5, more=False)),
    "layers by threshold": sparse(Layers(threshold=0.1, percentage=None, normalise=False)),
    "pattern": sparse(Pattern(["3.*"])),
    "flipped": filtered(Exchange, partial(SignFlip, 2, 3.0)),
}
LOSSY = {
    "half": filtered(Exchange, half),
    "int8": filtered(sparse(TopK(fraction=0.2)), whole8),
    "feedback": filtered(sparse(TopK(fraction=0.1)), ErrorFeedback),
    "feedback of randomk": filtered(sparse(RandomK(0.1)), partial(ErrorFeedback, 0.9)),
    "feedback of int8": filtered(sparse(TopK(fraction=0.1)), ErrorFeedback, whole8),
    "original": sparse(TopK(fraction=0.2, compat="original"), payload="value", compat="original"),
}
EXCHANGES = EXACT | LOSSY
AGGREGATIONS = {
    "senders": WeightedMean,
    "participants": partial(WeightedMean, "participants"),
    "fednova": FedNova,
    "fednova participants": partial(FedNova, "participants"),
    "trimmed": partial(Robust, robust.trimmed_mean),
    "median": partial(Robust, robust.median),
    "krum": partial(Robust, robust.krum),
    "multi-krum": partial(Robust, robust.multi_krum),
    "geometric": partial(Robust, partial(robust.geometric_median, steps=50)),
}
exchanges = pytest.mark.parametrize("exchange", list(EXCHANGES))
aggregations = pytest.mark.parametrize("aggregation", list(AGGREGATIONS))


def half_mask():
    return top_fraction(torch.rand(SIZE, generator=torch.Generator().manual_seed(3)), 0.4)


def build(exchange="masked", aggregation="senders", **options):
    """Ragged: clients hold 1 to 38 samples and pass over them twice."""
    made = {"exchange": EXCHANGES.get(exchange, exchange), "aggregation": AGGREGATIONS[aggregation]}
    options = {"work": LocalWork(8, None, 2), "lr": 0.1, **made, **options}
    return Small(small_net(), small_data(), uneven_parts(), **options)


def updates(clients=7, size=SIZE, dtype=torch.float64):
    """What seven clients changed, as floats of every magnitude."""
    g = torch.Generator().manual_seed(0)
    rows, start = (torch.randn(clients, size, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    weight = tuple(1.0 + k for k in range(clients))
    steps = tuple(2.0 * (k + 1) for k in range(clients))
    empty = torch.zeros(clients, 0, dtype=dtype)
    return Update(tuple(range(clients)), rows, empty, weight, weight, start=start, round=1, steps=steps)


def cohort(update, start, size):
    """Some rows, filled up with padding."""
    stop = min(start + size, len(update.clients))
    padding, rows = start + size - stop, slice(start, stop)
    zero = torch.zeros(padding, update.rows.shape[1], dtype=update.rows.dtype)
    filled = {name: (*getattr(update, name)[rows], *[0.0] * padding) for name in ("weight", "loss", "steps")}
    return replace(
        update,
        clients=(*update.clients[rows], *[-1] * padding),
        rows=torch.cat([update.rows[rows], zero]),
        start=torch.cat([update.start_values[rows], zero]),
        buffers=torch.zeros(size, 0, dtype=zero.dtype),
        **filled,
    )


def closed(exchange, aggregation, update, size):
    """The mean change of a round, clients in cohorts of a size; exchange and rule as a user gives them."""
    space = ParamSpace.of(small_net())
    travels = EXCHANGES[exchange](trained=torch.ones(SIZE, dtype=torch.bool), local=space.local, space=space)
    rule = AGGREGATIONS[aggregation]()
    tally = rule.zero(1, SIZE, 0, torch.device("cpu"), travels.per_coordinate)
    for start in range(0, len(update.clients), size):
        part = cohort(update, start, size)
        rule.add(tally, travels.decode(travels.encode(part)), [0] * size)
    change = rule.finish(rule.merge(tally))
    touched = torch.ones(1, SIZE, dtype=torch.bool) if change.touched is None else change.touched
    return torch.cat([change.rows, touched]), change.loss


def without(update, victim):
    """The update of the others, and with the victim as a dropped one: a row of zeros and of no weight."""
    keep = [k for k in range(len(update.clients)) if k != victim]
    tuples = ("clients", "weight", "loss", "steps")
    picked = {name: tuple(getattr(update, name)[k] for k in keep) for name in tuples}
    rest = replace(
        update, rows=update.rows[keep], start=update.start_values[keep], buffers=update.buffers[keep], **picked
    )
    muted = {n: tuple(0.0 if k == victim else v for k, v in enumerate(getattr(update, n))) for n in ("weight", "loss")}
    rows = update.rows.clone()
    rows[victim] = 0.0
    return rest, replace(update, rows=rows, **muted)


@exchanges
@aggregations
def test_every_pair(exchange, aggregation):
    """Cohorts are an implementation detail, what nobody sent does not move, and a dropped client does not count."""
    one, loss = closed(exchange, aggregation, updates(), 1)
    rows, touched = one
    assert one.isfinite().all()
    assert not rows[touched == 0].any()
    assert bool(touched.any()) == (exchange != "silent")
    for size in (3, 20):
        other, again = closed(exchange, aggregation, updates(), size)
        torch.testing.assert_close(other, one, rtol=0, atol=1e-9)
        assert again == pytest.approx(loss, abs=1e-12)
    (rest, wanted), (dropped, found) = (closed(exchange, aggregation, u, 4) for u in without(updates(), 2))
    assert torch.equal(dropped, rest)
    assert found == wanted


@exchanges
def test_every_exchange_trains_the_same_in_every_cohort(tmp_path, exchange):
    one, *others = (build(exchange, cohort=k, mask=half_mask()).fit(2, tmp_path) for k in (1, 3, 20))
    assert one.row.isfinite().all()
    for other in others:
        torch.testing.assert_close(other.row, one.row, rtol=0, atol=1e-9)
        assert other.federation.ledger.figures() == one.federation.ledger.figures()


@aggregations
def test_every_aggregation_trains_the_same_in_every_cohort(tmp_path, aggregation):
    rows = [build("largest_change", aggregation, cohort=k).fit(2, tmp_path).row for k in (1, 3, 20)]
    for row in rows[1:]:
        torch.testing.assert_close(row, rows[0], rtol=0, atol=1e-9)


def poisoned(small, victim, value):
    small.dataset.train.x[small.parts[victim][0]] = value
    return small


NOT_FINITE = [(1, float("nan")), (3, float("inf"))]


@pytest.mark.parametrize(
    ("exchange", "cohort", "value"), [(name, *NOT_FINITE[i % 2]) for i, name in enumerate(EXCHANGES)]
)
def test_a_client_that_is_not_finite_is_dropped_as_if_silent(tmp_path, exchange, cohort, value):
    bad, muted = build(exchange, cohort=cohort), build(exchange, cohort=1)
    sample, victim = muted.plan.sample, muted.plan.sample(0)[1]
    muted.plan.sample = lambda r: [c for c in sample(r) if c != victim]
    poisoned(bad, victim, value).fit(2, tmp_path)
    muted.fit(2, tmp_path)
    assert {d.client for d in bad.federation.dropped} == {victim}
    torch.testing.assert_close(bad.row, muted.row, rtol=0, atol=1e-9)
    for name, store in muted.federation.exchange.stores.items():
        kept = bad.federation.exchange.stores[name].rows
        assert set(kept) == set(store.rows)
        for client, row in store.rows.items():
            torch.testing.assert_close(kept[client], row, rtol=0, atol=1e-9)


def test_a_dropped_clients_local_coordinates_stay_what_they_were(tmp_path):
    small = build(cohort=3)
    small.space.local |= small.space.where("3.*")
    small.given["exchange"] = Exchange(torch.ones(SIZE, dtype=torch.bool), small.space.local)
    victim = small.plan.sample(0)[1]
    poisoned(small, victim, float("nan")).fit(2, tmp_path)
    kept = small.federation.stores[LOCAL].rows
    assert victim not in kept
    assert kept
    assert all(row.isfinite().all() for row in kept.values())


@pytest.mark.parametrize("silent", ["silent", "feedback of silence"])
@aggregations
def test_if_nobody_sends_the_model_stays_to_the_bit(tmp_path, silent, aggregation):
    exchange = sparse(SILENT) if silent == "silent" else filtered(sparse(SILENT), ErrorFeedback)
    server = partial(torch.optim.SGD, lr=1.0, momentum=0.9)
    small = build(exchange, aggregation, cohort=3, server=server)
    before = small.row.clone()
    assert torch.equal(small.fit(2, tmp_path).row, before)


def test_a_client_that_sends_nothing_counts_among_participants_alone(tmp_path):
    class Shy:
        """The first client of the first round sends nothing, the others all."""

        shared, client = False, None

        def mark(self, theta, start, layout, sender):
            return torch.full_like(theta, sender.client != Shy.client, dtype=torch.bool)

    got = {}
    for aggregation in ("senders", "participants"):
        small = build(sparse(Shy()), aggregation, cohort=3)
        Shy.client = shy = small.plan.sample(0)[0]
        start, (dealt,) = small.row.clone(), replay(small.plan, 1)
        weights = dict(zip(small.plan.sample(0), [weight for _, weight in dealt], strict=True))
        got[aggregation] = (small.fit(1, tmp_path).row - start) * (
            sum(weights.values()) - (weights[shy] if aggregation == "senders" else 0)
        )
    torch.testing.assert_close(got["senders"], got["participants"], rtol=0, atol=1e-9)


def test_all_send_the_same_coordinate():
    """Changes 10 times as large at one place: the weighted mean there, nothing elsewhere."""
    update = updates()
    update.rows[:, 5] = 100.0 + torch.arange(7)
    for aggregation, wanted in (("senders", 104.0), ("participants", 104.0), ("median", 103.0), ("trimmed", 103.0)):
        (rows, touched), _ = closed("topk of one", aggregation, update, 3)
        assert touched.nonzero().flatten().tolist() == [5]  # sum (k + 1) (100 + k) / 28 = 104
        assert rows[5] == pytest.approx(wanted, abs=1e-12)


ALL = {
    "topk": TopK(fraction=1.0),
    "each tensor": TopK(fraction=1.0, scope="tensor"),
    "list": TopK(fraction=[1.0] * 7),
    "randomk": RandomK(1.0),
    "threshold": Threshold(0.0),
    "layers": Layers(percentage=1.0),
    "pattern": Pattern("*"),
}


@pytest.mark.parametrize("rule", list(ALL))
@pytest.mark.parametrize(("aggregation", "masked"), [("senders", True), ("participants", False), ("fednova", True)])
def test_a_rule_that_sends_all_is_dense(tmp_path, rule, aggregation, masked):
    mask = half_mask() if masked else None
    dense, all_sent = (build(e, aggregation, mask=mask, cohort=3) for e in ("masked", sparse(ALL[rule])))
    assert torch.equal(all_sent.fit(2, tmp_path).row, dense.fit(2, tmp_path).row)


@pytest.mark.parametrize(
    "same",
    ["full", "masked values", filtered(sparse(TopK(fraction=1.0)), ErrorFeedback), filtered(Exchange, ErrorFeedback)],
)
def test_other_ways_to_send_all_are_dense_too(tmp_path, same):
    dense, other = (build(e, "participants", cohort=3).fit(ROUNDS, tmp_path).row for e in ("masked", same))
    torch.testing.assert_close(other, dense, rtol=0, atol=1e-12)


@exchanges
def test_the_ledger_counts_what_real_messages_take(tmp_path, exchange):
    small = build(exchange, cohort=3, mask=half_mask())
    travels, written = small.given["exchange"], []
    encode = travels.encode

    def spy(update):
        payload = encode(update)
        members = [k for k, client in enumerate(update.clients) if client >= 0]
        written.extend(travels.messages(payload)[k] for k in members)
        return payload

    travels.encode = spy
    small.fit(2, tmp_path)
    assert len(written) == 2 * small.count
    assert small.federation.ledger.bytes_up == sum(map(len, written)) > 0


@pytest.mark.parametrize("exchange", list(EXACT))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_arrives_is_what_was_sent(exchange, dtype):
    """To the bit for changes; for values the change is rounded by adding it to what it started from."""
    space = ParamSpace.of(small_net())
    travels = EXACT[exchange](trained=torch.ones(SIZE, dtype=torch.bool), local=space.local, space=space)
    update = updates(dtype=dtype)
    payload = travels.encode(update)
    unseen = replace(payload.update, rows=torch.full_like(update.rows, 7.0))  # the receiver does not see the rows
    wire = replace(payload, update=unseen, written=tuple(travels.messages(payload)), arrived=None)
    direct, read = travels.decode(payload), travels.decode(wire)
    assert torch.equal(direct.rows, read.rows)
    sent = torch.ones_like(update.rows, dtype=torch.bool) if read.sent is None else read.sent
    wanted = update.rows if travels.payload == "change" else update.start_values + update.rows - update.start_values
    if exchange == "flipped":
        wanted = torch.cat([-3.0 * update.rows[:2], update.rows[2:]])
    assert torch.equal(read.rows, torch.where(sent, wanted, 0.0))
    assert (read.weight, read.loss, read.clients) == (update.weight, update.loss, update.clients)
    assert travels.per_coordinate == (read.sent is not None)


@pytest.mark.parametrize("cohort", [1, 3])
@pytest.mark.parametrize("aggregation", ["senders", "participants"])
def test_three_rounds_of_the_largest_changes_equal_a_plain_loop(tmp_path, aggregation, cohort):
    small = build("largest_change", aggregation, cohort=cohort)
    close = partial(top_change_mean, fraction=0.1, senders=aggregation == "senders")
    expected = rounds_of(small, replay(small.plan, ROUNDS), close, lr=small.lr, momentum=small.momentum)
    before = small.row.clone()
    got = small.fit(ROUNDS, tmp_path).row
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
    assert 0 < int((got != before).sum()) < SIZE


@pytest.mark.parametrize("cohort", [1, 3])
def test_three_rounds_as_the_original_equal_a_plain_loop(tmp_path, cohort):
    small = build("original", cohort=cohort)
    close = partial(original_mean, fraction=0.2, sizes=small.space.sizes)
    expected = rounds_of(small, replay(small.plan, ROUNDS), close, lr=small.lr, momentum=small.momentum)
    torch.testing.assert_close(small.fit(ROUNDS, tmp_path).row, expected, rtol=0, atol=1e-9)


def test_as_the_original_what_all_say_is_zero_is_zero_in_float32():
    """The change is minus the start, averaged in float64: rounded to float32 it is that again, whatever the weights."""
    travels = Exchange(
        torch.ones(5000, dtype=torch.bool),
        torch.zeros(5000, dtype=torch.bool),
        rule=TopK(fraction=1e-9, compat="original"),
        payload="value",
        compat="original",
    )
    g = torch.Generator().manual_seed(0)
    row = torch.randn(1, 5000, generator=g)
    rows = torch.zeros(7, 5000)
    rows[:, 3] = 9.0  # the one that all send
    weight = tuple(torch.rand(7, generator=g, dtype=torch.float64).tolist())
    update = Update(tuple(range(7)), rows, torch.zeros(7, 0), weight, weight, start=row.expand(7, -1).clone())
    rule = WeightedMean()
    tally = rule.zero(1, 5000, 0, torch.device("cpu"), travels.per_coordinate)
    rule.add(tally, travels.decode(travels.encode(update)), [0] * 7)
    server = Server(row.clone(), partial(torch.optim.SGD, lr=1.0), Subspace(torch.ones(5000, dtype=torch.bool)))
    server.step(rule.finish(tally))
    assert server.rows[0].nonzero().flatten().tolist() == [3]
    assert server.rows[0, 3] == pytest.approx(float(row[0, 3]) + 9.0, rel=1e-6)
