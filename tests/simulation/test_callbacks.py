"""What a person sees and what loggers get."""

from __future__ import annotations

import copy
import io
import math
import re
import signal
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.progress import Progress
from small import Small, small_data, small_net, uneven_parts
from staged import staged

from fedsparse.core import parallel, signals
from fedsparse.core.seeding import Purpose, generator, number
from fedsparse.federation.phases import Phase
from fedsparse.job import config
from fedsparse.job.execute import quiet
from fedsparse.simulation.evaluation import Evaluation
from fedsparse.simulation.progress import FittedLine, RoundProgress, human_bytes
from fedsparse.simulation.tracking import GracefulStop, RoundLog


def watch(tmp_path, terminal, shared=False, width=150, small=None):
    """Run two rounds and return what the bar wrote."""
    quiet()
    small = small or Small(small_net(), small_data(), uneven_parts())
    evaluation, screen = Evaluation(), io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=width)
    small.callbacks = [
        evaluation,
        RoundLog(small.rounds, evaluation),
        RoundProgress(small.rounds, evaluation, lambda round: 5, console, shared),
    ]
    small.fit(2, tmp_path)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())


def test_the_bar_shows_round_client_loss_accuracy_bytes_and_time(tmp_path):
    last = watch(tmp_path, terminal=True).strip().splitlines()[-1]
    for part in (
        r"round 2/2, client 5/5",
        r"loss \d\.\d{3}",
        r"val acc \s*\d+\.\d\d%",
        r"sent up \d+\.\d kB",
        "left 0:00:00",
    ):
        assert re.search(part, last), (part, last)


def test_a_terminal_of_80_columns_shows_the_bar_and_keeps_what_counts(tmp_path):
    last = watch(tmp_path, terminal=True, width=80).strip().splitlines()[-1]
    assert len(last) <= 80
    assert re.fullmatch(
        r"round 2/2, client 5/5 ━{10} loss \d\.\d{3}  val acc \s*\d+\.\d\d% 0:00:0\d left 0:00:00", last
    ), last


WHERE = "round 100/100{} client 100/100"


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (40, None),
        (60, f"{WHERE.format('')} 0.041 97.78% left -:--:--"),
        (66, f"{WHERE.format('')} loss 0.041 acc 97.78% left -:--:--"),
        (80, f"{WHERE.format(',')} {'━' * 10} loss 0.041  val acc 97.78% left -:--:--"),
        (100, f"{WHERE.format(',')} {'━' * 13} loss 0.041  val acc 97.78% sent up 165.4 MB left -:--:--"),
        (120, f"{WHERE.format(',')} {'━' * 20} loss 0.041  val acc 97.78% sent up 165.4 MB 0:00:00 left -:--:--"),
    ],
)
def test_what_fits_a_terminal_of_any_width(width, expected):
    """By hand: the words are dropped from the ends of the list, and the rest is the bar's, from 8 to 20 columns."""
    screen = io.StringIO()
    console = Console(file=screen, width=width, force_terminal=True, color_system=None)
    wordings = [
        (WHERE.format(","), "loss 0.041  val acc 97.78%"),
        (WHERE.format(""), "loss 0.041 acc 97.78%"),
        (WHERE.format(""), "0.041 97.78%"),
    ]
    progress = Progress(FittedLine(console), console=console)
    progress.add_task("", total=1000, completed=1000, wordings=wordings, sent="sent up 165.4 MB")
    console.print(progress.make_tasks_table(progress.tasks))
    (line,) = screen.getvalue().splitlines()
    assert len(line) <= width
    assert expected is None or line.rstrip() == expected


def test_clients_that_explore_send_bytes_of_the_preparation(tmp_path):
    phases = [Phase("explore", updates_model=False, local_epochs=1), Phase("learn", rounds=1)]
    explored, learned = watch(tmp_path, terminal=False, small=staged(phases)).strip().splitlines()
    assert re.search(r"^explore 1/1  .*  sent up [1-9]\d*\.\d kB in preparation  ", explored), explored
    assert re.search(r"^round 1/1  .*  sent up [1-9]\d*\.\d kB  ", learned), learned


