"""metrics.csv: what is written comes back, nothing is ever torn, and each round stands once."""

from __future__ import annotations

import math
import os

import lightning
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.loggers import Logger

from fedsparse.simulation.csv_logger import RoundCSV, read_rows


def test_the_file_reads_as_written_by_hand(tmp_path):
    table = RoundCSV(tmp_path / "run")
    table.log_metrics({"train/loss": 0.5, "bytes_up": 10}, step=1)
    table.log_metrics({"bytes_up": 20, "val/acc": 0.1 + 0.2}, step=2)
    table.save()
    expected = "round,train/loss,bytes_up,val/acc\n1,0.5,10,\n2,,20,0.30000000000000004\n"
    assert (tmp_path / "run" / "metrics.csv").read_bytes().decode() == expected
    assert os.listdir(tmp_path / "run") == ["metrics.csv"]


def test_rounds_count_from_one_and_a_round_is_the_one_after_the_last(tmp_path):
    table = RoundCSV(tmp_path)
    table.log_metrics({"a": 5})
    table.log_metrics({"a": 6}, step=4)
    table.log_metrics({"a": 7})
    assert (tmp_path / "metrics.csv").read_text() == "round,a\n1,5\n4,6\n5,7\n"


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    st.lists(
        st.dictionaries(st.sampled_from(["a", "b,c", 'q"', "d/e", "f g"]), st.integers() | st.floats(allow_nan=False)),
        max_size=5,
    )
)
def test_numbers_come_back_exactly(tmp_path_factory, figures):
    folder = tmp_path_factory.mktemp("csv")
    table = RoundCSV(folder)
    for step, row in enumerate(figures, start=1):
        table.log_metrics(row, step)
    expected = [{"round": step, **row} for step, row in enumerate(figures, start=1)]
    again = read_rows(folder / "metrics.csv") if figures else []
    assert again == expected == table.rows
    assert [[type(v) for v in sorted_row(r)] for r in again] == [[type(v) for v in sorted_row(r)] for r in expected]


def sorted_row(row):
    return [row[name] for name in sorted(row)]


def test_numpy_and_torch_numbers_and_nan_are_plain_numbers(tmp_path):
    values = {"i": np.int64(3), "f": np.float32(0.1), "t": torch.tensor(0.25), "nan": math.nan, "inf": -math.inf}
    RoundCSV(tmp_path).log_metrics(values, step=7)
    (row,) = read_rows(tmp_path / "metrics.csv")
    assert math.isnan(row.pop("nan"))
    assert row == {"round": 7, "i": 3, "f": float(np.float32(0.1)), "t": 0.25, "inf": -math.inf}


def test_a_second_call_updates_the_row_of_its_round(tmp_path):
    table = RoundCSV(tmp_path)
    table.log_metrics({"a": 1, "b": 2}, step=1)
    table.log_metrics({"a": 5}, step=2)
    table.log_metrics({"b": 3, "c": 4, "round": 99}, step=1)
    assert read_rows(table.path) == [{"round": 1, "a": 1, "b": 3, "c": 4}, {"round": 2, "a": 5}]
    table.log_metrics({"a": 6}, step=None)
    assert table.rows[-1] == {"round": 3, "a": 6}


def test_rows_stand_by_round_and_are_copies(tmp_path):
    table = RoundCSV(tmp_path)
    for step in (3, 1, 2):
        table.log_metrics({"a": step}, step)
    table.rows[0]["a"] = 9
    assert [row["round"] for row in read_rows(table.path)] == [1, 2, 3]
    assert table.rows[0] == {"round": 1, "a": 1}


def test_after_a_resume_the_file_is_that_of_one_go(tmp_path):
    def log(table, steps):
        for step in steps:
            table.log_metrics({"a": step / 3} | ({"val": step} if step % 2 == 0 else {"odd": 1}), step)

    log(RoundCSV(tmp_path / "one"), range(1, 6))
    log(RoundCSV(tmp_path / "two"), range(1, 5))
    again = RoundCSV(tmp_path / "two")
    again.drop_from(2)
    assert read_rows(again.path) == [{"round": 1, "a": 1 / 3, "odd": 1}]
    log(again, range(2, 6))
    assert (tmp_path / "two/metrics.csv").read_bytes() == (tmp_path / "one/metrics.csv").read_bytes()


def test_dropping_nothing_writes_nothing(tmp_path):
    RoundCSV(tmp_path).drop_from(1)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("tail", "rounds"),
    [
        ("3,0.", [1, 2]),
        ("3,0.12", [1, 2]),
        ("3\n", [1, 2]),
        ("3,0.1,7\n", [1, 2]),
        ("3,abc\n4,0.5\n", [1, 2]),
        ("\x00\x00\x00\n", [1, 2]),
        ("nan,0.5\n", [1, 2]),
        ("inf,0.5\n", [1, 2]),
        (",0.5\n", [1, 2]),
        ("3,\n", [1, 2, 3]),
    ],
)
def test_a_damaged_file_is_read_as_far_as_it_goes(tmp_path, tail, rounds):
    path = tmp_path / "metrics.csv"
    path.write_text("round,a\n1,0.5\n2,0.25\n" + tail)
    assert [row["round"] for row in read_rows(path)] == rounds
    table = RoundCSV(tmp_path)
    table.log_metrics({"a": 1.0}, step=9)
    assert [row["round"] for row in read_rows(path)] == [*rounds, 9]


@pytest.mark.parametrize("content", [b"", b"round,a", b"a,b\n1,2\n", b"\xff\xfe\x00\n\x81\n"])
def test_a_file_without_rows_is_an_empty_table(tmp_path, content):
    (tmp_path / "metrics.csv").write_bytes(content)
    assert RoundCSV(tmp_path).rows == []


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_rows(tmp_path / "metrics.csv")


def test_a_kill_before_the_rename_leaves_the_old_file(tmp_path, monkeypatch):
    table = RoundCSV(tmp_path)
    table.log_metrics({"a": 1}, step=1)
    before = table.path.read_bytes()

    def killed(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            table.log_metrics({"a": 2, "b": 1}, step=2)  # a new column: the whole file is written
    assert table.path.read_bytes() == before
    again = RoundCSV(tmp_path)
    again.log_metrics({"a": 3}, step=2)
    assert read_rows(again.path) == [{"round": 1, "a": 1}, {"round": 2, "a": 3}]


def test_an_appended_row_is_one_write_and_the_file_the_same_as_a_whole_one(tmp_path, monkeypatch):
    table = RoundCSV(tmp_path / "appended")
    table.log_metrics({"a": 1, "b": 0.1}, step=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: pytest.fail("the file was written anew"))
        table.log_metrics({"b": 0.25}, step=2)
        table.log_metrics({"a": 3, "b": float("nan")}, step=5)
    assert table.path.read_text() == "round,a,b\n1,1,0.1\n2,,0.25\n5,3,nan\n"


def test_a_trainer_takes_it_as_a_logger(tmp_path):
    table = RoundCSV(tmp_path)
    assert isinstance(table, Logger)
    trainer = lightning.Trainer(logger=[table], accelerator="cpu", enable_progress_bar=False, barebones=False)
    assert trainer.log_dir == str(tmp_path)
    table.log_hyperparams({"a": 1})
    table.finalize("success")
    assert os.listdir(tmp_path) == []
