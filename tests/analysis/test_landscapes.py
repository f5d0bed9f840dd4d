"""The report on loss landscapes: right figures, no claim that the partial correlation does not bear, nothing fatal."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from landscape_files import a_landscape, barriers
from scipy import stats
from test_report import a_run, edit, files_of, printed, table_of

from fedsparse import report
from fedsparse.analysis import landscapes, landscapes_table
from fedsparse.analysis.folders import read_runs
from fedsparse.analysis.landscapes_plot import rounds_figure
from fedsparse.analysis.landscapes_reading import (
    Correlation,
    by_chance,
    correlations,
    partial_rank_correlation,
    rank_correlation,
    verdict,
)
from fedsparse.analysis.page import Bold

DASH = "\N{EN DASH}"


def sections_of(*folders):
    """Titles, and the sections, of the landscapes of all runs; no file may be a problem."""
    found, problems = landscapes_table.sections(table_of(*folders), read_runs(folders)[0])
    assert problems == []
    return {section.title: section for section in found}


def tables_of(section):
    return {table.caption: [list(table.head), *table.body] for table in section.blocks}


def settings_of(folder):
    table = table_of(folder)
    return landscapes.settings(table, landscapes.read([run for row in table for run in row.runs])[0])


@pytest.fixture
def study(tmp_path):
    """Two seeds: IID, one class a client, and one client alone; figures grow with ``scale``."""
    folder = tmp_path / "study"
    for seed in range(2):
        for name, deal, clients, scale in (
            ("iid", "iid", 10, 1),
            ("nc1", "noniid_nc1", 10, 3),
            ("central", "iid", 1, 2),
        ):
            run = a_run(
                folder / f"{name}{seed}", "dense", seed=seed, partition=deal, federation={"num_clients": clients}
            )
            edit(run, experiment="twin" if clients == 1 else "several")
            size = scale * (1 + 0.25 * seed)
            for closed in (1, 3):
                a_landscape(run, closed, closed == 3, loss=size / closed, scale=size * closed, clients=clients > 1)
    return folder


# ---- figures


def test_no_landscape_no_section(tmp_path):
    run = a_run(tmp_path / "r")
    (run / "landscape").mkdir()
    assert sections_of(tmp_path) == {}


def test_the_tables_as_a_person_reads_them(study):
    """Trace 32 x 3 x (1, 1.25): mean 108, standard error 12, times t(0.975, 1) = 12.706 is 152.5."""
    found = tables_of(sections_of(study)["Loss landscapes"])
    head, central, iid, nc1 = found["Loss and curvature"]
    assert head[:4] == ["mask rule", "partition", "training loss", "test accuracy, %"]
    assert head[-1] == "seeds"
    line = dict(zip(head, iid, strict=True))
    assert (line["mask rule"], line["partition"], line["seeds"]) == ("dense, several", "iid", "2")
    assert line["test accuracy, %"] == "75.0 ± 0.0"
    assert line["trace"] == "108 ± 152"
    assert line["lambda_1"] == "27.0 ± 38.1"
    assert line["distance between clients"] == "13.5 ± 19.1"
    assert (central[1], nc1[1]) == ("central", "noniid_nc1")
    assert central[head.index("distance between clients")] == DASH
    head, _, iid, _ = found["Sharpness"]
    line = dict(zip(head, iid, strict=True))  # 0.4 of it 0.3, in proportion to 3 and 3.75
    assert [line[name].split(" ")[0] for name in ("SAM rise", "of it first order", "beyond first order")] == [
        *("1.35", "1.01", "0.338")
    ]
    assert line["PAC-Bayes bound"] == "0.900 ± 0.000"


def test_barriers_have_three_figures_of_loss_and_three_of_accuracy(study):
    head, *body = tables_of(sections_of(study)["Loss landscapes"])["Barriers"]
    assert [line[2] for line in body[:4]] == [
        *("global to client, test", "client to client, test"),
        *("global to client, client:0", "client to client, client:0"),
    ]
    assert len(head) == 2 + 1 + 6 + 1
    iid = body[0]
    assert [cell.split(" ")[0] for cell in iid[3:9]] == ["0.338", "0.0500", "6.75", "25.0", "12.5", "50.0"]
    assert not any("central" in line for line in body)


def test_figures_of_several_lines_are_averaged(tmp_path):
    lines = {
        "global to client 0": barriers((1.0, 0.0, 2.0), (0.0, 0.0, 0.5)),
        "global to client 1": barriers((2.0, None, 4.0), (0.1, 0.0, 0.0)),
        "nobody to somebody": barriers((9.0, 9.0, 9.0), (0.9, 0.9, 0.9)),
    }
    a_landscape(a_run(tmp_path / "r"), **{"lines test": {"lines": lines}, "lines client:0": "gone"})
    ((one,), _) = landscapes.read(read_runs([tmp_path])[0])
    assert one.lines == (("global to client", "test"),)
    found = [one.figures[landscapes.barrier_name("global to client", "test", f)] for f in landscapes.BARRIER]
    assert found == pytest.approx([1.5, 0.0, 3.0, 5.0, 0.0, 25.0])
    assert one.figures[landscapes.DISTANCE] == 4.0


def test_distances_between_clients_are_averaged(tmp_path):
    pairs = {
        "client 0 to client 1": 1.0,
        "client 0 to client 2": 4.0,
        "global to client 0": 9.0,
        "client 1 to client 2": None,
    }
    a_landscape(a_run(tmp_path / "r"), models={"distances": pairs})
    assert landscapes.read(read_runs([tmp_path])[0])[0][0].figures[landscapes.DISTANCE] == 2.5


def test_the_file_of_the_last_round_is_that_of_the_folder_itself(tmp_path):
    run = a_run(tmp_path / "r")
    a_landscape(run, 3, last=False, loss=9.0)
    a_landscape(run, 3, loss=1.0)
    ((one,), problems) = landscapes.read(read_runs([tmp_path])[0])
    assert (one.figures[landscapes.LOSS], problems) == (1.0, [])


def test_runs_of_another_learning_rate_are_read_but_not_in_the_tables(tmp_path):
    for i in range(7):
        worse = i > 4
        run = a_run(tmp_path / f"r{i}", seed=i % 5, lr=0.3 if worse else 0.1, val=0.4 if worse else 0.8)
        a_landscape(run, loss=0.1 * i, accuracy=0.9 - 0.1 * i, scale=1.0 + i)
    found = sections_of(tmp_path)
    (_, line) = tables_of(found["Loss landscapes"])["Loss and curvature"]
    assert line[-1] == "5"
    assert tables_of(found["Loss landscapes and accuracy"])["digits, mlp"][1][:3] == ["training loss", "7", "-1.00"]


def test_options_that_change_what_figures_mean_keep_runs_apart(tmp_path):
    for seed in range(4):
        options = {"mask": "inside", "samples": 64} if seed % 2 else {}
        a_landscape(a_run(tmp_path / f"r{seed}", seed=seed), scale=1.0 + seed, options=options)
    (_, *body) = tables_of(sections_of(tmp_path)["Loss landscapes"])["Loss and curvature"]
    assert [(line[0], line[-1]) for line in body] == [("random", "2"), ("random, mask=inside, samples=64", "2")]


# ---- differences


def test_differences_are_those_of_the_paired_t_test(study):
    """Traces of Nc = 1 and of IID, last round, by hand from the writer's formula."""
    head, *body = tables_of(sections_of(study)["Loss landscapes by partition"])["dense, several"]
    assert head == ["figure", "noniid_nc1 against iid", "central against iid"]
    lines = {line[0]: line[1:] for line in body}
    nc1, iid = [32 * 3 * 3 * s for s in (1, 1.25)], [32 * 3 * s for s in (1, 1.25)]
    interval = stats.ttest_rel(nc1, iid).confidence_interval()
    assert lines["trace"][0] == f"+{np.mean(nc1) - np.mean(iid):.0f} ± {(interval.high - interval.low) / 2:.0f}"
    assert lines["trace"][1] == "+108 ± 152"
    assert lines["test accuracy, points"] == ["+0.0 ± 0.0"] * 2
    assert lines["distance between clients"][1] == DASH
    assert lines["seeds"] == ["2", "2"]
    (seed,) = study.glob("nc11")
    shutil.rmtree(seed)
    assert tables_of(sections_of(study)["Loss landscapes by partition"])["dense, several"][-1] == ["seeds", "1", "2"]


