"""Departments whose models are mixed by clusters: rows by hand, what is logged, resume, processes, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from composed import composed
from safetensors.torch import load_file
from sklearn.metrics import adjusted_rand_score

from fedsparse import run
from fedsparse.core.space import ParamSpace
from fedsparse.federation.clustering import ClusterTable
from fedsparse.federation.server import ClusterMixing, Departments, GlobalMixing
from fedsparse.job.assemble import assemble, assemble_course, assemble_method
from fedsparse.models.lora import Adapter
from fedsparse.preparation.calibration import Calibration

FEW = ["model=mlp", "mask_rule=random", "federation.num_clients=4"]
SPACE = ParamSpace(["q.A", "q.B", "head"], [torch.Size([1, 3]), torch.Size([2, 1]), torch.Size([2])])
ADAPTERS = {"q": Adapter("q.A", "q.B", 2.0)}
ROWS = torch.tensor(
    [
        [1.0, 0, 0, 1, 0, 0, 1],
        [0, 1, 0, 0, 1, 3, 0],
        [1, 0, 0, 0.9, 0, 2, 5],
        [0, 1, 0, 0, 1.2, 1, 1],
    ]
)
RUN = [
    "model=vit_digits",
    "method=fedit",
    "topology=departments",
    "topology.of=4",
    "mixing=clusters",
    "logger=csv",
    "pictures=false",
]
RUN += ["federation.num_clients=8", "federation.clients_per_round=1.0", "federation.local_steps=2"]
RUN += ["partition=noniid_nc2", "calibration.head_steps=1", "optimizer.lr=0.3"]


def mixing(groups=4, start=None, **options):
    return ClusterMixing(SPACE, ADAPTERS, torch.zeros(7) if start is None else start, groups, **options)


@pytest.mark.parametrize("of", ["A", "B", "BA"])
@pytest.mark.parametrize(("share", "whole"), [(0.3, 0.0), (1.0, 0.0), (0.3, 0.25)])
def test_groups_move_towards_the_mean_of_their_cluster_and_then_of_all(of, share, whole):
    found = GlobalMixing(whole, mixing(of=of, share=share))(ROWS, 0)
    assert found.clusters.labels == (0, 1, 0, 1)
    means = torch.stack([(ROWS[0] + ROWS[2]) / 2, (ROWS[1] + ROWS[3]) / 2] * 2)
    wanted = (1 - share) * ROWS + share * means
    wanted = (1 - whole) * wanted + whole * wanted.mean(0)
    torch.testing.assert_close(found.rows, wanted)


def test_a_group_alone_stays():
    rows = torch.cat([ROWS[:3], ROWS[1:2]])
    found = mixing(5, k=3, of="BA", metric="euclidean")(torch.cat([rows, -5 * rows[:1]]), 0)
    labels = found.clusters.labels
    alone = [group for group in range(5) if labels.count(labels[group]) == 1]
    assert alone
    assert all(torch.equal(found.rows[group], torch.cat([rows, -5 * rows[:1]])[group]) for group in alone)


def test_equal_groups_are_one_cluster():
    found = mixing(3, k=2)(ROWS[:1].repeat(3, 1), 0)
    assert found.clusters.labels == (0, 0, 0)


def test_given_clusters_are_taken_as_they_are():
    for options in ({"fixed": [5, 5, 2, 2]}, {"truth": (0, 0, 1, 1)}):
        found = mixing(method="fixed", share=1.0, **options)(ROWS, 0)
        assert found.clusters.labels == (0, 0, 1, 1)
        means = [ROWS[:2].mean(0)] * 2 + [ROWS[2:].mean(0)] * 2
        torch.testing.assert_close(found.rows, torch.stack(means))
    apart = mixing(method="none", share=1.0)(ROWS, 0)
    assert apart.clusters.labels == (0, 1, 2, 3)
    assert torch.equal(apart.rows, ROWS)


def test_all_departments_move_towards_their_mean_without_clusters():
    found = GlobalMixing(0.25)(ROWS, 0)
    assert found.clusters is None
    torch.testing.assert_close(found.rows, torch.stack([0.75 * row + 0.25 * sum(ROWS) / 4 for row in ROWS]))


def test_the_original_weighs_by_norms_and_starts_from_42_and_the_round():
    """By hand: of four groups it finds two clusters, by A alone, without scale; weights are whole norms, 1 at least."""
    rows = ROWS.clone()
    rows[0, 3:5] = torch.tensor([3.0, 4.0])  # |(A, B)| of group 0 is sqrt(1 + 25) = 5.1
    found = mixing(of="A", metric="euclidean", k="elbow", compat="original")(rows, 0)
    assert found.clusters.labels == (0, 1, 0, 1)
    assert set(found.clusters.scores) == {2, 3}
    means = [(5 * rows[0] + rows[2]) / 6, (rows[1] + rows[3]) / 2] * 2
    torch.testing.assert_close(found.rows, 0.7 * rows + 0.3 * torch.stack(means))


def test_what_stays_with_the_clients_is_not_compared():
    """As in FedSA, where B is each client's own, and in FFA, where A does not train."""
    sizes = SPACE.shapes
    own_b = ParamSpace(SPACE.names, sizes, local=torch.tensor([False] * 3 + [True] * 2 + [False] * 2))
    fedsa = ClusterMixing(own_b, ADAPTERS, torch.zeros(7), 4, of="A")(ROWS, 0)
    assert set(fedsa.similarities) == {"row", "A", "A-start"}
    assert fedsa.clusters.labels == (0, 1, 0, 1)
    ffa = ClusterMixing(ParamSpace(SPACE.names[1:], sizes[1:]), ADAPTERS, torch.zeros(4), 4, of="B")(ROWS[:, 3:], 0)
    assert set(ffa.similarities) == {"row", "B"}
    assert ffa.clusters.labels == (0, 1, 0, 1)
    for of, factors in (("B", "B is"), ("BA", "both factors are")):
        with pytest.raises(ValueError, match=f"mixing.of={of} compares adapters of which {factors} averaged"):
            ClusterMixing(own_b, ADAPTERS, torch.zeros(7), 4, of=of)


