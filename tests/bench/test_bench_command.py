"""What ``python -m fedsparse.bench`` collects, keeps, prints and refuses."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

from fedsparse import bench
from fedsparse.bench import federated, processes
from fedsparse.bench.__main__ import HINT, main
from fedsparse.bench.arguments import MODELS
from fedsparse.bench.collect import Collector

# a peer's Python: writes down how it was called, talks, and prints its figures
PEER = """#!{python}
import json, os, sys
with open({log!r}, "a") as file:
    file.write(json.dumps([sys.argv[1:], os.environ["OMP_NUM_THREADS"]]) + chr(10))
print("Welcome to a framework")
times = dict(pairs=1, hand_ms=10.0, runner_ms=20.0, ratio=2.0, ratio_min=1.5, ratio_max=2.5, weights_differ=1e-7)
print(json.dumps({{**times, "version": "9.9", "bytes_up": 123}} if "--pairs" in sys.argv else {{"memory": 7}}))
print("{{goodbye}}")
"""
BROKEN = """#!{python}
import sys
print("{{}}")
sys.exit("Traceback of many lines" + chr(10) + "ValueError: it cannot do this model" + chr(10))
"""


# of two rounds
SHORT = {"mlp": replace(bench.PROBLEMS["mlp"], pairs=1, warmup=0, settings=(bench.BARE,), cohorts=(1,))}


@pytest.fixture
def small(monkeypatch):
    """Start no process -> whose memory was asked for."""
    asked = []
    monkeypatch.setattr(processes, "alone", lambda *what: asked.append(what) or 1000 * len(asked))
    return asked


def install(folder, name, script):
    """Make an environment whose Python is a script -> the file it writes its calls to."""
    python, log = folder / name / "bin" / "python", folder / f"{name}.log"
    python.parent.mkdir(parents=True)
    python.write_text(script.format(python=sys.executable, log=str(log)))
    python.chmod(0o755)
    return log


def call(*arguments, problems=bench.PROBLEMS):
    """Run the command line -> what it complained about, or None."""
    try:
        main([str(a) for a in arguments], problems)
    except SystemExit as error:
        return error.code
    return None


def test_every_model_has_its_name():
    assert tuple(bench.PROBLEMS) == MODELS


def test_peers_that_are_installed_are_measured_and_a_failure_is_a_row(tmp_path, small, capsys):
    log = install(tmp_path, "pfl", PEER)
    install(tmp_path, "fedlab", BROKEN)
    file = tmp_path / "figures.json"
    said = call("--models", "mlp", "--environments", tmp_path, "--json", file, problems=SHORT)
    assert said == "fedsparse: 1 of 3 rows failed, see above"
    held = json.loads(file.read_text())
    own, pfl, fedlab = held["rows"]
    assert (own["runner"], own["memory"], own["hand_memory"]) == ("fedsparse", 2000, 1000)
    assert (pfl["runner"], pfl["version"], pfl["ratio"], pfl["bytes_up"]) == ("pfl", "9.9", 2.0, 123)
    assert (pfl["memory"], pfl["hand_memory"], pfl["failed"]) == (7, 1000, False)
    assert (fedlab["failed"], fedlab["ratio"], fedlab["memory"]) == (True, None, None)
    assert fedlab["note"] == "ValueError: it cannot do this model"
    assert small == [("loop", "mlp", 1, 1), ("fedsparse", "mlp", 1, 1)]
    assert [json.loads(line) for line in log.read_text().splitlines()] == [
        [["-m", "fedsparse.bench.peers.pfl", "mlp", "--pairs", "1", "--warmup", "0", "--threads", "1"], "1"],
        [["-m", "fedsparse.bench.peers.pfl", "mlp", "--threads", "1"], "1"],
    ]
    assert {"cpu", "cores", "threads", "torch", "load_start", "load_end"} <= set(held["machine"])
    out, err = capsys.readouterr()
    assert "mlp, fedlab (): failed; ValueError: it cannot do this model" in err
    assert "9.9" in out
    assert HINT not in out


def test_without_peers_a_line_says_how_to_get_them(tmp_path, small, capsys):
    assert call("--models", "mlp", "--environments", tmp_path, "--no-memory", "--cohort", 5, problems=SHORT) is None
    assert small == []
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == HINT
    lines = [line for line in out.splitlines() if line.startswith("│ mlp")]
    assert [line.split("│")[3].strip() for line in lines] == ["5", "5"]  # times; processor and pages


def test_a_peer_without_the_model_has_no_row(tmp_path, monkeypatch):
    logs = [install(tmp_path, name, PEER) for name in ("pfl", "fedjax")]
    monkeypatch.setattr(federated, "measure", lambda problem, *_: bench.Row(problem.name, "fedsparse"))
    collector = Collector(threads=1, memory=False, peers=processes.installed(tmp_path), everywhere=True)
    rows = [(row.model, row.runner) for row in collector.rows([replace(SHORT["mlp"], name=n) for n in ("conv", "vit")])]
    assert rows == [("conv", "fedsparse"), ("conv", "pfl"), ("conv", "fedjax"), ("vit", "fedsparse"), ("vit", "pfl")]
    assert [len(log.read_text().splitlines()) for log in logs] == [2, 1]


def test_figures_are_kept_row_by_row(tmp_path, small, monkeypatch):
    install(tmp_path, "pfl", PEER)

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(processes, "figures", stop)
    monkeypatch.setattr(federated, "measure", lambda problem, *_: bench.Row(problem.name, "fedsparse", ratio=1.0))
    with pytest.raises(KeyboardInterrupt):
        main(["--models", "mlp", "--environments", str(tmp_path), "--json", str(tmp_path / "figures.json")], SHORT)
    assert [row["runner"] for row in json.loads((tmp_path / "figures.json").read_text())["rows"]] == ["fedsparse"]


def test_a_peer_that_prints_no_figures_fails(tmp_path):
    install(tmp_path, "pfl", "#!{python}\nprint('hello')\n")
    with pytest.raises(RuntimeError, match="it printed no figures"):
        processes.figures(tmp_path / "pfl/bin/python", "any", [], 1)


TIMES = {"pairs": 5, "hand_ms": 10.04, "runner_ms": 1234.5, "ratio": 1.254, "ratio_min": 1.0, "ratio_max": 2.0}
ROWS = [
    {"model": "mlp", "runner": "fedsparse", "version": "0.1.0", "setting": "bytes, csv", "cohort": 1, **TIMES}
    | {"extra_ms_per_cohort": 0.714, "weights_differ": 4.2e-8, "bytes_up": 384720}
    | {"memory": 4_200_000, "hand_memory": 2_600_000, "sgd": "fused", "hand_cpu_ms": 9.96, "runner_cpu_ms": 1200.0}
    | {"hand_faults": 93121, "runner_faults": 7.5},
    {"model": "mlp", "runner": "fedsparse", "version": "0.1.0", "setting": "everything", "cohort": 10, **TIMES}
    | {"extra_ms_per_cohort": -3.0, "weights_differ": 4e-8, "bytes_up": 384720},
    {"model": "vit", "runner": "fedsparse", "setting": "bytes, csv", "failed": True, "note": "no such net"},
    {"model": "mlp", "runner": "pfl", "version": "0.6.0", **TIMES, "weights_differ": None, "note": "it keeps them"},
    {"model": "mlp", "runner": "flwr", "version": "", "failed": True, "note": "Ray is gone"},
]
EXPECTED = """\
| model | with | K | hand-written loop, ms a round | fedsparse, ms a round | ratio (least to greatest) | more, ms a cohort | peak memory / the loop's, MB | bytes up a round |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
| mlp | bytes, csv | 1 | 10.0 | 1,234 | 1.25 (1.00 to 2.00) | 0.71 | 4.2 / 2.6 | 384,720 |
| mlp | everything | 10 | 10.0 | 1,234 | 1.25 (1.00 to 2.00) | -3.00 |  | 384,720 |
| vit | bytes, csv | 1 |  |  | failed: no such net |  |  |  |

