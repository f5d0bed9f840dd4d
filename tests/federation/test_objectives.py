"""FedProx, SCAFFOLD and FedNova against plain loops of their own, written as the papers' boxes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from plain import replay
from plain_sparse import gradient, rounds_of, train
from small import Small, small_data, small_net, uneven_parts

from fedsparse.core.space import ParamSpace
from fedsparse.data.rounds import LocalWork
from fedsparse.federation.client.drift import VARIATES, FedProx, NoCorrection, Scaffold, step_weight, step_weights
from fedsparse.federation.exchange.exchange import Exchange, Full
from fedsparse.federation.exchange.sparsifiers import TopK
from fedsparse.federation.exchange.wire.message import HEADER
from fedsparse.federation.server.aggregation import FedNova, WeightedMean
from fedsparse.masks import top_fraction
from fedsparse.optim.sgdm import SparseSGDM

ROUNDS, CLIENTS = 3, 7
SIZE = ParamSpace.of(small_net()).size
EPOCHS = LocalWork(8, None, 2)  # ragged: 2 to 10 steps


def half_mask():
    return top_fraction(torch.rand(SIZE, generator=torch.Generator().manual_seed(3)), 0.4)


def build(masked=False, **options):
    mask = half_mask() if masked else None
    return Small(small_net(), small_data(), uneven_parts(), **{"work": EPOCHS, "lr": 0.1, "mask": mask, **options})


def weighted(row, after):
    """FedAvg."""
    total = sum(weight for _, weight, _ in after)
    return row + sum(weight * (new - row) for _, weight, new in after) / total


@pytest.mark.parametrize("cohort", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mu", [0.0, 1.0])
def test_fedprox_equals_a_plain_loop(tmp_path, mu, masked, cohort):
    small = build(masked, cohort=cohort, objective=partial(FedProx, mu))
    row = small.row.clone()
    for r, clients in enumerate(replay(small.plan, ROUNDS)):
        options = {"lr": 0.1, "momentum": 0.9, "mask": small.mask}
        start, data = row, small.dataset.train
        after = [
            (client, weight, train(small.net, start, data, batches, more=lambda y, x=start: mu * (y - x), **options))
            for client, (batches, weight) in zip(small.plan.sample(r), clients, strict=True)
        ]
        row = weighted(start, after)
    got = small.fit(ROUNDS, tmp_path).row
    torch.testing.assert_close(got, row, rtol=0, atol=1e-9)
    plain = build(masked, cohort=cohort).fit(ROUNDS, tmp_path).row
    assert torch.allclose(got, plain, rtol=0, atol=1e-12) == (mu == 0.0)


def test_fedprox_in_two_steps_by_hand():
    """Gradients of 1, lr 1/2, mu 1/2, start 4: 4 -> 3.5; pulled by -1/4, 3.5 -> 3.5 - 3/8."""

    class Rows:
        def __init__(self):
            self.views, self.gradients = [torch.tensor([[4.0]])], [torch.zeros(1, 1)]

        def parts(self, row):
            return [row]

    rows, path = Rows(), []
    term = FedProx(0.5).start(rows.views[0], (0,), None)
    for _ in range(2):
        rows.gradients[0].fill_(1.0)
        term.correct(rows)
        rows.views[0] -= 0.5 * rows.gradients[0]
        path.append(rows.views[0].item())
    assert path == [3.5, 3.125]


@pytest.mark.parametrize("mu", [-0.1, float("inf"), float("nan"), True, "1", None])
def test_a_pull_that_cannot_be_meant_is_refused(mu):
    with pytest.raises(ValueError, match="objective.mu is .*; it must be a finite number of 0 or more") as error:
        FedProx(mu)
    assert "\n" not in str(error.value)


def scaffold_box(small, dealt, momentum, mask):
    """Algorithm 1 of Karimireddy et al. 2020, option II; with momentum K is the sum of the step weights."""
    row, data = small.row.clone(), small.dataset.train
    server, own = torch.zeros_like(row), [torch.zeros_like(row) for _ in range(CLIENTS)]
    for r, clients in enumerate(dealt):
        after, renewed = [], list(own)
        for client, (batches, weight) in zip(small.plan.sample(r), clients, strict=True):
            y, v, far = row, None, 0.0
            for step in range(len(batches)):
                g = gradient(small.net, y, data.x, data.y, batches[step]) + server - own[client]
                g = g if mask is None else g * mask
                v = g if v is None else momentum * v + g
                y = y - small.lr * v
                far += sum(momentum**i for i in range(step + 1))
            after.append((client, weight, y))
            renewed[client] = own[client] - server + (row - y) / (small.lr * far)
            renewed[client] = renewed[client] if mask is None else renewed[client] * mask
        row = weighted(row, after)
        own = renewed
        server = sum(own) / CLIENTS
    return row, server, own


@pytest.mark.parametrize("cohort", [1, 3, 20])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_scaffold_equals_a_plain_loop_variates_and_all(tmp_path, momentum, masked, cohort):
    small = build(masked, cohort=cohort, momentum=momentum, objective=partial(Scaffold, CLIENTS), lr=0.05)
    row, server, own = scaffold_box(small, replay(small.plan, ROUNDS), momentum, small.mask)
    trained = torch.ones(SIZE, dtype=torch.bool) if small.mask is None else small.mask
    small.fit(ROUNDS, tmp_path)
    torch.testing.assert_close(small.row, row, rtol=0, atol=1e-9)
    objective, kept = small.module.objective, small.federation.stores[VARIATES].rows
    torch.testing.assert_close(objective.mean, server[trained], rtol=0, atol=1e-9)
    assert set(kept) == {client for r in range(ROUNDS) for client in small.plan.sample(r)}
    for client in kept:
        torch.testing.assert_close(kept[client], own[client][trained], rtol=0, atol=1e-9)
    assert float(server.abs().max()) > 1e-3


def test_scaffold_resumes_with_its_variates(tmp_path):
    whole = build(cohort=3, objective=partial(Scaffold, CLIENTS))
    whole.fit(2, tmp_path)
    state = whole.rounds.state_dict()
    again = build(cohort=3, objective=partial(Scaffold, CLIENTS))
    again.rounds.federate(again.module.form()).load_state_dict(state)
    assert torch.equal(again.module.objective.mean, whole.module.objective.mean)
    kept, wanted = again.module.objective.stores[VARIATES].rows, whole.federation.stores[VARIATES].rows
    assert set(kept) == set(wanted)
    assert all(torch.equal(kept[client], wanted[client]) for client in kept)


@pytest.mark.parametrize("cohort", [1, 3])
def test_a_client_that_scaffold_loses_leaves_every_variate_as_it_was(tmp_path, cohort):
    """As if it had not taken part; in a cohort of its own nobody is left to be heard."""
    options = {"objective": partial(Scaffold, CLIENTS), "cohort": cohort}
    bad, muted = build(**options), build(**options | {"cohort": 1})
    sample, victim = muted.plan.sample, muted.plan.sample(0)[1]
    muted.plan.sample = lambda r: [c for c in sample(r) if c != victim]
    bad.dataset.train.x[bad.parts[victim][0]] = float("nan")
    for small in (bad, muted):
        small.fit(2, tmp_path)
    assert {d.client for d in bad.federation.dropped} == {victim}
    torch.testing.assert_close(bad.row, muted.row, rtol=0, atol=1e-9)
    torch.testing.assert_close(bad.module.objective.mean, muted.module.objective.mean, rtol=0, atol=1e-9)
    assert victim not in bad.federation.stores[VARIATES].rows


@pytest.mark.parametrize(("exchange", "masked"), [(Full, False), (Exchange, False), (Full, True), (Exchange, True)])
def test_bytes_of_the_variates_by_hand(tmp_path, exchange, masked):
    """Eight bytes more each way for each that trains, in the same message; at first contact the model comes apart."""
    plain, more = (
        build(masked, cohort=3, exchange=exchange, objective=o).fit(ROUNDS, tmp_path).federation.ledger
        for o in (NoCorrection, partial(Scaffold, CLIENTS))
    )
    trained = int(half_mask().sum()) if masked else SIZE
    wanted = ROUNDS * 5 * 8 * trained
    assert more.bytes_up - plain.bytes_up == wanted
    assert more.bytes_down - plain.bytes_down == wanted + HEADER.size * len(more.has_model)
    assert more.bytes_dense == plain.bytes_dense


SGDS = [
    {"momentum": 0.0},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.5},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.5, "dampening": 1.0},
    {"momentum": 0.0, "dampening": 0.5},
]


@pytest.mark.parametrize("options", SGDS, ids=str)
@pytest.mark.parametrize("steps", [0, 1, 2, 7, 40])
def test_step_weight_is_how_far_sgd_goes_on_gradients_of_one(options, steps):
    for kind in (torch.optim.SGD, SparseSGDM):
        x = torch.zeros(1, dtype=torch.float64)
        optimizer = kind([x], lr=1.0, **options)
        for _ in range(steps):
            x.grad = torch.ones(1, dtype=torch.float64)
            optimizer.step()
        assert step_weight(steps, **options) == pytest.approx(-x.item(), abs=1e-12)


def test_step_weights_count_the_steps_that_have_samples():
    optimizer = SparseSGDM([torch.zeros(1)], lr=0.1, momentum=0.5)
    # three, one, none: 1 + 1.5 + 1.75, 1, 0
    assert step_weights([(8, 3, 0), (8, 0, 0), (1, 0, 0)], optimizer) == (4.25, 1.0, 0.0)


def fednova_box(row, after, steps, momentum):
    """Equation 6 of Wang et al. 2020: x - tau_eff * sum p_i d_i with d_i the way by a_i, tau_eff = sum p_i |a_i|."""
    total = sum(weight for _, weight, _ in after)
    a = {client: sum(sum(momentum**i for i in range(s + 1)) for s in range(steps[client])) for client, _, _ in after}
    effective = sum(weight / total * a[client] for client, weight, _ in after)
    return row + effective * sum(weight / total * (new - row) / a[client] for client, weight, new in after)


@pytest.mark.parametrize("cohort", [1, 3, 20])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fednova_equals_a_plain_loop(tmp_path, momentum, masked, cohort):
    small = build(masked, cohort=cohort, momentum=momentum, aggregation=FedNova)
    dealt = replay(small.plan, ROUNDS)
    steps = {
        client: len(batches)
        for r, clients in enumerate(dealt)
        for client, (batches, _) in zip(small.plan.sample(r), clients, strict=True)
    }
    assert len(set(steps.values())) > 2  # ragged
    close = partial(fednova_box, steps=steps, momentum=momentum)
    expected = rounds_of(small, dealt, close, lr=small.lr, momentum=momentum, mask=small.mask)
    got = small.fit(ROUNDS, tmp_path).row
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
    average = build(masked, cohort=cohort, momentum=momentum).fit(ROUNDS, tmp_path).row
    assert not torch.allclose(got, average, rtol=0, atol=1e-4)


@pytest.mark.parametrize("denominator", ["senders", "participants"])
def test_fednova_of_as_many_steps_each_is_the_mean(tmp_path, denominator):
    work = LocalWork(8, 3, None)
    rows = [
        build(
            work=work, cohort=3, aggregation=partial(kind, denominator), exchange=partial(Exchange, rule=TopK())
        ).fit(ROUNDS, tmp_path).row
        for kind in (FedNova, WeightedMean)
    ]  # fmt: skip
    torch.testing.assert_close(*rows, rtol=0, atol=1e-12)


def test_objectives_go_together_with_sparse_exchange_in_every_cohort(tmp_path):
    rows = [
        build(cohort=k, objective=partial(FedProx, 0.1), aggregation=FedNova, exchange=partial(Exchange, rule=TopK()))
        .fit(2, tmp_path)
        .row
        for k in (1, 3, 20)
    ]
    for row in rows[1:]:
        torch.testing.assert_close(row, rows[0], rtol=0, atol=1e-9)
