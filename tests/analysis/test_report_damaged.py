"""One damaged folder is one line of a report, whatever is wrong with it; the others are shown."""

from __future__ import annotations

import json
import os
import re

import matplotlib.figure
import pytest
from test_report import a_run

from fedsparse import report
from fedsparse.analysis.files import finite, short
from fedsparse.analysis.folders import read_runs
from fedsparse.landscape import scale


def changed(folder, **figures):
    """Change figures of a summary."""
    path = folder / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | figures))


def configured(folder, text):
    (folder / ".hydra/config.yaml").write_text(text)


def replaced(folder, name, make):
    (folder / name).unlink()
    make(folder / name)


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
DAMAGED = {
    "a seed beyond all": lambda folder: changed(folder, seed=10**400),
    "a negative seed": lambda folder: changed(folder, seed=-1),
    "half a seed": lambda folder: changed(folder, seed=0.5),
    "no number": lambda folder: changed(folder, **{"val/acc": float("nan")}),
    "infinity": lambda folder: changed(folder, bytes_up=float("inf")),
    "a text for a number": lambda folder: changed(folder, **{"test/acc": "0.7"}),
    "yes for a number": lambda folder: changed(folder, **{"test/acc": True}),
    "keys for a number": lambda folder: changed(folder, bytes_total={"a": 1}),
    "an accuracy of 7": lambda folder: changed(folder, **{"test/acc": 7}),
    "no name": lambda folder: changed(folder, partition=""),
    "numbers for names": lambda folder: changed(folder, exchange=["topk"], exchange_fraction={"a": 1}),
    "deep": lambda folder: (folder / "summary.json").write_text("[" * 100_000),
    "not UTF-8": lambda folder: (folder / "summary.json").write_bytes(b'{"seed": "\xff"}'),
    "a folder": lambda folder: replaced(folder, "summary.json", os.mkdir),
    "a pipe": lambda folder: replaced(folder, "summary.json", os.mkfifo),
    "a pipe for a configuration": lambda folder: replaced(folder, ".hydra/config.yaml", os.mkfifo),
    "a link to itself": lambda folder: replaced(folder, "summary.json", lambda path: path.symlink_to(path)),
    "a link without an end": lambda folder: replaced(folder, "summary.json", lambda path: path.symlink_to("/dev/zero")),
    "a gigabyte": lambda folder: os.truncate(folder / "summary.json", 10**9),
    "a configuration of a gigabyte": lambda folder: os.truncate(folder / ".hydra/config.yaml", 10**9),
    "a number of 5000 digits": lambda folder: configured(folder, "seed: " + "9" * 5000),
    "a billion laughs": lambda folder: configured(folder, LAUGHS),
    "a rate of nothing": lambda folder: configured(folder, "optimizer: {lr: .nan}"),
    "a sparsity of two": lambda folder: changed(folder, sparsity=2),
}
ODD = {
    "a long rule": lambda folder: changed(folder, mask_rule="x" * 2_000_000),
    "a long key": lambda folder: configured(folder, f"optimizer: {{lr: 0.1, {'k' * 500_000}: {'v' * 500_000}}}\n"),
    "NUL in the table": lambda folder: (folder / "metrics.csv").write_bytes(b"round,val/acc\n1,0.5\n\0\0\0\n"),
    "a million columns": lambda folder: (folder / "metrics.csv").write_text(
        "round" + ",a" * 10**6 + "\n1" + ",1" * 10**6
    ),
    "a table of numbers beyond all": lambda folder: (folder / "metrics.csv").write_text(
        f"round,val/acc\n{10**300},0.5\n1,{10**400}\n2,1e308\n"
    ),
    "a pipe for a table": lambda folder: replaced(folder, "metrics.csv", os.mkfifo),
    "scale.json of a pipe": lambda folder: os.mkfifo(folder / "scale.json"),
    "a mask that is a folder": lambda folder: os.mkdir(folder / "mask.safetensors"),
    "overlaps that are none": lambda folder: changed(folder, mask_overlap_rounds=[10**400], mask_overlap_clients="x"),
    "other figures beyond all": lambda folder: changed(folder, **{"client/acc_mean": 10**400, "client_steps": 1e308}),
}


@pytest.mark.parametrize("damage", [*DAMAGED.values(), *ODD.values()], ids=[*DAMAGED, *ODD])
def test_one_bad_folder_ends_no_report(tmp_path, capsys, damage):
    a_run(tmp_path / "runs/good", rule="least_sensitive", test=0.625)
    damage(a_run(tmp_path / "runs/bad", seed=1, test=0.375))
    report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "62.5" in said
    assert max(map(len, said.splitlines())) < 2000
    assert (tmp_path / "out/report.html").stat().st_size < 3_000_000
    if damage in DAMAGED.values():
        assert "37.5" not in said
        (line,) = [line for line in said.splitlines() if line.startswith("| bad ")]
        assert len(line) < 300


def test_a_loop_of_folders_is_walked_once(tmp_path, capsys):
    good = a_run(tmp_path / "runs/good")
    (good / "again").symlink_to(tmp_path / "runs", target_is_directory=True)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert [run.name for run in read_runs([tmp_path / "runs"])[0]] == ["good"]
    with pytest.raises(SystemExit, match="no finished run"):
        report.main([str(tmp_path / "loop")])


def test_names_are_text_in_the_page(tmp_path):
    a_run(tmp_path / "runs/<script>alert(1)</script>".replace("/script", "_script"), rule="<script>alert(2)</script>")
    a_run(tmp_path / "runs/b", partition='"><img src=x onerror=alert(3)>')
    report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    page = (tmp_path / "out/report.html").read_text()
    assert not re.search(r"<script|<img src=x", page)
    assert "&lt;script&gt;alert(2)" in page


def test_two_long_names_that_differ_stay_apart():
    one, other = short("x" * 1000 + "1"), short("x" * 1000 + "2")
    assert one != other
    assert max(len(one), len(other)) <= 120
    assert short("x" * 120) == "x" * 120


def test_numbers_that_can_be_counted_with():
    assert [finite(v) for v in (0, -1.5, 10**18, True, "1", None, float("nan"), 10**19, 10**400, -1e300)] == [
        *(True, True, True),
        *[False] * 7,
    ]


def test_a_picture_that_fails_is_a_line_and_the_report_has_none(tmp_path, monkeypatch, capsys):
    a_run(tmp_path / "runs/a")
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda *args, **kwargs: 1 / 0)
    report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    assert "is left out (ZeroDivisionError" in capsys.readouterr().err
    assert "<img" not in (tmp_path / "out/report.html").read_text()
    assert sorted(os.listdir(tmp_path / "out")) == ["report.html", "report.md", "tables"]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    a_run(tmp_path / "runs/a")
    (tmp_path / "out").write_text("")
    with pytest.raises(SystemExit, match=r"^fedsparse: .*out"):
        report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")])


def test_a_model_that_cannot_be_built_is_a_line_of_its_own(tmp_path, monkeypatch, capsys):
    a_run(tmp_path / "runs/a")
    a_run(tmp_path / "runs/b", seed=1)

    def scaled(folder, trusted):
        if folder.name == "a":
            raise KeyError("layer")
        return {"alpha": 1.0, "val/acc": 0.5, "test/acc": 0.5, "test/acc_at_1": 0.5}

    monkeypatch.setattr(scale, "scaled", scaled)
    with pytest.raises(SystemExit, match="1 folder was not scaled"):
        report.main([str(tmp_path / "runs"), "--scale"])
    said = capsys.readouterr()
    assert "a was not scaled: KeyError" in said.err
    assert "Scaled task vector" in said.out
