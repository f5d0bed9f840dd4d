"""What the tables and pictures of a report compare, and with what; figures and files by hand."""

from __future__ import annotations

import csv
import io
import json
import re
from html.parser import HTMLParser

import pytest
from test_report import a_run, edit, files_of, table_of

from fedsparse import report
from fedsparse.analysis import convergence, equal_steps, pareto, tables
from fedsparse.analysis.baseline import dense_of, nearest
from fedsparse.analysis.page import (
    Bold,
    Picture,
    Section,
    Table,
    csv_table,
    filled,
    latex_table,
    md_table,
    page,
    tables_of,
)
from fedsparse.analysis.style import legend, panels, wrapped
from fedsparse.analysis.table import lengths, locally

FEDERATION = {"num_clients": 20, "clients_per_round": 0.5, "local_steps": 4, "rounds": 3}
MEAN, MEDIAN = {"_target_": "WeightedMean", "block": 1}, {"_target_": "Robust", "average": {"_target_": "median"}}

# ---- what a row is compared with

OTHER = {
    "objective": {"objective": {"_target_": "Scaffold"}},
    "optimizer": {"client": {"momentum": 0.0}},
    "head": {"head": {"init": "random"}},
    "server": {"server": {"_target_": "Adam"}},
    "aggregation": {"aggregation": MEDIAN},
    "attack": {"exchange": {"attackers": 2, "attack_scale": 10.0}},
    "phases": {"phases": {"fine_tune": {"rounds": 5}}},
    "what stays": {"model": {"trainable": "all", "local": ["head"]}},
    "probe": {"calibration": {"head_steps": 3}},
}
FREE = {
    "average": {"aggregation": MEAN | {"denominator": "participants"}},
    "exchange": {"exchange": {"attackers": None, "feedback": 1.0}},
    "calibration": {"calibration": {"batches": 3}},
    "trainable": {"model": {"trainable": "head"}},
}


@pytest.mark.parametrize("groups", OTHER.values(), ids=OTHER)
def test_dense_training_of_another_experiment_is_no_reference(tmp_path, groups):
    a_run(tmp_path / "d", "dense", test=0.9, **groups)
    a_run(tmp_path / "r", test=0.8)
    table = table_of(tmp_path)
    (row,) = [row for row in table if row.sparsity]
    assert dense_of(row, table) is None
    other, keys = nearest(row, table)
    assert other.dense
    assert all(key.split(".")[0] in (*groups, "phases") for key in keys)
    results = tables.overview(table).blocks[0]
    (line,) = [line for line in results.body if line[0].startswith("random")]
    assert line[results.head.index("difference to dense, points")] == "–"  # noqa: RUF001


@pytest.mark.parametrize("groups", FREE.values(), ids=FREE)
def test_what_a_mask_or_an_exchange_brings_along_may_differ(tmp_path, groups):
    a_run(tmp_path / "d", "dense", test=0.9, aggregation=MEAN)
    a_run(tmp_path / "r", test=0.8, **({"aggregation": MEAN} | groups))
    table = table_of(tmp_path)
    (row,) = [row for row in table if row.sparsity]
    assert dense_of(row, table).dense
    assert nearest(row, table) is None


def test_each_server_has_its_own_dense_training(tmp_path):
    for server, best in (("SGD", 0.9), ("Adam", 0.7)):
        a_run(tmp_path / f"d{server}", "dense", test=best, server={"_target_": server})
        a_run(tmp_path / f"r{server}", test=0.6, server={"_target_": server})
    results = tables.overview(table_of(tmp_path)).blocks[0]
    at = results.head.index("difference to dense, points")
    assert {line[0]: line[at] for line in results.body if line[0].startswith("random")} == {
        "random, server=Adam": "-10.0",
        "random, server=SGD": "-30.0",
    }


def test_rows_without_a_reference_say_what_the_nearest_differs_in(tmp_path):
    a_run(tmp_path / "d", "dense", server={"_target_": "SGD", "lr": 1.0})
    a_run(tmp_path / "r", server={"_target_": "Adam", "lr": 0.1}, head={"init": "random"})
    listed = tables.overview(table_of(tmp_path)).blocks[1]
    assert [line[-1] for line in listed.body] == ["head.init, server"]


# ---- the accuracy that counts

OWN = {"personal/acc_mean": 0.9, "personal/acc_std": 0.1, "personal/acc_worst10": 0.7, "personal/loss": 0.5}


