"""Masks that change between rounds, against a plain loop over a dense row: what stops training is zero at once."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from small import small_net
from staged import DensePlain, dealt, entries_by_round, masks_by_round, staged

from fedsparse.core.seeding import Purpose, torch_generator
from fedsparse.core.space import ParamSpace
from fedsparse.federation.client.drift import Scaffold
from fedsparse.federation.exchange.exchange import Exchange
from fedsparse.federation.exchange.filters import ErrorFeedback
from fedsparse.federation.exchange.sparsifiers import TopK
from fedsparse.federation.exchange.wire.message import read
from fedsparse.federation.exchange.wire.positions import write_positions
from fedsparse.federation.phases import Phase
from fedsparse.federation.server.aggregation import WeightedMean
from fedsparse.masks import Evidence, Exploration, MaskRule, Sparsity, choose
from fedsparse.masks.gradual import Gradual
from fedsparse.masks.rules import AutoFLIP, Magnitude, Movement, Random

pytestmark = pytest.mark.filterwarnings("ignore:.*of the scores tie")  # zeros of what was pruned, or never sent
ROUNDS = 5
GRADUAL = Gradual(steps=3)  # ratios 0, 19/27, 26/27 and 1 of the last one
HALF = Gradual(initial=0.3, steps=2, every=2)
EXPLORE = Phase("explore", updates_model=False, local_epochs=1)
LEARN = Phase("learn", rounds=ROUNDS)
FEEDBACK = {
    "exchange": lambda **given: Exchange(**given, rule=TopK(fraction=0.3), filters={"feedback": ErrorFeedback()}),
    "aggregation": partial(WeightedMean, "participants"),
    "server": partial(torch.optim.SGD, lr=1.0, momentum=0.9),
}
STATES = {  # options of the federation, and of the plain loop
    "momentum": (
        {"server": partial(torch.optim.SGD, lr=1.0, momentum=0.9), "weight_decay": 0.05},
        {"server_momentum": 0.9},
    ),
    "adam": ({"server": partial(torch.optim.Adam, lr=0.05)}, {"adam": 0.05}),
    "feedback": (FEEDBACK, {"server_momentum": 0.9, "fraction": 0.3}),
    "scaffold": ({"objective": partial(Scaffold, 7), "momentum": 0.0, "lr": 0.05}, {"scaffold": True}),
}
RULES = {
    "random": (Random, Sparsity(0.8, schedule=GRADUAL), [LEARN]),
    "magnitude": (partial(Magnitude, True), Sparsity(0.6, renew_every=2, schedule=GRADUAL), [LEARN]),
    "movement": (Movement, Sparsity(0.8, schedule=GRADUAL, renew_every=2), [LEARN]),
    "autoflip": (partial(AutoFLIP, refine=True), Sparsity(0.7, schedule=HALF, renew_every=1), [EXPLORE, LEARN]),
}


def first_mask(rule, sparsity, small_space, row):
    return choose(rule, Evidence(small_space, row, sparsity.at(0), stream())).row(small_space)


def stream():
    return torch_generator(0, Purpose.MASK)


def build(rule, mode="freeze", **options):
    """A federation of one of the rules, its phases, and the rule."""
    make, sparsity, phases = RULES[rule]
    sparsity = Sparsity(sparsity.ratio, mode=mode, schedule=sparsity.schedule, renew_every=sparsity.renew_every)
    net, made = small_net(), make()
    space = ParamSpace.of(net)
    start = None if made.need(Exploration) else first_mask(made, sparsity, space, space.read(net))
    return staged(phases, made, sparsity, net=net, start=start, **options), phases, sparsity


def deviation(small, clients):
    plain = DensePlain(small)
    found = [plain.client(batches, 0.0) ** 2 for _, batches, _ in clients]
    weights = [weight for *_, weight in clients]
    return sum(w * row for w, row in zip(weights, found, strict=True)) / sum(weights)


def plain_run(small, phases, sparsity, **options):
    """The whole run by hand: rows after each round, and the mask of each learning round."""
    rule, explores = small.given["choice"].rule, len(phases) > 1
    plain = DensePlain(small, prune=sparsity.mode == "prune", **options)
    observed = deviation(small, dealt(small.plan, 0)) if explores else None
    updates, rows, masks = None, [], []
    for round in range(ROUNDS):
        if (round == 0 and not explores) or (round == 0 and explores) or sparsity.renews(round):
            evidence = Evidence(small.space, plain.row, sparsity.at(round), stream(), observed, updates)
            plain.remask(choose(rule, evidence).row(small.space))
        masks.append(plain.mask.clone())
        moved, signs = plain.learn(dealt(small.plan, round + explores))
        if isinstance(rule, Movement):
            updates = moved if updates is None else updates + moved
        elif isinstance(rule, AutoFLIP):
            updates = torch.where(plain.mask, signs, signs[plain.mask].abs().mean())
        rows.append(plain.row.clone())
    return plain, rows, masks


@pytest.mark.parametrize(
    ("mode", "cohort"),
    [
        ("freeze", 1),
        ("prune", 3),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (("freeze", 3), ("prune", 1))),
    ],
)
@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("state", list(STATES))
def test_everything_that_lasts_follows_the_mask(tmp_path, state, rule, mode, cohort):
    options, plainly = STATES[state]
    small, phases, sparsity = build(rule, mode, cohort=cohort, **options)
    plain, rows, masks = plain_run(small, phases, sparsity, **plainly)
    seen, after = masks_by_round(small), []
    small.after_rounds(lambda _: after.append(small.row.clone()))
    small.fit(ROUNDS + len(phases) - 1, tmp_path)
    size = small.space.size
    for round, mask in enumerate(masks):
        assert torch.equal(seen[round + len(phases) - 1], mask)
        assert int(mask.sum()) == math.floor((1 - sparsity.at(round).ratio) * size + 0.5)
        torch.testing.assert_close(after[round + len(phases) - 1], rows[round], rtol=0, atol=1e-9)
    assert len({tuple(mask.tolist()) for mask in masks}) > 1
    torch.testing.assert_close(small.row, plain.row, rtol=0, atol=1e-9)
    same_states(small, plain)
    if mode == "prune":
        assert not bool(small.row[~masks[-1]].any())


def same_states(small, plain):
    """Moments, residuals and variates, laid out over all coordinates, are those of the dense row."""
    server, spread = small.federation.server, small.federation.server.subspace.spread
    moments = server.optimizer.state.get(server.parameters[0], {})
    if plain.adam:
        torch.testing.assert_close(spread(moments["exp_avg"][0]), plain.m, rtol=0, atol=1e-9)
        torch.testing.assert_close(spread(moments["exp_avg_sq"][0]), plain.v, rtol=0, atol=1e-9)
        assert int(moments["step"]) == ROUNDS
    if plain.beta:
        torch.testing.assert_close(spread(-moments["momentum_buffer"][0]), plain.m, rtol=0, atol=1e-9)
    stores = small.federation.stores
    if plain.fraction is not None:
        rows = stores["residuals"].rows
        assert set(rows) == {c for c, row in plain.left.items() if bool(row.any())}
        for client, row in rows.items():
            torch.testing.assert_close(spread(row), plain.left[client], rtol=0, atol=1e-9)
    if plain.scaffold:
        torch.testing.assert_close(spread(small.federation.objective.mean), plain.common, rtol=0, atol=1e-9)
        for client, row in stores["variates"].rows.items():
            torch.testing.assert_close(spread(row), plain.own[client], rtol=0, atol=1e-9)


@pytest.mark.parametrize("cohort", [1, 3])
def test_the_federation_keeps_the_optimizers_of_the_new_mask(tmp_path, cohort):
    small, *_ = build("random", server=partial(torch.optim.Adam, lr=0.05), cohort=cohort)
    small.fit(ROUNDS, tmp_path)
    clients, server = small.module.clients, small.federation.server
    for optimizer, own in ((clients.optimizer, clients.rows.views), (server.optimizer, server.parameters)):
        (group,) = optimizer.param_groups
        assert [id(tensor) for tensor in group["params"]] == [id(tensor) for tensor in own]
    path = tmp_path / "saved.ckpt"
    small.trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    state = saved["callbacks"]["FederatedRounds"]["server"]["optimizer"]["state"]
    assert list(state) == [0]
    assert state[0]["exp_avg"].shape == (1, int(torch.as_tensor(small.module.mask).sum()))
    assert torch.equal(saved["state_dict"]["mask"], torch.as_tensor(small.module.mask))


# pruned is zero


class Watch:
    """Looks at every client's row after every step, and at the server's and the network's after every batch."""

    def __init__(self, small):
        self.small, self.steps, self.batches, self.messages = small, 0, 0, 0
        rounds, exchange = small.rounds, small.given["exchange"]
        end = rounds.on_train_batch_end
        rounds.on_train_batch_end = lambda *args: self.after(end(*args), self.server)
        self.encode = exchange.encode
        exchange.encode = self.send
        small.once_made(self.watch_steps)

    def watch_steps(self, federation):
        step = federation.clients.step
        federation.clients.step = lambda *args: self.after(step(*args), self.rows)

    def after(self, result, look):
        look()
        return result

    @property
    def pruned(self):
        return ~torch.as_tensor(self.small.module.mask)

    def rows(self):
        self.steps += 1
        assert not bool(self.small.module.clients.theta.detach()[:, self.pruned].any())

    def server(self):
        self.batches += 1
        module = self.small.module
        assert not bool(self.small.federation.server.rows[:, self.pruned].any())
        if module.cohort > 1 or self.small.trainer_is_last():
            assert not bool(module.space.read(module.net)[self.pruned].any())

    def send(self, update):
        payload, exchange = self.encode(update), self.small.federation.exchange
        count = exchange.sendable.subspace.size
        assert update.rows.shape[1] == count
        for message in exchange.messages(payload):
            self.messages += 1
            assert len(read(message, count, dtype=torch.float64).values) == count  # no place for any other
        return payload


