"""TaLoS against a slow reference: loops, one sample at a time, plain autograd, sorted lists."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from fedsparse.core.space import ParamSpace
from fedsparse.masks import Evidence, Sparsity, choose
from fedsparse.masks.rules import Talos, talos
from fedsparse.masks.thinning import exchanged, shrunk, thin


def two_layers(dtype=torch.float64, seed=3):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 14), nn.Tanh(), nn.Dropout(0.5), nn.Linear(14, 4)).to(dtype)


def data(dtype=torch.float64):
    rng = np.random.default_rng([4])
    return [(torch.from_numpy(rng.normal(size=(n, 6))).to(dtype), torch.zeros(n, dtype=torch.long)) for n in (9, 7)]


def flat(net):
    return [value for p in net.parameters() for value in p.detach().flatten().tolist()]


@torch.no_grad()
def fill(net, values):
    position = 0
    for p in net.parameters():
        p.copy_(torch.tensor(values[position : position + p.numel()], dtype=p.dtype).view(p.shape))
        position += p.numel()


def slow_scores(net, batches, generator, score):
    """Squared gradient of the drawn label's logit (or log-probability), one sample at a time, in Python numbers."""
    scores = [0.0] * len(flat(net))
    for x, _ in batches:
        with torch.no_grad():
            labels = torch.multinomial(torch.softmax(net(x).double(), 1), 1, generator=generator).flatten().tolist()
        for i, label in enumerate(labels):
            net.zero_grad()
            logits = net(x[i : i + 1])[0]
            (logits if score == "logit" else logits.log_softmax(0))[label].backward()
            gradient = [value for p in net.parameters() for value in p.grad.flatten().tolist()]
            scores = [s + g * g for s, g in zip(scores, gradient, strict=True)]
    return scores


def slow_talos(net, batches, keep, rounds, seed, score="logit"):
    """The marks of every coordinate after each round."""
    net.eval()
    start, generator = flat(net), torch.Generator().manual_seed(seed)
    alive, history = [True] * len(start), []
    for r in range(1, rounds + 1):
        fill(net, [w if on else 0.1 * w for w, on in zip(start, alive, strict=True)])
        scores = slow_scores(net, batches, generator, score)
        order = sorted((scores[i], i) for i in range(len(start)) if alive[i])
        chosen = {i for _, i in order[: math.floor(keep ** (r / rounds) * len(start) + 0.5)]}
        alive = [i in chosen for i in range(len(start))]
        history.append(alive)
    fill(net, start)
    net.zero_grad()
    return history


def drawn(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("keep", [0.1, 0.37])
@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_the_mask_equals_the_slow_reference(rounds, keep, dtype):
    found = talos(two_layers(dtype), data(dtype), keep, rounds, drawn(5))
    assert found.dtype == torch.bool
    assert found.tolist() == slow_talos(two_layers(dtype), data(dtype), keep, rounds, seed=5)[-1]


def test_one_round_is_the_plain_choice_of_the_lowest_scores():
    net = two_layers().eval()
    scores = slow_scores(net, data(), drawn(5), "logit")
    lowest = sorted(range(158), key=lambda i: (scores[i], i))[:16]
    assert talos(net, data(), 0.1, 1, drawn(5)).nonzero().flatten().tolist() == sorted(lowest)


def test_scores_are_summed_in_double_precision():
    """One class, so that its logit's gradient is x: 1e8 + 1 against 1e8, which float32 takes for one."""
    net = nn.Linear(2, 1, bias=False)
    batches = [(torch.tensor([[1e4, 1e4]]), torch.zeros(1)), (torch.tensor([[1.0, 0.0]]), torch.zeros(1))]
    assert talos(net, batches, 0.5, 1, drawn(0)).tolist() == [False, True]


def test_the_network_comes_back_as_it_was():
    net = two_layers().train()
    net[0].eval()
    net[0].bias.requires_grad_(False)
    before = flat(net)
    found = talos(net, data(), 0.2, 3, drawn(5))
    assert len(found) == 158 - 14  # what needs no gradient is no candidate
    assert flat(net) == before
    assert [module.training for module in net] == [False, True, True, True]
    assert all(p.grad is None for p in net.parameters())
    with pytest.raises(RuntimeError):
        talos(net, [*data(), (torch.zeros(2, 5), torch.zeros(2))], 0.2, 3, drawn(5))
    assert flat(net) == before


def test_an_empty_round_and_impossible_numbers_are_refused():
    with pytest.raises(ValueError, match="no samples in round 2; hand in a list"):
        talos(two_layers(), iter(data()), 0.1, 4, drawn(0))
    for rounds in (0, 1.5, True):
        with pytest.raises(ValueError, match="rounds is .*; it must be a whole number"):
            talos(two_layers(), data(), 0.1, rounds, drawn(0))
    for keep in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="keep is .*; it must be"):
            talos(two_layers(), data(), keep, 1, drawn(0))


def calibrated(rule, net, sparsity, rounds, seed=5):
    """The calibration of ``federation``, on one client: the states after each round."""
    space, states, generator = ParamSpace.of(net), [None], drawn(seed)
    row = space.read(net)
    for round in range(rounds):
        space.write(net, shrunk(row, states[-1], rule.calibration.shrink))
        observed = torch.zeros(space.size, dtype=torch.float64)
        for x, y in data():
            rule.observe(net, space, x, y, loss=None, generator=generator, into=observed)
        states.append(thin(observed, states[-1], space, sparsity, largest=rule.largest, power=(round + 1) / rounds))
    space.write(net, row)
    return space, states