def test_where_something_stays_with_the_clients_their_own_models_count_everywhere(tmp_path):
    """Seeds 0 and 1: 90 and 92 per cent of own models, the global model 0."""
    for seed in (0, 1):
        local = {"trainable": "all", "local": ["*"]}
        edit(
            a_run(tmp_path / f"l{seed}", "dense", test=0.0, val=0.0, seed=seed, model=local),
            **OWN | {"personal/acc_mean": 0.9 + 0.02 * seed, "val/personal_acc": 0.8},
        )
        a_run(tmp_path / f"d{seed}", "dense", test=0.5, seed=seed)
    table = table_of(tmp_path)
    (row,) = [row for row in table if row.own]
    results = tables.overview(table)
    line = dict(zip(results.blocks[0].head, results.blocks[0].body[0], strict=True))
    assert line["test accuracy, %"] == "91.0 ± 12.7 †"
    assert line["worst tenth of clients, %"] == "70.0 ± 0.0"
    assert "† " not in tables.overview([r for r in table if not r.own]).text
    assert "own models" in results.text
    assert pareto.point(row, "bytes_up") == pytest.approx((1.0, 0.91))
    assert "91.0 ± 12.7 †" in str(pareto.section(table).blocks)
    assert [convergence.column_of(row, split) for split in convergence.SPLITS] == [
        "val/personal_acc",
        "personal/acc_mean",
    ]
    assert len(tables.clients(table).blocks[0].body) == 1  # of the global model, which counts in the other row alone


# ---- accuracy against bytes


def test_points_lie_at_their_bytes_however_many_there_are(tmp_path):
    for i, rule in enumerate(["random", "talos", "snip", "dense"]):
        a_run(tmp_path / rule, rule, test=0.5 + 0.1 * i, sent=16_400_000)
    (axes,) = pareto.pareto_figure(table_of(tmp_path), "bytes_up").axes
    drawn = [line.get_xydata()[0] for line in axes.lines if line.get_marker() != "None"]
    assert [x for x, _ in drawn] == [16.4] * 4
    assert sorted(y for _, y in drawn) == pytest.approx([0.5, 0.6, 0.7, 0.8])


def test_a_front_is_of_one_data_set_model_and_length(tmp_path):
    for data in ("digits", "docs"):
        for rounds in (3, 30):
            for rule in ("dense", "random"):
                folder = a_run(tmp_path / f"{data}{rounds}{rule}", rule, federation=FEDERATION | {"rounds": rounds})
                edit(folder, data=data)
    table = table_of(tmp_path)
    places = [(d, "mlp", f"{n} rounds of 10 clients x 4 steps") for d in ("digits", "docs") for n in (3, 30)]
    assert list(lengths(table)) == places
    assert all([row.name for row in rows] == ["dense", "random"] for rows in lengths(table).values())
    blocks = pareto.section(table).blocks
    fronts = [block.caption for block in blocks if isinstance(block, Table)]
    assert fronts == [f"Pareto fronts: {', '.join(place)}" for place in places]
    pictures = [block for block in blocks if isinstance(block, Picture)]
    assert len({picture.name for picture in pictures}) == len(pictures) == 8
    assert pictures[0].draw().get_suptitle() == "digits, mlp, 3 rounds of 10 clients x 4 steps, 1 seed"


LENGTHS = [
    (FEDERATION | {"rounds": 1, "clients_per_round": 7}, {}, "1 round of 7 clients x 4 steps"),
    (FEDERATION | {"local_steps": None, "local_epochs": 1}, {}, "3 rounds of 10 clients x 1 epoch"),
    (FEDERATION | {"rounds": "${rounds_for_steps:99}"}, {}, "99 client steps in rounds of 10 clients x 4 steps"),
    (FEDERATION, {"explore": {"rounds": 1}}, "3 rounds of 10 clients x 4 steps"),
    ({"rounds": 3}, {"fine_tune": {"rounds": 5}}, "3 rounds, then fine_tune"),
]


@pytest.mark.parametrize(("federation", "phases", "length"), LENGTHS)
def test_a_length_is_rounds_clients_and_steps(tmp_path, federation, phases, length):
    a_run(tmp_path / "r", federation=federation, phases={"learn": {"rounds": 3}} | phases)
    (row,) = table_of(tmp_path)
    assert row.length == length


def test_a_sparse_exchange_may_be_on_the_front(tmp_path):
    a_run(tmp_path / "d", "dense", test=0.8, sent=10**7)
    folder = a_run(tmp_path / "s", "dense", test=0.9, sent=10**6)
    edit(folder, exchange="topk", exchange_rule="largest_change", exchange_fraction=0.1)
    (front,) = [block for block in pareto.section(table_of(tmp_path)).blocks if isinstance(block, Table)]
    assert [line[2] for line in front.body] == ["largest_change 10 %"] * 2


# ---- equal client steps


