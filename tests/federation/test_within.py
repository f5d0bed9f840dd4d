"""A learning rate that falls over a client's own local steps, against torch's optimizers under ``LambdaLR``."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from plain import replay
from small import Small, small_data, small_net, uneven_parts
from torch.nn import functional as F

from fedsparse import run
from fedsparse.data.rounds import LocalWork
from fedsparse.federation.schedule import linear, within
from fedsparse.optim import SparseAdam, SparseSGDM
from fedsparse.simulation.module import ClientModule

OPTIMIZERS = {  # of the clients, and torch's
    "sgd": (partial(SparseSGDM, momentum=0.0), torch.optim.SGD),
    "sgdm": (
        partial(SparseSGDM, momentum=0.9, weight_decay=0.01),
        partial(torch.optim.SGD, momentum=0.9, weight_decay=0.01),
    ),
    "adam": (SparseAdam, torch.optim.Adam),
    "adamw": (partial(SparseAdam, weight_decay=0.1, decoupled=True), partial(torch.optim.AdamW, weight_decay=0.1)),
}
LR = 0.05


def trained(tmp_path, make, cohort, mask=None, decay=linear):
    """Train four clients of different sizes in one round of two epochs: the federation."""
    work = LocalWork(8, None, 2)
    parts = uneven_parts(90, 4)
    client = partial(ClientModule, decay=decay)
    small = Small(
        small_net(),
        small_data(90),
        parts,
        work=work,
        count=4,
        cohort=cohort,
        make=make,
        lr=LR,
        client=client,
        mask=mask,
    )
    return small.fit(1, tmp_path)


def left(steps, step):
    return 1 - step / steps


def by_torch(small, make):
    """The weighted mean of four networks that torch's optimizer trained, one after the other."""
    (clients,) = replay(small.plan, 1)
    assert len({len(batches) for batches, _ in clients}) > 2  # the clients take different numbers of steps
    start, total, mean = small_net(), sum(weight for _, weight in clients), 0
    x, y = small.dataset.train.x, small.dataset.train.y
    for batches, weight in clients:
        net = copy.deepcopy(start)
        optimizer = make(net.parameters(), lr=LR)
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(left, len(batches)))
        for batch in batches:
            optimizer.zero_grad()
            F.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
            rate.step()
        mean = mean + weight / total * torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    return mean


@pytest.mark.parametrize("cohort", [1, 3, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_client_is_a_plain_loop_with_a_scheduler(name, cohort, tmp_path):
    ours, theirs = OPTIMIZERS[name]
    small = trained(tmp_path, ours, cohort)
    torch.testing.assert_close(small.row, by_torch(small, theirs), rtol=1e-9, atol=1e-12)
    constant = trained(tmp_path, ours, cohort, decay=None).row
    assert float((constant - small.row).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["sgdm", "adamw"])
def test_a_mask_and_stacking_change_nothing(name, tmp_path):
    size = small_net_size()
    mask = torch.rand(size, generator=torch.Generator().manual_seed(0)) < 0.4
    rows = [trained(tmp_path, OPTIMIZERS[name][0], cohort, mask=mask).row for cohort in (1, 4)]
    assert size == len(rows[0])
    torch.testing.assert_close(rows[0], rows[1], rtol=1e-9, atol=1e-12)
    start = torch.nn.utils.parameters_to_vector(small_net().parameters()).detach()
    assert torch.equal(rows[1][~mask], start[~mask])
    assert not torch.equal(rows[1][mask], start[mask])


def small_net_size():
    return sum(parameter.numel() for parameter in small_net().parameters())


FAST = ["model=mlp", "mask_rule=random", "federation.num_clients=4", "federation.clients_per_round=1.0"]
FAST += ["federation.local_steps=null", "federation.local_epochs=1", "partition=quantity", "logger=csv"]
FAST += ["calibration.head_steps=1", "pictures=false", "schedule.within=linear", "federation.cohort=4"]


def test_a_resume_goes_on_with_the_same_bits(tmp_path):
    whole = run([*FAST, "federation.rounds=3", f"hydra.run.dir={tmp_path / 'whole'}"])
    constant = run([*FAST, "federation.rounds=3", "schedule.within=constant", f"hydra.run.dir={tmp_path / 'constant'}"])
    run([*FAST, "federation.rounds=1", f"hydra.run.dir={tmp_path / 'part'}"])
    again = run([f"resume={tmp_path / 'part'}", "federation.rounds=3"])
    assert again["global_sha256"] == whole["global_sha256"] != constant["global_sha256"]


@pytest.mark.parametrize("options", [["objective=scaffold"], ["aggregation=fednova"]])
def test_what_weighs_equal_steps_is_refused(options, tmp_path):
    with pytest.raises(ValueError, match="weigh local steps of one learning rate: set schedule.within=constant"):
        run([*FAST, *options, f"hydra.run.dir={tmp_path}"])


def test_an_unknown_schedule_is_refused():
    assert within("constant") is None
    with pytest.raises(ValueError, match="schedule.within is 'cosine'; it must be constant or linear"):
        within("cosine")
