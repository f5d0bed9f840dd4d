"""What the server sends, what is counted, how long it takes, and what becomes of coordinates that nobody sent."""

from __future__ import annotations

import copy
import csv
import math
from functools import partial

import numpy as np
import pytest
import torch
from small import Small, small_data, small_net, uneven_parts

from fedsparse.core.space import ParamSpace
from fedsparse.core.subspace import Subspace
from fedsparse.federation.client.drift import Scaffold
from fedsparse.federation.exchange.downlink import Downlink
from fedsparse.federation.exchange.exchange import Exchange, Full
from fedsparse.federation.exchange.ledger import COLUMNS, Ledger, Link, Traffic
from fedsparse.federation.exchange.sparsifiers import Threshold, TopK
from fedsparse.federation.exchange.wire.message import HEADER, Size, encode
from fedsparse.federation.server.aggregation import Change, WeightedMean
from fedsparse.federation.server.server import Server
from fedsparse.optim.fedopt import FedAdam, FedYogi

N, H = 80, HEADER.size
SIZE = ParamSpace.of(small_net()).size
WHOLE = H + 4 * N


def moved(downlink, round, *places):
    """Close a round in which these places moved."""
    before = torch.zeros(N)
    after = before.clone()
    after[list(places)] = 1.0
    downlink.close(round, before, after)


def real(places, buffers=0):
    """Length of the message with these places, written."""
    marks = torch.zeros(N, dtype=torch.bool)
    marks[list(places)] = True
    return len(encode(torch.zeros(N), marks, buffers=torch.zeros(buffers)))


def test_what_moved_since_by_hand():
    downlink, row = Downlink(), torch.zeros(N)

    def total(client):
        return downlink.size(client, row, 0).total

    assert total(1) == WHOLE  # never met
    for client in (1, 2):
        downlink.holds[client] = 0
    assert total(1) == H  # nothing has moved since
    moved(downlink, 0, 3, 70)
    assert total(1) == real({3, 70}) == H + 2 * 4 + 2  # two gaps of a byte
    downlink.holds[1] = 1
    moved(downlink, 1, 3, 5)
    assert total(1) == real({3, 5}) == H + 2 * 4 + 2
    assert total(2) == real({3, 5, 70}) == H + 3 * 4 + 3
    assert total(3) == WHOLE
    downlink.holds[2] = 2
    assert total(2) == H
    moved(downlink, 2)  # a round that moved nothing
    assert total(2) == H
    assert total(1) == real({3, 5})
    moved(downlink, 3, *range(N))
    assert [total(client) for client in (1, 2, 3)] == [WHOLE] * 3
    downlink.holds[1] = 4
    moved(downlink, 4, 9)
    assert total(1) == real({9})
    assert total(2) == WHOLE  # all moved in between


def test_the_whole_row_where_positions_cost_more():
    downlink, row = Downlink(), torch.zeros(N)
    downlink.holds[1] = 0
    moved(downlink, 0, *range(N - 2))  # 78 values and a bitmap of ten bytes: two more than all 80 values
    assert downlink.size(1, row, 0) == Size(H, 0, 4 * N)
    downlink = Downlink()
    downlink.holds[1] = 0
    moved(downlink, 0, *range(N - 3))  # two bytes less
    assert downlink.size(1, row, 0) == Size(H, 10, 4 * (N - 3))
    assert downlink.size(1, row, 0).total == real(range(N - 3))


def test_buffers_always_travel_whole():
    downlink, row = Downlink(), torch.zeros(N)
    downlink.holds[1] = 0
    moved(downlink, 0, 4)
    assert downlink.size(1, row, 6).total == real({4}, buffers=6) == H + 4 * 7 + 1
    downlink.known = {}
    assert downlink.size(2, row, 6).total == WHOLE + 4 * 6


def test_its_state_goes_on():
    first, row = Downlink(), torch.zeros(N)
    first.holds[1] = 0
    moved(first, 0, 4, 7)
    again = Downlink()
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    for downlink in (first, again):
        downlink.holds[2] = 1
        moved(downlink, 1, 50)
    for client in (1, 2, 3):
        assert again.size(client, row, 0) == first.size(client, row, 0)
    assert again.size(1, row, 0).total == real({4, 7, 50})