def explored(folder, rule, steps, data="digits", **figures):
    phases = {"learn": {"rounds": 3}, "explore": {"rounds": 1}} if rule == "autoflip" else {"learn": {"rounds": 3}}
    a_run(folder, rule, federation=FEDERATION, phases=phases, explore={"keep_model": False}, **figures)
    edit(folder, client_steps=steps, data=data)


def test_a_table_of_equal_steps_refuses_other_budgets_and_other_data(tmp_path):
    """A round takes 40: of 1000, 980, 961 and 959 the last is out; 320 and 320 have a table of their own."""
    for rule, steps in (("dense", 1000), ("random", 980), ("autoflip", 961), ("snip", 959)):
        explored(tmp_path / rule, rule, steps)
    for rule in ("random", "autoflip"):
        explored(tmp_path / f"short{rule}", rule, 320, seed=1, head={"init": "random"})
    explored(tmp_path / "docs", "autoflip", 1000, data="docs")
    (section,) = equal_steps.section(table_of(tmp_path))
    found = {table.caption: {line[0] for line in table.body} for table in section.blocks}
    assert found == {
        "digits, mlp, iid, 961 to 1000 client steps": {"dense", "random", "autoflip"},
        "digits, mlp, iid, 320 client steps": {"random", "autoflip"},
    }


# ---- curves


def test_phases_are_marked_in_the_curves(tmp_path):
    folder = a_run(tmp_path / "r")
    (folder / "metrics.csv").write_text("round,phase,val/acc,test/acc\n1,0,0.5,0.5\n2,1,0.6,0.6\n3,1,0.7,0.7\n")
    figure = convergence.convergence_figure(table_of(tmp_path), 0.8)
    assert figure.get_suptitle() == "digits, mlp, 80% frozen, 1 seed"
    for axes in figure.axes:
        assert [line.get_xdata() for line in axes.lines if line.get_linestyle() == ":"] == [[1.5, 1.5]]
    assert "the next phase" in [text.get_text() for text in figure.legends[0].get_texts()]
    a_run(tmp_path / "d", "dense")
    plain = convergence.convergence_figure([row for row in table_of(tmp_path) if row.dense], 0.0)
    assert "the next phase" not in [text.get_text() for text in plain.legends[0].get_texts()]


def test_empty_tables_and_axes_are_left_out(tmp_path):
    """No dense run: no target; no metrics.csv: no curves; one row: no front."""
    (a_run(tmp_path / "r") / "metrics.csv").unlink()
    parts = report.sections([tmp_path])
    titles = [part.title for part in parts]
    assert not {"Rounds and bytes to a target", "Convergence", "Accuracy against bytes"} & set(titles)
    assert all(block.body for part in parts for block in part.blocks if isinstance(block, Table))


def test_a_section_keeps_what_has_lines():
    full, empty, picture = Table(["a"], [["1"]]), Table(["a"], []), Picture("p", "c", lambda: None)
    assert filled(Section("S", "", [empty, full, picture, empty])).blocks == [full, picture]


def test_names_in_a_place_leave_out_what_all_share(tmp_path):
    for rule, power in (("random", 1), ("random", 2), ("snip", 1)):
        a_run(tmp_path / f"{rule}{power}", rule, head={"init": "probe", "more": power})
    a_run(tmp_path / "x", "snip", head={"init": "probe", "more": 3})
    table = table_of(tmp_path)
    same = [row for row in table if row.name.endswith("head.more=1")]
    assert [row.name for row in locally(same)] == ["random", "snip"]
    assert [row.name for row in locally(table)] == [row.name for row in table]


# ---- files and pages

ROWS = Table(
    ["rule", "MB", "test accuracy, %", "trained"],
    [
        ["a_b & c", "1.0", Bold("84.0 ± 9.9 ▲"), "20.0%"],
        ["=1+1", "0.06", "70.0 †", "100.0%"],
        ["none", "–", "–", "no mask"],  # noqa: RUF001
    ],
    "50%",
)


def test_a_table_as_csv_has_numbers_in_its_cells():
    head, *body = csv.reader(io.StringIO(csv_table(ROWS)))
    assert head == ["rule", "MB", "test accuracy, %", "test accuracy, %, half of the 95 % interval", "trained, %"]
    assert body == [
        ["a_b & c", "1.0", "84.0", "9.9", "20.0"],
        ["'=1+1", "0.06", "70.0", "", "100.0"],
        ["none", "", "", "", ""],
    ]


