"""A sweep started again goes on where it stopped; launchers, signals and the search for hyper-parameters."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from fedsparse import run, train
from fedsparse.core.folder import LAST
from fedsparse.job.shipped import conf_dir
from fedsparse.job.sweep import MAY_DIFFER, cell_name, difference, locked
from fedsparse.simulation import tracking
from fedsparse.simulation.csv_logger import read_rows

pytestmark = pytest.mark.slow

OPTIONS = ["model=mlp", "logger=csv", "calibration.head_steps=1", "mask_rule=random", "pictures=False"]  # Hydra's case
CELL = "mask_rule-random+model-mlp"


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Type a sweep, in this process; gives its exit status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("warnings.formatwarning", None)

    def go(*overrides):
        options = [*OPTIONS, "hydra.sweep.dir=grid", *overrides]
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        monkeypatch.setattr(sys, "argv", ["fedsparse", "-m", *options])
        try:
            train.main()
        except SystemExit as error:
            return error.code
        return 0

    return go


def cell(seed):
    return f"grid/calibration.head_steps-1+{CELL}+seed-{seed}"


def summary_of(folder):
    with open(f"{folder}/summary.json") as file:
        return json.load(file)


def sha(*overrides):
    """The model of an undisturbed single run."""
    return run([*OPTIONS, *overrides])["global_sha256"]


def contents(folder):
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def test_started_again_it_skips_the_finished_and_runs_the_new(sweep, tmp_path, capsys, monkeypatch):
    assert sweep("seed=0,1", "federation.rounds=1") == 0
    assert capsys.readouterr().out.startswith("2 cells in grid\n")
    before = contents(tmp_path / cell(0)) | contents(tmp_path / cell(1))
    with monkeypatch.context() as patch:
        patch.setattr("fedsparse.job.execute.assemble", lambda _: pytest.fail("built what is finished"))
        assert sweep("federation.rounds=1", "seed=1,0") == 0
    out = capsys.readouterr().out
    assert out.startswith("2 cells in grid, 2 finished before\n")
    assert all(f"{cell(seed)} is finished after 1 rounds\n" in out for seed in (0, 1))
    assert sweep("seed=0,1,2", "federation.rounds=1") == 0
    assert contents(tmp_path / cell(0)) | contents(tmp_path / cell(1)) == before
    assert summary_of(cell(2))["global_sha256"] == sha("seed=2", "federation.rounds=1")
    assert [path.name for path in sorted(tmp_path.glob("grid/*/"))] == [cell(s).removeprefix("grid/") for s in range(3)]


@pytest.mark.slow
def test_more_rounds_go_on(sweep):
    for rounds in (1, 3, 2):  # two are fewer than are there
        assert sweep("seed=0", f"federation.rounds={rounds}") == 0
    assert [row["round"] for row in read_rows(f"{cell(0)}/metrics.csv")] == [1, 2, 3]
    assert summary_of(cell(0))["global_sha256"] == sha("federation.rounds=3")


@pytest.mark.slow
def test_rounds_that_are_swept_are_cells_of_their_own(sweep):
    assert sweep("federation.rounds=1,2") == 0
    names = [f"grid/calibration.head_steps-1+federation.rounds-{rounds}+{CELL}" for rounds in (1, 2)]
    assert [summary_of(name)["rounds"] for name in names] == [1, 2]


@pytest.mark.slow
def test_a_run_that_stopped_early_by_itself_is_finished(sweep, tmp_path, capsys):
    options = ("callbacks=early_stopping", "callbacks.early_stopping.patience=1", "optimizer.lr=1e-9")
    for _ in range(2):
        assert sweep(*options, "federation.rounds=9") == 0
    assert "is finished after 2 rounds" in capsys.readouterr().out
    assert sweep(*options, "federation.rounds=10") == 0
    assert "is finished" not in capsys.readouterr().out


def test_another_run_in_the_cell_is_refused_and_the_rest_is_done(sweep, tmp_path, capsys):
    assert sweep("seed=0,1", "federation.rounds=1", "hydra.sweep.subdir='of-${seed}'") == 0
    before = contents(tmp_path / "grid" / "of-0")
    path = tmp_path / "grid" / "of-1" / ".hydra" / "config.yaml"
    path.write_text(re.sub("^seed: 1$", "seed: 7", path.read_text(), flags=re.MULTILINE))
    changed = contents(tmp_path / "grid" / "of-1")
    capsys.readouterr()
    assert sweep("seed=1,0,2", "federation.rounds=1", "hydra.sweep.subdir='of-${seed}'") == 1
    said = capsys.readouterr()
    assert "fedsparse: grid/of-1: another run is stored here: seed is 7 there and 1 here; " in said.err
    assert said.err.splitlines()[-1] == "fedsparse: a cell failed, see above; the same command skips what is finished"
    assert "grid/of-0 is finished" in said.out
    assert summary_of("grid/of-2")["rounds"] == 1
    assert contents(tmp_path / "grid" / "of-1") == changed
    assert contents(tmp_path / "grid" / "of-0") == before


def test_a_used_folder_without_a_stored_configuration_is_refused(sweep, tmp_path, capsys):
    (tmp_path / cell(0)).mkdir(parents=True)
    (tmp_path / cell(0) / "metrics.csv").write_text("round\n1\n")
    assert sweep("seed=0", "federation.rounds=1") == 1
    assert "already holds a run; continue it with resume=" in capsys.readouterr().err
    assert (tmp_path / cell(0) / "metrics.csv").read_text() == "round\n1\n"


def test_every_cell_that_fails_says_why(sweep, capsys):
    assert sweep("seed=0", "optimizer.lr=-1,0.1,-2", "federation.rounds=1") == 1
    said = capsys.readouterr()
    assert re.findall(r"optimizer\.lr is (-\d); it must be", said.err) == ["-1", "-2"]
    assert "Traceback" not in said.err
    assert "optimizer.lr-0.1+seed-0: test accuracy" in said.out


def test_the_line_of_a_cell_whose_clients_keep_a_part_is_of_their_own_models(sweep, capsys):
    assert sweep("model.local=[hidden.*]", "mask_rule=dense", "federation.rounds=1") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "after round 1" in line]
    summary = summary_of(line.split(": ")[0])
    assert f": accuracy of clients' own models {summary['personal/acc_mean']:.1%} after round 1, " in line


def test_what_is_stored_is_what_hydra_would_store(sweep, tmp_path):
    assert sweep("seed=3", "federation.rounds=1") == 0
    stored = {path.stem: yaml.safe_load(path.read_text()) for path in (tmp_path / cell(3) / ".hydra").iterdir()}
    assert set(stored) == {"config", "hydra", "overrides"}
    assert stored["config"]["seed"] == 3
    assert stored["overrides"] == [*OPTIONS, "seed=3", "federation.rounds=1"]
    assert stored["hydra"]["hydra"]["runtime"]["choices"]["mask_rule"] == "random"
    assert (stored["hydra"]["hydra"]["mode"], stored["hydra"]["hydra"]["sweep"]["dir"]) == ("MULTIRUN", "grid")


def test_two_processes_do_not_share_a_run_folder(sweep, tmp_path, capsys):
    (tmp_path / cell(0)).mkdir(parents=True)
    with locked(tmp_path / cell(0)):
        assert sweep("seed=0", "federation.rounds=1") == 1
    assert "is being run by another process" in capsys.readouterr().err
    assert sweep("seed=0", "federation.rounds=1") == 0


KEYS = st.sampled_from(["seed", "optimizer.lr", "mask_rule", "data.root", "partition"])
VALUES = st.one_of(st.integers().map(str), st.floats().map(str), st.text(max_size=150))
OVERRIDES = st.dictionaries(KEYS, VALUES).map(lambda d: [f"{key}={value}" for key, value in d.items()])


@settings(derandomize=True, deadline=None)
@given(OVERRIDES, OVERRIDES, st.randoms(use_true_random=False))
def test_cells_have_names_of_their_own_that_every_file_system_takes(one, other, random):
    name = cell_name(one)
    assert re.fullmatch(r"[A-Za-z0-9_.+-]{1,120}", name)
    assert name not in (".", "..")
    shuffled = random.sample(one, len(one))
    assert cell_name(shuffled) == name
    if sorted(one) != sorted(other):
        assert cell_name(other) != name


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, None),
        ({"logger": {"wandb": 1}, "resume": "x", "federation.rounds": 9, "trainer.accelerator": "gpu"}, None),
        ({"trainer.devices": 2}, None),
        ({"model.image_side": 32}, None),  # as a run of before lacks it; what it changes is data.size
        ({"data.size": 32}, "data.size is None there and 32 here"),
        ({"trainer.precision": "bf16-mixed"}, "trainer.precision is '32-true' there and 'bf16-mixed' here"),
        ({"seed": 1}, "seed is 0 there and 1 here"),  # and not model.seed, which follows it
        ({"federation.cohort": 2}, "federation.cohort is None there and 2 here"),
        ({"callbacks": None}, "callbacks is {} there and None here"),
    ],
)
def test_what_makes_another_run(change, says):
    text = """
    {seed: 0, model: {net: {seed: '${seed}'}}, federation: {rounds: 3}, logger: {csv: {}}, callbacks: {}, resume: null,
     trainer: {accelerator: auto, devices: 1, precision: 32-true}}
    """
    stored, asked = OmegaConf.create(text), OmegaConf.create(text)
    for key, value in change.items():
        OmegaConf.update(asked, key, value)
    assert difference(stored, asked) == says


def test_what_does_not_make_another_run_does_not_make_another_cell():
    job = OmegaConf.load(conf_dir() / "train.yaml").hydra.job
    assert set(job.config.override_dirname.exclude_keys) == set(MAY_DIFFER)


@pytest.fixture
def signalled(monkeypatch, tmp_path):
    """A run that gets a signal at the start of its second round; gives the folder."""
    monkeypatch.chdir(tmp_path)
    begin = tracking.RoundLog.on_train_epoch_start

    def go(number):
        def kicked(self, trainer, module):
            begin(self, trainer, module)
            if trainer.current_epoch == 1:
                os.kill(os.getpid(), number)

        with monkeypatch.context() as patch:
            patch.setattr(tracking.RoundLog, "on_train_epoch_start", kicked)
            run([*OPTIONS, "federation.rounds=3", f"hydra.run.dir={tmp_path / 'stopped'}"])

    return go


@pytest.mark.parametrize(
    ("number", "queued"),
    [
        (signal.SIGTERM, None),
        (signal.SIGUSR2, 144),
        pytest.param(signal.SIGUSR1, None, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, 144, marks=pytest.mark.slow),
    ],
)
def test_a_signal_closes_the_round_and_is_handed_on(signalled, tmp_path, number, queued):
    seen = []

    def handler(received, frame):
        """What submitit's handler does: it queues the job again and exits, or only tells that it ignores."""
        seen.append((received, len(read_rows(tmp_path / "stopped" / "metrics.csv"))))
        assert (tmp_path / "stopped" / "checkpoints" / LAST).exists()
        if queued:
            sys.exit(queued)

    before = signal.signal(number, handler)
    try:
        with pytest.raises(SystemExit) as stop:
            signalled(number)
    finally:
        signal.signal(number, before)
    assert stop.value.code == (queued or 143)
    assert seen == [(number, 2)]
    assert run(["resume=stopped"])["global_sha256"] == sha("federation.rounds=3")