def written(last, since, buffers):
    """Bytes of the shorter message, by numpy's record of the round in which each coordinate last changed."""
    late = torch.from_numpy(last >= since)
    return min(len(encode(torch.zeros(len(last)), late, buffers=torch.zeros(buffers))), H + 4 * (len(last) + buffers))


@pytest.mark.parametrize("seed", range(8))
def test_any_history_is_that_of_a_plain_record(seed):
    """Rounds that move nothing, few, many, almost all and all, in any order, to clients that joined in any round."""
    n, rng, buffers = 400, np.random.default_rng(seed), seed % 3
    downlink, last, holds = Downlink(), np.full(n, -1), {}
    for number in range(25):
        for client, since in holds.items():
            assert downlink.size(client, torch.zeros(n), buffers).total == written(last, since, buffers)
        still = rng.permutation(n)[: rng.choice([0, 0, 1, 5, 50, 51, 200, 396, 400])]
        start = torch.from_numpy(rng.normal(size=n))
        after = start + 1
        after[still] = start[still]
        taking_part = rng.permutation(9)[:3].tolist()
        downlink.close(number, start, after, taking_part)
        last[np.setdiff1d(np.arange(n), still)] = number
        holds |= dict.fromkeys(taking_part, number)
        if rng.random() < 0.3:
            state, downlink = downlink.state_dict(), Downlink()
            downlink.load_state_dict(copy.deepcopy(state))


def test_few_that_rest_take_no_row():
    """One dead unit does not make the record a number a coordinate: the list of what rests is as long as it is."""
    n, downlink = 1000, Downlink()
    rests = [([], []), ([0, 1], [0, 0]), ([1, 2], [0, 1]), ([0], [2])]  # 1 rested twice, 2 moved in round 1
    for number, (resting, rested) in enumerate(rests):
        after = torch.ones(n)
        after[resting] = 0.0
        downlink.close(number, torch.zeros(n), after)
        assert (downlink.moved, downlink.resting.tolist(), downlink.rested.tolist()) == (number, resting, rested)


def build(**options):
    return Small(small_net(), small_data(), uneven_parts(), **{"momentum": 0.0, "cohort": 3, "lr": 0.1, **options})


@pytest.mark.parametrize("server", [partial(torch.optim.SGD, lr=1.0), partial(torch.optim.SGD, lr=1.0, momentum=0.9)])
def test_bytes_down_of_five_rounds_are_those_of_real_messages(tmp_path, server):
    """Each client that was here before gets what differs between the model it started from and the one of now."""
    small = build(exchange=partial(Exchange, rule=TopK(fraction=0.05)), server=server)
    models = [small.row.clone()]
    small.after_rounds(lambda round: models.append(round.federation.server.rows[0].clone()))
    small.fit(5, tmp_path)
    last, wanted = {}, 0
    for r in range(5):
        for client in small.plan.sample(r):
            if client in last:
                between = torch.stack(models[last[client] : r + 1])
                marks = (between != between[0]).any(0)  # also what went and came back
                wanted += min(len(encode(models[r], marks)), H + 8 * SIZE)
            last[client] = r
    assert small.federation.ledger.bytes_down == wanted > 0


def test_first_contact_is_the_first_model_and_the_mask(tmp_path):
    small = build()
    small.given["model_length"] = 1000
    small.once_made(lambda federation: setattr(federation.bytes, "mask_length", 30))
    small.fit(1, tmp_path)
    ledger = small.federation.ledger
    assert ledger.bytes_down == 0
    assert ledger.bytes_setup_down == 5 * 1030
    assert ledger.bytes_up == ledger.bytes_dense == 5 * (H + 8 * SIZE)
    assert ledger.bytes_total == ledger.bytes_up + 5 * 1030


def test_who_holds_the_model_from_before_gets_the_row_of_now(tmp_path):
    """Head and calibration sent the model, and changed it since: which coordinates, nobody noted."""
    small = build()
    small.given["model_length"] = 1000
    small.given["ledger"] = Ledger()
    small.given["ledger"].first_model(small.plan.sample(0)[:2], 1000)
    small.fit(1, tmp_path)
    assert small.federation.ledger.bytes_down == 2 * (H + 8 * SIZE)
    assert small.federation.ledger.bytes_setup_down == 5 * 1000