def test_a_difference_is_marked_where_its_interval_excludes_zero(tmp_path):
    for seed in range(3):
        a_landscape(a_run(tmp_path / f"i{seed}", seed=seed), scale=1 + 0.01 * seed)
        a_landscape(a_run(tmp_path / f"n{seed}", seed=seed, partition="noniid_nc1"), scale=2 + 0.02 * seed)
    ((_, *body),) = tables_of(sections_of(tmp_path)["Loss landscapes by partition"]).values()
    marked = {line[0]: line[1] for line in body if isinstance(line[1], Bold)}
    assert marked["trace"].startswith("+32.3 ± ")
    assert marked["trace"].endswith(" ▲")
    assert marked["sigma"].endswith(" ▼")
    assert "training loss" not in marked


@pytest.mark.parametrize("other", [{"federation": {"rounds": 5}}, {"model": {"trainable": "head"}}, {"rule": "fisher"}])
def test_settings_that_differ_in_more_than_the_partition_are_no_pair(tmp_path, other):
    a_landscape(a_run(tmp_path / "a"))
    a_landscape(a_run(tmp_path / "b", partition="noniid_nc1", **other))
    assert landscapes_table.pairs(settings_of(tmp_path)) == []


def test_central_is_compared_within_its_model_and_mask_alone(study):
    for i, change in enumerate(({"model": {"trainable": "head"}}, {"rule": "random"})):
        a_landscape(a_run(study / f"x{i}", **{"rule": "dense", "federation": {"num_clients": 1}} | change))
    ((first, others),) = landscapes_table.pairs(settings_of(study))
    assert (first.partition, first.row.name) == ("iid", "dense, several")
    assert [(one.partition, one.row.name) for one in others] == [
        ("noniid_nc1", "dense, several"),
        ("central", "dense, twin"),
    ]