def test_zero_adapters_are_alike_and_nothing_else():
    rows = ROWS.clone()
    rows[[0, 3], 3:5] = 0
    found = mixing(of="BA", k=3)(rows, 0)
    assert found.clusters.labels == (0, 1, 2, 0)
    wanted = torch.eye(4, dtype=torch.float64)
    wanted[0, 3] = wanted[3, 0] = 1
    torch.testing.assert_close(found.similarities["BA"], wanted)
    assert mixing()(0 * ROWS, 0).clusters.labels == (0, 0, 0, 0)


def test_rounds_between_two_mixings_leave_the_rows():
    mix = mixing(every=3)
    assert [mix(ROWS, number).clusters is None for number in range(6)] == [True, True, False] * 2
    assert mix(ROWS, 0).rows is ROWS


def test_cosines_of_all_that_can_be_compared():
    start = torch.tensor([0.5, 0.25, -1, 0, 0, 1, 1])
    found = mixing(start=start)(ROWS, 0).similarities
    assert set(found) == {"row", "A", "A-start", "B", "BA"}
    dense = [2 * (row[3:5].unsqueeze(1) @ row[:3].unsqueeze(0)).flatten() for row in ROWS]
    for of, vectors in {
        "row": list(ROWS - start),
        "A": [r[:3] for r in ROWS],
        "A-start": [r[:3] - start[:3] for r in ROWS],
        "B": [r[3:5] for r in ROWS],
        "BA": dense,
    }.items():
        stacked = torch.nn.functional.normalize(torch.stack(vectors).double(), dim=1)
        torch.testing.assert_close(found[of], stacked @ stacked.T)
    without = ClusterMixing(SPACE, {}, torch.zeros(7), 4, of="row")(ROWS, 0).similarities
    assert set(without) == {"row"}


def test_members_of_departments():
    assert Departments(2, 5).group([4, 0, -1]) == (1, 0, 0)
    assert Departments([1, 0, 1], 3).groups == 2
    assert Departments([1, 0, 1], 3).group([0, 1, 2]) == (1, 0, 1)
    assert Departments(None, 7).members == (0, 0, 0, 1, 1, 1, 2)
    assert Departments(None, 4, clients_per_department=2).members == (0, 0, 1, 1)