@pytest.mark.parametrize("cohort", [1, 3])
@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("untouched", ["step", *(pytest.param(u, marks=pytest.mark.slow) for u in ("hold", "freeze"))])
def test_what_is_pruned_is_zero_after_every_step_and_every_round(tmp_path, rule, cohort, untouched):
    options = FEEDBACK | {"weight_decay": 0.1, "untouched": untouched, "cohort": cohort}
    small, phases, _ = build(rule, "prune", **options)
    small.trainer_is_last = lambda: small.module.trainer.is_last_batch
    watch = Watch(small)
    small.fit(ROUNDS + len(phases) - 1, tmp_path)
    assert watch.steps > 0
    assert watch.messages >= ROUNDS * small.count
    assert 0 < int(watch.pruned.sum()) < small.space.size


def around_the_choice(small, look):
    """Call ``look(federation, choose)`` when a round begins: to choose its mask is left to it."""

    def watch(federation):
        begin = federation.open

        def spy(number):
            opened = []
            look(federation, lambda: opened.append(begin(number)))
            return opened[0]

        federation.open = spy

    small.once_made(watch)


class Wandering(MaskRule):
    """Other scores at every choice, so that coordinates stop and come back."""

    def __init__(self):
        self.asked = 0

    def scores(self, evidence):
        self.asked += 1
        return torch.rand(evidence.row.shape, generator=torch.Generator().manual_seed(self.asked))


