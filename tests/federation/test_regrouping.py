"""Clusters of clients within departments: who moves where, by hand; resume, processes, bytes, refusals."""

from __future__ import annotations

from functools import partial
from itertools import permutations

import numpy as np
import pytest
import torch
from composed import composed
from small import Small, small_data, small_net

from fedsparse import run
from fedsparse.core.space import ParamSpace
from fedsparse.data.rounds import LocalWork
from fedsparse.federation.server.mixing import Comparison
from fedsparse.federation.server.regrouping import SENT, Regrouping, matched
from fedsparse.federation.server.topology import Departments
from fedsparse.job.assemble import assemble
from fedsparse.models.lora import Adapter
from fedsparse.simulation.csv_logger import read_rows


def regrouped(small, of, num_clients, within=2, **options):
    """Give a small federation two departments, of whose clients each may move."""
    departments = Departments(of, num_clients, clusters_within=within)
    comparison = Comparison(small.space, {}, small.space.read(small.net))
    small.given |= {"topology": departments}
    small.given |= {"regrouping": Regrouping(departments, comparison, "row", "euclidean", **options)}
    return departments


def two_tasks(clients=8):
    """Clients of even ids have one task, those of odd ids the same inputs with other classes."""
    data, parts = small_data(240), [np.arange(30 * c, 30 * c + 30) for c in range(clients)]
    for client in range(1, clients, 2):
        data.train.y[parts[client]] = (data.train.y[parts[client]] + 1) % 3
    return data, parts


def federation(tmp_path, rounds, count=8, name="run", **options):
    data, parts = two_tasks()
    small = Small(small_net(), data, parts, work=LocalWork(10, 6, None), count=count, lr=0.5)
    departments, seen = regrouped(small, [0, 0, 0, 0, 1, 1, 1, 1], 8, **options), []

    def see(round):
        rows = small.federation.server.rows.clone()
        clients = [client for report in round.reports for client in report.clients]
        seen.append((rows, departments.labels, clients))

    small.after_rounds(see)
    return small.fit(rounds, tmp_path / name), departments, seen


def test_clients_of_a_task_share_a_model_after_the_first_assignment(tmp_path):
    small, departments, seen = federation(tmp_path, 4, every=2)
    assert [labels for _, labels, _ in seen[:1]] == [(0,) * 8]
    rows = seen[0][0]
    assert torch.equal(rows[0], rows[1])  # a group without clients is its department's model
    assert torch.equal(rows[2], rows[3])
    assert not torch.equal(rows[0], rows[2])
    rows, labels, _ = seen[1]
    assert torch.equal(rows[0], rows[1])  # it has clients now, and has just begun
    for clients in (range(4), range(4, 8)):
        assert len({labels[c] for c in clients if c % 2}) == len({labels[c] for c in clients if not c % 2}) == 1
        assert {labels[c] for c in clients} == {0, 1}
    assert seen[3][1] == labels  # the groups keep their clients
    for group in range(4):
        members = [c for c in range(8) if departments.group([c]) == (group,)]
        accuracy = {parity: right(small, small.federation.server.rows[group], parity) for parity in (0, 1)}
        assert accuracy[members[0] % 2] > 0.6 > 0.4 > accuracy[1 - members[0] % 2]


@pytest.mark.parametrize("flip", [0, 1])
def test_groups_keep_their_clients_whatever_k_means_calls_its_clusters(tmp_path, flip):
    small, departments, _ = federation(tmp_path, 1)
    server, rows = small.federation.server, small.federation.server.rows.clone()
    present = tuple(label ^ flip for label in departments.labels)
    departments.assign(present)
    small.given["regrouping"].close(1, server, small.federation.buffers)
    assert departments.labels == present
    assert torch.equal(server.rows, rows)


def right(small, row, parity):
    """Accuracy of a row on the training samples of all clients of even, or odd, ids."""
    net = small_net()
    small.space.write(net, row)
    rows = np.concatenate([part for client, part in enumerate(small.parts) if client % 2 == parity])
    return float((net(small.dataset.train.x[rows]).argmax(1) == small.dataset.train.y[rows]).double().mean())


