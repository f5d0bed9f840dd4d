"""Exploration and the rounds after it, against plain loops and numbers worked out by hand."""

from __future__ import annotations

import copy
import math
from functools import partial

import lightning
import pytest
import torch
from plain_sparse import train
from small import Small, small_data, small_net, uneven_parts
from staged import dealt, entries_by_round, masks_by_round, staged, total
from test_federation import batchnorm_net

from fedsparse.data.rounds import LocalWork
from fedsparse.federation import masking
from fedsparse.federation.client.drift import Scaffold
from fedsparse.federation.client.early_stopping import Patience
from fedsparse.federation.exchange.wire.message import HEADER
from fedsparse.federation.exchange.wire.positions import write_positions
from fedsparse.federation.masking import ClientMean
from fedsparse.federation.phases import Phase
from fedsparse.federation.reports import EveryUpdateDropped
from fedsparse.federation.server.aggregation import FedNova
from fedsparse.masks import Evidence, Sparsity, choose
from fedsparse.masks.rules import AutoFLIP, Movement, Random

LEARN = Phase("learn", rounds=2)
SPARSE = Sparsity(0.8)


def explore(**options):
    return Phase("explore", **({"updates_model": False, "local_epochs": 2} | options))


def deviation(small, clients, lr=0.2, momentum=0.9):
    """Mean squared deviation of these clients, all from the same row, a client after the other."""
    start, data = small.row.clone(), small.dataset.train
    whole, mean = sum(weight for *_, weight in clients), torch.zeros_like(start)
    for _, batches, weight in clients:
        if weight:
            mean += weight * (train(small.net, start, data, batches, lr=lr, momentum=momentum) - start) ** 2 / whole
    return mean


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kind": "learn", "informs_mask": False},
        {"kind": "explore"},
        {"kind": "explore", "updates_model": False},
        {"kind": "explore", "informs_mask": False},
        {"kind": "head", "updates_model": False, "informs_mask": False},
        {"local_steps": 3},
        {"local_epochs": 3},
        {"local_epochs": 3, "patience": 2},
        {"weight": "held"},
        {"weight": "processed"},
        {"weight": "equal"},
        {"lr": 1e-9},
    ],
    ids=str,
)
def test_options_of_a_phase_that_go_together(options):
    phase = Phase("a", **options)
    assert {key: getattr(phase, key) for key in options} == options


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"updates_model": False}, "phases.a.updates_model is false"),
        ({"updates_model": False, "informs_mask": False}, "phases.a.updates_model is false"),
        ({"kind": "explore", "updates_model": False, "informs_mask": False}, "does nothing"),
        ({"local_steps": 3, "local_epochs": 3}, "give either phases.a.local_steps or phases.a.local_epochs"),
        ({"patience": 2}, "phases.a.patience counts epochs"),
        ({"local_steps": 3, "patience": 2}, "phases.a.patience counts epochs"),
        ({"local_steps": 0}, "phases.a.local_steps is 0; it must be null, or a whole number of 1"),
        ({"kind": "explore", "local_epochs": 1.5}, "explore.epochs is 1.5; it must be null, or a whole number of 1"),
        ({"local_epochs": 3, "patience": 0}, "phases.a.patience is 0; it must be null, or a whole number of 1"),
        ({"weight": "all"}, "phases.a.weight is 'all'"),
        ({"lr": 0.0}, "phases.a.lr is 0"),
    ],
    ids=str,
)
def test_options_of_a_phase_that_do_not_go_together_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        Phase("a", **options)


def test_a_state_that_is_saved_before_a_round_counts_the_rounds_that_are_closed(tmp_path):
    """Where a checkpoint is written as training starts, and where it goes on."""

    class Start(lightning.Callback):
        def on_train_start(self, *_):
            states.append(small.rounds.state_dict()["phases"])

    states, small = [], staged([explore(), LEARN])
    small.callbacks.append(Start())
    trainer = small.fit(2, tmp_path).trainer
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    trainer.fit_loop.max_epochs = 3
    trainer.fit(small.module, trainer.datamodule, ckpt_path=tmp_path / "saved.ckpt")
    assert states == [[], [["explore", 1], ["learn", 1]]]