def test_a_table_as_latex():
    assert latex_table(ROWS).splitlines() == [
        r"% needs \usepackage{booktabs}",
        "% 50%",
        r"\begin{tabular}{lrrr}",
        r"\toprule",
        r"rule & MB & test accuracy, \% & trained \\",
        r"\midrule",
        r"a\_b \& c & 1.0 & \textbf{84.0 $\pm$ 9.9 $\uparrow$} & 20.0\% \\",
        r"=1+1 & 0.06 & 70.0 $\dagger$ & 100.0\% \\",
        r"none & -- & -- & no mask \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_columns_are_of_one_width_in_a_terminal():
    table = Table(["rule", "MB", "why"], [["a_b & c", Bold("10.0 ▲"), "a long text"], ["x", "0.06", "b"]])
    assert md_table(table, padded=True).splitlines() == [
        "| rule        |         MB | why |",
        "| ---         |       ---: | --- |",
        "| a_b &amp; c | **10.0 ▲** | a long text |",
        "| x           |       0.06 | b |",
    ]


def test_numbers_stand_to_the_right():
    text = page("T", [Section("S", "", [ROWS])], {})
    assert '<th scope="col">rule</th><th scope="col" class="n">MB</th>' in text
    assert '<td class="n">0.06</td>' in text
    assert "text-align: right" in text


class Outline(HTMLParser):
    """Keeps every tag with its attributes."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def of(self, name):
        return [attrs for tag, attrs in self.seen if tag == name]


def test_the_page_is_read_without_eyes_mouse_or_a_wide_screen():
    outline = Outline()
    blocks = [Table(ROWS.head, ROWS.body), ROWS, Picture("a", 'bytes "up"', lambda: None)]
    outline.feed(page("T", [Section("S", "", blocks), Section("U", "", [])], {"a": b""}))
    assert outline.of("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in outline.of("meta")
    assert [tag for tag, _ in outline.seen if tag in ("main", "h1", "h2", "nav")] == ["main", "h1", "nav", "h2", "h2"]
    assert [image["alt"] for image in outline.of("img")] == ['bytes "up"']
    assert [(box["tabindex"], box["aria-label"]) for box in outline.of("div")] == [("0", "S"), ("0", ROWS.caption)]
    assert {head["scope"] for head in outline.of("th")} == {"col"}


def luminance(colour):
    """Relative luminance of #rrggbb or #rgb: WCAG 2.2."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_text_and_links_stand_out_from_the_paper_in_both_schemes():
    style = re.findall(r"--ink: (#\w+); --paper: (#\w+); --rule: #\w+; --link: (#\w+)", page("T", [], {}))
    assert len(style) == 2
    for ink, paper, link in style:
        for colour in (ink, link):
            dark, light = sorted([luminance(colour), luminance(paper)])
            assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_tables_have_names_of_their_own():
    named = tables_of([Section("A b", "", [ROWS, ROWS, ROWS]), Section("C", "", [ROWS])])
    assert list(named) == ["a-b-50", "a-b-50-2", "a-b-50-3", "c"]


def test_every_table_is_a_file_and_the_page_is_the_last_line(tmp_path, capsys):
    for seed in (0, 1):
        a_run(tmp_path / f"runs/d{seed}", "dense", seed=seed)
        a_run(tmp_path / f"runs/r{seed}", seed=seed, test=0.6 + 0.1 * seed)
    report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {tmp_path / 'out' / 'report.html'}"
    written = files_of(tmp_path / "out")
    names = {name.rpartition(".")[0] for name in written if name.startswith("tables/")}
    assert {"tables/results", "tables/rule-by-sparsity"} <= names
    assert all({f"{name}.csv", f"{name}.tex"} <= written.keys() for name in names)
    rows = list(csv.DictReader(io.StringIO(written["tables/results.csv"].decode())))
    (row,) = [row for row in rows if row["mask rule"] == "random"]
    assert (row["test accuracy, %"], row["seeds"]) == ("65.0", "2")
    assert float(row["test accuracy, %, half of the 95 % interval"]) == pytest.approx(63.5)  # 12.706 x 5 points


def test_long_names_are_broken_and_no_picture_grows_with_them(tmp_path):
    from matplotlib.lines import Line2D

    name = "random, " + ", ".join(f"group.key{i}=value{i}" for i in range(20))
    assert max(map(len, wrapped(name, 28).splitlines())) <= 28
    figure, _ = panels(1, 2)
    legend(figure, [Line2D([], [], label=name), Line2D([], [], label="dense")])
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width


def test_own_models_that_are_no_number_leave_the_global_model_to_count(tmp_path):
    edit(a_run(tmp_path / "a"), **{"personal/acc_mean": "many"})
    (row,) = table_of(tmp_path)
    assert row.headline == "test/acc"
    assert json.loads((tmp_path / "a/summary.json").read_text())["test/acc"] == 0.7
