"""Own models of all clients: the global row with what each client keeps, by hand from the stores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small import Small, small_data, small_net, uneven_parts
from torch.nn.functional import cross_entropy

from fedsparse import run
from fedsparse.core.space import ParamSpace
from fedsparse.federation.client.training import LOCAL
from fedsparse.simulation.evaluation import Evaluation
from fedsparse.simulation.own_models import OwnModels
from fedsparse.simulation.tracking import RoundLog

TESTS = [np.arange(0, 9), np.arange(9, 12), np.array([], dtype=int), np.arange(12, 30), *[np.array([1, 5])] * 3]


class Two:
    groups = 2

    def group(self, clients):
        return tuple(client % 2 for client in clients)


def fitted(tmp_path, local, topology=None, count=3):
    net = small_net()
    space = ParamSpace.of(net, lambda name: True, local)
    small = Small(net, small_data(), uneven_parts(), count=count, space=space, data={"tests": TESTS})
    if topology is not None:
        small.given["topology"] = topology
    own = OwnModels(small.rounds)
    log = RoundLog(small.rounds, Evaluation(TESTS), own)
    small.callbacks = [log.evaluation, own, log]
    small.fit(2, tmp_path)
    return small, log


@pytest.mark.parametrize("topology", [None, Two()], ids=["one model", "two groups"])
def test_every_client_is_evaluated_with_what_it_keeps(tmp_path, topology):
    small, log = fitted(tmp_path, ["3.*"], topology)
    federation, test = small.federation, small.dataset.test
    accuracies, losses, kept = [], [], 0
    for client, part in enumerate(TESTS):
        if not len(part):
            continue
        row = federation.server.rows[client % 2 if topology else 0].clone()
        stays = small.space.local
        stored = federation.stores[LOCAL].get(client, row[stays])
        kept += not torch.equal(stored, row[stays])
        row[stays] = stored
        net = small_net(seed=9)
        small.space.write(net, row)
        logits = net(test.x[part])
        accuracies.append(float((logits.argmax(1) == test.y[part]).double().mean()))
        losses.append(float(cross_entropy(logits.detach(), test.y[part])))
    assert 2 <= kept < len(accuracies)  # some have trained, and some never took part
    row = log.row
    assert row["personal/acc_mean"] == pytest.approx(np.mean(accuracies))
    assert row["personal/acc_worst10"] == pytest.approx(min(accuracies))
    assert row["personal/acc_std"] == pytest.approx(np.std(accuracies))
    assert row["personal/loss"] == pytest.approx(np.mean(losses))
    assert row["personal/acc_mean"] != row["client/acc_mean"]


@pytest.mark.parametrize(("option", "there"), [("model.local=[hidden.*]", True), ("model.local=[]", False)])
def test_a_run_has_them_where_something_stays(tmp_path, option, there):
    small = ["model=mlp", "logger=csv", "pictures=false", "federation.rounds=1", "calibration.head_steps=1"]
    summary = run([*small, option, f"hydra.run.dir={tmp_path}"])
    assert ("personal/acc_mean" in summary) is there
