"""trajectory.safetensors: the rows are those that the federation had, whatever is killed or added."""

import csv
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small import Small, small_data, small_net, uneven_parts

from fedsparse import run
from fedsparse.federation.trajectory import Layout, Trajectory, read_rounds, read_row

SMALL = ["model=mlp", "model.hidden=8", "mask_rule=random", "logger=csv", "pictures=false", "calibration.head_steps=1"]
SMALL += ["federation.rounds=2", "federation.num_clients=4", "federation.clients_per_round=1.0", "federation.cohort=1"]
SMALL += ["trajectory=global"]


class Two:
    groups = 2

    def group(self, clients):
        return tuple(client % 2 for client in clients)


def fitted(folder, rounds, kind=torch.float32, **options):
    """A federation that keeps its rows -> the rows seen after each round, the first before any, and the file."""
    folder.mkdir(exist_ok=True)
    path = folder / "trajectory.safetensors"
    small = Small(small_net(kind), small_data(dtype=kind), uneven_parts())
    seen = [small.row.clone()]
    small.given["watchers"] = [Trajectory(path, rounds, **options)]
    small.after_rounds(lambda round: seen.append(round.federation.server.rows[0].clone()))
    small.fit(rounds, folder)
    return seen, path


def test_every_row_lies_in_a_file_of_a_common_format(tmp_path):
    seen, path = fitted(tmp_path, 3)
    held = load_file(path)
    assert held["rounds"].tolist() == read_rounds(path) == [0, 1, 2, 3]
    assert torch.equal(held["rows"], torch.stack(seen))
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize(("every", "kept"), [(2, [0, 2, 4]), (3, [0, 3]), (9, [0])])
def test_some_rows_only(tmp_path, every, kept):
    seen, path = fitted(tmp_path, 5, every=every)
    assert read_rounds(path) == kept
    assert all(torch.equal(read_row(path, closed), seen[closed]) for closed in kept)
    with pytest.raises(ValueError, match=rf"holds no row after 1 rounds; it holds those after {kept[0]}"):
        read_row(path, 1)


def test_half_precision_takes_half_the_bytes(tmp_path):
    seen, path = fitted(tmp_path, 2)
    halved, half = fitted(tmp_path / "half", 2, dtype="float16")
    assert torch.equal(read_row(half, 2), seen[2].half())
    rows = 3 * len(seen[0])
    assert path.stat().st_size - half.stat().st_size == 2 * rows
    assert torch.equal(seen[2], halved[2])


def test_doubles_are_rounded_to_float32(tmp_path):
    seen, path = fitted(tmp_path, 1, kind=torch.float64)
    assert torch.equal(read_row(path, 1), seen[1].float())


def test_a_row_counts_once_it_is_whole(tmp_path):
    """A kill between the row and its number leaves the number at -1; the resumed round writes both again."""
    seen, path = fitted(tmp_path, 3)
    layout = Layout(4, len(seen[0]), "F32", 4)
    with path.open("r+b") as file:
        file.seek(layout.rounds_at + 8 * 3)
        file.write(struct.pack("<q", -1))
    assert read_rounds(path) == [0, 1, 2]
    with pytest.raises(ValueError, match="no row after 3 rounds"):
        read_row(path, 3)


SHORT = ["model=mlp", "model.hidden=8", "mask_rule=random", "logger=csv", "pictures=false", "calibration.cache=null"]


def test_a_run_that_is_given_more_rounds_keeps_the_rows_of_before_and_no_bit_changes(run_in):
    plain, _ = run_in("plain", *SHORT, "federation.rounds=4")
    whole, held = run_in("whole", *SHORT, "federation.rounds=4", "trajectory=global")
    _, folder = run_in("stopped", *SHORT, "federation.rounds=2", "trajectory=global")
    assert read_rounds(folder / "trajectory.safetensors") == [0, 1, 2]
    again = run([f"resume={folder}", "federation.rounds=4"])
    assert again["global_sha256"] == whole["global_sha256"] == plain["global_sha256"]
    first, other = (load_file(path / "trajectory.safetensors") for path in (held, folder))
    assert first["rounds"].tolist() == other["rounds"].tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(first["rows"], other["rows"])