| model | with | K | SGD of the loop | processor, the loop's and fedsparse's, ms a round | pages mapped, by the loop and by fedsparse, a round |
| --- | --- | --- | --- | --- | --- |
| mlp | bytes, csv | 1 | fused | 10.0 / 1,200 | 93,121 / 8 |

| model | runner | version | ratio (least to greatest) | peak memory / the loop's, MB | bytes up a round | weights differ |
| --- | --- | --- | --- | --- | --- | --- |
| mlp | fedsparse, K = 1 | 0.1.0 | 1.25 (1.00 to 2.00) | 4.2 / 2.6 | 384,720 | 4e-08 |
| mlp | pfl | 0.6.0 | 1.25 (1.00 to 2.00) |  | nothing serialised | it keeps them |
| mlp | flwr |  | failed: Ray is gone |  |  |  |
"""  # noqa: E501


def test_the_tables_of_the_page_come_from_the_file(tmp_path, capsys):
    file = tmp_path / "figures.json"
    file.write_text(json.dumps({"machine": {}, "rows": ROWS}))
    assert call("--table", file) is None
    assert capsys.readouterr().out == EXPECTED


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cohort", "0"], "'0' is not a whole number of 1 or more"),
        (["--pairs", "many"], "'many' is not a whole number"),
        (["--threads", "-1"], "'-1' is not a whole number"),
        (["--models", "nope"], "invalid choice: 'nope'"),
        (["--peers", "pfl", "--environments", "{folder}"], "pfl not installed"),
        (["--models", "mlp", "--json", "{folder}/none/such.json"], "none/such.json"),
        (["--table", "{folder}/none.json"], "none.json holds no figures"),
        (["--table", "{folder}/text.json"], "text.json holds no figures"),
        (["--table", "{folder}/list.json"], "list.json holds no figures"),
        (["--table", "{folder}/row.json"], "row.json holds no figures"),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, said):
    for name, text in {"text": "hello", "list": "[]", "row": '{"rows": [{"color": 1}]}'}.items():
        (tmp_path / f"{name}.json").write_text(text)
    message = call(*[a.format(folder=tmp_path) for a in arguments])
    assert message.startswith("fedsparse: ")
    assert said in message
    assert "\n" not in message


def test_too_few_rounds_to_measure_processes_is_one_line():
    from fedsparse.bench import several

    with pytest.raises(SystemExit, match="--rounds 2 leaves none to measure"):
        several.main(["--rounds", "2"])