def test_differences_are_against_iid_wherever_its_name_stands(tmp_path):
    for deal in ("dirichlet01", "iid", "unbalanced"):
        groups = {"trajectory": {"every": 1}} if deal == "iid" else {}
        a_landscape(a_run(tmp_path / deal, partition=deal, deal={"_target_": deal}, **groups))
    ((first, others),) = landscapes_table.pairs(settings_of(tmp_path))
    assert (first.partition, [one.partition for one in others]) == ("iid", ["dirichlet01", "unbalanced"])


def test_central_may_have_batches_of_another_size_but_not_other_data(tmp_path):
    for i, (clients, data) in enumerate([(10, {}), (1, {"batch_size": 8}), (1, {"augment": "flip"})]):
        groups = {"data": {"batch_size": 32, "augment": "none"} | data, "federation": {"num_clients": clients}}
        a_landscape(a_run(tmp_path / f"r{i}", "dense", **groups))
    ((_, (central,)),) = landscapes_table.pairs(settings_of(tmp_path))
    assert central.row.settings["data.batch_size"] == "8"


def test_learning_rates_that_differ_are_said(tmp_path):
    a_landscape(a_run(tmp_path / "a", lr=0.1))
    b = a_run(tmp_path / "b", lr=0.3, partition="noniid_nc1")
    a_landscape(b)
    ((_, *body),) = tables_of(sections_of(tmp_path)["Loss landscapes by partition"]).values()
    assert body[-2] == ["learning rates", "0.3 and 0.1"]
    shutil.rmtree(b)
    a_landscape(a_run(tmp_path / "c", lr=0.1, partition="noniid_nc1"))
    ((_, *body),) = tables_of(sections_of(tmp_path)["Loss landscapes by partition"]).values()
    assert "learning rates" not in [line[0] for line in body]