@pytest.mark.parametrize("cohort", [1, 3, 20])
@pytest.mark.parametrize("weight", ["equal", "held", "processed"])
def test_what_is_told_is_the_mean_squared_deviation_and_the_model_stays(tmp_path, cohort, weight):
    small = staged([explore(weight=weight), LEARN], sparsity=SPARSE, cohort=cohort)
    clients = dealt(small.plan, 0)
    wanted, start, rows = deviation(small, clients), small.row.clone(), []
    assert sorted(client for client, *_ in clients) == list(range(7))
    if weight == "equal":
        assert {w for *_, w in clients} == {1.0}
    else:
        held = [len(small.parts[client]) for client, *_ in clients]
        assert [w for *_, w in clients] == [n if weight == "held" else 2 * n for n in held]
    small.after_rounds(lambda round: rows.append((round.federation.server.rows[0].clone(), small.row.clone())))
    seen = masks_by_round(small)
    small.fit(3, tmp_path)
    for row in rows[0]:
        assert torch.equal(row.view(torch.int64), start.view(torch.int64))
    torch.testing.assert_close(small.federation.choice.observed, wanted, rtol=0, atol=1e-12)
    chosen = choose(AutoFLIP(), Evidence(small.space, start, SPARSE, observed=wanted)).row(small.space)
    assert int(chosen.sum()) == math.floor(0.2 * small.space.size + 0.5)
    assert [bool(mask.all()) for mask in seen] == [True, False, False]
    assert torch.equal(seen[1], chosen)
    assert torch.equal(seen[2], chosen)


def test_two_rounds_of_exploration_count_alike(tmp_path):
    phases = [explore(rounds=2, local_epochs=None, local_steps=3), LEARN]
    small = staged(phases, explorers=4)
    ids = [[client for client, *_ in dealt(small.plan, round)] for round in (0, 1)]
    assert ids[0] != ids[1]
    found = [deviation(small, dealt(small.plan, round)) for round in (0, 1)]
    small.fit(total(phases), tmp_path)
    torch.testing.assert_close(small.federation.choice.observed, (found[0] + found[1]) / 2, rtol=0, atol=1e-12)


def test_the_rate_of_an_exploration_is_its_own(tmp_path):
    small = staged([explore(lr=0.03), LEARN], schedule=lambda round, rounds: 0.5)
    wanted = deviation(small, dealt(small.plan, 0), lr=0.03)
    rates = []
    small.rounds.on_train_batch_end = _then(
        small.rounds.on_train_batch_end, lambda: rates.append(small.module.clients.optimizer.param_groups[0]["lr"])
    )
    small.fit(3, tmp_path)
    torch.testing.assert_close(small.federation.choice.observed, wanted, rtol=0, atol=1e-12)
    assert set(rates[:7]) == {0.03}
    assert set(rates[7:]) == {0.2 * 0.5}


def _then(call, more):
    def both(*args):
        call(*args)
        more()

    return both


def test_learning_after_an_exploration_is_learning_with_that_mask_from_the_start(tmp_path):
    first = staged([explore(), Phase("learn", rounds=3)], cohort=3)
    clients = [dealt(first.plan, round) for round in range(4)]
    first.fit(4, tmp_path)
    mask = torch.as_tensor(first.module.mask)
    second = staged([Phase("learn", rounds=3)], start=mask, cohort=3)
    assert [dealt(second.plan, round) for round in range(3)] == clients[1:]
    assert [batches for _, batches, _ in clients[0]] != [batches for _, batches, _ in clients[1]]
    assert torch.equal(second.fit(3, tmp_path).row, first.row)
    assert second.federation.ledger.bytes_up == first.federation.ledger.bytes_up


def test_batchnorms_statistics_stay_too(tmp_path):
    net = batchnorm_net()
    net[2].running_mean[0] = -0.0  # -0.0 + 0.0 is 0.0: another bit
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    small = staged([explore(), Phase("learn", rounds=1)], net=net, work=LocalWork(8, 3, None))
    found = []
    small.after_rounds(lambda _: found.append({n: b.clone() for n, b in net.named_buffers()}))
    small.fit(2, tmp_path)
    for name, buffer in before.items():
        if "num_batches" not in name:  # the counter stays with the process, as in learning rounds
            assert torch.equal(found[0][name].view(torch.int64), buffer.view(torch.int64)), name