def test_a_ledger_by_hand():
    ledger = Ledger(link=Link(up=8.0, down=16.0, latency=0.25))
    ledger.first_model([1, 2], 100)
    ledger.first_model([2, 3], 100)
    ledger.mask([1], 7)
    ledger.mask([1, 2], 7)
    ledger.setup(3, up=10, down=20)
    assert (ledger.bytes_setup_up, ledger.bytes_setup_down) == (30, 300 + 14 + 60)
    ledger.trained(2, Size(10, 20, 30), Size(1, 2, 3), dense=500)
    ledger.trained(1, Size(10, 0, 999_990), Size(0, 0, 0), dense=500, first=2_000_000)
    entries = ledger.close()
    assert [entry.client for entry in entries] == [1, 2]
    assert (ledger.bytes_up, ledger.bytes_down, ledger.bytes_dense) == (1_000_060, 6, 1000)
    # 1 MB up at 8 Mbit/s is 1 s, 2 MB down at 16 is 1 s, and two times a quarter of latency
    assert entries[0].seconds == pytest.approx(2.5)
    assert entries[1].seconds == pytest.approx(0.5 + 60 / 1e6 + 6 / 2e6)
    assert ledger.link_seconds == pytest.approx(2.5)  # the slowest of the round
    ledger.trained(2, Size(0, 0, 0), Size(0, 0, 0), dense=0)
    ledger.close()
    assert ledger.link_seconds == pytest.approx(3.0)
    assert ledger.bytes_total == 1_000_060 + 6 + 30 + 374
    assert ledger.figures()["bytes_total"] == ledger.bytes_total
    again = Ledger()
    again.load_state_dict(copy.deepcopy(ledger.state_dict()))
    assert again.figures() == ledger.figures()
    assert (again.has_model, again.has_mask, again.link_seconds) == ({1, 2, 3}, {1, 2}, ledger.link_seconds)


@pytest.mark.parametrize(
    ("key", "value"), [("up", 0), ("down", -1.0), ("latency", -0.1), ("up", math.inf), ("down", "fast"), ("up", True)]
)
def test_a_link_that_cannot_be_is_refused_in_one_line(key, value):
    with pytest.raises(ValueError, match=f"link.{key} is .*; it must be a finite number") as error:
        Link(**{"up": 1.0, "down": 1.0, "latency": 0.0, key: value})
    assert "\n" not in str(error.value)


def rows_of(path):
    with path.open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


OPTIONS = {
    "full": {"exchange": Full},
    "scaffold": {"objective": partial(Scaffold, 7)},
    "topk": {"exchange": partial(Exchange, rule=TopK(fraction=0.05))},
    "silent": {"exchange": partial(Exchange, rule=Threshold(1e9))},
}


@pytest.mark.parametrize("case", list(OPTIONS))
def test_the_lines_of_traffic_sum_up_to_the_summary(tmp_path, case):
    small = build(**OPTIONS[case])
    link = Link(up=9.0, down=18.0, latency=0.01)
    small.given |= {"traffic": Traffic(tmp_path / "traffic.csv"), "model_length": 1000, "ledger": Ledger(link=link)}
    small.fit(4, tmp_path)
    rows, ledger = rows_of(tmp_path / "traffic.csv"), small.federation.ledger

    def total(row, way):
        return sum(row[f"{way}_{part}"] for part in ("header", "positions", "values"))

    assert [(row["round"], row["client"]) for row in rows] == [
        (r + 1, client) for r in range(4) for client in sorted(small.plan.sample(r))
    ]
    assert sum(total(row, "up") for row in rows) == ledger.bytes_up
    assert sum(total(row, "down") for row in rows) == ledger.bytes_down
    assert sum(row["first_contact"] for row in rows) == ledger.bytes_setup_down
    assert sum(row["dense"] for row in rows) == ledger.bytes_dense
    seconds = [0.02 + 8e-6 * (total(r, "up") / 9 + (total(r, "down") + r["first_contact"]) / 18) for r in rows]
    assert [row["seconds"] for row in rows] == pytest.approx(seconds, rel=1e-5)
    assert link.seconds(0, 0) == 0.02
    slowest = [max(s for s, row in zip(seconds, rows, strict=True) if row["round"] == r) for r in (1, 2, 3, 4)]
    assert ledger.link_seconds == pytest.approx(sum(slowest))