# ---- over rounds


def test_a_line_is_the_mean_and_its_band_goes_from_lowest_to_highest(study):
    figure = rounds_figure(settings_of(study))
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_visible()}
    assert len(panels) == 12
    trace = panels["trace"]
    assert [line.get_xydata().tolist() for line in trace.lines] == [
        [[1, 32 * s * 1.125], [3, 32 * 3 * s * 1.125]]
        for s in (2, 1, 3)  # central, iid, noniid_nc1
    ]
    band = trace.collections[1].get_paths()[0].vertices
    assert {tuple(point) for point in band[band[:, 0] == 3].tolist()} == {(3.0, 96.0), (3.0, 120.0)}
    assert len(panels["distance between clients"].lines) == 2
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["central", "iid", "noniid_nc1"]


def test_an_axis_is_logarithmic_where_positive_values_lie_far_apart(tmp_path):
    run = a_run(tmp_path / "r")
    a_landscape(run, 1, last=False, loss=0.1, scale=0.1, curvature={"eigenvalues": [-5.0], "trace": 1.0})
    a_landscape(run, 3, loss=1.0, scale=10.0, curvature={"eigenvalues": [5000.0], "trace": 19.0})
    panels = {axes.get_title(): axes.get_yscale() for axes in rounds_figure(settings_of(tmp_path)).axes}
    scales = [panels[name] for name in ("training loss", "lambda_1", "trace", "SAM rise")]
    assert scales == ["linear", "linear", "linear", "log"]


def test_one_round_alone_is_no_picture(tmp_path):
    a_landscape(a_run(tmp_path / "r"))
    assert "Loss landscapes over rounds" not in sections_of(tmp_path)


def test_earlier_rounds_are_not_in_the_tables(tmp_path):
    """A run whose last round has no landscape is drawn, and stands in no table."""
    run = a_run(tmp_path / "r")
    for closed in (1, 2):
        a_landscape(run, closed, last=False)
    assert list(sections_of(tmp_path)) == ["Loss landscapes over rounds"]


# ---- the reading

values = st.lists(st.tuples(*[st.integers(0, 8)] * 3), min_size=4, max_size=20)


def residuals(ranks, given):
    """Of a least-squares regression with a constant."""
    design = np.stack([np.ones_like(given), given], axis=1)
    return ranks - design @ np.linalg.lstsq(design, ranks, rcond=None)[0]


@given(values)
@settings(derandomize=True, deadline=None)
def test_partial_rank_correlation_is_that_of_the_residuals_of_ranks(rows):
    x, y, z = np.array(rows, dtype=float).T
    if min(np.ptp(v) for v in (x, y, z)) == 0:
        return
    assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    given_z = stats.rankdata(z)
    left = [residuals(stats.rankdata(v), given_z) for v in (x, y)]
    found = partial_rank_correlation(x, y, z)
    if min(np.linalg.norm(v) for v in left) < 1e-6:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(stats.pearsonr(*left).statistic)


def test_partial_rank_correlation_by_the_formula_of_three_correlations():
    """(r_xy - r_xz r_yz) / sqrt((1 - r_xz^2)(1 - r_yz^2)), Kendall and Stuart."""
    x, y, z = np.random.default_rng(3).normal(size=(3, 15)).round(1)
    xy, xz, yz = (stats.spearmanr(*pair).statistic for pair in ((x, y), (x, z), (y, z)))
    expected = (xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2))
    assert partial_rank_correlation(x, y, z) == pytest.approx(expected)


