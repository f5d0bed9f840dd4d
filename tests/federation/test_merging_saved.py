"""What a checkpoint holds of merged adapters, against a plain loop over rounds."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fedsparse import run
from fedsparse.core.space import ParamSpace
from fedsparse.federation.lowrank import Pair
from fedsparse.federation.server.merging import Stacking
from fedsparse.models.lora import adapters, lora

WIDE, HIGH, RANK = 24, 16, 2  # a weight has 384 values, the factors of a client 80
FAST = ["model=vit_digits", "logger=csv", "pictures=false", "federation.num_clients=3", "optimizer.lr=0.3"]
FAST += ["federation.clients_per_round=1.0", "federation.local_steps=3", "calibration.head_steps=1"]
FAST += ["partition=dirichlet01", "federation.cohort=1", "lora.dropout=0.0", "federation.rounds=8"]


def merging():
    torch.manual_seed(0)
    net = lora(nn.Sequential(nn.Linear(WIDE, HIGH)), r=RANK, targets=["0"], dropout=0.0)
    space = ParamSpace.of(net, lambda name: "lora" in name)
    return net, space, Stacking(net, adapters(net), space)


def closed(merges, space, number, clients):
    """Close a round in which so many clients come to random factors; returns these."""
    generator = torch.Generator().manual_seed(number)
    pairs = [
        Pair(torch.randn(RANK, WIDE, generator=generator), torch.randn(HIGH, RANK, generator=generator))
        for _ in range(clients)
    ]
    merges.received = {"0": {client: (1.0, pair) for client, pair in enumerate(pairs)}}
    merges.close(number, torch.zeros(space.size))
    return pairs


def values(state):
    return sum(
        t.numel() for stored in state["layers"]["0"].values() for t in ([stored] if torch.is_tensor(stored) else stored)
    )


@pytest.mark.parametrize(("rounds", "held"), [(1, 160), (2, 320), (3, 384), (4, 384)])
def test_factors_are_held_until_the_weight_is_smaller_and_give_its_bits(rounds, held):
    """Two clients of rank 2 add 2 x 2 x (24 + 16) values a round; the weight has 24 x 16."""
    net, space, merges = merging()
    expected = net.get_parameter("0.base_layer.weight").detach().clone()
    for number in range(rounds):
        for_now = closed(merges, space, number, clients=2)
        a = torch.cat([pair.A for pair in for_now])
        b = torch.cat([0.5 * pair.B for pair in for_now], 1)
        expected.addmm_(b, a)
    state = merges.state_dict()
    assert values(state) == held
    other, _, again = merging()
    again.load_state_dict(state)
    for found in (net, other):
        assert torch.equal(found.get_parameter("0.base_layer.weight"), expected)
    closed(merges, space, rounds, clients=2)
    closed(again, space, rounds, clients=2)
    assert torch.equal(net.get_parameter("0.base_layer.weight"), other.get_parameter("0.base_layer.weight"))
    assert values(again.state_dict()) == values(merges.state_dict())


@pytest.mark.slow  # it starts a process
@pytest.mark.parametrize("method", ["flora", pytest.param("fedex", marks=pytest.mark.soak)])
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, method):
    options = [*FAST, f"method={method}"]
    run([*options, f"hydra.run.dir={tmp_path / 'whole'}"])
    command = [sys.executable, "-m", "fedsparse.train", *options, f"hydra.run.dir={tmp_path / 'killed'}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=os.environ)
    assert any(line.startswith("round 3/") for line in process.stderr)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    moved = shutil.move(tmp_path / "killed", tmp_path / "moved")
    run([f"resume={moved}"])
    whole, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "moved"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
