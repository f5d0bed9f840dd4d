"""Departments whose models are mixed by clusters: rows by hand, what is logged, resume, processes, refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import adjusted_rand_score

from fedsparse import run
from fedsparse.core.space import ParamSpace
from fedsparse.federation.server import ClusterMixing, Departments
from fedsparse.models.lora import Adapter

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
RUN = ["model=vit_digits", "method=fedit", "topology=departments", "mixing=clusters", "logger=csv", "pictures=false"]
RUN += ["federation.num_clients=8", "federation.clients_per_round=1.0", "federation.local_steps=2"]
RUN += ["partition=noniid_nc2", "calibration.head_steps=1", "optimizer.lr=0.3"]


def mixing(**options):
    return ClusterMixing(SPACE, ADAPTERS, torch.zeros(7), **options)


@pytest.mark.parametrize("of", ["A", "B", "BA"])
@pytest.mark.parametrize(("share", "whole"), [(0.3, 0.0), (1.0, 0.0), (0.3, 0.25)])
def test_groups_move_towards_the_mean_of_their_cluster(of, share, whole):
    found = mixing(of=of, share=share, global_share=whole)(ROWS, 0)
    assert found.clusters.labels == (0, 1, 0, 1)
    means = torch.stack([(ROWS[0] + ROWS[2]) / 2, (ROWS[1] + ROWS[3]) / 2] * 2)
    wanted = (1 - share) * ROWS + share * means
    wanted = (1 - whole) * wanted + whole * wanted.mean(0)
    torch.testing.assert_close(found.rows, wanted)


def test_a_group_alone_stays():
    rows = torch.cat([ROWS[:3], ROWS[1:2]])
    found = mixing(k=3, of="BA", metric="euclidean")(torch.cat([rows, -5 * rows[:1]]), 0)
    labels = found.clusters.labels
    alone = [group for group in range(5) if labels.count(labels[group]) == 1]
    assert alone
    assert all(torch.equal(found.rows[group], torch.cat([rows, -5 * rows[:1]])[group]) for group in alone)


def test_equal_groups_are_one_cluster():
    found = mixing(k=2)(ROWS[:1].repeat(3, 1), 0)
    assert found.clusters.labels == (0, 0, 0)


def test_rounds_between_two_mixings_leave_the_rows():
    mix = mixing(every=3)
    assert [mix(ROWS, number).clusters is None for number in range(6)] == [True, True, False] * 2
    assert mix(ROWS, 0).rows is ROWS


def test_cosines_of_all_that_can_be_compared():
    found = mixing()(ROWS, 0).similarities
    assert set(found) == {"row", "A", "A-start", "B", "BA"}
    dense = [2 * (row[3:5].unsqueeze(1) @ row[:3].unsqueeze(0)).flatten() for row in ROWS]
    for of, vectors in {
        "row": list(ROWS),
        "A": [r[:3] for r in ROWS],
        "B": [r[3:5] for r in ROWS],
        "BA": dense,
    }.items():
        stacked = torch.nn.functional.normalize(torch.stack(vectors).double(), dim=1)
        torch.testing.assert_close(found[of], stacked @ stacked.T)
    without = ClusterMixing(SPACE, {}, torch.zeros(7), of="row")(ROWS, 0).similarities
    assert set(without) == {"row"}


def test_members_of_departments():
    assert Departments(2, 5).group([4, 0, -1]) == (1, 0, 0)
    assert Departments([1, 0, 1], 3).groups == 2
    assert Departments([1, 0, 1], 3).group([0, 1, 2]) == (1, 0, 1)


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
        assert len(line["labels"]) == 4
        assert line["k"] == len(set(line["labels"])) == int(max(line["scores"], key=line["scores"].get))
        assert np.allclose(np.diag(line["cosines"]["BA"]), 1)
    assert {row.split(",")[1] for row in (folder / "lora.csv").read_text().splitlines()[1:]} == set("0123")
    assert summary["rounds"] == 3


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
        ("some", ["mixing.global_share=0.5"]),
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
        (lambda: mixing(k=5)(ROWS, 0), "mixing.k is 5; it must be a whole number from 1 to 4"),
        (lambda: mixing()(0 * ROWS, 0), "adapters of department 0 are zero and have no direction"),
        (lambda: mixing()(ROWS / 0, 0), "adapters of a department are not finite"),
        (
            lambda: ClusterMixing(SPACE, {}, torch.zeros(7)),
            "mixing.of=BA compares adapters of which both factors are averaged, and there are none",
        ),
    ],
)
def test_what_cannot_be_mixed_is_refused(make, line):
    with pytest.raises(ValueError, match=line):
        make()


def test_one_group_is_refused(tmp_path):
    with pytest.raises(ValueError, match="topology=flat has one group: set topology=departments"):
        run(["model=mlp", "mixing=clusters", "mixing.of=row", "logger=csv", f"hydra.run.dir={tmp_path}"])