@pytest.mark.parametrize("conditioned", [False, True])
def test_chance_is_what_all_orders_of_the_ranks_give(conditioned):
    """All 720 orders of six runs, against random ones."""
    x, y, z = np.random.default_rng(5).normal(size=(3, 6))
    z = z + y
    orders = [np.array(order, dtype=float) for order in itertools.permutations(range(6))]
    exact = [partial_rank_correlation(o, y, z) if conditioned else rank_correlation(o, y) for o in orders]
    found = by_chance(x, y, z if conditioned else None)
    assert found == pytest.approx(np.nanquantile(np.abs(exact), 0.95), abs=0.03)
    mixed = np.random.default_rng(0).permutation(6)
    assert by_chance(x[mixed], y[mixed], z[mixed] if conditioned else None) == found


def some_runs(folder, figures):
    """One run for each (training loss, test accuracy, scale)."""
    for i, (loss, accuracy, scale) in enumerate(figures):
        a_landscape(a_run(folder / f"r{i:02}", seed=i), loss=loss, accuracy=accuracy, scale=scale)
    return sections_of(folder)["Loss landscapes and accuracy"]


def test_what_only_follows_the_training_loss_is_not_said_to_explain_accuracy(tmp_path):
    """Curvature and accuracy both follow the training loss, each with noise of its own."""
    random = np.random.default_rng(1)
    losses = np.linspace(0.1, 1.6, 15)
    noise = 0.1 * random.normal(size=(2, 15))
    section = some_runs(
        tmp_path, zip(losses, 0.95 - 0.3 * losses + 0.2 * noise[0], np.exp(losses + noise[1]), strict=True)
    )
    lines = {line[0]: line[1:] for line in tables_of(section)["digits, mlp"][1:]}
    assert lines["training loss"][0] == "15"
    assert lines["training loss"][3:] == [DASH, DASH]
    assert float(lines["trace"][1]) < -0.9
    assert not any(isinstance(line[3], Bold) for line in lines.values())
    assert "Given it, no figure goes beyond chance" in section.text
    assert "Few runs say little" in section.text
    assert lines["sigma"][1].startswith("+")  # it falls where curvature rises


def test_what_says_more_than_the_training_loss_is_named(tmp_path):
    """Accuracy follows curvature alone, and the training loss is another thing."""
    random = np.random.default_rng(2)
    scales = random.permutation(np.linspace(1, 3, 12))
    section = some_runs(tmp_path, zip(random.normal(1, 0.1, 12), 0.9 - 0.1 * scales, scales, strict=True))
    lines = {line[0]: line[1:] for line in tables_of(section)["digits, mlp"][1:]}
    assert isinstance(lines["trace"][3], Bold)
    assert "Given it, beyond chance: lambda_1 (-1.00), trace (-1.00)" in section.text
    assert "no figure goes beyond" not in section.text


def test_worst_points_of_lines_on_the_test_set_are_not_read(tmp_path):
    """On a line that ends at the global model they hold its own accuracy."""
    section = some_runs(tmp_path, [(0.1 * i, 0.9 - 0.1 * i, 1.0 + i % 4) for i in range(8)])
    lines = [line[0] for line in tables_of(section)["digits, mlp"][1:] if " to " in line[0]]
    assert lines == [f"{line}, test: loss, above the chord" for line in ("global to client", "client to client")]


def test_few_runs_are_not_read(tmp_path):
    section = some_runs(tmp_path, [(0.1 * i, 0.9 - 0.1 * i, 1.0 + i) for i in range(5)])
    assert section.blocks == []
    assert "digits, mlp: 5 runs are too few" in section.text


def test_models_are_read_apart(tmp_path):
    for model in ("mlp", "vit"):
        for i in range(6):
            run = a_run(tmp_path / f"{model}{i}", seed=i)
            edit(run, model=model)
            a_landscape(run, loss=0.1 * i, accuracy=0.9 - 0.1 * i if model == "mlp" else 0.1 * i)
    section = sections_of(tmp_path)["Loss landscapes and accuracy"]
    found = {name: lines[1][:3] for name, lines in tables_of(section).items()}
    assert found == {"digits, mlp": ["training loss", "6", "-1.00"], "digits, vit": ["training loss", "6", "+1.00"]}


