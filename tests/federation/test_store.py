"""What clients keep: a file gives back what memory would, after any kill, from either of the last two checkpoints."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsparse.federation.stores.store import FileStore, MemoryStore, make_store, read

WIDTH = 5
NONE = torch.full((WIDTH,), -1.0)


def row(value):
    return torch.arange(WIDTH, dtype=torch.float32) + value


def contents(store, clients=8):
    return [store.get(client, NONE).tolist() for client in range(clients)]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 7)),
        st.tuples(st.sampled_from(["best", "last", "resume", "resume from the one before"]), st.just(0)),
    ),
    max_size=40,
)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(STEPS)
def test_any_history_equals_memory(steps):
    """The oracle copies whole dictionaries; a checkpoint of the best round pins nothing, and is not resumed from."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clients.bin"
        file, memory = FileStore(path), MemoryStore()
        checkpoints = [(file.state_dict(), memory.state_dict())] * 2
        for number, (step, client) in enumerate(steps):
            if step == "write":
                for store in (file, memory):
                    store.write([client, -1], torch.stack([row(number), row(0)]))
            elif step == "best":
                file.state_dict()
            elif step == "last":
                checkpoints = [checkpoints[-1], (copy.deepcopy(file.state_dict()), memory.state_dict())]
                file.saved()
            else:
                chosen = checkpoints[-1 if step == "resume" else 0]
                checkpoints = checkpoints if step == "resume" else [checkpoints[0]] * 2
                file, memory = FileStore(path), MemoryStore()
                file.load_state_dict(chosen[0])
                memory.load_state_dict(chosen[1])
            assert contents(file) == contents(memory)


def test_the_file_holds_at_most_three_rows_a_client(tmp_path):
    store = FileStore(tmp_path / "clients.bin")
    for round in range(20):
        store.write(range(10), torch.stack([row(round)] * 10))
        store.state_dict()
        store.saved()
    assert store.path.stat().st_size <= 32 * WIDTH * 4  # 30 rows, and room for a power of two


def test_a_file_grows_only_when_its_rows_are_used_up_and_keeps_each(tmp_path):
    """Room for 16 at first, then for twice as many; no client's row is another's."""
    store, length = FileStore(tmp_path / "clients.bin"), WIDTH * 4
    for clients, room in ((1, 16), (16, 16), (17, 32), (32, 32), (33, 64)):
        for client in range(len(store.slots), clients):
            store.write([client], row(100 * client)[None])
        assert store.path.stat().st_size == room * length
        assert [store.get(client, NONE).tolist() for client in range(clients)] == [
            row(100 * client).tolist() for client in range(clients)
        ]


def test_rows_that_no_checkpoint_needs_are_used_again(tmp_path):
    """Five clients, three rows each at most: the 16 rows of the beginning last for ever; 15 clients leave one free."""
    for clients, rounds in ((5, 20), (15, 1)):
        store = FileStore(tmp_path / f"{clients}.bin")
        for round in range(rounds):
            store.write(range(clients), torch.stack([row(round)] * clients))
            store.saved()
        store.write([15], row(9)[None]) if clients == 15 else None
        assert store.path.stat().st_size == 16 * WIDTH * 4


def test_the_checkpoint_before_the_last_keeps_its_rows_by_hand(tmp_path):
    store, states = FileStore(tmp_path / "clients.bin"), []
    for value in (1, 2):
        store.write([0], row(value)[None])
        states.append(copy.deepcopy(store.state_dict()))
        store.saved()
    for value in (3, 4, 5):
        store.write([0], row(value)[None])
        store.write([value], row(value)[None])
    for state, value in zip(states, (1, 2), strict=True):
        again = FileStore(store.path)
        again.load_state_dict(state)
        assert again.get(0, NONE).tolist() == row(value).tolist()


def test_rows_of_another_length_only_in_memory(tmp_path):
    memory, file = MemoryStore(), FileStore(tmp_path / "clients.bin")
    file.move(lambda kept: kept[:2])  # nothing is kept yet
    for store in (memory, file):
        store.write([3], row(1)[None])
    memory.move(lambda kept: kept[:2])
    assert memory.get(3, NONE).tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="a mask that changes while .* needs federation.store=memory"):
        file.move(lambda kept: kept[:2])
    assert file.get(3, NONE).tolist() == row(1).tolist()


def test_another_kind_of_store_is_refused(tmp_path):
    with pytest.raises(ValueError, match="federation.store is 'disk'; it must be memory or file"):
        make_store("disk", tmp_path / "clients.bin")


def test_clients_are_read_in_order_beside_those_that_keep_nothing():
    store, default = MemoryStore(), torch.zeros(3, WIDTH)
    store.write([4], row(7)[None])
    default[2] = 5.0
    assert read(store, [1, 4, 2], default).tolist() == [[0.0] * WIDTH, row(7).tolist(), [5.0] * WIDTH]
    assert read(store, [], default[:0]).shape == (0, WIDTH)


def test_nothing_is_allocated_before_the_first_write(tmp_path):
    store = make_store("file", tmp_path / "clients.bin")
    assert read(store, [3, 4], torch.zeros(2, WIDTH)).tolist() == [[0.0] * WIDTH] * 2
    store.saved()
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_one_line(tmp_path):
    store = FileStore(tmp_path / "clients.bin")
    store.write([0], row(1)[None])
    state = store.state_dict()
    store.path.unlink()
    with pytest.raises(ValueError, match=r"clients.bin is missing: it holds what the clients keep"):
        FileStore(store.path).load_state_dict(state)


KEEPING = ["model=mlp", "model.local=[head.*]", "logger=csv", "pictures=false", "calibration.head_steps=2"]


def test_a_run_with_a_file_equals_one_in_memory_over_a_resume(tmp_path, monkeypatch):
    """It stops a round after its last checkpoint: what the clients kept in that round must not be found again."""
    from fedsparse import run

    monkeypatch.chdir(tmp_path)
    options = [*KEEPING, "federation.num_clients=6", "calibration.cache=null", "federation.checkpoint_every=2"]
    memory = run([*options, "federation.rounds=4", "hydra.run.dir=memory"])
    run([*options, "federation.rounds=3", "federation.store=file", "hydra.run.dir=file"])
    resumed = run(["resume=file", "federation.rounds=4"])
    assert resumed["global_sha256"] == memory["global_sha256"]
    assert (tmp_path / "file/clients.bin").stat().st_size > 0
    assert not (tmp_path / "memory/clients.bin").exists()
