"""Memory is counted at its peak, and in the processes that a runner starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedsparse import bench
from fedsparse.bench import memory
from fedsparse.bench.alone import memory as memory_alone
from fedsparse.bench.pairs import Trained
from fedsparse.bench.problems import Task

pytestmark = pytest.mark.skipif(not memory.PROC.is_dir(), reason="needs /proc")

SIZE, MARGIN = 64 * 2**20, 8 * 2**20


def fill():
    """Take 64 MB and give them back."""
    return float(torch.ones(SIZE // 4)[7])


def test_a_peak_counts_though_its_memory_is_given_back():
    found, grown = memory.grown(fill)
    assert found == 1.0
    assert SIZE - MARGIN < grown < SIZE + MARGIN


def test_an_earlier_peak_does_not_count():
    fill()
    _, grown = memory.grown(lambda: None)
    assert grown < MARGIN


def test_a_runners_other_processes_count():
    def train(task, feed):
        feed.tick()
        assert [len(client) for client in feed.batches] == [4] * 10
        fill()
        return Trained(None, elsewhere=10**9)

    found = memory_alone(train, Task(bench.PROBLEMS["mlp"], 1))["memory"]
    assert SIZE - MARGIN < found - 10**9 < SIZE + MARGIN


def test_processes_below_count_children_of_children_too():
    code = f"held = b'x' * {SIZE}; print('ready', flush=True); input()"
    command = ["sh", "-c", '"$0" -c "$1"; true', sys.executable, code]
    before = memory.descendants()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        found = memory.descendants() - before
        process.communicate("\n")
    assert SIZE < found < SIZE + 4 * MARGIN


@pytest.mark.parametrize("refused", ["write_text", "read_text"])
def test_without_proc_nothing_is_reported(monkeypatch, refused):
    """Where there is none, or what is in it cannot be read or written."""

    def absent(path, *args, **options):
        raise FileNotFoundError(2, "No such file or directory", str(path))

    monkeypatch.setattr(Path, refused, absent)
    assert memory.grown(lambda: 5) == (5, None)