def start(folder, *options):
    command = [sys.executable, "-m", "fedsparse.train", "-m", *OPTIONS, "hydra.sweep.dir=grid", *options]
    with (folder / "said.txt").open("w") as said:
        return subprocess.Popen(command, cwd=folder, start_new_session=True, stdout=said, stderr=said)


def ends_well(process, folder):
    status = process.wait(400)
    said = (folder / "said.txt").read_text()
    assert status == 0, said
    return said


def wait_until(condition, process):
    while not condition():
        assert process.poll() is None
        time.sleep(0.02)


def rounds_of(folder):
    return [row["round"] for path in folder.glob("grid/*/metrics.csv") for row in read_rows(path)]


@pytest.mark.soak
@pytest.mark.slow
def test_a_sweep_of_two_jobs_at_once_that_is_killed_goes_on(sweep, tmp_path):
    options = ["seed=0,1,2", "partition=iid,noniid_nc1", "federation.rounds=40"]
    parallel = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    process = start(tmp_path, *options, *parallel)
    summaries = lambda: len(list(tmp_path.glob("grid/*/summary.json")))  # noqa: E731
    wait_until(lambda: summaries() >= 1 and len(rounds_of(tmp_path)) > 40 * summaries() + 5, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert summaries() < 6
    process = start(tmp_path, *options, *parallel)
    ends_well(process, tmp_path)
    got = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("grid/*/summary.json")}
    assert len(got) == 6
    for name in got:
        rounds = [row["round"] for row in read_rows(tmp_path / "grid" / name / "metrics.csv")]
        assert rounds == list(range(1, 41))
    assert sweep(*options, "hydra.sweep.dir=undisturbed") == 0
    for name, summary in got.items():
        assert summary["global_sha256"] == summary_of(f"undisturbed/{name}")["global_sha256"]


