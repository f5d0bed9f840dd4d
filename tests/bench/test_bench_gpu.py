"""``python -m fedsparse.bench.gpu``, as far as a CPU carries it."""

from __future__ import annotations

import json
import math
import signal
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from fedsparse.bench.gpu import __main__ as gpu
from fedsparse.bench.gpu import cases, command_line, runs, sections
from fedsparse.bench.gpu.federations import beside
from fedsparse.bench.gpu.profile import described
from fedsparse.bench.gpu.session import MARGIN, OutOfTime, Session
from fedsparse.bench.gpu.waits import Waits
from fedsparse.masks import Mask

CPU = torch.device("cpu")


def lines(capsys):
    """What was said -> JSON objects by name."""
    return {line["check"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}


def call(*arguments):
    """Run the command line -> what it complained about, or None."""
    try:
        gpu.main([str(a) for a in arguments])
    except SystemExit as error:
        return error.code
    return None


@pytest.fixture
def asked(monkeypatch):
    """Measure nothing -> the sessions that were made, with the sections that were carried out in each."""
    found = {}

    def noting(name):
        return lambda session: found.setdefault(session, []).append(name)

    monkeypatch.setattr(command_line, "command_line", noting("cli"))
    monkeypatch.setattr(sections, "vit", noting("vit"))
    monkeypatch.setattr(sections, "small", noting("small"))
    monkeypatch.setattr(sections, "bert", noting("bert"))
    monkeypatch.setattr(sections, "profile", noting("profile"))
    monkeypatch.setattr(sections, "determinism", noting("determinism"))
    return found


@pytest.fixture
def no_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("asked", "no_card")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--budget", "0"], "'0' is not a number of seconds above 0"),
        (["--budget", "nan"], "'nan' is not a number of seconds"),
        (["--budget", "soon"], "'soon' is not a number of seconds"),
        (["--only", "nope"], "invalid choice: 'nope'"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--device", "cuda"], "torch finds no CUDA device here"),
        (["--out", "{folder}/file/below"], "--out: "),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, said):
    (tmp_path / "file").write_text("")
    message = call(*[a.format(folder=tmp_path) for a in arguments])
    assert message.startswith("fedsparse: ")
    assert said in message
    assert "\n" not in message


@pytest.mark.slow
@pytest.mark.usefixtures("no_card")
def test_options_that_are_not_given(tmp_path, asked, capsys):
    short = ["--budget", "300", "--out", tmp_path / "a", "--only", "vit"]
    assert [call(), call("--tiny", "--only", "vit", "cli"), call(*short)] == [None] * 3
    assert [session.budget for session in asked] == [gpu.BUDGET, math.inf, 300.0]
    assert [(session.device, session.tiny) for session in asked] == [(CPU, False), (CPU, True), (CPU, False)]
    assert list(asked.values()) == [list(gpu.SECTIONS), ["cli", "vit"], ["vit"]]  # in their own order
    out = capsys.readouterr().out.splitlines()
    said = ["here", *gpu.SECTIONS, "end", "here", "cli", "vit", "end", "here", "vit", "end"]
    assert [json.loads(line)["check"] for line in out] == said
    assert (tmp_path / "a" / "results.jsonl").read_text().splitlines() == out[-3:]


@pytest.mark.usefixtures("asked")
def test_what_failed_is_the_exit_status(monkeypatch, capsys):
    monkeypatch.setattr(command_line, "command_line", lambda session: wrong())
    assert call("--tiny", "--only", "cli", "vit") == "fedsparse: 1 checks failed, see above"
    said = lines(capsys)
    assert said["cli"]["failed"] == "ValueError: no such net"
    assert said["end"]["failed_checks"] == 1


def wrong():
    raise ValueError("no such net")


def late():
    raise OutOfTime("too late")


def test_a_check_that_fails_or_finds_no_time_stops_nothing(monkeypatch, capsys):
    session = Session(CPU, budget=100.0)
    monkeypatch.setattr(session, "passed", lambda: 0.0)
    assert session.attempt("wrong", 10, wrong) is None
    assert session.attempt("late", 10, late) is None
    assert session.attempt("long", 200, dict) is None
    assert session.attempt("good", 10, lambda: {"ratio": 2.0}) == {"ratio": 2.0}
    assert session.failed == ["wrong"]
    said = lines(capsys)
    assert said["wrong"]["failed"] == "ValueError: no such net"
    assert said["wrong"]["frames"][-1].endswith(" wrong")
    assert said["late"]["skipped"] == "too late"
    assert said["long"]["skipped"] == "100 s left, 200 needed"
    assert said["good"]["ratio"] == 2.0


def test_the_longest_of_a_kind_replaces_the_guess(monkeypatch, capsys):
    session, now = Session(CPU, budget=100.0), [0.0]
    monkeypatch.setattr(session, "passed", lambda: now[0])

    def takes(seconds):
        return lambda: now.__setitem__(0, now[0] + seconds) or {}

    for name, seconds in {"a": 40, "b": 1, "c": 1, "d": 30}.items():  # after c there are 58 s left
        session.attempt(name, 10, takes(seconds), kind="small")
    session.attempt("e", 10, takes(1), kind="small")  # 28 s left
    session.attempt("other", 10, takes(1), kind="bert")
    assert session.longest == {"small": 40 * MARGIN, "bert": MARGIN}
    said = lines(capsys)
    assert [name for name, line in said.items() if "skipped" in line] == ["e"]
    assert said["e"]["skipped"] == "28 s left, 50 needed"


def test_rounds_that_take_longer_than_what_is_left_are_not_begun():
    case = replace(cases.small("mlp", 2), rounds=6)
    left = iter([100.0, 60.0, 30.0, 10.0])  # a pair takes 20 at last, which does not fit into 10
    figures = beside(case, CPU, lambda: next(left))
    assert figures["rounds"] == 2
    assert figures["weights_relative"] < 1e-6
    left = iter([100.0, 40.0])
    with pytest.raises(OutOfTime):
        beside(case, CPU, lambda: next(left))


def test_a_trace_is_summed_up():
    kernel = {"cat": "kernel", "ph": "X"}
    events = [
        {**kernel, "name": "gemm<float>", "ts": 0.0, "dur": 100.0},
        {**kernel, "name": "gemm<double>", "ts": 160.0, "dur": 300.0},
        {"cat": "gpu_memcpy", "name": "DtoH", "ts": 460.0, "dur": 40.0},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 0.0, "dur": 5.0},
        {"cat": "cpu_op", "ph": "X", "name": "aten::mm", "ts": 0.0, "dur": 500.0},
    ]
    found = described(events)
    assert (found["device_events"], found["busy_share"], found["gap_ms"]) == (3, 0.88, 0.06)
    assert (found["gaps_over_50us"], found["copies"]) == (1, {"DtoH": 1})
    assert found["top15"] == [("gemm", 2, 0.4), ("DtoH", 1, 0.04)]
    assert found["runtime_calls"] == {"cudaLaunchKernel": 1}
    assert described(events[4:])["device_events"] == 1


