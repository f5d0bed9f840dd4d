"""Sparse exchanges in the report: their names, their lines, and figures worked out by hand or by SciPy."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from test_report import a_run, edit, files_of, printed, table_of

from fedsparse import report
from fedsparse.analysis.baseline import dense_of
from fedsparse.analysis.exchange import exchange_label
from fedsparse.analysis.exchange_lines import line_of, lines, places, references
from fedsparse.analysis.exchange_plot import curves_figure, exchange_figure
from fedsparse.analysis.exchange_table import section

ROOT = Path(__file__).parents[2]
MASKED, FULL = ({"feedback": None, "_target_": f"exchange.{name}", "_partial_": True} for name in ("Masked", "Full"))
DENSE = [0.90, 0.92, 0.94]  # by seed
SPARSE = {0.01: [0.70, 0.74, 0.78], 0.1: [0.88, 0.89, 0.93]}


def sparse(
    folder, kind="topk", by="largest_change", fraction=0.1, feedback=None, precision=None, sums=None, more=(), **figures
):
    """A run of a sparse exchange, whose configuration and summary say so as train leaves them."""
    settings = {"by": by, "fraction": fraction, "feedback": feedback, "precision": precision}
    exchange = {"_target_": kind} | settings | dict(more)
    aggregation = sums or {"_target_": "WeightedMean", "denominator": "participants" if feedback else "senders"}
    facts = {f"exchange_{key}": value for key, value in settings.items() if key != "by"}
    a_run(folder, figures.pop("rule", "dense"), exchange=exchange, aggregation=aggregation, **figures)
    edit(folder, exchange=kind, exchange_rule=by, exchange_payload="change", **facts)
    return folder


@pytest.fixture
def sweep(tmp_path):
    """Dense and masked beside two fractions of one rule, plain and with error feedback: three seeds."""
    folder = tmp_path / "sweep"
    for seed in range(3):
        edit(
            a_run(folder / f"d{seed}", "dense", seed=seed, test=DENSE[seed], sent=10**7, exchange=FULL), exchange="full"
        )
        masked = a_run(folder / f"m{seed}", seed=seed, test=DENSE[seed] - 0.05, sent=2 * 10**6, exchange=MASKED)
        edit(masked, exchange="masked")
        for fraction, tests in SPARSE.items():
            sent = int(1.5 * fraction * 10**7)
            sparse(folder / f"p{fraction}{seed}", fraction=fraction, seed=seed, test=tests[seed], sent=sent)
            more = {"feedback": 1.0, "seed": seed, "test": tests[seed] + 0.01, "sent": sent + 1000}
            sparse(folder / f"f{fraction}{seed}", fraction=fraction, **more)
    return folder


LABELS = {
    "largest_change 10 %, feedback, half": ("topk", "largest_change", 0.1, 1.0, "float16", "change"),
    "largest_final 0.5 %": ("topk", "largest_final", 0.005, None, None, "change"),
    "randomk 30 %, feedback 0.9, int8": ("randomk", "randomk", 0.3, 0.9, "int8", "change"),
    "threshold largest_change, bfloat16": ("threshold", "largest_change", None, None, "bfloat16", None),
    "layers largest_change 100 %, values": ("layers", "largest_change", 1.0, None, None, "value"),
    "pattern": ("pattern", None, None, None, None, "change"),
    "mine first 10 %": ("mine", "first", 0.1, None, None, "change"),
}
KEYS = ("exchange", *(f"exchange_{key}" for key in ("rule", "fraction", "feedback", "precision", "payload")))


@pytest.mark.parametrize("label", list(LABELS))
def test_a_label_says_what_is_sent(label):
    assert exchange_label(dict(zip(KEYS, LABELS[label], strict=True))) == label


@pytest.mark.parametrize("exchange", [None, "full", "masked", "mine"])
def test_what_chooses_nothing_anew_has_no_label(exchange):
    nothing = dict.fromkeys(KEYS)
    assert exchange_label(nothing | {"exchange": exchange}) == ""
    assert exchange_label({}) == ""


# ---- rows


def test_runs_of_different_exchanges_are_not_averaged(sweep):
    names = {row.name: len(row.runs) for row in table_of(sweep) if row.exchange}
    rules = [f"largest_change {percent} %{more}" for percent in (1, 10) for more in ("", ", feedback")]
    assert names == dict.fromkeys(rules, 3)


def test_old_folders_keep_their_names_beside_a_sparse_exchange(tmp_path):
    a_run(tmp_path / "d", "dense")
    a_run(tmp_path / "r")
    sparse(tmp_path / "s")
    assert [row.name for row in table_of(tmp_path)] == ["dense", "largest_change 10 %", "random"]


def test_a_mask_stands_before_the_exchange_within_it(tmp_path):
    sparse(tmp_path / "s", rule="random")
    sparse(tmp_path / "h", model={"trainable": "head"})
    assert [row.name for row in table_of(tmp_path)] == [
        "head alone, largest_change 10 %",
        "random, largest_change 10 %",
    ]


def test_exchanges_of_one_label_are_told_apart_by_what_differs_among_them(tmp_path):
    for who in ("senders", "participants"):
        sparse(tmp_path / who, sums={"_target_": "WeightedMean", "denominator": who})
    sparse(tmp_path / "half", precision="float16", sums={"_target_": "Other"})
    found = [row.name for row in table_of(tmp_path)]
    assert found == [
        "largest_change 10 %, aggregation.denominator=participants",
        "largest_change 10 %, aggregation.denominator=senders",
        "largest_change 10 %, half",
    ]


def test_what_the_label_does_not_say_is_named_on_all_of_a_line(tmp_path):
    """Fractions aside, which the label says, and lists of fractions, which it does not."""
    for fraction in (0.1, 0.3):
        sparse(tmp_path / f"{fraction}", fraction=fraction)
        sparse(tmp_path / f"bad{fraction}", fraction=fraction, more={"attackers": 2})
    edit(sparse(tmp_path / "list", fraction=[0.1, 0.3]), exchange_fraction=None)
    assert [row.name for row in table_of(tmp_path)] == [
        "largest_change 10 %",
        "largest_change 10 %, exchange.attackers=2",
        "largest_change 30 %",
        "largest_change 30 %, exchange.attackers=2",
        "largest_change, exchange.fraction=[0.1, 0.3]",
    ]
    ((_, shown),) = places(table_of(tmp_path)).items()
    assert [len(rows) for rows in lines(shown).values()] == [2, 2, 1]


def test_dense_training_sends_everything(sweep):
    """A sparse exchange trains all, too, and is no reference: not for a row, not for the target."""
    table = table_of(sweep)
    assert {dense_of(row, table).name for row in table} == {"dense, exchange=full"}
    for path in sweep.glob("d*"):
        edit(path, **{"test/acc": 0.1})
    (lines_of,) = [part for part in report.sections([sweep]) if part.title.startswith("Rounds")]
    assert {line[1] for line in lines_of.blocks[0].body} == {"9.5"}  # 0.95 of it


# ---- lines


def test_a_line_goes_through_the_fractions(sweep):
    ((place, shown),) = places(table_of(sweep)).items()
    assert place == ("digits", "mlp", "iid", "3 rounds")
    found = {line: [row.runs[0].summary["exchange_fraction"] for row in rows] for line, rows in lines(shown).items()}
    assert found == {("largest_change", ""): [0.01, 0.1], ("largest_change", "feedback"): [0.01, 0.1]}
    assert list(references(shown)) == ["dense", "random, 80% frozen"]


def test_a_line_keeps_what_all_rows_of_its_place_share(tmp_path):
    for fraction in SPARSE:
        sparse(tmp_path / f"{fraction}", fraction=fraction, feedback=1.0)
    ((_, shown),) = places(table_of(tmp_path)).items()
    assert [(line, len(rows)) for line, rows in lines(shown).items()] == [(("largest_change", "feedback"), 2)]


def test_references_share_all_but_the_mask_and_the_exchange(sweep):
    for name, rule in (("dense", "dense"), ("masked", "random")):
        a_run(sweep / name, rule, server={"_target_": "Adam"})
    ((_, shown),) = places(table_of(sweep)).items()
    assert {row.settings.get("server._target_") for row in references(shown).values()} == {None}
    assert sorted(len(row.runs) for row in references(shown).values()) == [3, 3]


def test_places_are_apart_and_references_elsewhere_stay_out(sweep):
    a_run(sweep / "far", "dense", partition="noniid_nc1")
    edit(sparse(sweep / "docs"), data="docs", model="bert_tiny")
    parts = places(table_of(sweep))
    assert list(parts) == [("digits", "mlp", "iid", "3 rounds"), ("docs", "bert_tiny", "iid", "3 rounds")]
    (row,) = parts["docs", "bert_tiny", "iid", "3 rounds"]
    assert line_of(row) == ("largest_change", "")


def test_references_of_one_name_say_how_they_are_sent(sweep):
    edit(a_run(sweep / "d9", "dense", exchange=MASKED), exchange="masked")
    (shown,) = places(table_of(sweep)).values()
    assert list(references(shown)) == [
        "dense, exchange=full",
        "dense, exchange=masked",
        "random, 80% frozen",
    ]


# ---- figures


def body_of(folder):
    (part,) = section(table_of(folder))
    (table,) = [block for block in part.blocks if hasattr(block, "body")]
    return table


def test_the_table_by_hand(sweep):
    """Total bytes are three times those sent up. Dense: 30 MB, 92.0; t(0.975, 2) = 4.303 over the root of 3 = 2.484.

    Differences of 1 % to dense: -0.20 -0.18 -0.16, mean -18.0, deviation 2.0, half 4.97. Of 10 %: -0.02 -0.03 -0.01,
    mean -2.0, deviation 1.0, half 2.48: its interval holds 0. With feedback one point more.
    """
    table = body_of(sweep)
    assert table.caption == "digits, mlp, iid, 3 rounds"
    assert table.head[-1] == "front"
    assert table.body == [
        ["dense", "–", "10.00", "30.00", "100.0%", "92.0 ± 5.0", "–", "3", "yes"],
        ["random, 80% frozen", "–", "2.00", "6.00", "20.0%", "87.0 ± 5.0", "-5.0 ± 0.0 ▼", "3", ""],
        ["largest_change", "1 %", "0.15", "0.45", "1.5%", "74.0 ± 9.9", "-18.0 ± 5.0 ▼", "3", "yes"],
        ["largest_change", "10 %", "1.50", "4.50", "15.0%", "90.0 ± 6.6", "-2.0 ± 2.5", "3", "yes"],
        ["largest_change, feedback", "1 %", "0.15", "0.45", "1.5%", "75.0 ± 9.9", "-17.0 ± 5.0 ▼", "3", "yes"],
        ["largest_change, feedback", "10 %", "1.50", "4.50", "15.0%", "91.0 ± 6.6", "-1.0 ± 2.5", "3", "yes"],
    ]


def test_intervals_are_those_of_scipy(sweep):
    table = table_of(sweep)
    (row,) = [row for row in table if row.name == "largest_change 10 %"]
    low, high = stats.t.interval(0.95, 2, np.mean(SPARSE[0.1]), stats.sem(SPARSE[0.1]))
    found = row.over_seeds("test/acc")
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    oracle = stats.ttest_rel(SPARSE[0.1], DENSE).confidence_interval()
    found = row.against(dense_of(row, table), "test/acc")
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((oracle.low, oracle.high))


def test_time_on_the_link_has_a_column_where_it_is_known(sweep):
    assert "link, s" not in body_of(sweep).head
    for seed in range(3):
        edit(sweep / f"p0.1{seed}", link_seconds=10.0 + seed)  # half of t(0.975, 2) over the root of 3: 2.484
    table = body_of(sweep)
    column = list(table.head).index("link, s")
    assert [line[column] for line in table.body] == ["–", "–", "–", "11.0 ± 2.5", "–", "–"]


# ---- pictures


def drawn(axes):
    """What stands in the panel: (x, y) of each plotted line by colour and marker, intervals aside."""
    return {
        (line.get_color(), line.get_marker()): line.get_xydata() for line in axes.lines if line.get_marker() != "None"
    }


def test_points_lie_where_the_means_are(sweep):
    """Megabytes of a mean to 1.2 % of the panel's width, accuracies exactly; the smaller fraction is left."""
    (axes,) = exchange_figure(table_of(sweep), "bytes_total").axes
    assert axes.get_xscale() == "log"
    found = drawn(axes)
    assert found["#D55E00", "o"][:, 1] == pytest.approx([0.74, 0.90])
    assert found["#D55E00", "s"][:, 1] == pytest.approx([0.75, 0.91])
    assert found["#D55E00", "o"][:, 0] == pytest.approx([0.45, 4.5], rel=0.02)
    assert found["#000000", "*"][0] == pytest.approx([30, 0.92])
    assert found["#555555", "D"][0] == pytest.approx([6, 0.87])


