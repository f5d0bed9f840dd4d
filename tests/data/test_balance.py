"""Class balance of clients against values by hand and doubled plain loops."""

from __future__ import annotations

import csv
from math import isnan
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsparse import run
from fedsparse.data import datasets, partition
from fedsparse.data.balance import Balance, gini


@pytest.mark.parametrize(
    ("counts", "expected"), [([1, 2, 3, 4], 0.25), ([10, 0, 0, 0], 0.75), ([7, 7, 7], 0.0), ([4, 1, 3, 2], 0.25)]
)
def test_the_gini_index_by_hand(counts, expected):
    assert gini(counts) == expected


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=12).filter(any))
def test_the_gini_index_is_that_of_a_doubled_loop(counts):
    total = 0
    for i in range(len(counts)):
        for j in range(i + 1, len(counts)):
            total += abs(counts[i] - counts[j])
    assert gini(counts) == pytest.approx(total / (len(counts) ** 2 * fmean(counts)), abs=1e-12)


def test_rows_are_clients_and_nothing_held_has_no_index():
    found = gini([[1, 2, 3, 4], [0, 0, 0, 0], [10, 0, 0, 0]])
    assert found[[0, 2]].tolist() == [0.25, 0.75]
    assert isnan(found[1])


def test_shares_are_of_the_clients_own_samples():
    labels = np.array([0, 1, 1, 3, 3, 3, 3, 0])
    balance = Balance.of([np.array([0, 1, 2, 3]), np.array([], dtype=np.int64), np.array([4, 5])], labels, classes=4)
    assert balance.columns == ["gini", "share_0", "share_1", "share_2", "share_3"]
    assert balance.cells(0) == ["0.375", "0.25", "0.5", "0", "0.25"]  # 1 2 0 1: (1+1+0+2+1+1) / (16 x 1)
    assert balance.cells(1) == [""] * 5
    assert balance.cells(2) == ["0.75", "0", "0", "0", "1"]


FEW = [
    "model=mlp", "logger=csv", "pictures=false", "federation.rounds=2", "federation.num_clients=4", "head.init=random",
    "mask_rule=random", "federation.clients_per_round=2", "partition=dirichlet01", "evaluation=per_client",
]  # fmt: skip


def table(folder):
    with (folder / "clients.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_table_of_clients_has_the_balance_of_each(run_in):
    _, folder = run_in("run", *FEW, fast=False)
    y = datasets.digits().train.y.numpy()
    parts = partition.dirichlet(y, num_clients=4, beta=0.1, seed=0)
    rows = table(folder)
    assert {int(row["client"]) for row in rows} == {0, 1, 2, 3}
    for row in rows:
        counts = [int((y[parts[int(row["client"])]] == c).sum()) for c in range(10)]
        assert float(row["gini"]) == pytest.approx(gini(counts), abs=1e-6)
        shares = [float(row[f"share_{c}"]) for c in range(10)]
        assert shares == pytest.approx([count / sum(counts) for count in counts], abs=1e-6)
    assert list(rows[0])[:6] == ["round", "client", "group", "model", "n", "loss"]  # what was there stays in its place


def test_a_table_without_these_columns_goes_on(run_in):
    """An older run: its rows lack the cells, and those that a resume appends have them."""
    _, folder = run_in("run", *FEW, fast=False)
    path = folder / "clients.csv"
    old = [line.rsplit(",", 11)[0] for line in path.read_text().splitlines()]
    assert old[0].endswith("recall")
    path.write_text("\n".join(old) + "\n")
    run([f"resume={folder}", "federation.rounds=3"])
    rows = table(folder)
    assert {row["gini"] is None for row in rows if row["round"] in "12"} == {True}
    assert all(0 < float(row["gini"]) < 1 for row in rows if row["round"] == "3")
    assert all(float(row["recall"]) >= 0 for row in rows)
