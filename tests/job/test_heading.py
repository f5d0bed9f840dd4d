"""What a run says before it begins: one line, from the configuration alone."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
from composed import composed
from omegaconf import OmegaConf

from fedsparse.core import waits
from fedsparse.job.heading import announcement, heading
from fedsparse.job.resume import Job

CHOSEN = {"data": "digits", "model": "vit_digits", "partition": "iid", "mask_rule": "random", "server": "fedavg"}


@pytest.fixture(scope="module")
def default():
    return composed()


@pytest.mark.parametrize(
    ("choices", "values", "said"),
    [
        ({}, {}, "digits, vit_digits, iid, random 80% frozen, server=fedavg, seed 0; 20 clients, 10 rounds; runs/a"),
        (
            {"mask_rule": "dense", "server": "fedadam", "exchange": "topk", "experiment": "None"},
            {"seed": 3, "federation.rounds": 2},
            "digits, vit_digits, iid, dense, exchange=topk, server=fedadam, seed 3; 20 clients, 2 rounds; runs/a",
        ),
        (
            {},
            {"federation.num_clients": 1},
            "digits, vit_digits, iid, random 80% frozen, server=fedavg, seed 0; 1 client, ",
        ),
        (
            {},
            {"sparsity.ratio": 0.95, "sparsity.mode": "prune"},
            "digits, vit_digits, iid, random 95% pruned, server=fedavg, ",
        ),
        ({}, {"sparsity": {"rank": 8}}, "digits, vit_digits, iid, random, server=fedavg, seed 0; "),
        ({}, {"sparsity.ratio": "much"}, "digits, vit_digits, iid, random, server=fedavg, seed 0; "),  # refused later
    ],
)
def test_what_is_about_to_run(choices, values, said, default, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = copy.deepcopy(default)
    for key, value in values.items():
        OmegaConf.update(cfg, key, value, merge=False)
    assert announcement(Job(cfg, Path(tmp_path, "runs/a"), CHOSEN | choices)).startswith(said)


def test_a_resumed_run_says_so_and_an_older_one_lacks_choices(default, tmp_path):
    job = Job(default, tmp_path, {"mask_rule": "random"}, resumed=True)
    assert announcement(job).startswith("resumes own, own, own, random 80% frozen, seed 0; ")


def test_what_was_pruned_is_not_called_frozen():
    run = CHOSEN | {"sparsity": 0.5, "seed": 0}
    assert heading(run) == "digits, vit_digits, iid, random 50% frozen, seed 0"
    assert heading(run | {"compression": 1.9}) == "digits, vit_digits, iid, random 50% pruned, seed 0"


class Terminal:
    """Standard error that is a terminal, and notes what is written."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("passes", "at"), [(1, "3/3"), (20, "2/20")])
def test_a_wait_is_shown_on_a_terminal_of_ones_own_and_logged(shared, passes, at, monkeypatch, caplog):
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with caplog.at_level("INFO", logger="fedsparse"):
        with waits.waiting("calibration", shared, passes):
            for _ in range(2):
                for place in range(3):
                    waits.advance(place + 1, 3)
            with waits.waiting("another", shared):  # one spinner at a time
                pass
        waits.advance(1, 7)  # of nothing
    assert ("calibration" in screen.text) is not shared
    assert (at in screen.text) is not shared
    assert "another" not in screen.text
    assert "1/7" not in screen.text
    assert [record.message.split(":")[0] for record in caplog.records] == ["another", "calibration"]


def test_a_bar_is_empty_only_where_something_is_counted(monkeypatch):
    """A rule that asks no client has no empty bar, which would stay so: the bar's whole width pulses."""
    widths = []
    for counted in (False, True):
        screen = Terminal()
        monkeypatch.setattr("sys.stderr", screen)
        monkeypatch.setenv("TERM", "xterm-256color")
        with waits.waiting("calibration", passes=1):
            if counted:
                waits.advance(1, 1000)
        last = screen.text.rsplit("calibration", 1)[1]
        widths.append(len(re.findall(r"\x1b\[[\d;]*m", last.partition("\n")[0])))  # a pulse changes colour as it goes
    assert widths[0] > 10 > widths[1]


@pytest.mark.parametrize(("rank", "said"), [("0", "fedsparse: downloads a.zip\n"), ("1", "")])
def test_a_download_is_a_line_of_the_first_process(rank, said, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    with waits.waiting("data and model"):
        waits.may_download("downloads a.zip")
    assert capsys.readouterr().err == said
