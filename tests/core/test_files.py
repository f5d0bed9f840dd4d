"""Files are written whole, through no link, and a full disk loses nothing that was saved before."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from contextlib import ExitStack, contextmanager, nullcontext

import pytest
import torch

from fedsparse import run
from fedsparse.core import files
from fedsparse.core.lines import RoundLines
from fedsparse.federation.stores.store import FileStore
from fedsparse.job.sweep import locked
from fedsparse.simulation.csv_logger import RoundCSV, read_rows

OPTIONS = ["model=mlp", "logger=csv", "pictures=false", "calibration.head_steps=4"]


@contextmanager
def quota(size):
    """Let this process write files of so many bytes at most: what a full disk does, without one.

    For no longer than needed: the tests' own output may go to a file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def takes_half(monkeypatch):
    """A system that takes half of what it is given, one byte at least."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, bytes(data)[: max(1, len(data) // 2)]))


@pytest.mark.parametrize("content", ["text é", b"\x00\xff", lambda file: file.write(b"made")])
def test_a_file_is_written_whole(tmp_path, content, takes_half):
    files.write(tmp_path / "a", "old")
    files.write(tmp_path / "a", content)
    expected = {str: lambda: content.encode(), bytes: lambda: content}.get(type(content), lambda: b"made")()
    assert (tmp_path / "a").read_bytes() == expected
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("planted", ["a", "a.part", ".a.part"])
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_nothing_is_written_through_a_link(tmp_path, planted, link):
    outside, folder = tmp_path / "outside", tmp_path / "run"
    outside.write_text("mine")
    folder.mkdir()
    link(outside, folder / planted)
    files.write(folder / "a", "theirs")
    assert outside.read_text() == "mine"
    assert (folder / "a").read_text() == "theirs"
    assert not (folder / "a").is_symlink()


def test_what_is_appended_goes_through_no_link(tmp_path):
    (tmp_path / "outside").write_text("mine\n")
    (tmp_path / "a").symlink_to(tmp_path / "outside")
    with pytest.raises(OSError, match="a'"):
        files.append(tmp_path / "a", b"theirs\n")
    assert (tmp_path / "outside").read_text() == "mine\n"


@pytest.mark.parametrize("content", [b"x" * 5000, lambda file: torch.save(torch.zeros(5000), file)])
def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path, content):
    files.write(tmp_path / "a", "old")
    with quota(1000), pytest.raises(OSError, match=r"free some space.*resume.*/a'"):
        files.write(tmp_path / "a", content)
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_rows_are_appended_whole_or_not_at_all(tmp_path, takes_half):
    """The quota is 10 bytes above a row's end: the last row begins, and is cut off again."""
    table = RoundCSV(tmp_path)
    table.log_metrics({"a": 0.5}, step=1)
    table.log_metrics({"a": 0.25}, step=2)
    whole = (tmp_path / "metrics.csv").read_bytes()
    assert whole == b"round,a\n1,0.5\n2,0.25\n"
    with quota(len(whole) + 10), pytest.raises(OSError, match="free some space"):
        table.log_metrics({"a": 0.1234567890123}, step=3)
    assert (tmp_path / "metrics.csv").read_bytes() == whole
    lines = RoundLines("round,b", tmp_path / "lines.csv")
    lines.append(["1,2\n", "1,3\n"])
    with quota(20), pytest.raises(OSError, match="free some space"):
        lines.append(["2,1234567890\n"])
    assert (tmp_path / "lines.csv").read_text() == "round,b\n1,2\n1,3\n"


def test_a_store_on_a_full_disk_is_an_error_and_not_a_signal(tmp_path):
    store = FileStore(tmp_path / "clients.bin")
    with quota(100), pytest.raises(OSError, match=r"free some space.*clients\.bin"):
        store.write([0], torch.ones(1, 500))


def test_a_store_that_was_cut_off_is_refused(tmp_path):
    """Cut off, its rows would be read as zeros."""
    store = FileStore(tmp_path / "clients.bin")
    store.write(range(3), torch.ones(3, 5))
    state = store.state_dict()
    os.truncate(store.path, 30)
    with pytest.raises(ValueError, match="cut off"):
        FileStore(store.path).load_state_dict(state)


@pytest.mark.parametrize("damage", [b"\xff\xfe", b"\x00\x00\x00\n", b"x,1\n", b"2,1"])
def test_lines_are_read_as_far_as_they_go(tmp_path, damage):
    path = tmp_path / "lines.csv"
    path.write_bytes(b"round,b\n1,2\n" + damage)
    lines = RoundLines("round,b", path)
    lines.drop_from(3)
    lines.append(["3,4\n"])
    assert path.read_text() == "round,b\n1,2\n3,4\n"


PLANTED = [
    *("metrics.csv.part", ".metrics.csv.1.tmp", "traffic.csv", "metrics.csv", "run.log", "summary.json.part"),
    *("checkpoints/last.ckpt.part", "checkpoints/best.ckpt", ".hydra/config.yaml.part", "model.safetensors"),
]


