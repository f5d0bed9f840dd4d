"""Each table of the replications is that of a report of the runs that are kept beside it."""

from __future__ import annotations

import math
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

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


DENSE, HEAD = ["mask_rule=dense", "model.trainable=all"], ["model.trainable=head"]
FEW, MANY = ["federation.local_steps=4"], ["federation.local_steps=16"]
FEDAVG = ["server=fedavg"]


def masked(rule, ratio):
    return [f"mask_rule={rule}", f"sparsity.ratio={ratio}"]


def topk(by, fraction):
    return [f"exchange.by={by}", f"exchange.fraction={fraction}", "exchange.compat=null", "model.trainable=all"]


EVERYTHING = topk("largest_change", "1.0")
ORIGINAL = ["exchange.compat=original"]
# what stands in the text below the tables: file, typed of a row, typed of the other, and the difference by seed
PAIRED = [
    ("methods_cifar10", ["objective=scaffold"], FEDAVG, "SCAFFOLD +4.0 ± 6.5 points"),
    ("methods_cifar10", ["server=fedadam"], FEDAVG, "FedAdam +0.5 ± 4.8"),
    ("methods_cifar10", ["aggregation=fednova"], FEDAVG, "FedNova +0.3 ± 7.1"),
    ("methods_cifar10", ["objective=fedprox"], FEDAVG, "FedProx -0.6 ± 1.2"),
    ("methods_cifar10", ["server=fedavgm"], FEDAVG, "FedAvgM -9.2 ± 7.2"),
    ("masks_cifar10_noniid_nc1", HEAD + MANY, DENSE + MANY, "loses 5.4 ± 3.7 points to the head alone"),
    ("masks_cifar10_noniid_nc1", masked("least_sensitive", 0.95) + MANY, DENSE + MANY, "(least_sensitive +5.4 ± 3.7"),
    ("masks_cifar10_noniid_nc1", masked("random", 0.95) + MANY, DENSE + MANY, "random +5.4 ± 3.3"),
    ("masks_cifar10_noniid_nc1", DENSE + FEW, DENSE + MANY, "costs dense training 7.7 ± 7.2 points"),
    ("masks_cifar10_iid", DENSE + MANY, DENSE + FEW, "nothing IID (+0.1 ± 0.8)"),
    ("masks_cifar10_iid", masked("least_sensitive", 0.5) + FEW, DENSE + FEW, "+0.3 ± 0.3 and +0.9 ± 0.7 points"),
    ("masks_cifar10_iid", masked("least_sensitive", 0.5) + MANY, DENSE + MANY, " and +0.9 ± 0.7 points"),
    ("exchange_ag_news", topk("largest_change", 0.01), EVERYTHING, "`largest_change` -10.4 ± 11.2"),
    ("exchange_ag_news", topk("largest_change", 0.1), EVERYTHING, "-10.4 ± 11.2, -7.4 ± 11.5"),
    ("exchange_ag_news", topk("largest_change", 0.3), EVERYTHING, "-7.4 ± 11.5 and +3.1 ± 5.2"),
    ("exchange_ag_news", topk("largest_final", 0.01), EVERYTHING, "`largest_final` -33.5 ± 21.2"),
    ("exchange_ag_news", topk("largest_final", 0.1), EVERYTHING, "-33.5 ± 21.2, -26.6 ± 29.2"),
    ("exchange_ag_news", topk("largest_final", 0.3), EVERYTHING, "-26.6 ± 29.2 and -13.8 ± 13.3"),
    ("exchange_ag_news", ["exchange.fraction=0.01", *ORIGINAL], EVERYTHING, "as the source reads it -36.3 ± 14.8"),
    ("exchange_ag_news", ["exchange.fraction=0.1", *ORIGINAL], EVERYTHING, "-36.3 ± 14.8, -35.0 ± 13.2"),
    ("exchange_ag_news", ["exchange.fraction=0.3", *ORIGINAL], EVERYTHING, "-35.0 ± 13.2 and -11.0 ± 2.7"),
]


def accuracies(name, typed):
    """Test accuracy in percent by seed of the runs with some overrides; what a run did not type is the default."""
    found = {}
    for run in read(STUDIES / f"results/{name}.csv.gz"):
        usual = {"model.trainable": "all", "federation.num_clients": "3", "exchange.compat": "null"}
        options = usual | dict(override.split("=", 1) for override in run.overrides)
        if all(options.get(key) == value for key, value in (word.split("=", 1) for word in typed)):
            assert options["seed"] not in found
            found[options["seed"]] = 100 * run.summary["test/acc"]
    return found


@pytest.mark.parametrize(("name", "one", "other", "said"), PAIRED, ids=[f"{row[0]}-{row[3]}" for row in PAIRED])
def test_a_difference_in_the_text_is_that_of_the_kept_runs(name, one, other, said):
    """Mean and half of Student's 95 % interval, by scipy."""
    ours, theirs = accuracies(name, one), accuracies(name, other)
    assert set(ours) == set(theirs)
    difference = np.array([ours[seed] - theirs[seed] for seed in sorted(ours)])
    half = stats.t.ppf(0.975, len(difference) - 1) * stats.sem(difference)
    assert said in PAGE
    assert f"{difference.mean():+.1f} ± {half:.1f}".removeprefix("" if re.search(r"[+-]\d", said) else "+") in said


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
