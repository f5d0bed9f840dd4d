"""Each table of the replications is that of a report of the runs that are kept beside it."""

from __future__ import annotations

import math
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from fedsparse import repeat, report
from fedsparse.analysis.archive import read
from fedsparse.analysis.page import markdown

STUDIES = Path(__file__).parents[2] / "docs/studies"
PAGE = (STUDIES / "replications.md").read_text(encoding="utf-8")
MADE = re.compile(r"<!-- from (results/\S+\.csv\.gz) -->\n\n((?:\|.*\n)+)")
REACH = {"results/fedavg_shakespeare.csv.gz": 0.2}  # the accuracy to which rounds are counted; 0.9 of the others
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
    return {
        name: tables_of(markdown("all", report.sections([STUDIES / name], reach=REACH.get(name, 0.9)))) for name in KEPT
    }


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


TARGETS = re.findall(r"^(replicate-\w+): \$\(READY\)", (STUDIES / "replications.mk").read_text(encoding="utf-8"), re.M)


@pytest.fixture(scope="module")
def printed():
    """The lines of each target."""

    def lines(target):
        command = ["make", "-n", "-C", str(STUDIES.parents[1]), target, "SIZE=small"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()

    return {target: lines(target) for target in TARGETS}


def typed(line, module):
    """The words that follow a module's name."""
    words = shlex.split(line)
    return words[words.index(module) + 1 :]


# runs of a small target: those that its lists multiply to, and those that fedsparse.repeat adds; counted by hand
RUNS = {
    "replicate-autoflip": (3 + 2 * 3 + 2 * 2 * 3 + 2 * 3 + 3 + 4 * 3, 0),
    "replicate-exchange": (2 * (2 * 4 + 3 + 1 + 1), 13 * 3),
    "replicate-fedavg": (2 * 2 * 2 + 2 * 2, 2 * 2 * 3 + 2 * 3),
    "replicate-methods": (6 * 4, 6 * 3),
    "replicate-masks": (1 + 2 * 3 * 2 * 3 + 3 * 2 * 4 * 3 * 5, 2 * 3 * 2 * 5),
}


def test_the_variables_of_these_targets_are_theirs_alone():
    """Make has one name space: a second definition changes what the first one's targets run."""
    own, main = (
        re.findall(r"^(\w+) *[:?]?=", path.read_text(encoding="utf-8"), re.M)
        for path in (STUDIES / "replications.mk", STUDIES.parents[1] / "Makefile")
    )
    assert len(own) > 40
    assert set(own) & set(main) == set()


def test_every_target_is_counted():
    assert sorted(RUNS) == sorted(TARGETS)


@pytest.mark.parametrize("target", RUNS)
def test_a_target_says_how_many_runs_it_is(printed, target):
    lines = printed[target]
    swept = [typed(line, "fedsparse.train") for line in lines if "fedsparse.train" in line]
    said = next(line for line in lines if " at a time" in line).partition("JOBS")[0]
    listed, repeated = RUNS[target]
    assert sum(math.prod(1 + word.count(",") for word in words) for words in swept) == listed
    assert sum(int(count) for count in re.findall(r"\d+", said)) == listed + repeated


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_repeats_in_words_that_the_command_takes(printed, target, tmp_path):
    """What is wrong with a folder that is not there is the folder."""
    for line in printed[target]:
        if "fedsparse.repeat" in line:
            words = [str(tmp_path) if "/rates" in word else word for word in typed(line, "fedsparse.repeat")]
            with pytest.raises(SystemExit, match="no finished run"):
                repeat.main(words)