def sure():
    """A net whose labels leave nothing to chance: only the schedule can tell two masks apart."""
    net = two_layers()
    net[3].weight.data *= 1e5
    return net


def test_more_rounds_give_another_mask():
    """47 of 158 train. One round shares 38, 40 and 45 of them with two, four and eight, whatever the labels' seed."""
    masks = {rounds: talos(sure(), data(), 0.3, rounds, drawn(5)) for rounds in (1, 2, 4, 8)}
    assert [int(mask.sum()) for mask in masks.values()] == [47] * 4
    shared = [int((masks[1] & masks[rounds]).sum()) for rounds in (2, 4, 8)]
    assert all(30 <= number <= 46 for number in shared), shared
    assert all(torch.equal(talos(sure(), data(), 0.3, rounds, drawn(6)), mask) for rounds, mask in masks.items())


def test_what_the_rounds_change_is_the_shrinking():
    ends = {rounds: calibrated(Talos(shrink=1.0), sure(), Sparsity(0.7), rounds)[1][-1] for rounds in (1, 4)}
    assert torch.equal(ends[1], ends[4])
    assert not torch.equal(calibrated(Talos(), sure(), Sparsity(0.7), 4)[1][-1], ends[4])


@pytest.mark.parametrize("score", ["logit", "logprob"])
def test_the_rule_takes_the_same_steps_as_the_reference(score):
    space, states = calibrated(Talos(score=score), two_layers(), Sparsity(0.9), rounds=4)
    history = slow_talos(two_layers(), data(), 1 - 0.9, 4, seed=5, score=score)
    assert [state.tolist() for state in states[1:]] == history
    mask = choose(Talos(), Evidence(space, space.read(two_layers()), Sparsity(0.9), observed=states[-1]))
    assert mask.row(space).tolist() == history[-1]
    assert mask.metadata == {"rule": "Talos", "ratio": "0.9"}


def test_what_is_differentiated_is_each_samples_own_logit_or_log_probability():
    """Logits 0 and log 3: chances of a quarter and three quarters."""
    x, y = torch.tensor([[0.0, math.log(3)], [math.log(3), 0.0], [0.0, math.log(3)]]), torch.tensor([1, 1, 0])
    found = {score: Talos(score=score).differentiated(None)(lambda x: x, x, y) for score in ("logit", "logprob")}
    torch.testing.assert_close(found["logit"], torch.tensor([math.log(3), 0.0, 0.0]))
    torch.testing.assert_close(found["logprob"].exp(), torch.tensor([0.75, 0.25, 0.25]))


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("unit", ["coordinate", "output"])
def test_frozen_coordinates_never_return_and_always_train_is_never_shrunk(scope, unit):
    net, rounds = two_layers(), 5
    sparsity = Sparsity(0.8, scope=scope, unit=unit, always_train="3.*")
    space, states = calibrated(Talos(), net, sparsity, rounds)
    row, head = space.read(net), space.where("3.*")
    for round, (before, after) in enumerate(zip(states[1:-1], states[2:], strict=True), 1):
        assert not (after & ~before).any()
        budget = math.floor((1 - 0.8) ** ((round + 1) / rounds) * 98 + 0.5)
        number = int(after[~head].sum())
        assert number <= budget + (scope == "tensor")
        assert unit == "output" or scope == "tensor" or number == budget
    assert all(state[head].all() for state in states[1:])
    small = shrunk(row, states[-1], Talos().calibration.shrink)
    assert torch.equal(small[states[-1]], row[states[-1]])
    torch.testing.assert_close(small[~states[-1]], 0.1 * row[~states[-1]], rtol=1e-15, atol=0)
    assert shrunk(row, None, 0.1) is row


def test_shira_thins_out_layer_by_layer():
    sparsity = Sparsity(scope="shira", rank=2, always_train="3.*")
    space, states = calibrated(Talos(), two_layers(), sparsity, 3)
    weights = [int(state[: 6 * 14].sum()) for state in states[1:]]
    share = 2 * (6 + 14) / (6 * 14)
    assert weights == [math.floor(share ** (r / 3) * 84 + 0.5) for r in (1, 2, 3)]
    assert weights[-1] == 40
    assert not states[-1][space.where("0.bias")].any()


def test_bytes_of_the_messages_by_hand():
    """Scores going up, and bytes coming down."""
    assert exchanged(24, None) == (24, 0)
    assert exchanged(24, torch.arange(24) < 7) == (7, 3)
    assert exchanged(25, torch.arange(25) < 7) == (7, 4)


def test_bad_options_are_refused_by_name():
    with pytest.raises(ValueError, match=r"mask_rule\.score is 'loss'; it must be logit or logprob"):
        Talos(score="loss")
    for shrink in (-0.1, 1.1, "a", None, True):
        with pytest.raises(ValueError, match=r"mask_rule\.shrink"):
            Talos(shrink=shrink)
    with pytest.raises(ValueError, match=r"mask_rule\.chunk"):
        Talos(chunk=0)