def test_waits_are_counted_by_place_from_a_round_on(monkeypatch):
    modes, before = [], warnings.showwarning
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    waits, module = Waits(1), SimpleNamespace(device=torch.device("cuda"))
    for round in range(3):
        waits.on_train_epoch_start(SimpleNamespace(current_epoch=round), module)
        if round:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            warnings.warn("something else", stacklevel=1)
    waits.on_train_end(SimpleNamespace(), module)
    assert (modes, warnings.showwarning) == (["warn", "default"], before)
    figures = waits.figures()
    assert figures["waits_a_round"] == 1.0
    ((place, count),) = figures["by_place"].items()
    assert count == 1.0
    assert "test_bench_gpu.py" in place


def write_run(folder, weight, kept=2):
    """Write what is read of a run."""
    folder.mkdir()
    save_file({"weight": torch.tensor([weight, 1.0])}, folder / "model.safetensors")
    Mask({"weight": torch.arange(2) < kept}).save(folder / "mask.safetensors")
    (folder / "metrics.csv").write_text("round,train/loss\n1,2.5\n2,2.25\n")


def test_one_line_says_which_pairs_are_equal(tmp_path, capsys):
    session, ended = (
        Session(CPU),
        {"default", "default_again", "conv", "conv_again", "random", "bf16", "whole", "killed"},
    )
    for name in ended - {"conv", "bf16", "killed"}:
        write_run(tmp_path / name, 0.0)
    write_run(tmp_path / "conv", 0.5)
    write_run(tmp_path / "bf16", 0.0, kept=1)
    command_line.summarise(session, command_line.compare(session, tmp_path, ended))
    said = lines(capsys)
    conv, line = said["cli same command twice, conv (cudnn): bits"], said["cli pairs"]
    assert (conv["equal_bits"], conv["largest"], conv["mask_jaccard"]) == (False, 0.5, 1.0)
    assert conv["last_row"] == [{"train/loss": 2.25}] * 2
    assert (line["compared"], line["equal_bits"], len(line["not_compared"])) == (3, 1, 7)
    assert line["not_equal"] == ["same command twice, conv (cudnn): bits", "bf16-mixed and float32: close"]
    assert said["cli default on GPU and CPU: close, mask may differ in ties"]["skipped"] == "no run default_cpu"
    assert session.failed == ["cli killed and resumed, or in one go: bits"]  # the folder of a run is not there


