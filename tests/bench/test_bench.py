"""The benchmark compares like with like."""

from __future__ import annotations

import copy
import mmap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from fedsparse import bench
from fedsparse.bench import pairs, processes
from fedsparse.bench.loop import SGDS, HandWritten, fastest
from fedsparse.bench.peers import ONLY, PEERS
from fedsparse.bench.problems import BLOCKS, LR, MOMENTUM, Task

SHORT = replace(bench.PROBLEMS["mlp"], pairs=2, warmup=1)


@pytest.mark.parametrize(
    ("setting", "bound", "cohort", "tolerance"),
    [
        (bench.BARE, 1, 1, 1e-6),
        (BLOCKS, 1, 1, 1e-6),
        (bench.UNVALIDATED, 1, 1, 1e-6),
        (bench.BARE, 10, 10, 1e-5),
        (bench.BARE, 8, 5, 1e-5),
    ],
)
def test_both_loops_end_at_the_same_weights(tmp_path, setting, bound, cohort, tolerance):
    row = bench.measure(SHORT, setting, tmp_path, bound)
    assert row.weights_differ < tolerance
    assert row.ratio_min <= row.ratio <= row.ratio_max
    assert row.hand_ms > 0
    assert row.sgd in ("fused", "foreach", "plain")
    assert min(row.hand_cpu_ms, row.runner_cpu_ms) > 0
    assert (row.runner, row.setting, row.cohort, row.pairs) == ("fedsparse", setting, cohort, 2)
    assert row.bytes_up > 10 * 4 * 9610  # ten clients, four bytes a weight
    assert (tmp_path / "metrics.csv").is_file()


def averaged(net, clients):
    """One round of FedAvg, with a network of its own for every client and torch's defaults."""
    ends = []
    for batches in clients:
        own = copy.deepcopy(net)
        optimizer = torch.optim.SGD(own.parameters(), lr=LR, momentum=MOMENTUM)
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(own(x), y).backward()
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in own.parameters()]))
    return torch.stack(ends).mean(0)


@pytest.mark.parametrize("options", SGDS, ids=str)
def test_the_hand_written_loop_is_federated_averaging(options):
    task = Task(SHORT, 2)
    hand, net = HandWritten(task.net(), options), task.net()
    for round in range(2):
        expected = averaged(net, task.batches(round))
        torch.nn.utils.vector_to_parameters(expected, net.parameters())
        hand.round(task.batches(round))
    assert (hand.weights - expected).abs().max() < 1e-6
    start = torch.cat([p.detach().flatten() for p in task.net().parameters()])
    assert (hand.weights - start).abs().max() > 1e-2


def test_every_network_of_a_task_starts_from_the_same_weights_and_rounds_differ():
    task = Task(bench.PROBLEMS["vit"], 1)
    one, other = (torch.cat([p.flatten() for p in task.net().parameters()]) for _ in range(2))
    assert torch.equal(one, other)
    (first, _), (second, _) = task.batches(0)[3][1], task.batches(1)[3][1]
    assert first.shape == (32, 1, 8, 8)
    assert not torch.equal(first, second)


class Watch:
    """A clock that work moves."""

    def __init__(self):
        self.now, self.log = 100.0, []

    def perf_counter(self):
        return self.now

    def process_time(self):
        return self.now / 2

    def faults(self):
        return 4 * self.now

    def work(self, what, seconds):
        self.log.append(what)
        self.now += seconds


@pytest.mark.parametrize("ticks_at_the_end", [False, True])
def test_rounds_alternate_and_neither_counts_the_others_time(monkeypatch, ticks_at_the_end):
    watch, rounds = Watch(), 5
    monkeypatch.setattr(pairs, "time", watch)
    monkeypatch.setattr(pairs, "faults", watch.faults)

    def gather(round):
        watch.now += 1000.0
        return round

    clock = pairs.Clock(gather, {}, lambda b: watch.work(f"hand {b}", 10.0 + b), range(1, rounds - 1))
    for round in range(rounds):
        clock.tick()
        watch.work(f"runner {clock.batches}", 3.0 + round)
    if ticks_at_the_end:
        clock.tick()
    clock.finish(rounds)
    assert watch.log == [f"{who} {round}" for round in range(rounds) for who in ("runner", "hand")]
    spent = [[pairs.Spent(s, s / 2, 4 * s) for s in seconds] for seconds in ([4.0, 5.0, 6.0], [11.0, 12.0, 13.0])]
    assert clock.times == pairs.Times(*spent)


def test_pages_that_are_mapped_are_counted():
    size, before = 256, pairs.faults()
    held = mmap.mmap(-1, size * mmap.PAGESIZE)
    held.madvise(mmap.MADV_NOHUGEPAGE)
    for page in range(size):
        held[page * mmap.PAGESIZE] = 1
    assert size <= pairs.faults() - before < 2 * size


def test_the_fastest_sgd_is_chosen():
    def least(trial, batches):
        return {None: 3.0, True: 1.0, False: 2.0}[trial.optimizer.defaults["foreach"]]

    assert fastest(Task(SHORT, 1), least) == {"foreach": True}


def test_every_peer_has_its_module_its_packages_and_its_environment():
    root = Path(__file__).parents[2]
    makefile = (root / "Makefile").read_text()
    (line,) = [line for line in makefile.splitlines() if line.startswith("bench-peers:")]
    for name, module in PEERS.items():
        assert (root / f"{module.replace('.', '/')}.py").is_file()
        assert f"{name}==" in (root / "fedsparse/bench/peers" / f"{name}.txt").read_text()
        assert name in line
    assert set(ONLY) < set(PEERS)
    assert {model for models in ONLY.values() for model in models} < set(bench.PROBLEMS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("peer", "model"),
    [(peer, model) for peer in PEERS for model in ("mlp", "conv_digits", "vit") if model in ONLY.get(peer, (model,))],
)
def test_a_peer_ends_at_the_weights_of_the_loop(peer, model):
    root = Path(__file__).parents[2]
    if (python := processes.installed(root / processes.ENVIRONMENTS).get(peer)) is None:
        pytest.skip(f"no .peers/{peer}: make .peers/{peer}/.ready")
    figures = processes.figures(python, PEERS[peer], [model, "--pairs", "1", "--warmup", "1"], 1)
    assert figures["weights_differ"] < 2e-5
