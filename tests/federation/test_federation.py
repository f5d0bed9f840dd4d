"""The federation against a plain loop, and what must not depend on how it is simulated."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from plain import plain_fedavg, replay
from small import Small, small_data, small_net, uneven_parts

from fedsparse.core.space import ParamSpace
from fedsparse.data.rounds import LocalWork
from fedsparse.federation.client.training import LOCAL
from fedsparse.federation.exchange.exchange import Exchange, Full
from fedsparse.masks import top_fraction
from fedsparse.simulation.module import ClientModule

ROUNDS = 3
WORK = {
    "steps": LocalWork(8, 3, None),
    "epochs": LocalWork(8, None, 2),
    "processed": LocalWork(8, None, 1, "processed"),
}


def half_mask(net):
    space = ParamSpace.of(net)
    scores = torch.rand(space.size, generator=torch.Generator().manual_seed(3))
    return top_fraction(scores, 0.4)


def unit_mask(net):
    """Five hidden units with their biases, the whole output weight, and nothing of the output bias."""
    space = ParamSpace.of(net)
    mask = torch.zeros(space.size, dtype=torch.bool)
    weight, bias, out, _ = space.unflatten(mask).values()
    weight[2:7], bias[2:7], out[:] = True, True, True
    return mask


APART = partial(ClientModule, large=1)  # these layers are small, and yet stepped as large ones are
MASKS = {False: lambda net: None, True: half_mask, "units": unit_mask}


def build(work="steps", masked=False, **options):
    net = small_net()
    mask = MASKS[masked](net)
    return Small(net, small_data(), uneven_parts(), work=WORK[work], mask=mask, **options)


@pytest.mark.parametrize("cohort", [1, 3])
@pytest.mark.parametrize("masked", list(MASKS))
@pytest.mark.parametrize("work", list(WORK))
@pytest.mark.parametrize("exchange", [Full, Exchange])
def test_three_rounds_equal_a_plain_loop(tmp_path, work, masked, cohort, exchange):
    options = {"weight_decay": 0.01, "clip": 0.5, "client": APART}
    small = build(work, masked, cohort=cohort, exchange=exchange, **options)
    masks = small.space.unflatten(small.mask) if masked else None
    start = copy.deepcopy(small.net)
    plain, losses = plain_fedavg(
        start,
        small.dataset.train.x,
        small.dataset.train.y,
        replay(small.plan, ROUNDS),
        lr=small.lr,
        momentum=small.momentum,
        weight_decay=0.01,
        clip=0.5,
        masks=masks,
    )
    small.fit(ROUNDS, tmp_path)
    expected = small.space.read(plain)
    assert not torch.allclose(expected, small.space.read(start), atol=1e-3)
    torch.testing.assert_close(small.row, expected, rtol=0, atol=1e-9)
    assert small.rounds.loss == pytest.approx(losses[-1], abs=1e-9)


def test_server_momentum_equals_a_plain_loop(tmp_path):
    small = build(server=partial(torch.optim.SGD, lr=1.0, momentum=0.9))
    start = copy.deepcopy(small.net)
    plain, _ = plain_fedavg(
        start,
        small.dataset.train.x,
        small.dataset.train.y,
        replay(small.plan, ROUNDS),
        lr=small.lr,
        momentum=small.momentum,
        server_momentum=0.9,
    )
    torch.testing.assert_close(small.fit(ROUNDS, tmp_path).row, small.space.read(plain), rtol=0, atol=1e-9)


@pytest.mark.parametrize("work", list(WORK))
@pytest.mark.parametrize("masked", [False, True])
def test_cohort_size_is_an_implementation_detail(tmp_path, work, masked):
    rows = [build(work, masked, cohort=k, clip=0.5).fit(ROUNDS, tmp_path).row for k in (1, 3, 20)]
    for row in rows[1:]:
        torch.testing.assert_close(row, rows[0], rtol=0, atol=1e-9)


def test_the_same_run_twice_gives_the_same_bits(tmp_path):
    first, second = (build(masked=True, cohort=3).fit(ROUNDS, tmp_path).row for _ in range(2))
    assert torch.equal(first, second)


def test_another_seed_gives_another_model(tmp_path):
    first, second = (build(seed=s).fit(1, tmp_path).row for s in (0, 1))
    assert not torch.equal(first, second)


def test_one_client_with_all_data_is_centralised_sgd(tmp_path):
    net, data = small_net(), small_data()
    small = Small(net, data, [torch.arange(150).numpy()], work=LocalWork(8, 40, None), count=1, lr=0.1)
    central = copy.deepcopy(net)
    sgd = torch.optim.SGD(central.parameters(), lr=0.1, momentum=0.9)
    for batch in replay(small.plan, 1)[0][0][0]:
        sgd.zero_grad()
        torch.nn.functional.cross_entropy(central(data.train.x[batch]), data.train.y[batch]).backward()
        sgd.step()
    torch.testing.assert_close(small.fit(1, tmp_path).row, small.space.read(central), rtol=0, atol=1e-9)


def test_density_one_is_dense(tmp_path):
    full = torch.ones(ParamSpace.of(small_net()).size, dtype=torch.bool)
    rows = [Small(small_net(), small_data(), uneven_parts(), mask=m).fit(ROUNDS, tmp_path).row for m in (None, full)]
    assert torch.equal(*rows)


@pytest.mark.parametrize("cohort", [1, 3])
@pytest.mark.parametrize(
    "server", [partial(torch.optim.SGD, lr=1.0), partial(torch.optim.Adam, lr=0.05, weight_decay=0.1)]
)
@pytest.mark.parametrize("exchange", [Full, Exchange])
def test_frozen_coordinates_keep_their_bits(tmp_path, cohort, server, exchange):
    data = {"bundle": 0.0}  # a batch is a cohort
    small = build(masked=True, cohort=cohort, server=server, exchange=exchange, weight_decay=0.1, data=data)
    with torch.no_grad():
        small.net[1].weight[0] = -0.0  # the hard case: -0.0 + 0.0 is +0.0
    before, seen = small.row.view(torch.int64), []
    end = small.rounds.on_train_batch_end

    def spy(trainer, module, outputs, batch, index):
        seen.extend(module.clients.theta.detach().clone().view(torch.int64))
        end(trainer, module, outputs, batch, index)

    small.rounds.on_train_batch_end = spy
    after = small.fit(ROUNDS, tmp_path).row.view(torch.int64)
    frozen = ~small.mask
    assert len(seen) >= ROUNDS * 5
    assert all(torch.equal(row[frozen], before[frozen]) for row in [*seen, after])
    assert not torch.equal(after[small.mask], before[small.mask])


def test_only_what_trains_is_differentiated_stepped_averaged_and_kept(tmp_path, monkeypatch):
    """Counts: n values in updates and moments, no gradient of a frozen tensor, weight gradients of five units of 16."""
    small = build(masked="units", client=APART, server=partial(torch.optim.Adam, lr=0.05))
    products, multiply = [], torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: products.append(a.shape) or multiply(a, b))
    zero, tallies = small.given["aggregation"].zero, []
    monkeypatch.setattr(small.given["aggregation"], "zero", lambda *a: tallies.append(zero(*a)) or tallies[-1])
    small.fit(1, tmp_path)
    trained, module = int(small.mask.sum()), small.module
    (state,) = small.federation.server.optimizer.state.values()
    assert tallies[0].rows.shape == state["exp_avg"].shape == (1, trained)
    assert sum(s["momentum_buffer"].numel() for s in module.clients.optimizer.state.values()) == trained
    assert [p.requires_grad for p in small.net.parameters()] == [True, True, True, False]
    assert set(products) == {(5, 8)}  # units x samples; the first layer's inputs take no gradient
    assert "forward" not in vars(small.net[1])


def poison(small, clients):
    """Let some clients' losses become NaN, from one sample on."""
    for client in clients:
        small.dataset.train.x[small.parts[client][0]] = float("nan")