def test_a_figure_that_half_of_the_runs_have_is_correlated_over_them(tmp_path):
    random = np.random.default_rng(4)
    for i in range(12):
        a_landscape(a_run(tmp_path / f"r{i}", seed=i), loss=random.random(), accuracy=random.random(), sharp=i < 7)
    found = {one.figure: one for one in correlations(landscapes.read(read_runs([tmp_path])[0])[0])}
    assert found["training loss"].runs == 12
    assert "SAM rise" not in found  # the same in all
    assert found.keys() == {"training loss"}


def test_a_verdict_claims_what_lies_beyond_chance_alone():
    loss = Correlation("training loss", 15, -0.96, 0.5, math.nan, math.nan)
    trace = Correlation("trace", 15, -0.90, 0.5, 0.24, 0.55)
    path = Correlation("path norm", 15, 0.91, 0.5, -0.62, 0.55)
    assert verdict("digits, mlp", 15, [loss, trace]) == (
        "digits, mlp, 15 runs: the training loss alone has -0.96. Given it, no figure goes beyond chance: that a flat "
        "minimum means accuracy, these runs do not show."
    )
    assert verdict("a", 15, [loss, trace, path]).endswith("Given it, beyond chance: path norm (-0.62).")
    assert verdict("a", 1, []).startswith("a: 1 run is too few")


# ---- files of any kind


def written(folder, content):
    (folder / "landscape/landscape.json").write_text(content)


def replaced(folder, make):
    (folder / "landscape/landscape.json").unlink()
    make(folder / "landscape/landscape.json")


DAMAGED = {
    "torn": (lambda f: written(f, '{"round": 3'), "landscape.json is damaged: it is not JSON"),
    "deep": (lambda f: written(f, "[" * 100_000), "landscape.json is damaged: it is not JSON"),
    "a list": (lambda f: written(f, "[]"), "landscape.json is damaged: it holds no keys"),
    "empty": (lambda f: written(f, "{}"), "landscape.json is damaged: it holds no round"),
    "half a round": (lambda f: a_landscape(f, round=1.5), "landscape.json is damaged: it holds no round"),
    "a round beyond all": (lambda f: a_landscape(f, round=10**400), "landscape.json is damaged: it holds no round"),
    "another run": (
        lambda f: a_landscape(f, round=7),
        "landscape.json is of another run: it is of round 7, the run has 3",
    ),
    "parts of another kind": (
        lambda f: a_landscape(f, curvature=[1], **{"lines test": 5}),
        "landscape.json is damaged: its curvature, lines test holds no keys",
    ),
    "an accuracy of 7": (
        lambda f: a_landscape(f, accuracy=7),
        "landscape.json is damaged: it holds no number from 0 to 1 for the test accuracy",
    ),
    "a folder": (lambda f: replaced(f, os.mkdir), "landscape.json cannot be read: Is a directory"),
    "a pipe": (lambda f: replaced(f, os.mkfifo), "landscape.json is no plain file"),
    "a link to nothing": (
        lambda f: replaced(f, lambda path: path.symlink_to("nothing")),
        "landscape.json cannot be read: No such file or directory",
    ),
}


@pytest.mark.parametrize("damage", list(DAMAGED))
def test_a_damaged_file_is_one_line_and_the_others_are_shown(tmp_path, capsys, damage):
    harm, reason = DAMAGED[damage]
    a_landscape(a_run(tmp_path / "runs/good"), scale=2.0)
    bad = a_run(tmp_path / "runs/bad", seed=1)
    a_landscape(bad)
    harm(bad)
    report.main([str(tmp_path / "runs")])
    lines = printed(capsys).splitlines()
    assert f"| bad | {reason}; not in the landscapes |" in lines
    assert "| random | iid | 80% | 0.500 | 75.0 | 16.0 | 64.0 | 20.0 | 60.0 | 8.00 | 1 |" in lines
    assert "| random | iid | 80% | 0.1 | 20.0% | 1.0 | 70.0 ± 0.0 | – | 60.0 ± 0.0 | 2 |" in lines  # the run is there