def test_intervals_are_drawn(sweep):
    (axes,) = exchange_figure(table_of(sweep), "bytes_up").axes
    ends = [segment[:, 1] for bars in axes.collections for segment in bars.get_segments()]
    low, high = stats.t.interval(0.95, 2, np.mean(SPARSE[0.1]), stats.sem(SPARSE[0.1]))
    assert any(end == pytest.approx([low, high]) for end in ends)
    assert len(ends) == 6  # every row of the table


def test_curves_show_one_fraction_beside_dense(sweep):
    figure = curves_figure(table_of(sweep), 0.1)
    assert [len(axes.lines) for axes in figure.axes] == [3, 3]  # validation, test: plain, feedback, dense


@pytest.mark.parametrize("picture", ["bytes", "rounds"])
def test_nothing_lies_on_the_legend_nor_beyond_the_edge(sweep, picture):
    table = table_of(sweep)
    figure = exchange_figure(table, "bytes_total") if picture == "bytes" else curves_figure(table, 0.01)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
    assert not any(box.overlaps(axes.get_tightbbox()) for axes in figure.axes)
    names = [text.get_text() for text in legend.get_texts()]
    assert {"largest_change", "feedback", "no feedback, float32", "dense"} <= set(names)


def test_sparse_exchanges_alone_make_a_report(tmp_path, capsys):
    """No dense run, one seed, a rule without a fraction, names that would act: nothing fatal, pictures and all."""
    sparse(tmp_path / "runs/t", "threshold", "<b>a, b$</b>", fraction=None)
    sparse(tmp_path / "runs/none", fraction=0.5, sent=0)
    report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    page, written = (tmp_path / "out/report.html").read_text(), files_of(tmp_path / "out")
    assert "threshold &lt;b&gt;a, b$&lt;/b&gt;" in page
    assert "<b>" not in page
    pictures = [f"exchange-{name}" for name in ("bytes_total", "bytes_up", "rounds-50", "rounds-other")]
    pictures += ["pareto-bytes_total", "pareto-bytes_up"]
    expected = [*(f"{name}.png" for name in pictures), "report.html", "report.md"]
    assert sorted(name for name in written if "/" not in name) == sorted(expected)
    assert "| largest_change | 50 % | 0.00 | 0.00 | – | 70.0 | – | 1 | yes |" in printed(capsys)