@pytest.mark.parametrize("cohort", [1, 3])
def test_a_client_that_becomes_nan_is_dropped_and_named(tmp_path, cohort):
    bad, muted = build("epochs", cohort=cohort), build("epochs", cohort=1)
    victim = bad.plan.sample(0)[1]
    poison(bad, [victim])
    sample = muted.plan.sample
    muted.plan.sample = lambda r: [c for c in sample(r) if c != victim]
    bad.fit(1, tmp_path)
    muted.fit(1, tmp_path)
    assert [(d.round, d.client) for d in bad.federation.dropped] == [(0, victim)]
    assert bad.row.isfinite().all()
    torch.testing.assert_close(bad.row, muted.row, rtol=0, atol=1e-12)


@pytest.mark.parametrize("server", [partial(torch.optim.SGD, lr=1.0), partial(torch.optim.Adam, lr=0.05)])
def test_if_every_client_is_dropped_the_run_stops_and_the_model_stays(tmp_path, server):
    small = build("epochs", server=server)
    poison(small, range(7))
    before = small.row
    with pytest.raises(RuntimeError, match="round 1: the loss or update of every client became NaN"):
        small.fit(2, tmp_path)
    assert torch.equal(small.federation.server.rows[0], before)


def test_global_step_counts_rounds(tmp_path):
    assert build().fit(ROUNDS, tmp_path).trainer.global_step == ROUNDS