def test_a_planted_link_reaches_no_file_outside(tmp_path, monkeypatch):
    """All of them in one folder that someone sent: the resume goes on, and the file outside is as it was."""
    monkeypatch.chdir(tmp_path)
    folder, outside = tmp_path / "run", tmp_path / "outside"
    run([*OPTIONS, "federation.rounds=1", f"hydra.run.dir={folder}"])
    outside.write_text("mine")
    for name in PLANTED:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(outside)
    assert run([f"resume={folder}", "federation.rounds=2"])["test/acc"] > 0
    assert [row["round"] for row in read_rows(folder / "metrics.csv")] == [2]  # the first was not in the link's file
    assert outside.read_text() == "mine"
    assert [path for path in folder.rglob("*") if path.is_symlink() or path.suffix in (".part", ".tmp")] == []


@pytest.mark.parametrize("name", ["checkpoints", ".hydra", "tensorboard"])
def test_a_folder_that_is_a_link_is_refused(tmp_path, name):
    (tmp_path / "outside").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match=f"run/{name} is a link"), locked(tmp_path / "run"):
        pass
    assert os.listdir(tmp_path / "outside") == []


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_the_lock_empties_no_file_outside(tmp_path, link):
    (tmp_path / "outside").write_text("mine")
    (tmp_path / "run").mkdir()
    link(tmp_path / "outside", tmp_path / "run" / ".lock")
    with pytest.raises(OSError, match="link") if link is os.symlink else nullcontext(), locked(tmp_path / "run"):
        pass
    assert (tmp_path / "outside").read_text() == "mine"


def test_a_hard_link_of_a_log_stays_as_it_was(tmp_path):
    """As ``cp -al`` makes them: the copy of a run folder goes on, the other stays."""
    (tmp_path / "outside").write_text("mine\n")
    os.link(tmp_path / "outside", tmp_path / "run.log")
    handler = files.LogFile(tmp_path / "run.log", encoding="utf-8")
    handler.stream.write("more\n")
    handler.close()
    assert (tmp_path / "run.log").read_text() == "mine\nmore\n"
    assert (tmp_path / "outside").read_text() == "mine\n"


def test_what_a_killed_writer_left_goes_and_others_stay(tmp_path):
    (tmp_path / ".a.1234.part").write_text("")
    (tmp_path / ".b.7.tmp").write_text("")
    (tmp_path / "c.part").mkdir()
    (tmp_path / "d.csv").write_text("")
    files.clear(tmp_path, age=3600)
    assert len(os.listdir(tmp_path)) == 4
    files.clear(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["c.part", "d.csv"]


def test_a_disk_that_fills_is_one_line_and_the_resume_comes_to_the_same(tmp_path, monkeypatch):
    """The checkpoint of the second round does not fit; torch's own word for that is a RuntimeError."""
    monkeypatch.chdir(tmp_path)
    whole = run([*OPTIONS, "federation.rounds=3", "hydra.run.dir=whole"])
    size = (tmp_path / "whole/checkpoints/last.ckpt").stat().st_size
    write, seen = files.write, []

    def full(path, *rest):
        seen.append(path.name)
        if seen.count("last.ckpt") == 2:
            full_disk.enter_context(quota(size // 2))
        write(path, *rest)

    with monkeypatch.context() as patch, ExitStack() as full_disk:
        patch.setattr(files, "write", full)
        with pytest.raises(OSError, match=r"free some space.*last\.ckpt"):
            run([*OPTIONS, "federation.rounds=3", "hydra.run.dir=full"])
    assert not list((tmp_path / "full").rglob("*.part"))
    again = run(["resume=full"])
    assert again["global_sha256"] == whole["global_sha256"]
    assert [row["round"] for row in read_rows(tmp_path / "full/metrics.csv")] == [1, 2, 3]


@pytest.mark.slow
def test_a_run_killed_while_it_writes_leaves_nothing_after_the_resume(tmp_path):
    """A kill in the middle of a checkpoint: the process writes half and is gone."""
    code = (
        "import os, sys, signal\nfrom fedsparse import run\nfrom fedsparse.core import files\n"
        "fill, seen = files._fill, []\n"
        "def half(disk, content):\n"
        "    seen.append('last.ckpt' in disk.path.name)\n"
        "    if sum(seen) == 2:\n"
        "        disk.write(b'half'); os.kill(os.getpid(), signal.SIGKILL)\n"
        "    fill(disk, content)\n"
        f"files._fill = half\nrun([*{OPTIONS!r}, 'federation.rounds=3', 'hydra.run.dir=killed'])\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True).returncode == -9
    assert list((tmp_path / "killed").rglob("*.part"))
    assert run([f"resume={tmp_path / 'killed'}"])["rounds"] == 3
    assert not list((tmp_path / "killed").rglob("*.part"))