def test_the_data_names_departments_and_their_truth():
    """What is typed wins, and the truth is then no more that of the departments."""
    problem = replace(assemble(composed(*FEW)).problem, departments=(1, 0, 1, 0), truth=(0, 0))
    for of, members, truth in ((None, (1, 0, 1, 0), (0, 0)), ([0, 0, 1, 1], (0, 0, 1, 1), ()), (2, (0, 0, 1, 1), ())):
        cfg = composed(*FEW, "topology=departments", f"topology.of={'null' if of is None else of}")
        topology = assemble_method(cfg, problem, assemble_course(cfg, problem), Calibration()).topology
        assert topology.members == members
        assert problem.truth_of(topology) == truth


def lines(folder):
    return [json.loads(line) for line in (folder / "clusters.jsonl").read_text().splitlines()]


def tables(folder):
    return lines(folder), (folder / "lora.csv").read_text(), (folder / "traffic.csv").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("departments")
    return folder, run([*RUN, "federation.rounds=3", f"hydra.run.dir={folder}"])


def test_each_round_is_a_line(whole):
    folder, summary = whole
    found = lines(folder)
    assert [line["round"] for line in found] == [1, 2, 3]
    assert found[0]["ari_before"] is None
    for before, line in zip(found, found[1:], strict=False):
        assert line["ari_before"] == pytest.approx(adjusted_rand_score(before["labels"], line["labels"]))
    for line in found:
        assert line["ari_truth"] is None
        assert len(line["labels"]) == 4
        assert line["k"] == len(set(line["labels"])) == int(max(line["scores"], key=line["scores"].get))
        assert np.allclose(np.diag(line["cosines"]["BA"]), 1)
    assert {row.split(",")[1] for row in (folder / "lora.csv").read_text().splitlines()[1:]} == set("0123")
    assert summary["rounds"] == 3


@pytest.mark.parametrize("truth", [(0, 1, 0, 1), (0, 0, 1, 1), ()])
def test_a_line_says_how_near_the_truth_its_clusters_are(tmp_path, truth):
    table = ClusterTable(tmp_path / "clusters.jsonl", truth=truth)
    table.close(SimpleNamespace(number=0, mixed=mixing()(ROWS, 0)), [], None)
    table.close(SimpleNamespace(number=1, mixed=mixing(every=3)(ROWS, 1)), [], None)  # no mixing, no line
    (line,) = lines(tmp_path)
    assert line["labels"] == [0, 1, 0, 1]
    assert line["ari_truth"] == (adjusted_rand_score(truth, [0, 1, 0, 1]) if truth else None)


def test_a_resume_goes_on_with_the_same_bits(whole, tmp_path):
    run([*RUN, "federation.rounds=2", f"hydra.run.dir={tmp_path}"])
    again = run([f"resume={tmp_path}", "federation.rounds=3"])
    assert again["global_sha256"] == whole[1]["global_sha256"]
    assert again["test/acc"] == whole[1]["test/acc"]
    assert tables(tmp_path) == tables(whole[0])


@pytest.mark.slow  # it starts a process
def test_two_processes_mix_the_same_rows(whole, tmp_path):
    found = run([*RUN, "federation.rounds=3", "trainer.devices=2", f"hydra.run.dir={tmp_path}"])
    assert found["global_sha256"] == whole[1]["global_sha256"]
    assert [line["labels"] for line in lines(tmp_path)] == [line["labels"] for line in lines(whole[0])]


