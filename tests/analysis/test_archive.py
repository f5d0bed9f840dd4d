"""Finished runs in one file: a report of the file is the report of the folders."""

from __future__ import annotations

import csv
import gzip
import io
import json

import pytest
from test_report import a_run

from fedsparse import report
from fedsparse.analysis.archive import read
from fedsparse.analysis.folders import read_runs


@pytest.fixture
def kept(tmp_path):
    """Four runs on two partitions, and the archive of them; they have no masks, which an archive leaves out."""
    for partition in ("iid", "noniid_nc1"):
        for seed in (0, 1):
            a_run(tmp_path / f"runs/{partition}-{seed}", "dense", seed=seed, partition=partition, val=0.8 + seed / 100)
    report.main([str(tmp_path / "runs"), "--save", str(tmp_path / "kept.csv.gz")])
    return tmp_path


def printed(capsys, *arguments):
    capsys.readouterr()
    report.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_a_report_of_the_file_is_that_of_the_folders(kept, capsys):
    shown = [printed(capsys, kept / place) for place in ("runs", "kept.csv.gz")]
    assert "noniid_nc1" in shown[0]
    assert shown[0] == shown[1]
    for folder in sorted((kept / "runs").iterdir()):
        (folder / "summary.json").unlink()
    assert printed(capsys, kept / "kept.csv.gz") == shown[0]


def test_a_file_and_a_folder_are_read_together(kept, capsys):
    a_run(kept / "more/random-0", "random")
    both = printed(capsys, kept / "kept.csv.gz", kept / "more")
    assert all(name in both for name in ("dense", "random", "noniid_nc1"))


def test_runs_of_a_file_and_of_a_folder_are_kept_together(kept, capsys):
    a_run(kept / "more/random-0", "random")
    given, both = (kept / "kept.csv.gz", kept / "more"), kept / "both.csv.gz"
    shown = printed(capsys, *given)
    report.main([*map(str, given), "--save", str(both)])
    assert [run.name for run in read(both)] == [*(run.name for run in read(given[0])), "random-0"]
    left_out = "\n## Left out"  # the mask of the folder's run is not there, of which a file says nothing
    assert printed(capsys, both).partition(left_out)[0].strip() == shown.partition(left_out)[0].strip()


def test_each_line_is_a_run_with_its_figures(kept):
    """Read by csv and json alone, as anybody would."""
    lines = list(csv.DictReader(io.StringIO(gzip.decompress((kept / "kept.csv.gz").read_bytes()).decode())))
    assert [line["run folder"] for line in lines] == sorted(p.name for p in (kept / "runs").iterdir())
    for line in lines:
        summary = json.loads((kept / "runs" / line["run folder"] / "summary.json").read_text())
        assert {key: json.loads(line[key]) for key in summary} == summary
    again = kept / "again.csv.gz"
    report.main([str(kept / "runs"), "--save", str(again)])
    assert again.read_bytes() == (kept / "kept.csv.gz").read_bytes()


@pytest.mark.parametrize("damage", ["cut", "text", "other", "missing", "number"])
def test_a_damaged_file_is_one_line(kept, damage):
    path = kept / "kept.csv.gz"
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {
                "cut": whole[: len(whole) // 2],
                "text": b"run folder,overrides.yaml\n",
                "other": gzip.compress(b"a,b\n1,2\n"),
                "number": gzip.compress(
                    b"run folder,overrides.yaml,hydra choices,config.yaml,metrics.csv\na,1,2,3,4\n"
                ),
            }[damage]
        )
    with pytest.raises(ValueError, match=r"kept\.csv\.gz( is damaged, or was not written by|$)"):
        read_runs([path])


def test_a_line_that_is_no_run_is_named_and_the_others_are_read(kept):
    path = kept / "kept.csv.gz"
    text = gzip.decompress(path.read_bytes()).decode()
    assert text.count(",0.81,") == 2
    path.write_bytes(gzip.compress(text.replace(",0.81,", ",7,", 1).encode()))
    runs, problems = read_runs([path])
    assert [run.name for run in runs] == ["iid-0", "noniid_nc1-0", "noniid_nc1-1"]
    assert [(problem.name, problem.reason) for problem in problems] == [
        ("iid-1", "summary.json holds no number from 0 to 1 for val/acc")
    ]


def test_another_ending_is_refused(kept):
    with pytest.raises(SystemExit, match=r"kept\.csv has to end in \.csv\.gz"):
        report.main([str(kept / "runs"), "--save", str(kept / "kept.csv")])