def test_without_a_terminal_each_round_is_a_line(tmp_path):
    lines = watch(tmp_path, terminal=False).strip().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["round 1/2", "round 2/2"]


@pytest.mark.parametrize("terminal", [True, False])
def test_beside_other_runs_rounds_go_to_the_log_alone(tmp_path, terminal, caplog):
    with caplog.at_level("INFO", logger="fedsparse"):
        assert watch(tmp_path, terminal, shared=True).strip() == ""
    assert [record.message.split("  ")[0] for record in caplog.records] == ["round 1/2", "round 2/2"]


def test_a_signal_while_processes_wait_for_each_other_ends_the_next_round(monkeypatch):
    """What a process had when the wait began is sent; what comes during the wait is not in it."""

    def gather(value):
        sent = copy.deepcopy(value)
        if not stop.own:
            signal.raise_signal(signal.SIGUSR1)
        return [sent]

    monkeypatch.setattr(parallel, "gather", gather)
    before = {number: signal.getsignal(number) for number in [*signals.CLUSTER, *signals.TERMINAL]}
    stop, trainer, stopped = GracefulStop(), SimpleNamespace(should_stop=False), []
    try:
        stop.on_train_start(trainer, None)
        for _ in range(2):
            stop.on_train_epoch_end(trainer, None)
            stopped.append((trainer.should_stop, [*stop.received]))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert stopped == [(False, []), (True, [signal.SIGUSR1])]


def test_a_signal_in_the_wait_of_the_last_round_is_handed_on(monkeypatch):
    stop = GracefulStop()
    stop.began = 0.0
    monkeypatch.setattr(parallel, "gather", lambda value: [copy.deepcopy(value)])
    stop.on_train_epoch_end(SimpleNamespace(should_stop=False), None)
    stop.own.append(signal.SIGTERM)
    assert stop.received == []
    stop.on_train_end(SimpleNamespace(), None)
    assert stop.received == [signal.SIGTERM]


def test_bytes_for_people():
    assert [human_bytes(n) for n in (12, 1500, 2_500_000, 3.2e9)] == ["12 B", "1.5 kB", "2.5 MB", "3.2 GB"]


@pytest.mark.parametrize(
    ("environment", "offline"),
    [({}, True), ({"WANDB_API_KEY": "x"}, False), ({"WANDB_API_KEY": "x", "WANDB_MODE": "offline"}, True),
     ({"WANDB_MODE": "online"}, False), ({"WANDB_MODE": "dryrun"}, True)],
)  # fmt: skip
def test_wandb_is_online_when_a_key_is_present(tmp_path, monkeypatch, environment, offline):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert config.wandb_offline() is offline


def test_a_key_in_netrc_counts(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert config.wandb_offline() is False


def test_an_offline_run_says_how_to_sync_it(run_in, capsys):
    _, folder = run_in("a", "logger=wandb", "federation.rounds=1")
    assert re.search(rf"wandb sync {folder}/wandb/offline-run-\S+", capsys.readouterr().out)
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))


def test_two_offline_runs_of_one_process(run_in, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "")
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("HOME", "/nonexistent")
    folders = [run_in(name, "logger=wandb", "federation.rounds=1")[1] for name in "ab"]
    assert all(list(folder.glob("wandb/offline-run-*/*.wandb")) for folder in folders)


def test_streams_do_not_meet():
    keys = [(0, 1), (0, 1, 0), (0, 1, 0, 0), (0, 1, 1), (0, 2), (1, 1), (0, 1, 0, 1), (0, 1, 1, 0)]
    draws = {int(generator(seed, Purpose(purpose), *ids).integers(2**62)) for seed, purpose, *ids in keys}
    numbers = {number(seed, Purpose(purpose), *ids) for seed, purpose, *ids in keys}
    assert len(draws) == len(numbers) == len(keys)
    assert all(0 <= n < 2**63 for n in numbers)


def test_numbers_are_spread_evenly():
    values = [number(0, Purpose.DROPOUT, r, c) / 2**63 for r in range(50) for c in range(50)]
    assert sum(values) / len(values) == pytest.approx(0.5, abs=4 * math.sqrt(1 / 12 / len(values)))