def test_a_round_in_the_folder_of_another_is_a_line(tmp_path):
    run = a_run(tmp_path / "r")
    a_landscape(run, 1, last=False, round=2)
    (problem,) = landscapes.read(read_runs([tmp_path])[0])[1]
    assert problem.reason == (
        "landscape/round_1: landscape.json is of another folder: it is of round 2; not in the landscapes"
    )


EMPTY = {
    "no parts": dict.fromkeys(("models", "curvature", "sharpness", "lines test", "lines client:0"), "gone"),
    "parts without figures": {key: {} for key in ("models", "curvature", "sharpness", "lines test", "lines client:0")},
    "gaps": {
        "models": {"models": {"global": {"train": {"loss": None}, "test": []}}, "distances": 3},
        "curvature": {"eigenvalues": [None], "trace": "x", "frobenius": 1e300},
        "sharpness": {"sam": None, "path_norm": {"value": None, "why": "no"}, "sigma": {"value": True}},
        "lines test": {"lines": {"client 0 to client 1": {"loss_barrier": None}}},
        "lines client:0": {"lines": []},
    },
    "eigenvalues": {"curvature": {"eigenvalues": {"0": 1}}, "options": None},
}


@pytest.mark.parametrize("parts", list(EMPTY.values()), ids=list(EMPTY))
def test_what_is_missing_is_a_dash(tmp_path, capsys, parts):
    a_landscape(a_run(tmp_path / "a"))
    bare = a_run(tmp_path / "b", partition="noniid_nc1")
    for closed in (1, 3):
        a_landscape(bare, closed, closed == 3, **parts)
    report.main([str(tmp_path)])
    lines = printed(capsys).splitlines()
    there = "0.500 | 75.0 | – | – | – | 30.0 | 4.00" if "options" in parts else " | ".join(DASH * 7)
    assert f"| random | noniid_nc1 | 80% | {there} | 1 |" in lines
    assert not any("not in the landscapes" in line for line in lines)
    panels = [axes.get_title() for axes in rounds_figure(settings_of(tmp_path)).axes if axes.get_visible()]
    assert len(panels) == 12  # of the other run


def test_names_of_other_parts_are_not_shown(tmp_path, capsys):
    lines = {"<script> to client 0": barriers((1, 1, 1), (1, 1, 1))}
    parts = {"lines test": {"lines": lines}, "lines <b>": {"lines": lines}, "options": {"mask": "<i>" * 1000}}
    a_landscape(a_run(tmp_path / "r"), **parts)
    report.main([str(tmp_path), "--out", str(tmp_path / "out")])
    out = printed(capsys)
    assert "script" not in out
    assert "<i>" not in (tmp_path / "out/report.html").read_text()
    assert "mask=&lt;i&gt;" in out
    assert max(map(len, out.splitlines())) < 2500


@pytest.mark.slow
def test_the_same_folders_give_the_same_bytes(study, tmp_path):
    for name in ("contour_test.png", "lines.png", "contour_<b>.png"):
        (study / "iid0/landscape" / name).write_bytes(b"")
    shutil.copytree(study, tmp_path / "moved/study")
    for out, folder in (("one", study), ("other", tmp_path / "moved/study")):
        report.main([str(folder), "--out", str(tmp_path / out)])
    first = files_of(tmp_path / "one")
    assert first == files_of(tmp_path / "other")
    assert "landscapes-digits-mlp.png" in first
    assert "| dense, several | iid | iid0/landscape | contour_test.png, lines.png |" in first["report.md"].decode()


def test_the_writer_is_json_without_gaps(tmp_path):
    folder = a_landscape(a_run(tmp_path / "r"))
    json.loads((folder / "landscape.json").read_text(), parse_constant=lambda word: pytest.fail(word))