def test_a_damaged_file_is_one_line(tmp_path):
    _, path = fitted(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"the trajectory .* is damaged \(SafetensorError\); remove it"):
        read_rounds(path)
    path.unlink()
    with pytest.raises(ValueError, match="is damaged"):
        read_row(path, 0)


def test_without_a_path_nothing_is_written(tmp_path):
    small = Small(small_net(), small_data(), uneven_parts())
    small.given["watchers"] = [Trajectory(None, 1)]
    small.fit(1, tmp_path)
    assert not list(tmp_path.glob("**/trajectory*"))


def test_several_global_models_are_refused(tmp_path):
    small = Small(small_net(), small_data(), uneven_parts(), topology=Two())
    small.given["watchers"] = [Trajectory(tmp_path / "t", 2)]
    with pytest.raises(ValueError, match=r"trajectory=global needs one global model; set topology=flat"):
        small.fit(1, tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"every": 0}, r"trajectory\.every is 0"), ({"dtype": "int8"}, r"trajectory\.dtype is 'int8'; it must be")],
    ids=["every", "dtype"],
)
def test_what_cannot_be_meant_is_refused(tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        Trajectory(tmp_path / "t", 2, **options)


@pytest.mark.slow  # it starts a process
def test_clients_are_written_by_the_process_that_leads(tmp_path):
    """Each of two processes trains some of the clients; all rows lie in the one folder."""
    run([*SMALL, "trainer.devices=2", "trajectory.clients=[0,1,2,3]", f"hydra.run.dir={tmp_path / 'two'}"])
    run([*SMALL, "trajectory.clients=[0,1,2,3]", f"hydra.run.dir={tmp_path / 'one'}"])
    for client in range(4):
        one, two = (tmp_path / name / f"trajectory.client_{client}.safetensors" for name in ("one", "two"))
        assert read_rounds(one) == read_rounds(two) == [1, 2]
        assert torch.equal(read_row(one, 2), read_row(two, 2))


def test_the_path_norm_is_logged_after_every_round(tmp_path):
    run([*SMALL, "trajectory.path_norm=true", "trajectory.every=2", f"hydra.run.dir={tmp_path}"])
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    row = read_row(tmp_path / "trajectory.safetensors", 2).double().numpy() ** 2
    w1, b1, w2, b2 = np.split(row, np.cumsum([64 * 8, 8, 80]))
    hidden = w1.reshape(8, 64).sum(1) + b1
    assert len(rows) == 2
    assert all(float(one["path_norm"]) > 0 for one in rows)
    assert float(rows[1]["path_norm"]) == pytest.approx(np.sqrt((w2.reshape(10, 8) @ hidden + b2).sum()), rel=1e-5)
    assert rows[0]["path_norm"] != rows[1]["path_norm"]


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("trajectory.clients=[9]", "trajectory.clients is 9; it must be a whole number from 0 to 3"),
        ("trajectory.clients=[-1]", "trajectory.clients is -1; it must be a whole number from 0 to 3"),
        ("trajectory.clients=3", "trajectory.clients is 3; it must be a list of clients"),
        ("trajectory.path_norm=maybe", "trajectory.path_norm is 'maybe'"),
    ],
)
def test_options_of_the_trajectory_are_checked_before_training(tmp_path, option, line):
    with pytest.raises(ValueError, match=line):
        run([*SMALL, option, f"hydra.run.dir={tmp_path}"])


def test_a_model_without_a_path_norm_is_refused_by_name(tmp_path):
    options = [*SMALL[2:], "model=vit_digits", "trajectory.path_norm=true", f"hydra.run.dir={tmp_path}"]
    with pytest.raises(ValueError, match=r"LayerNorm, for which there is no path norm; set trajectory.path_norm=false"):
        run(options)