@pytest.mark.parametrize("cohort", [1, 3])
@pytest.mark.parametrize("untouched", ["step", "hold", "freeze"])
def test_what_grows_back_starts_from_zero(tmp_path, untouched, cohort):
    options = {"server": partial(torch.optim.SGD, lr=1.0, momentum=0.9), "weight_decay": 0.1, "untouched": untouched}
    small = staged([LEARN], Wandering(), Sparsity(0.5, mode="prune", renew_every=1), cohort=cohort, **options)
    seen = []

    def spy(federation, choose):
        server = federation.server
        before, row = server.subspace.mask.clone(), server.rows[0].clone()
        choose()
        state = server.optimizer.state[server.parameters[0]]
        moments = state.get("momentum_buffer", torch.zeros_like(server.values))[0]
        seen.append((before, server.subspace.mask.clone(), row, server.rows[0].clone(), moments.clone()))

    around_the_choice(small, spy)
    small.fit(ROUNDS, tmp_path)
    grown_twice = 0
    seen = seen[1:]  # before the first round nothing changes
    for i, (before, now, old, row, moments) in enumerate(seen[:-1]):
        grown, stays = now & ~before, now & before
        assert bool(stays.any())
        assert torch.equal(row[stays], old[stays])
        assert not bool(row[~stays].any())
        assert not bool(moments[grown[now]].any())
        assert bool(moments[~grown[now]].any())
        grown_twice += int(any(bool((grown & was).any()) for was, *_ in seen[:i]))
        assert bool(seen[i + 1][2][grown].any()) or not bool(grown.any())  # a round later they have moved
    assert grown_twice


# bytes that follow


@pytest.mark.parametrize("mode", ["freeze", "prune"])
def test_bytes_down_after_a_change_by_hand(tmp_path, mode):
    """A client is sent what has another value than in the model it holds: of what trains now, or stopped training.

    What is pruned it knows to be zero, from the mask.
    """
    small = staged([LEARN], Wandering(), Sparsity(0.8, mode=mode, renew_every=2), momentum=0.0)
    small.given["model_length"] = 10_000
    size, entries = small.space.size, entries_by_round(small)
    masks, starts = [], []

    def spy(federation, choose):
        choose()
        masks.append(federation.server.subspace.mask.clone())
        starts.append(federation.server.rows[0].clone())

    around_the_choice(small, spy)
    small.fit(ROUNDS, tmp_path)
    holds, masked, stopped = {}, set(range(7)), 0
    for round in range(ROUNDS):
        if round in (2, 4):
            masked = set()
        for e in entries[round]:
            zeros = 8 * int((~masks[round]).sum()) if mode == "prune" else 0
            new = e.client not in holds
            assert e.first == new * (10_000 - zeros) + (e.client not in masked) * (48 + math.ceil(size / 8))
            masked.add(e.client)
            if new:
                assert e.down.total == 0
            else:
                steps = range(holds[e.client], round)
                moved = torch.stack([starts[r + 1] != starts[r] for r in steps]).any(0)
                n, some = int(masks[round].sum()), 8 * int((moved & masks[round]).sum())
                some += positions(moved[masks[round]])
                late = moved & ~masks[round]
                more = 0 if mode == "prune" or not bool(late.any()) else 8 * int(late.sum()) + positions(late)
                assert e.down.total == 48 + min(8 * n, some) + more
                stopped += more
            holds[e.client] = round
    assert (stopped > 0) == (mode == "freeze")


def positions(marks):
    return len(write_positions(marks.numpy())[1])
