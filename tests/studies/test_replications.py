"""Each table of the replications is that of a report of the runs that are kept beside it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedsparse import report
from fedsparse.analysis.archive import read
from fedsparse.analysis.page import markdown

STUDIES = Path(__file__).parents[2] / "docs/studies"
PAGE = (STUDIES / "replications.md").read_text(encoding="utf-8")
MADE = re.compile(r"<!-- from (results/\S+\.csv\.gz) -->\n\n((?:\|.*\n)+)")
REACH = 0.9
TABLES = [(found[1], found[2]) for found in MADE.finditer(PAGE)]
KEPT = sorted(f"results/{path.name}" for path in (STUDIES / "results").glob("*.csv.gz"))


def cells(block):
    """Cells of a table's lines, without the line of dashes."""
    lines = [line.strip().strip("|").split("|") for line in block.strip().splitlines()]
    return [tuple(cell.strip() for cell in line) for line in lines if not re.fullmatch(r"[\s:-]*", "".join(line))]


def tables_of(text):
    return [cells(block) for block in re.findall(r"(?:^\|.*\n)+", text, re.M)]


@pytest.fixture(scope="module")
def reported():
    return {name: tables_of(markdown("all", report.sections([STUDIES / name], reach=REACH))) for name in KEPT}


def test_every_file_of_runs_has_a_table_and_they_are_small():
    assert sorted({name for name, _ in TABLES}) == KEPT
    assert sum((STUDIES / name).stat().st_size for name in KEPT) < 3_000_000


@pytest.mark.parametrize(("name", "block"), TABLES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(TABLES)])
def test_a_table_is_the_reports(reported, name, block):
    assert cells(block) in reported[name]


@pytest.mark.parametrize("name", KEPT)
def test_every_run_has_its_hash_and_seconds_and_no_place_of_a_machine(name):
    runs = read(STUDIES / name)
    assert runs
    for run in runs:
        assert re.fullmatch("[0-9a-f]{64}", run.summary["global_sha256"])
        assert run.summary["seconds"] > 0
        assert not re.search(r"/(work|home|root|tmp)/", f"{run.overrides} {run.config} {run.summary}")
