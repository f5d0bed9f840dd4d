"""However a run ends, what it found stays, one line says how to go on, and nothing is left where nothing was begun."""

from __future__ import annotations

import copy
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import lightning
import matplotlib.figure
import pytest
import wandb
from lightning.pytorch.loggers import Logger

from fedsparse import calibrate, run
from fedsparse.core import files, signals
from fedsparse.job import prepare
from fedsparse.job.limits import ALLOWED, INSTEAD, check_trainer, seconds_of
from fedsparse.simulation import tracking
from fedsparse.simulation.csv_logger import read_rows
from fedsparse.train import main

OPTIONS = ["model=mlp", "logger=csv", "pictures=false", "calibration.head_steps=4"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def at_round(monkeypatch, number, act):
    """Do something at the start of a round, counted from 1."""
    begin = tracking.RoundLog.on_train_epoch_start

    def begun(self, trainer, module):
        begin(self, trainer, module)
        if trainer.current_epoch + 1 == number:
            act()

    monkeypatch.setattr(tracking.RoundLog, "on_train_epoch_start", begun)


class Failing(Logger):
    """A logger that fails where it is told to."""

    name, version = "failing", ""

    def __init__(self, where, save_dir):
        super().__init__()
        self.where, self.calls = where, []

    @property
    def experiment(self):
        self._do("experiment")

    def _do(self, call):
        self.calls.append(call)
        if call == self.where:
            raise OSError(28, "No space left on device", "elsewhere")

    def log_metrics(self, metrics, step=None):
        self._do("log_metrics")

    def log_hyperparams(self, params, *args, **kwargs):
        self._do("log_hyperparams")

    def save(self):
        self._do("save")

    def after_save_checkpoint(self, checkpoint_callback):
        self._do("after_save_checkpoint")

    def finalize(self, status):
        self._do("finalize")


@pytest.mark.parametrize(
    "where", ["experiment", "log_hyperparams", "log_metrics", "save", "after_save_checkpoint", "finalize"]
)
def test_a_logger_that_fails_is_a_warning_and_is_asked_no_more(where, caplog, monkeypatch):
    made = []
    monkeypatch.setattr(Failing, "__init__", _noting(Failing.__init__, made))
    target = f"+logger.failing={{_target_: {__name__}.Failing, _partial_: true, where: {where}}}"
    warned = _warnings(monkeypatch)
    summary = run([*OPTIONS, target, "federation.rounds=2", "hydra.run.dir=a"])
    assert summary["rounds"] == 2
    assert Path("a/summary.json").is_file()
    assert len(warned) == 1
    assert "Failing is left out from here on" in warned[0]
    assert "No space left" in warned[0]
    assert made[0].calls[-1] == where
    assert made[0].calls.count(where) == 1


def _noting(init, made):
    def noted(self, *args, **kwargs):
        init(self, *args, **kwargs)
        made.append(self)

    return noted


def _warnings(monkeypatch):
    said = []
    monkeypatch.setattr(
        logging.getLogger("fedsparse"), "warning", lambda text, *args, **kwargs: said.append(text % args)
    )
    return said


@pytest.mark.parametrize("broken", ["init", "Artifact", "finish"])
def test_results_are_written_before_w_and_b_can_fail(monkeypatch, broken):
    def fails(*args, **kwargs):
        if broken != "init":
            assert Path("a/summary.json").is_file()
            assert Path("a/model.safetensors").is_file()
        raise PermissionError(13, "Permission denied", "/proc/1/x")

    run_of = wandb.sdk.wandb_run.Run
    monkeypatch.setattr(*{"finish": (run_of, "finish")}.get(broken, (wandb, broken)), fails)
    warned = _warnings(monkeypatch)
    try:
        assert run([*OPTIONS[:1], *OPTIONS[2:], "federation.rounds=1", "hydra.run.dir=a"])["rounds"] == 1
    finally:
        monkeypatch.undo()
        if wandb.run is not None:
            wandb.run.finish()
    assert len(warned) == 1
    assert "WandbLogger is left out" in warned[0]


def test_pictures_that_fail_are_warnings(monkeypatch):
    def fails(self, *args, **kwargs):
        raise OSError(13, "Permission denied", "fontlist.json")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", fails)
    warned = _warnings(monkeypatch)
    summary = run(["model=mlp", "logger=csv", "calibration.head_steps=4", "federation.rounds=1", "hydra.run.dir=a"])
    assert summary["rounds"] == 1
    assert [line.split()[0] for line in warned] == ["partition.png", "mask.png", "mask.png", "curves.png"][
        : len(warned)
    ]
    assert len(warned) >= 3


def test_a_limit_is_a_stop_that_a_resume_continues():
    whole = run([*OPTIONS, "federation.rounds=4", "hydra.run.dir=whole"])
    with pytest.raises(
        ValueError, match=r"trainer.max_time=00:00:00:00: round 1 is closed and saved; go on with resume="
    ):
        run([*OPTIONS, "federation.rounds=4", "+trainer.max_time=00:00:00:00", "hydra.run.dir=a"])
    assert not Path("a/summary.json").exists()
    with pytest.raises(ValueError, match="round 2 is closed"):
        run(["resume=a"])
    summary = run(["resume=a", "trainer.max_time=null"])
    assert (summary["rounds"], summary["global_sha256"]) == (4, whole["global_sha256"])


def test_early_stopping_stays_a_finish(capsys):
    options = ["callbacks=early_stopping", "callbacks.early_stopping.patience=1", "optimizer.lr=1e-9"]
    assert run([*OPTIONS, *options, "federation.rounds=9", "hydra.run.dir=a"])["rounds"] == 2
    run(["resume=a"])
    assert "is finished after 2 rounds" in capsys.readouterr().out


def test_every_key_of_lightnings_trainer_is_let_through_or_refused():
    import inspect

    keys = set(inspect.signature(lightning.Trainer.__init__).parameters) - {"self"}
    assert keys <= {*ALLOWED, *INSTEAD}
    assert not {*ALLOWED} & {*INSTEAD}


@pytest.mark.parametrize("key", sorted(INSTEAD))
def test_a_key_that_would_change_a_round_is_refused(key):
    with pytest.raises(ValueError, match=rf"^trainer\.{key} is not to be set: "):
        check_trainer({"_target_": "lightning.Trainer", key: 1})


def test_refused_before_anything_is_made():
    for key, text in (("limit_train_batches", "federation.clients_per_round"), ("nonsense", "no key trainer.nonsense")):
        with pytest.raises(ValueError, match=text):
            run([*OPTIONS, f"+trainer.{key}=1", "hydra.run.dir=made/a"])
    assert os.listdir() == []


@pytest.mark.parametrize("limit", ["1:0", "00:00:00", 5, 1.5, ["x"], {"moons": 1}, {"hours": "x"}])
def test_a_limit_that_is_none_is_one_line(limit):
    with pytest.raises(ValueError, match=r"^trainer\.max_time is .* days:hours:minutes:seconds"):
        seconds_of(limit)


def test_fewer_rounds_on_resume_can_be_followed_by_more(monkeypatch, capsys):
    """Begun with 30, killed after one, finished with 2: then 3 are more."""

    def killed():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        at_round(patch, 2, killed)
        with pytest.raises(SystemExit):
            run([*OPTIONS, "federation.rounds=30", "hydra.run.dir=a"])
    assert run(["resume=a", "federation.rounds=2"])["rounds"] == 2
    assert run(["resume=a", "federation.rounds=3"])["rounds"] == 3
    assert [row["round"] for row in read_rows("a/metrics.csv")] == [1, 2, 3]
    run(["resume=a", "federation.rounds=3"])
    assert "is finished after 3 rounds" in capsys.readouterr().out


ENDS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.mark.parametrize(("number", "status"), ENDS)
def test_a_signal_in_training_closes_the_round_and_says_how_to_go_on(monkeypatch, capfd, number, status):
    whole = run([*OPTIONS, "federation.rounds=3", "hydra.run.dir=whole"])
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_round(patch, 2, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as stop:
            run([*OPTIONS, "federation.rounds=3", "hydra.run.dir=a"])
    assert stop.value.code == status
    assert signal.getsignal(number) is before
    assert f"{number.name}: round 2 is closed and saved; go on with resume=" in capfd.readouterr().err
    assert run(["resume=a"])["global_sha256"] == whole["global_sha256"]


@pytest.mark.parametrize(("number", "status"), ENDS)
def test_a_signal_before_the_first_round_says_how_to_go_on(monkeypatch, capfd, number, status):
    def asked(*args, **kwargs):
        os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "choose_mask", asked)
        with pytest.raises(SystemExit) as stop:
            run([*OPTIONS, "federation.rounds=1", "hydra.run.dir=a"])
    assert stop.value.code == status
    assert f"fedsparse: {number.name}: no round is saved yet; go on with resume=" in capfd.readouterr().err
    assert run(["resume=a"])["rounds"] == 1


def test_a_second_interrupt_ends_at_once(monkeypatch, capfd):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        at_round(patch, 2, twice)
        with pytest.raises(SystemExit) as stop:
            run([*OPTIONS, "federation.rounds=3", "hydra.run.dir=a"])
    assert stop.value.code == 130
    assert "SIGINT: what was saved before stays; go on with resume=" in capfd.readouterr().err
    assert [row["round"] for row in read_rows("a/metrics.csv")] == [1]
    assert run(["resume=a"])["rounds"] == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_what_is_ignored_stays_so(monkeypatch, number):
    """As nohup has it, and a shell for what it runs in the background."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        at_round(monkeypatch, 1, lambda: os.kill(os.getpid(), number))
        assert run([*OPTIONS, "federation.rounds=2", "hydra.run.dir=a"])["rounds"] == 2
    finally:
        signal.signal(number, before)


def test_a_run_in_a_thread_heeds_no_signals_and_ends_well():
    found = []
    thread = threading.Thread(target=lambda: found.append(run([*OPTIONS, "federation.rounds=1", "hydra.run.dir=a"])))
    thread.start()
    thread.join()
    assert found[0]["rounds"] == 1


@pytest.mark.parametrize(("number", "status"), [*ENDS, (None, 130)])
def test_a_command_ends_in_one_line(capsys, number, status):
    def body():
        if number is None:
            raise KeyboardInterrupt
        os.kill(os.getpid(), number)

    with pytest.raises(SystemExit) as stop, signals.command():
        body()
    assert stop.value.code == status
    assert capsys.readouterr().err == f"fedsparse: {(number or signal.SIGINT).name}: stopped before the end\n"


def test_a_stop_survives_the_way_between_processes():
    for number, status in ENDS:
        again = copy.copy(signals.Stopped(number, said=True))  # as pickle makes it anew
        assert (again.number, again.said, again.code) == (number, True, status)


def test_each_run_writes_to_its_own_log():
    run([*OPTIONS, "federation.rounds=1", "hydra.run.dir=a"])
    run([*OPTIONS, "federation.rounds=1", "hydra.run.dir=b"])
    handlers = list(logging.getLogger().handlers)
    text = Path("b/run.log").read_text()
    run(["resume=a", "federation.rounds=2"])
    assert "round 2/2" in Path("a/run.log").read_text()
    assert Path("b/run.log").read_text() == text
    assert logging.getLogger().handlers == handlers


def test_a_resume_warns_on_the_terminal_too(capsys):
    run([*OPTIONS, "federation.rounds=2", "hydra.run.dir=a"])
    last = Path("a/checkpoints/last.ckpt")
    last.write_bytes(last.read_bytes()[:100])
    capsys.readouterr()
    run(["resume=a", "federation.rounds=3"])
    assert "the one before it is used" in capsys.readouterr().out


MISTAKES = {
    "a checked number": ["optimizer.lr=-1"],
    "a part that cannot be built": ["aggregation=trimmed_mean", "aggregation.trim=0.9"],
    "data that are not there": ["data=imagefolder", "data.root=nowhere"],
    "a mask file that is not there": ["mask_rule=from_file", "mask_rule.path=nowhere"],
}


@pytest.mark.parametrize("options", MISTAKES.values(), ids=MISTAKES)
@pytest.mark.parametrize("go", [run, calibrate.run], ids=["train", "calibrate"])
def test_a_mistake_leaves_no_folder_behind(options, go):
    with pytest.raises(Exception, match=r".+"):
        go(["model=mlp", "logger=csv", "calibration.cache=null", *options, "hydra.run.dir=runs/day/time"])
    assert os.listdir() == []


def test_a_mistake_leaves_what_was_there(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/day/time").mkdir(parents=True)
    (tmp_path / "runs/day/time/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"optimizer\.lr"):
        run([*OPTIONS, "optimizer.lr=-1", "hydra.run.dir=runs/day/time"])
    assert (tmp_path / "runs/day/time/notes.txt").read_text() == "mine"


def test_a_cell_that_fails_leaves_no_folder_and_the_others_stay(monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["train", "-m", *OPTIONS, "federation.rounds=1", "optimizer.lr=-1,0.1", "hydra.sweep.dir=s"]
    )
    with pytest.raises(SystemExit):
        main()
    assert [path.parent.name for path in Path("s").rglob("metrics.csv")] == [
        path.name for path in Path("s").iterdir() if path.is_dir()
    ]
    assert "optimizer.lr is -1" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("module", ["train", "report"])
def test_a_reader_that_leaves_ends_nothing(module):
    """``| head -1``: the run goes on, without a word of it."""
    run([*OPTIONS, "federation.rounds=1", "hydra.run.dir=before"])
    given = {"train": " ".join([*OPTIONS, "federation.rounds=2", "hydra.run.dir=a"]), "report": "before"}[module]
    command = f"set -o pipefail; {sys.executable} -u -m fedsparse.{module} {given} 2>&1 | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (0, 1, "")
    assert module == "report" or Path("a/summary.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("module", ["calibrate", "bench.__main__", "report"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_commands_end_in_one_line(module, number):
    """Whenever the signal comes: here, as soon as the command has taken it over."""
    code = (
        "import os, sys, runpy\nfrom fedsparse.core import signals\ntaken = signals.heeded\n"
        "import contextlib\n@contextlib.contextmanager\ndef then():\n"
        f"    with taken():\n        os.kill(os.getpid(), {int(number)})\n        yield\n"
        "signals.heeded = then\nsys.argv = ['x', 'x']\n"
        f"runpy.run_module('fedsparse.{module}', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert done.stderr == f"fedsparse: {number.name}: stopped before the end\n"


@pytest.mark.parametrize("where", ["a file", "a folder that takes nothing"])
def test_a_cache_that_keeps_nothing_is_a_warning(monkeypatch, where):
    if where == "a file":
        Path("kept").write_text("")
    else:
        write = files.write

        def full(path, *rest):
            if path.parent.name == "kept":
                raise OSError(28, "No space left on device")
            write(path, *rest)

        monkeypatch.setattr(files, "write", full)
    warned = _warnings(monkeypatch)
    summary = run(["model=mlp", *OPTIONS[1:], "calibration.cache=kept", "federation.rounds=1", "hydra.run.dir=a"])
    assert summary["rounds"] == 1
    assert warned
    assert all("calibration.cache=kept keeps nothing" in line for line in warned)


def test_the_model_is_there_before_figures_of_it_can_fail(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("fedsparse.job.execute.summarise", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run([*OPTIONS, "federation.rounds=1", "hydra.run.dir=a"])
    assert Path("a/model.safetensors").is_file()
    assert run(["resume=a"])["rounds"] == 1