# a run: closes two rounds and goes on for a minute, unless it is resumed; or fails at once
RUN = """
import pathlib, sys, time
print("called with", sys.argv[-1])
folder = next((pathlib.Path(a.split("=")[1]) for a in sys.argv if a.startswith("hydra.run.dir=")), None)
if "fails" in sys.argv:
    sys.exit("no such option")
if folder:
    folder.mkdir()
    (folder / "metrics.csv").write_text("round,train/loss\\n1,2.5\\n2,2.25\\n")
    time.sleep(60)
"""


STAND_IN = (sys.executable, "-c", RUN)


def test_a_run_is_killed_after_a_round_and_resumed(tmp_path, capsys):
    jobs = [runs.Job("killed", "cpu", killed=True), runs.Job("bad", "cpu", ("fails",))]
    with runs.Runs(tmp_path, 1, 1, lambda: math.inf, STAND_IN) as made:
        made.make(jobs)
    assert (made.codes, made.kills) == ({"killed": 0, "bad": 1}, {"killed": 2})
    assert made.said("killed")[-1] == f"called with resume={tmp_path / 'killed'}"
    for job in jobs:
        command_line.say_ended(Session(CPU), made, job)
    said = lines(capsys)
    assert said["cli killed"]["rounds_at_kill"] == 2
    assert (said["cli bad"]["failed"], said["cli bad"]["said"][-1]) == ("exit status 1", "no such option")


def test_runs_end_with_the_budget(tmp_path, capsys):
    left = iter([100.0, 100.0, 10.0])
    with runs.Runs(tmp_path, 1, 1, lambda: next(left), STAND_IN) as made:
        made.make([runs.Job("long", "cpu"), runs.Job("next", "cpu")])
        process = made.running["long"]
    assert process.poll() == -signal.SIGKILL
    assert (made.codes, made.running) == ({}, {})
    command_line.say_ended(Session(CPU), made, runs.Job("next", "cpu"))
    assert "did not suffice" in lines(capsys)["cli next"]["skipped"]


@pytest.mark.parametrize("there", [True, False])
def test_runs_do_without_wandb(tmp_path, monkeypatch, there):
    monkeypatch.setattr(runs.importlib.util, "find_spec", lambda name: object() if there else None)
    monkeypatch.setenv("PYTHONPATH", "/others")
    paths = runs.environment(tmp_path, 4)["PYTHONPATH"].split(":")
    assert paths[:2] == [str(Path(runs.__file__).parents[3]), "/others"]
    assert paths[2:] == ([] if there else [str(tmp_path / "stub")])
    assert there or (tmp_path / "stub" / "wandb.py").read_text() == "run = None\n"


def test_runs_have_names_of_their_own_and_pairs_name_runs():
    for tiny in (True, False):
        names = [job.name for job in command_line.make_jobs("cuda", tiny)]
        assert len(set(names)) == len(names)
        assert {name for pair in command_line.PAIRS for name in pair.runs} <= set(names)


@pytest.mark.soak
@pytest.mark.slow
def test_tiny_federations_end_where_the_loop_does(capsys):
    assert call("--tiny", "--device", "cpu", "--only", "vit", "small") is None
    said = lines(capsys)
    assert not [name for name, line in said.items() if "failed" in line or "skipped" in line]
    paired = {name: line for name, line in said.items() if "K=" in name and not name.startswith("waits")}
    assert len(paired) == 16
    assert all(line["ratio"] > 0 and line["rounds"] == 2 for line in paired.values())
    float32 = [line for name, line in paired.items() if "bf16" not in name and "mask" not in name]
    assert len(float32) == 10
    assert all(line["weights_relative"] < 1e-4 for line in float32)