def test_without_a_share_the_rows_are_those_of_departments_apart(tmp_path):
    hashes = []
    for name, options in (
        ("apart", ["mixing=none"]),
        ("none", ["mixing.share=0.0"]),
        ("some", ["topology.global_mix=0.5"]),
    ):
        found = run([*RUN, "federation.rounds=1", *options, f"hydra.run.dir={tmp_path / name}"])
        hashes.append(found["global_sha256"])
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("options", [["method=fedit", "aggregation=median"], ["mixing.of=row", "mask_rule=random"]])
def test_departments_go_with_other_parts(tmp_path, options):
    rest = [option for option in RUN if not option.startswith("method")]
    summary = run([*rest, "federation.rounds=1", *options, f"hydra.run.dir={tmp_path}"])
    assert summary["rounds"] == 1
    assert len(lines(tmp_path)) == 1
    assert load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: Departments(9, 8), "topology.of is 9; it must be a whole number from 1 to 8"),
        (lambda: Departments([0, 1], 3), "lists the departments of 2 clients, and there are 3"),
        (lambda: Departments([0, 2], 2), "gives department 1 no client; number them from 0 without a gap"),
        (lambda: Departments([0, -1], 2), "topology.of is -1"),
        (lambda: mixing(of="C"), "mixing.of is 'C'; it must be A, A-start, B, BA or row"),
        (lambda: mixing(share=1.5), "mixing.share is 1.5"),
        (lambda: mixing(every=0), "mixing.every is 0"),
        (lambda: mixing(k="gap"), "mixing.k is 'gap'"),
        (lambda: mixing(k=5), "mixing.k, of 4 departments, is 5; it must be a whole number from 1 to 4"),
        (lambda: mixing(k=True), "mixing.k, of 4 departments, is True"),
        (lambda: mixing(k_range=[2]), r"mixing.k_range is \[2\]; it must be two numbers that rise"),
        (lambda: mixing(k_range=3), "mixing.k_range is 3; it must be two numbers that rise"),
        (lambda: mixing(k_range=[1, 2]), "mixing.k_range is 1; it must be a whole number of 2 or more"),
        (lambda: mixing(k_range=[5, 4]), "mixing.k_range is 4; it must be a whole number of 5 or more"),
        (lambda: mixing(k_range=[5, 6]), "mixing.k_range begins with 5 clusters, and there are 4 departments"),
        (lambda: mixing(method="dbscan"), "mixing.method is 'dbscan'"),
        (
            lambda: mixing(method="fixed"),
            "takes a cluster for each of 4 departments; mixing.fixed is null, and the data",
        ),
        (lambda: mixing(method="fixed", fixed=2), "mixing.fixed is 2; it must be null or a list"),
        (lambda: mixing(method="fixed", fixed=[0, 1]), "for each of 4 departments; mixing.fixed lists 2"),
        (lambda: mixing(method="fixed", fixed=[0, 1, 2, "hr"]), "mixing.fixed is 'hr'; it must be a whole number"),
        (lambda: mixing(compat="code"), "mixing.compat is 'code'; it must be null or original"),
        (lambda: mixing(compat="original"), "clusters A by its own elbow: set mixing=original"),
        (lambda: GlobalMixing(1.5), "topology.global_mix is 1.5"),
        (lambda: Departments(None, 8, 0), "topology.clients_per_department is 0"),
        (lambda: Departments(None, 8, 3, 0), "topology.clusters_within is 0"),
        (
            lambda: Departments("hr", 2),
            "topology.of is 'hr'; it must be null, a number of departments, or one for each",
        ),
        (lambda: Departments(2.5, 2), "topology.of is 2.5; it must be null"),
        (lambda: Departments(["hr", "it"], 2), "topology.of is 'hr'; it must be a whole number of 0 or more"),
        (lambda: mixing()(ROWS / 0, 0), "adapters of a department are not finite"),
        (
            lambda: ClusterMixing(SPACE, {}, torch.zeros(7), 4),
            "mixing.of=BA compares adapters of which both factors are averaged, and there are none",
        ),
    ],
)
def test_what_cannot_be_mixed_is_refused(make, line):
    with pytest.raises(ValueError, match=line):
        make()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["mixing=clusters"], "mixing joins the models of departments, and there is one: set topology=departments"),
        (["topology=departments", "topology.of=1", "mixing=clusters"], "and there is one"),
        (["topology=departments", "topology.of=1", "topology.global_mix=0.1"], "topology.global_mix joins the models"),
        (["topology=departments", "topology.of=2", "topology.global_mix=2"], "topology.global_mix is 2"),
        (
            ["topology=departments", "topology.of=2", "mixing=clusters", "mixing.k=3"],
            "mixing.k, of 2 departments, is 3",
        ),
        (["topology=departments", "topology.of=9"], "topology.of is 9; it must be a whole number from 1 to 4"),
    ],
)
def test_what_departments_cannot_do_is_refused_before_training(tmp_path, options, line):
    few = ["model=mlp", "mask_rule=random", "federation.num_clients=4", "logger=csv", f"hydra.run.dir={tmp_path}"]
    with pytest.raises(ValueError, match=line):
        run([*few, *options, *(["mixing.of=row"] if "mixing=clusters" in options else [])])
    assert not (tmp_path / "metrics.csv").exists()