def test_traffic_after_a_resume_has_each_round_once(tmp_path):
    ledger, traffic = Ledger(), Traffic(tmp_path / "traffic.csv")
    for r in (1, 2, 10):
        ledger.trained(r, Size(1, 2, 3), Size(4, 5, 6), dense=9, first=7)
        traffic.write(r, ledger.close())
    lines = traffic.path.read_text().splitlines()
    assert lines == [COLUMNS, *[f"{r},{r},1,2,3,4,5,6,7,9,0" for r in (1, 2, 10)]]
    with traffic.path.open("a") as file:
        file.write("11,4,1")  # torn
    traffic.drop_from(2)
    assert traffic.path.read_text().splitlines() == lines[:2]
    traffic.path.write_text("round,cl")  # torn in its first line
    traffic.drop_from(1)
    assert traffic.path.read_text() == COLUMNS + "\n"
    Traffic(None).drop_from(1)
    Traffic(None).write(1, [])


# three rounds of a mean change; the first coordinate is always sent, the second only in the second round, the third in
# the first and last, the fourth never
CHANGES = [[1.0, 0.0, 2.0, 0.0], [0.5, -1.0, 0.0, 0.0], [-2.0, 0.0, 1.0, 0.0]]
SENT = [[True, False, True, False], [True, True, False, False], [True, False, True, False]]
START, LR, BETAS, TAU = [0.5, 1.0, -1.0, 2.0], 0.1, (0.9, 0.99), 1e-3


def yogi(state, d, t):
    m, v = state or (0.0, TAU**2)
    m = BETAS[0] * m + (1 - BETAS[0]) * d
    v = v - (1 - BETAS[1]) * d * d * ((v > d * d) - (v < d * d))
    return (m, v), LR * m / (math.sqrt(v) + TAU)


def fed_adam(state, d, t):
    m, v = state or (0.0, TAU**2)
    m, v = BETAS[0] * m + (1 - BETAS[0]) * d, BETAS[1] * v + (1 - BETAS[1]) * d * d
    return (m, v), LR * m / (math.sqrt(v) + TAU)


def torchs_adam(state, d, t):
    m, v = state or (0.0, 0.0)
    m, v = BETAS[0] * m + (1 - BETAS[0]) * d, BETAS[1] * v + (1 - BETAS[1]) * d * d
    return (m, v), LR * (m / (1 - BETAS[0] ** t)) / (math.sqrt(v / (1 - BETAS[1] ** t)) + TAU)


def momentum(state, d, t):
    m = 0.9 * state[0] + d if state else d
    return (m,), LR * m


def sgd(state, d, t):
    return (), LR * d


SERVERS = {
    "yogi": (yogi, partial(FedYogi, lr=LR, betas=BETAS, tau=TAU)),
    "fedadam": (fed_adam, partial(FedAdam, lr=LR, betas=BETAS, tau=TAU)),
    "torch's adam": (torchs_adam, partial(torch.optim.Adam, lr=LR, betas=BETAS, eps=TAU, foreach=False)),
    "momentum": (momentum, partial(torch.optim.SGD, lr=LR, momentum=0.9)),
    "sgd": (sgd, partial(torch.optim.SGD, lr=LR)),
}


def by_hand(rule, untouched):
    """One coordinate after the other: a step moves it, holds it while its moments decay, or freezes both."""
    path = []
    for place, x in enumerate(START):
        state, values = None, []
        for t, (change, sent) in enumerate(zip(CHANGES, SENT, strict=True), start=1):
            renewed, way = rule(state, change[place], t)
            if sent[place] or untouched != "freeze":
                state = renewed
            if sent[place] or untouched == "step":
                x += way
            values.append(x)
        path.append(values)
    return [list(values) for values in zip(*path, strict=True)]