def chain(small, clients, lr=0.2):
    """Each client goes on from where the one before it stopped."""
    row, start, mean = small.row.clone(), small.row.clone(), torch.zeros_like(small.row)
    for _, batches, weight in clients:
        after = train(small.net, row, small.dataset.train, batches, lr=lr, momentum=0.9)
        mean += weight * (after - row) ** 2 / sum(w for *_, w in clients)
        row = after
    assert not torch.equal(row, start)
    return row, mean


@pytest.mark.parametrize("cohort", [1, 3, 20])
def test_with_keep_model_each_client_goes_on_from_the_one_before(tmp_path, cohort):
    small = staged([explore(updates_model=True), LEARN], cohort=cohort)
    clients, rows = dealt(small.plan, 0), []
    row, mean = chain(small, clients)
    small.after_rounds(lambda _: rows.append(small.row.clone()))
    small.fit(1, tmp_path)
    torch.testing.assert_close(rows[0], row, rtol=0, atol=1e-12)
    small.federation.choice.observed = None
    again = staged([explore(updates_model=True), LEARN], cohort=cohort).fit(3, tmp_path)
    torch.testing.assert_close(again.federation.choice.observed, mean, rtol=0, atol=1e-12)


def test_keep_model_hands_batchnorms_statistics_on(tmp_path):
    net = batchnorm_net()
    small = staged([explore(updates_model=True), Phase("learn", rounds=1)], net=net)
    client, rows = copy.deepcopy(net).train(), []
    data = small.dataset.train
    for _, batches, _ in dealt(small.plan, 0):
        sgd = torch.optim.SGD(client.parameters(), lr=0.2, momentum=0.9)
        for batch in batches:
            sgd.zero_grad()
            torch.nn.functional.cross_entropy(client(data.x[batch]), data.y[batch]).backward()
            sgd.step()
    small.after_rounds(lambda _: rows.append(copy.deepcopy(net.state_dict())))
    small.fit(1, tmp_path)
    for name, value in client.state_dict().items():
        if "num_batches" not in name:
            torch.testing.assert_close(rows[0][name], value, rtol=0, atol=1e-12)


