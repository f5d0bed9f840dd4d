"""What happens before the first round, against plain loops and bytes counted by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from small import Small, small_data, small_net, uneven_parts

from fedsparse.federation.calibration import Calibration, Setting, observe, warm_head
from fedsparse.federation.ledger import Ledger
from fedsparse.federation.wire import HEADER
from fedsparse.masks.rules import Fisher, Random

HEAD = "3.*"
SAMPLED = {0: [3, 5], 1: [6, 3]}  # by round: three different clients


@pytest.fixture
def setting():
    """Batches of whole shards, so that the order in which they are dealt does not matter."""
    small = Small(small_net(), small_data(), uneven_parts())
    return Setting(
        net=small.net, space=small.space, dataset=small.dataset, parts=small.parts,
        sample=lambda round, purpose: SAMPLED[round], losses=small.module.losses, batch_size=1000, seed=0,
        ledger=Ledger(), model_length=777,
    )  # fmt: skip


def samples(setting, round):
    index = torch.cat([torch.from_numpy(setting.parts[client]) for client in SAMPLED[round]])
    return setting.dataset.train.x[index], setting.dataset.train.y[index]


def test_head_steps_are_sgd_on_the_union_of_the_sampled_shards(setting):
    plain = copy.deepcopy(setting.net)
    sgd = torch.optim.SGD(plain[3].parameters(), lr=0.3)
    for round in (0, 1):
        x, y = samples(setting, round)
        sgd.zero_grad()
        torch.nn.functional.cross_entropy(plain(x), y).backward()
        sgd.step()
    before = setting.space.read(setting.net)
    warm_head(setting, HEAD, steps=2, lr=0.3)
    after, head = setting.space.read(setting.net), setting.space.where(HEAD)
    torch.testing.assert_close(after, setting.space.read(plain), rtol=0, atol=1e-12)
    assert torch.equal(after[~head], before[~head])
    assert not torch.equal(after[head], before[head])


def test_bytes_of_the_head_steps_by_hand(setting):
    warm_head(setting, HEAD, steps=2, lr=0.3)
    message = HEADER.size + 8 * (16 * 3 + 3)  # float64
    assert setting.ledger.bytes_setup_up == 2 * 2 * message
    assert setting.ledger.bytes_setup_down == 2 * 2 * message + 3 * 777  # three clients got the first model
    assert setting.ledger.bytes_up == setting.ledger.bytes_down == 0


def plain_fisher(setting, x, y):
    """Sum of squared gradients, one sample at a time."""
    total = torch.zeros(setting.space.size, dtype=torch.float64)
    for i in range(len(y)):
        loss = torch.nn.functional.cross_entropy(setting.net(x[i : i + 1]), y[i : i + 1])
        gradients = torch.autograd.grad(loss, list(setting.net.parameters()))
        total += torch.cat([g.flatten() for g in gradients]) ** 2
    return total


def test_scores_are_summed_over_clients_and_calibration_rounds(setting):
    expected = sum(plain_fisher(setting, *samples(setting, round)) for round in (0, 1))
    got = observe(setting, Fisher(largest=False), Calibration(rounds=2), HEAD)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    assert setting.ledger.bytes_setup_up == 4 * (HEADER.size + 4 * setting.space.size)


def test_the_server_scores_on_its_validation_split_and_sends_nothing(setting):
    split = setting.dataset.val
    got = observe(setting, Fisher(largest=False), Calibration(where="server"), HEAD)
    torch.testing.assert_close(got, plain_fisher(setting, split.x, split.y), rtol=1e-9, atol=1e-12)
    assert setting.ledger.bytes_total == 0


def test_a_rule_without_data_costs_nothing(setting):
    assert observe(setting, Random(), Calibration(), HEAD) is None
    assert setting.ledger.bytes_total == 0