def test_labels_are_those_of_the_best_split_of_what_was_sent(tmp_path):
    """Of three clients seen, by plain loops over all splits in two; who was not seen is with the most."""
    small, departments, seen = federation(tmp_path, 1, count=5, within=2)
    _, labels, clients = seen[0]
    start = small_net()
    for members in (range(4), range(4, 8)):
        known = [c for c in members if c in clients]
        if len(known) < 2:
            assert [labels[c] for c in members] == [0] * 4
            continue
        sent = torch.stack([small.federation.stores[SENT].get(c, None) for c in known]) - small.space.read(start)
        splits = [s for s in np.ndindex(*[2] * len(known)) if set(s) == {0, 1}]
        best = min(splits, key=lambda split: scatter(sent, split))
        got = [labels[c] for c in known]
        assert got in ([*best], [1 - label for label in best])
        assert got.count(0) >= got.count(1)  # all had group 0, and the larger cluster keeps it
        assert all(labels[c] == 0 for c in members if c not in known)
    assert 0 < len(clients) < 8


def scatter(points, split):
    total = 0.0
    for label in (0, 1):
        own = points[torch.tensor(split) == label]
        total += float(((own - own.mean(0)) ** 2).sum())
    return total


def test_what_is_kept_is_what_was_sent_last(tmp_path):
    small, _, seen = federation(tmp_path, 1)
    rows = seen[0][0]
    for group, clients in ((0, range(4)), (2, range(4, 8))):  # equal weights: their mean is the department's model
        mean = torch.stack([small.federation.stores[SENT].get(c, None) for c in clients]).mean(0)
        torch.testing.assert_close(rows[group], mean)


@pytest.mark.parametrize("seed", range(4))
def test_clusters_take_the_groups_they_share_most_clients_with(seed):
    rng = np.random.default_rng(seed)
    found, present = [0, 1, 2, *rng.integers(0, 3, 9).tolist()], rng.integers(0, 4, 12).tolist()
    kept = max(sum(to[a] == b for a, b in zip(found, present, strict=True)) for to in permutations(range(4), 3))
    labels = matched(found, present, 4)
    assert sum(a == b for a, b in zip(labels, present, strict=True)) == kept
    assert len(set(zip(found, labels, strict=True))) == len(set(labels)) == 3


def test_an_empty_group_has_the_moments_of_the_largest(tmp_path):
    data, parts = two_tasks()
    server = partial(torch.optim.SGD, lr=0.7, momentum=0.9)
    small = Small(small_net(), data, parts, count=8, server=server)
    regrouped(small, 2, 8, every=9)
    small.fit(2, tmp_path)
    found = small.federation.server
    for group, other in ((1, 0), (3, 2)):
        assert torch.equal(found.rows[group], found.rows[other])
        moments = [found.optimizer.state[found.parameters[g]]["momentum_buffer"] for g in (group, other)]
        assert torch.equal(*moments)
        assert moments[0] is not moments[1]
        assert bool(moments[0].any())


def test_empty_groups_and_labels_by_hand():
    departments = Departments([0, 0, 1, 1, 1], 5, clusters_within=3)
    assert (departments.number, departments.groups) == (2, 6)
    assert departments.group([0, 4, -1]) == (0, 3, 0)
    assert departments.empty() == [(1, 0), (2, 0), (4, 3), (5, 3)]
    departments.assign([2, 0, 1, 1, 2])
    assert departments.group(range(5)) == (2, 0, 4, 4, 5)
    assert departments.empty() == [(1, 0), (3, 4)]  # of equals the first


def test_only_what_travels_is_compared(tmp_path):
    """A row of what stays would tell clients apart that have sent the same."""
    net = small_net()
    space = ParamSpace.of(net, lambda name: True, ["3.*"])
    data, parts = two_tasks()
    small = Small(net, data, parts, count=8, space=space)
    regrouped(small, 2, 8)
    small.fit(1, tmp_path)
    held = small.federation.stores[SENT].get(0, None)
    assert len(held) == int((~space.local).sum())


RUN = ["model=mlp", "mask_rule=random", "federation.num_clients=8", "federation.clients_per_round=6", "logger=csv"]
RUN += ["topology=departments", "topology.of=2", "topology.clusters_within=2", "topology.cluster_of=row"]
RUN += ["pictures=false", "partition=noniid_nc2", "calibration.head_steps=1", "calibration.cache=null"]
RUN += ["server=fedavgm", "federation.local_steps=2"]