def test_validation_between_rounds_does_not_unbind_the_gradients(tmp_path):
    plain = build().fit(ROUNDS, tmp_path, limit_val_batches=0).row
    assert torch.equal(plain, build().fit(ROUNDS, tmp_path).row)


def test_the_learning_rate_follows_the_schedule(tmp_path):
    from fedsparse.federation.schedule import cosine

    assert torch.equal(build(schedule=cosine).fit(1, tmp_path).row, build().fit(1, tmp_path).row)
    four = build(schedule=cosine).fit(4, tmp_path)
    assert four.rounds.lr == pytest.approx(0.2 * 0.1464466, abs=1e-6)  # (1 + cos(3 pi / 4)) / 2
    assert not torch.equal(four.row, build().fit(4, tmp_path).row)


def batchnorm_net():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(12, 8, bias=False),
        torch.nn.BatchNorm1d(8),
        torch.nn.ReLU(),
        torch.nn.Linear(8, 3),
    ).double()


def test_batchnorm_statistics_are_averaged_with_the_weights(tmp_path):
    net, data, parts = batchnorm_net(), small_data(), [torch.arange(0, 50).numpy(), torch.arange(50, 150).numpy()]
    small = Small(net, data, parts, work=LocalWork(10, 2, None), count=2, momentum=0.0)
    clients, mean, var = replay(small.plan, 1)[0], 0.0, 0.0
    for batches, weight in clients:
        client = copy.deepcopy(net).train()
        sgd = torch.optim.SGD(client.parameters(), lr=0.2)
        for batch in batches:
            sgd.zero_grad()
            torch.nn.functional.cross_entropy(client(data.train.x[batch]), data.train.y[batch]).backward()
            sgd.step()
        mean, var = mean + weight / 150 * client[2].running_mean, var + weight / 150 * client[2].running_var
    small.fit(1, tmp_path)
    torch.testing.assert_close(net[2].running_mean, mean, rtol=0, atol=1e-9)
    torch.testing.assert_close(net[2].running_var, var, rtol=0, atol=1e-9)


def test_frozen_batchnorm_keeps_the_pretrained_statistics(tmp_path):
    net = batchnorm_net()
    before = net[2].running_mean.clone()
    Small(net, small_data(), uneven_parts(), count=3, buffers="frozen").fit(2, tmp_path)
    assert torch.equal(net[2].running_mean, before)


def test_batchnorm_cannot_be_stacked():
    with pytest.raises(ValueError, match="GroupNorm"):
        Small(batchnorm_net(), small_data(), uneven_parts(), cohort=3)


def test_local_coordinates_stay_with_the_client(tmp_path):
    net = small_net()
    small = Small(net, small_data(), uneven_parts(), cohort=3)
    small.space.local |= small.space.where("3.*")
    small.given["exchange"] = Full(torch.ones(small.space.size, dtype=torch.bool), small.space.local)
    start = small.row[small.space.local]
    small.fit(ROUNDS, tmp_path)
    assert torch.equal(small.row[small.space.local], start)
    kept = small.federation.stores[LOCAL].rows
    assert set(kept) <= set(range(7))
    assert not torch.equal(kept[next(iter(kept))], start)
    sent = small.space.size - int(small.space.local.sum())
    assert small.federation.ledger.bytes_up < 8 * small.space.size * 5 * ROUNDS
    assert small.federation.exchange.size == sent


class CountsSamples(torch.nn.Module):
    """Has an integer buffer that changes in training."""

    def __init__(self):
        super().__init__()
        self.body = small_net()
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        if self.training:
            self.seen += len(x)
        return self.body(x)


def test_an_integer_buffer_that_changes_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="integer buffers seen"):
        Small(CountsSamples(), small_data(), uneven_parts()).fit(1, tmp_path)


class Halved(ClientModule):
    """A loss of a user's own."""

    def losses(self, forward, x, y):
        return 0.5 * super().losses(forward, x, y)


@pytest.mark.parametrize("cohort", [1, 3])
def test_a_loss_of_ones_own_halves_the_step(tmp_path, cohort):
    plain = build(cohort=cohort, lr=0.1, momentum=0.0).fit(1, tmp_path).row
    halved = build(cohort=cohort, lr=0.2, momentum=0.0, client=Halved).fit(1, tmp_path).row
    torch.testing.assert_close(halved, plain, rtol=0, atol=1e-12)