@pytest.mark.soak
@pytest.mark.slow
def test_a_preempted_cell_is_queued_again_by_submitit(tmp_path, monkeypatch):
    """With submitit's launcher on this machine; its own handler and its own controller queue the job again."""
    monkeypatch.chdir(tmp_path)
    process = start(tmp_path, "hydra/launcher=submitit_local", "seed=0", "federation.rounds=200")
    wait_until(lambda: len(rounds_of(tmp_path)) > 5, process)
    log = next(tmp_path.glob("grid/*/run.log"))
    job = int(re.search(r"process (\d+)", log.read_text()).group(1))
    os.kill(job, signal.SIGUSR2)
    ends_well(process, tmp_path)
    jobs = re.findall(r"process (\d+)", log.read_text())
    assert len(jobs) == 2
    assert jobs[0] != jobs[1]
    assert "SIGUSR2: round" in log.read_text()
    assert rounds_of(tmp_path) == list(range(1, 201))
    assert summary_of(log.parent)["global_sha256"] == sha("federation.rounds=200")


@pytest.mark.slow
@pytest.mark.parametrize(
    "sweeper",
    [["search"], pytest.param(["optuna", "hydra.sweeper.direction=maximize"], marks=pytest.mark.soak)],
    ids=["search", "own"],
)
def test_optuna_finds_the_best_by_validation(tmp_path, sweeper):
    options = [f"hydra/sweeper={sweeper[0]}", *sweeper[1:], "hydra.sweeper.n_trials=4"]
    space = ["optimizer.lr=tag(log,interval(0.001,0.3))", "federation.rounds=2"]
    process = start(tmp_path, *options, *space)
    ends_well(process, tmp_path)
    cells = [json.loads(path.read_text()) for path in tmp_path.glob("grid/*/summary.json")]
    rates = [yaml.safe_load(path.read_text())["optimizer"]["lr"] for path in tmp_path.glob("grid/*/.hydra/config.yaml")]
    assert len(cells) == 4
    assert all(a != b and 0.001 <= a <= 0.3 for a, b in pairwise(sorted(rates)))
    best = yaml.safe_load((tmp_path / "grid" / "optimization_results.yaml").read_text())
    assert best["best_value"] == max(cell["val/acc"] for cell in cells)
    assert best["best_params"]["optimizer.lr"] in rates
    if sweeper == ["search"]:  # seeded: the same cells again
        process = start(tmp_path, *options, *space)
        assert ends_well(process, tmp_path).count("is finished after 2 rounds") == 4