def state(folder):
    rounds = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]["FederatedRounds"]
    return rounds["regrouping"]["labels"], rounds["server"]["rows"]


def table(folder):
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in read_rows(folder / "metrics.csv")]
    return rows, (folder / "traffic.csv").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("within") / "run"
    return run([*RUN, "federation.rounds=4", f"hydra.run.dir={folder}"]), folder


def test_a_resumed_run_ends_with_the_same_bits(whole, tmp_path):
    for store in ("memory", "file"):
        folder = tmp_path / store
        run([*RUN, f"federation.store={store}", "federation.rounds=2", f"hydra.run.dir={folder}"])
        summary = run([f"resume={folder}", "federation.rounds=4"])
        assert summary["global_sha256"] == whole[0]["global_sha256"]
        (labels, rows), (wanted, rows_wanted) = state(folder), state(whole[1])
        assert labels == wanted
        assert set(labels) == {0, 1}
        assert torch.equal(rows, rows_wanted)
        assert table(folder) == table(whole[1])


@pytest.mark.slow  # it starts a process
def test_two_processes_assign_alike(whole, tmp_path):
    summary = run([*RUN, "federation.rounds=4", "trainer.devices=2", f"hydra.run.dir={tmp_path}"])
    assert summary["global_sha256"] == whole[0]["global_sha256"]
    assert state(tmp_path)[0] == state(whole[1])[0]
    assert torch.equal(state(tmp_path)[1], state(whole[1])[1])


def test_a_client_that_changed_models_receives_a_whole_one(tmp_path):
    """Back in a group that it left, it no longer holds what it had there."""
    small, _, _ = federation(tmp_path, 3)
    for group, downlink in enumerate(small.federation.bytes.downlinks):
        others = [d for g, d in enumerate(small.federation.bytes.downlinks) if g != group]
        assert all(client not in other.holds for client in downlink.holds for other in others)
    held = [client for downlink in small.federation.bytes.downlinks for client in downlink.holds]
    assert sorted(held) == list(range(8))


@pytest.mark.parametrize("of", ["A", "A-start", "B", "BA", "row"])
def test_adapters_are_compared_as_asked(of):
    space = ParamSpace(["q.A", "q.B"], [torch.Size([1, 3]), torch.Size([2, 1])])
    comparison = Comparison(space, {"q": Adapter("q.A", "q.B", 2.0)}, torch.tensor([1.0, 0, 0, 0, 0]))
    rows = torch.tensor([[1.0, 2, 0, 1, 0], [0.0, 1, 1, 3, 1], [2.0, 0, 1, 0, 2]])
    of_rows = {
        "A": rows[:, :3],
        "A-start": rows[:, :3] - torch.tensor([1.0, 0, 0]),
        "B": 2 * rows[:, 3:],
        "BA": torch.stack([torch.outer(2 * row[3:], row[:3]).flatten() for row in rows]),
        "row": rows - torch.tensor([1.0, 0, 0, 0, 0]),
    }[of].double()
    torch.testing.assert_close(comparison.gram(of, rows), of_rows @ of_rows.T)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["topology.cluster_of=BA"], "topology.cluster_of=BA compares adapters of which both factors are averaged"),
        (["topology.cluster_of=C"], "topology.cluster_of is 'C'; it must be A, A-start, B, BA or row"),
        (["topology.cluster_metric=manhattan"], "topology.cluster_metric is 'manhattan'"),
        (["topology.cluster_every=0"], "topology.cluster_every is 0"),
        (["topology.clusters_within=0"], "topology.clusters_within is 0"),
        (["sparsity.renew_every=1"], "a mask that changes needs topology=flat"),
        (["model=vit_digits", "method=fedsa", "lora.ranks=[2,4]"], "set lora.ranks=null"),
    ],
)
def test_what_cannot_be_clustered_within_is_refused(tmp_path, options, line):
    with pytest.raises(ValueError, match=line):
        run([*RUN, *options, f"hydra.run.dir={tmp_path}"])
    assert not (tmp_path / "metrics.csv").exists()


def test_one_model_of_a_department_needs_no_regrouping():
    options = ["model=mlp", "topology=departments", "topology.of=2", "federation.num_clients=4"]
    assert assemble(composed(*options)).method.regrouping is None
    assert assemble(composed(*options, "topology.clusters_within=2", "topology.cluster_of=row")).method.regrouping
