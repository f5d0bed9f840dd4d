"""What clients keep stays where it was computed, while it fits there; checkpoints and processes get copies."""

from __future__ import annotations

import pytest
import torch
from pretend import DEVICE, pretended

from fedsparse.core.subspace import Carry, Subspace
from fedsparse.federation.exchange.update import Update, of_those
from fedsparse.federation.reports import Report
from fedsparse.federation.stores.store import FileStore, MemoryStore, read

WIDTH = 5
INF = float("inf")


def rows(*values, device=DEVICE):
    return torch.stack([torch.arange(WIDTH, dtype=torch.float32) + value for value in values]).to(device)


def zeros(count, device=DEVICE):
    return torch.zeros(count, WIDTH, device=device)


def update(weight):
    return Update((4, 9, 2), zeros(3), zeros(3)[:, :0], weight, (0.0,) * 3)


def test_rows_are_written_and_read_where_they_are_without_a_wait():
    with pretended() as counts:
        store, given = MemoryStore(), rows(0, 1, 2)
        default = zeros(2)
        counts.clear()
        store.write([3, -1, 7], given)
        found = read(store, [7, 5], default)
        assert not counts.waits
        assert set(store.rows) == {3, 7}
        given.zero_()  # copies are kept
        assert found.device == DEVICE
        assert found.tolist() == [[2, 3, 4, 5, 6], [0] * WIDTH]


@pytest.mark.parametrize("most", [0, 20, 45, 60])
def test_rows_that_do_not_fit_lie_on_the_cpu(most):
    """A row takes 20 bytes; another one of the same client takes the place of its first."""
    with pretended():
        store = MemoryStore(most)
        for value in range(3):
            store.write([0, 1, 2], rows(value, value + 10, value + 20))
        devices = [store.rows[client].device.type for client in range(3)]
        there = most // 20
        assert devices == [DEVICE.type] * there + ["cpu"] * (3 - there)
        assert read(store, [0, 1, 2], zeros(3)).tolist() == rows(2, 12, 22, device="cpu").tolist()


def test_rows_of_the_cpu_have_no_limit():
    store = MemoryStore(0)
    store.write([0], rows(1, device="cpu"))
    assert store.rows[0].tolist() == [1, 2, 3, 4, 5]


def test_a_checkpoint_has_them_on_the_cpu_and_goes_on_on_the_device():
    with pretended():
        store, again = MemoryStore(), MemoryStore()
        store.write([3], rows(7))
        state = store.state_dict()
        assert {row.device.type for row in state["rows"].values()} == {"cpu"}
        again.load_state_dict(state)
        store.write([3], rows(8))  # what was taken down does not follow
        found = read(again, [3], zeros(1))
        assert found.device == DEVICE
        assert found.tolist() == [[7, 8, 9, 10, 11]]
        again.write([3], found)
        assert again.rows[3].device == DEVICE


def test_rows_follow_a_mask_where_they_are():
    before, after = torch.tensor([True] * 5 + [False]), torch.tensor([False] + [True] * 5)
    with pretended():
        store = MemoryStore()
        store.write([3], rows(1))
        store.move(Carry(Subspace(before.to(DEVICE)), Subspace(after.to(DEVICE))))
        assert store.rows[3].device == DEVICE
        assert store.rows[3].tolist() == [2, 3, 4, 5, 0]


def test_a_file_gets_rows_with_one_wait_and_gives_them_back_without(tmp_path):
    with pretended() as counts:
        store, given, default = FileStore(tmp_path / "rows.bin"), rows(0, 1, 2), zeros(3)
        counts.clear()
        store.write([0, 1, 2], given)
        assert sum(counts.waits.values()) == 1
        found = read(store, [0, 1, 2], default)
        assert sum(counts.waits.values()) == 1
        assert found.device == DEVICE
        assert found.tolist() == given.tolist()


def test_rows_to_keep_are_chosen_where_they_are():
    with pretended() as counts:
        kept = {"a": ((4, 9, 2), rows(0, 1, INF)), "b": ((9,), rows(1))}
        found = of_those(kept, update((10.0, 0.0, 30.0)))
        assert found["a"][1].device == DEVICE
        assert {name: (ids, part.tolist()) for name, (ids, part) in found.items()} == {
            "a": ((4,), [[0, 1, 2, 3, 4]]),
            "b": ((), []),
        }
        kept, admitted = {"a": ((4, 9, 2), rows(0, 1, 2))}, update((1.0, 1.0, 1.0))
        for known, waits in ((False, {"update.py:finite_rows": 1}), (True, {})):
            counts.clear()
            found = of_those(kept, admitted, known=known)
            assert counts.waits == waits
            assert found["a"][0] == (4, 9, 2)


@pytest.mark.parametrize("device", ["cpu", DEVICE])
def test_what_other_processes_read_is_a_copy_on_the_cpu(device):
    """The next cohort may overwrite the memory before the round closes."""
    with pretended():
        given = rows(1, device=device)
        report = Report.of(0, update((1.0, 1.0, 1.0)), (0, 0, 0), (None,) * 3, {"a": ((4,), given)}).on_cpu()
        given.zero_()
        assert report.kept["a"][1].device.type == "cpu"
        assert report.kept["a"][1].tolist() == [[1, 2, 3, 4, 5]]
