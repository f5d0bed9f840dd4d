"""trajectory.safetensors: the rows are those that the federation had, whatever is killed or added."""

import struct

import pytest
import torch
from safetensors.torch import load_file
from small import Small, small_data, small_net, uneven_parts

from fedsparse import run
from fedsparse.federation.trajectory import Layout, Trajectory, read_rounds, read_row


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