@pytest.mark.parametrize("untouched", ["step", "hold", "freeze"])
@pytest.mark.parametrize("name", list(SERVERS))
def test_what_nobody_sent_by_hand(name, untouched):
    rule, make = SERVERS[name]
    row = torch.tensor([START], dtype=torch.float64)
    server = Server(row, make, Subspace(torch.ones(4, dtype=torch.bool)), untouched)
    for change, sent, wanted in zip(CHANGES, SENT, by_hand(rule, untouched), strict=True):
        rows = torch.tensor([change], dtype=torch.float64)
        server.step(Change(rows, torch.zeros(1, 0), torch.tensor([sent]), 0.0, (True,)))
        assert row[0].tolist() == pytest.approx(wanted, rel=1e-12)
    assert row[0, 3] == 2.0


def test_the_three_choices_differ_where_a_coordinate_rests():
    paths = {choice: by_hand(momentum, choice) for choice in ("step", "hold", "freeze")}
    third = {choice: [values[2] for values in path] for choice, path in paths.items()}
    # velocity 2, then 1.8 or 2; then 1.62 + 1 or 1.8 + 1
    assert third["step"] == pytest.approx([-0.8, -0.62, -0.358])
    assert third["hold"] == pytest.approx([-0.8, -0.8, -0.538])
    assert third["freeze"] == pytest.approx([-0.8, -0.8, -0.52])


@pytest.mark.parametrize("untouched", ["step", "hold", "freeze"])
def test_if_all_is_sent_the_choice_does_not_matter(untouched):
    rows = []
    for choice in (untouched, "step"):
        row = torch.tensor([START], dtype=torch.float64)
        server = Server(row, SERVERS["yogi"][1], Subspace(torch.ones(4, dtype=torch.bool)), choice)
        for change in CHANGES:
            server.step(Change(torch.tensor([change], dtype=torch.float64), torch.zeros(1, 0), None, 0.0, (True,)))
        rows.append(row)
    assert torch.equal(*rows)


def test_an_unknown_choice_is_refused_in_one_line():
    with pytest.raises(ValueError, match="server.untouched is 'stay'; it must be step, hold or freeze") as error:
        Server(torch.zeros(1, 4), torch.optim.SGD, Subspace(torch.ones(4, dtype=torch.bool)), "stay")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("denominator", ["senders", "participants"])
@pytest.mark.parametrize("untouched", ["hold", "freeze"])
def test_a_federation_under_yogi_moves_only_what_was_sent(tmp_path, untouched, denominator):
    small = build(
        exchange=partial(Exchange, rule=TopK(fraction=0.02)),
        aggregation=partial(WeightedMean, denominator),
        server=partial(FedYogi, lr=0.01),
        untouched=untouched,
    )
    before, seen, finish = small.row.clone(), [], small.given["aggregation"].finish
    small.given["aggregation"].finish = lambda tally: seen.append(finish(tally)) or seen[-1]
    after = small.fit(4, tmp_path).row
    touched = torch.stack([change.touched[0] for change in seen]).any(0)
    assert torch.equal(after != before, touched)
    assert 0 < int(touched.sum()) < SIZE


def test_masked_exchange_steps_everything_that_trains(tmp_path):
    small = build(exchange=Exchange, server=partial(torch.optim.SGD, lr=1.0, momentum=0.9))
    seen, finish = [], small.given["aggregation"].finish
    small.given["aggregation"].finish = lambda tally: seen.append(finish(tally)) or seen[-1]
    small.fit(1, tmp_path)
    assert seen[0].touched is None


def test_freeze_leaves_no_momentum_of_a_first_step_by_hand():
    """Weight decay 1/2 would give a velocity of 1 to the second of 2, which nobody sent; it begins at 0 instead."""
    row = torch.tensor([[2.0, 2.0]], dtype=torch.float64)
    make = partial(torch.optim.SGD, lr=1.0, momentum=0.5, weight_decay=0.5)
    server = Server(row, make, Subspace(torch.ones(2, dtype=torch.bool)), "freeze")
    path = []
    for sent in ([True, False], [True, True]):
        server.step(
            Change(torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1, 0), torch.tensor([sent]), 0.0, (True,))
        )
        path.append(row[0].tolist())
    # first: v = 1, 2 - 1 = 1; then v = 0.5 + 0.5, 1 - 1 = 0. second: stays; then v = 1, 2 - 1 = 1
    assert path == [[1.0, 2.0], [0.0, 1.0]]