def test_the_pictures_are_part_of_the_page_and_masks_keep_theirs(sweep, tmp_path):
    report.main([str(sweep), "--out", str(tmp_path / "out")])
    written = files_of(tmp_path / "out")
    assert {"exchange-bytes_total.png", "exchange-rounds-10.png", "pareto-bytes_up.png"} <= written.keys()
    assert written["report.html"].count(b"<img ") == len([name for name in written if name.endswith(".png")])
    text = written["report.md"].decode()
    assert "| mask rule or exchange | partition |" in text
    assert text.index("## Accuracy against bytes") < text.index("## Sparse exchange") < text.index("## Left out")


def test_without_a_sparse_exchange_there_is_no_section(tmp_path):
    a_run(tmp_path / "r")
    edit(a_run(tmp_path / "m", seed=1), **dict.fromkeys(KEYS) | {"exchange": "masked"})
    titles = [part.title for part in report.sections([tmp_path])]
    assert "Sparse exchange" not in titles
    assert section(table_of(tmp_path)) == []


def test_a_single_run_has_no_interval(tmp_path):
    sparse(tmp_path / "s")
    (row,) = table_of(tmp_path)
    assert math.isnan(row.over_seeds("test/acc").half)
    (axes,) = exchange_figure([row], "bytes_up").axes
    assert drawn(axes)["#D55E00", "o"][0] == pytest.approx([1.0, 0.7])


def test_the_sweep_says_how_many_runs_it_is():
    """A command makes the product of its lists: 2 x 4 x 5 three times, 4 x 5 three times, 5, 5; then 3 four times."""
    done = subprocess.run(["make", "-n", "exchange"], cwd=ROOT, capture_output=True, text=True, check=True)
    commands = [line for line in done.stdout.splitlines() if "fedsparse.train" in line]
    runs = [math.prod(1 + word.count(",") for word in command.split()) for command in commands]
    assert runs == [40, 40, 40, 20, 20, 20, 5, 5, 3, 3, 3, 3]
    assert f"{sum(runs)} runs" in done.stdout
    assert len({command.split("hydra.sweep.dir=")[1] for command in commands}) == len(commands)