def _ruined(small, *clients):
    for client in clients:
        small.dataset.train.x[small.parts[client]] = math.nan
    return small


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("cohort", [1, 3])
def test_an_explorer_that_diverges_is_left_out(tmp_path, keep, cohort):
    phases = [explore(updates_model=keep, weight="held"), LEARN]
    small = _ruined(staged(phases, cohort=cohort), 2, 4)
    clients = [(c, batches, 0.0 if c in (2, 4) else w) for c, batches, w in dealt(small.plan, 0)]
    good = [client for client in clients if client[2]]
    row, wanted = chain(small, good) if keep else (small.row.clone(), deviation(small, good))
    rows = []
    small.after_rounds(lambda _: rows.append(small.row.clone()))
    small.fit(3, tmp_path)
    torch.testing.assert_close(small.federation.choice.observed, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(rows[0], row, rtol=0, atol=1e-12)
    assert sorted(d.client for d in small.federation.dropped if d.round == 0) == [2, 4]


def test_if_all_explorers_diverge_the_run_stops(tmp_path):
    with pytest.raises(EveryUpdateDropped):
        _ruined(staged([explore(), LEARN]), *range(7)).fit(3, tmp_path)


# patience


def test_patience_by_hand():
    """Two clients of two steps an epoch (3 + 1 samples) and of one; patience 2, at most 5 epochs."""
    counts = [[3, 2], [1, 2], [3, 2], [1, 2], [3, 2], [1, 0], [3, 0], [1, 0], [3, 0], [1, 0]]
    stop = Patience(counts, epochs=5, patience=2)
    # first: epoch means (3 * 1 + 1 * 5) / 4 = 2, then 1, then 1 (no better), then 3: stops after its 4th epoch
    # second: an epoch a step: 1, 2, 1 (no better): stops after its 3rd
    losses = [[1.0, 1.0], [5.0, 2.0], [1.0, 1.0], [1.0, 9.0], [1.0, 9.0], [1.0, 0], [3.0, 0], [3.0, 0]]
    taken = []
    for step, count in enumerate(counts):
        taken.append(stop.allowed(count))
        stop.update(losses[step] if step < len(losses) else [0.0, 0.0])
    assert [a for a, _ in taken] == [3, 1, 3, 1, 3, 1, 3, 1, 0, 0]
    assert [b for _, b in taken] == [2, 2, 2, 0, 0, 0, 0, 0, 0, 0]
    assert stop.taken == taken


def test_a_loss_that_is_no_number_is_no_better():
    stop = Patience([[4]] * 5, epochs=5, patience=1)
    for loss in (1.0, math.nan):
        assert stop.allowed([4]) == (4,)
        stop.update([loss])
    assert stop.allowed([4]) == (0,)


def patient(small, batches, epochs, patience, lr):
    """Train an epoch at a time until the mean loss has not been better for so many: row, steps, samples."""
    row, velocity, best, waited, steps = small.row.clone(), torch.zeros_like(small.row), math.inf, 0, 0
    data, samples, each = small.dataset.train, 0, len(batches) // epochs
    for epoch in range(epochs):
        seen = summed = 0.0
        for batch in batches[epoch * each : (epoch + 1) * each]:
            net = copy.deepcopy(small.net)
            torch.nn.utils.vector_to_parameters(row, net.parameters())
            loss = torch.nn.functional.cross_entropy(net(data.x[batch]), data.y[batch])
            grads = torch.autograd.grad(loss, list(net.parameters()))
            velocity = 0.9 * velocity + torch.cat([g.flatten() for g in grads])
            row, steps = row - lr * velocity, steps + 1
            seen, summed = seen + len(batch), summed + len(batch) * loss.item()
        samples += int(seen)
        waited = 0 if summed / seen < best else waited + 1
        best = min(best, summed / seen)
        if waited == patience:
            break
    return row, steps, samples


@pytest.mark.parametrize("cohort", [1, 3, 20])
@pytest.mark.parametrize("weight", ["equal", "processed"])
def test_an_exploration_with_patience_equals_a_plain_loop(tmp_path, cohort, weight):
    phases = [explore(local_epochs=12, patience=1, weight=weight, lr=1.5), Phase("learn", rounds=1)]
    small = staged(phases, cohort=cohort)
    clients = dealt(small.plan, 0)
    ran = [patient(small, batches, 12, 1, 1.5) for _, batches, _ in clients]
    planned = sum(len(batches) for _, batches, _ in clients)
    steps = sum(n for _, n, _ in ran)
    assert 0 < steps < planned
    weights = [1.0 if weight == "equal" else n for *_, n in ran]
    mean = sum(w * (row - small.row) ** 2 for w, (row, *_) in zip(weights, ran, strict=True)) / sum(weights)
    learned = sum(len(batches) for _, batches, _ in dealt(small.plan, 1))
    small.fit(2, tmp_path)
    assert small.federation.ledger.client_steps == steps + learned
    torch.testing.assert_close(small.federation.choice.observed, mean, rtol=1e-9, atol=1e-12)


# bytes


def positions(marks):
    return len(write_positions(marks.numpy())[1])


@pytest.mark.parametrize("prune", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_bytes_of_an_exploration_by_hand(tmp_path, prune, keep):
    """Rows of 8 bytes; 3 explore, 5 learn in each round; the first model is said to be 5000 bytes."""
    phases = [explore(updates_model=keep), LEARN]
    small = staged(phases, explorers=3, sparsity=Sparsity(0.8, mode="prune" if prune else "freeze"))
    size = small.space.size
    small.given["model_length"] = 5000
    ids = [[client for client, *_ in dealt(small.plan, round)] for round in range(3)]
    entries, rows = entries_by_round(small), [small.row.clone()]
    small.after_rounds(lambda _: rows.append(small.row.clone()))
    small.fit(3, tmp_path)
    trained = int(torch.as_tensor(small.module.mask).sum())
    assert trained == math.floor(0.2 * size + 0.5)
    zeros, mask = 8 * (size - trained) if prune else 0, 48 + math.ceil(size / 8)
    mask_row, holds = torch.as_tensor(small.module.mask), {}
    for round in range(3):
        assert [e.client for e in entries[round]] == sorted(ids[round])
        for e in entries[round]:
            new = e.client not in holds
            explores = round == 0
            assert e.up.header == HEADER.size * (2 if explores and keep else 1)
            assert e.up.values == 8 * (size if explores else trained) * (2 if explores and keep else 1)
            assert e.up.positions == 0
            model = (5000 if explores else 5000 - zeros) if new else 0
            again = any(e.client in ids[r] for r in range(1, round))
            assert e.first == model + (0 if explores or again else mask)
            if new:
                assert e.down.total == 0
            elif round == 1 and not keep:
                assert (e.down.header, e.down.positions, e.down.values) == (HEADER.size, 0, 0)
            else:  # what has moved of it; behind a pruned unit nothing does
                steps = range(holds[e.client], round)
                moved = torch.stack([rows[r + 1] != rows[r] for r in steps]).any(0)
                some = 8 * int(moved[mask_row].sum()) + positions(moved[mask_row])
                late = moved & ~mask_row  # a head start has moved these for the last time; pruned, they are zero
                more = 0 if prune or not bool(late.any()) else 8 * int(late.sum()) + positions(late)
                assert e.down.total == HEADER.size + min(8 * trained, some) + more
            holds[e.client] = round
    ledger, learned = small.federation.ledger, [*entries[1], *entries[2]]
    assert ledger.bytes_up == sum(e.up.total for e in learned)
    assert ledger.bytes_down == sum(e.down.total for e in learned)
    assert ledger.bytes_setup_up == sum(e.up.total for e in entries[0])
    assert ledger.bytes_setup_down == sum(e.down.total for e in entries[0]) + sum(
        e.first for rows in entries.values() for e in rows
    )


def test_an_exploration_carries_no_variates(tmp_path):
    """They are all zero then: the explorers' messages are the guide alone, the learners' have a variate each way."""
    small = staged([explore(), LEARN], objective=partial(Scaffold, 7), momentum=0.0, sparsity=Sparsity(0.5))
    entries = entries_by_round(small)
    wanted = deviation(small, dealt(small.plan, 0), momentum=0.0)
    small.fit(3, tmp_path)
    torch.testing.assert_close(small.federation.choice.observed, wanted, rtol=0, atol=1e-12)
    assert {e.up.total for e in entries[0]} == {HEADER.size + 8 * small.space.size}
    assert {e.down.total for e in entries[0]} == {0}
    trained = int(torch.as_tensor(small.module.mask).sum())
    assert {e.up.total for e in entries[1]} == {HEADER.size + 2 * 8 * trained}
    assert {e.down.total for e in entries[1]} == {HEADER.size + 8 * trained}  # nothing has moved


@pytest.mark.parametrize("cohort", [1, 3])
def test_fednova_counts_the_steps_that_patience_leaves(tmp_path, cohort):
    phase = Phase("learn", rounds=1, local_epochs=12, patience=1, lr=1.5)
    small = staged([phase], start=torch.ones(259, dtype=torch.bool), aggregation=FedNova, cohort=cohort)
    clients = dealt(small.plan, 0)
    ran = [patient(small, batches, 12, 1, 1.5) for _, batches, _ in clients]
    weights = [w / sum(w for *_, w in clients) for *_, w in clients]
    far = [
        sum(10 * (1 - 0.9**s) for s in range(1, steps + 1)) for _, steps, _ in ran
    ]  # of unit gradients, with momentum
    assert any(steps < len(batches) for (_, steps, _), (_, batches, _) in zip(ran, clients, strict=True))
    mean = sum(w * a for w, a in zip(weights, far, strict=True))
    wanted = small.row + mean * sum(
        w * (row - small.row) / a for w, (row, *_), a in zip(weights, ran, far, strict=True)
    )
    torch.testing.assert_close(small.fit(1, tmp_path).row, wanted, rtol=1e-9, atol=1e-9)


def test_nothing_is_summed_up_for_a_rule_that_scores_no_updates(monkeypatch, tmp_path):
    sizes = []
    monkeypatch.setattr(masking, "ClientMean", lambda size, device: sizes.append(size) or ClientMean(size, device))
    Small(small_net(), small_data(), uneven_parts()).fit(2, tmp_path)
    staged([LEARN], Random()).fit(2, tmp_path)
    assert sizes == []
    small = staged([LEARN], Movement())
    small.fit(2, tmp_path)
    assert sizes == [small.space.size] * 2


def test_a_checkpoint_names_the_rounds_that_are_closed(tmp_path):
    small = staged([explore(rounds=2), LEARN], sparsity=SPARSE)
    small.fit(3, tmp_path)
    assert small.rounds.state_dict()["phases"] == [["explore", 2], ["learn", 1]]
    alone = Small(small_net(), small_data(), uneven_parts())
    alone.fit(1, tmp_path)
    assert alone.rounds.state_dict()["phases"] == [["learn", 1]]
