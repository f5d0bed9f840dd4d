"""The report reads folders and nothing else: right figures, the same bytes, no name that acts, nothing fatal."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedsparse import report
from fedsparse.analysis import convergence, overlap, pareto
from fedsparse.analysis.baseline import dense_of
from fedsparse.analysis.folders import read_runs
from fedsparse.analysis.page import Bold, Picture, Section, Table, markdown
from fedsparse.analysis.statistics import Interval, paired
from fedsparse.analysis.style import styles
from fedsparse.analysis.table import once, rows
from fedsparse.masks import Mask

CONFIG = {
    "model": {"trainable": "all"},
    "sparsity": {"ratio": 0.8},
    "mask": {"owner": "global"},
    "partition": {"_target_": "deal"},
    "federation": {"rounds": 3},
}


def a_run(
    folder, rule="random", lr=0.1, seed=0, val=0.8, test=0.7, partition="iid", sent=1_000_000, curve=(), **groups
):
    """Write what a finished run leaves behind, as far as the report reads it; groups add to the configuration."""
    (folder / ".hydra").mkdir(parents=True)
    groups["partition"] = groups.pop("deal", {})
    config = {name: CONFIG.get(name, {}) | groups.get(name, {}) for name in CONFIG.keys() | groups.keys()}
    config |= {"seed": seed, "optimizer": {"lr": lr}}
    (folder / ".hydra/config.yaml").write_text(yaml.safe_dump(config))
    curve = curve or (val - 0.2, val - 0.1, val)
    summary = {
        "val/acc": val,
        "test/acc": test,
        "client/acc_mean": test,
        "client/acc_std": 0.05,
        "client/acc_worst10": test - 0.1,
        "trainable_fraction": 0.2,
        "bytes_up": sent,
        "bytes_total": 3 * sent,
        "rounds": len(curve),
        "seed": seed,
        "mask_rule": rule,
        "partition": partition,
        "data": "digits",
        "model": "mlp",
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    lines = [f"{r},{v},{v - 0.1},{sent * r},{3 * sent * r}" for r, v in enumerate(curve, 1)]
    (folder / "metrics.csv").write_text("\n".join(["round,val/acc,test/acc,bytes_up,bytes_total", *lines]) + "\n")
    return folder


def printed(capsys):
    """What was printed, without the spaces that align columns."""
    return re.sub(" +", " ", capsys.readouterr().out)


def table_of(*folders):
    return rows(once(read_runs(folders)[0])[0])


def row_of(folder, name, partition="iid"):
    (row,) = [row for row in table_of(folder) if (row.name, row.partition) == (name, partition)]
    return row


@pytest.fixture
def sweep(tmp_path):
    """Two learning rates: 0.1 validates better, 0.3 tests better; the table must take 0.1. Dense is paired by seed."""
    folder = tmp_path / "sweep"
    for seed, (val, test) in enumerate([(0.90, 0.80), (0.92, 0.84), (0.94, 0.88)]):
        a_run(folder / f"a{seed}", lr=0.1, seed=seed, val=val, test=test, sent=2_500_000)
        a_run(folder / f"b{seed}", lr=0.3, seed=seed, val=val - 0.05, test=test + 0.1, sent=2_500_000)
        a_run(folder / f"d{seed}", "dense", seed=seed, val=val, test=test - 0.02 - 0.01 * seed, sent=9_000_000)
    a_run(folder / "head", "dense", val=0.5, test=0.4, model={"trainable": "head"})
    return folder


# ---- figures


def test_a_row_takes_the_learning_rate_that_validates_best(sweep):
    row = row_of(sweep, "random")
    assert (row.lr, len(row.runs), row.lr_at_edge, row.sparsity) == (0.1, 3, True, 0.8)
    found = row.over_seeds("test/acc")
    assert found.mean == pytest.approx(0.84)
    low, high = stats.t.interval(0.95, df=2, loc=0.84, scale=0.04 / math.sqrt(3))  # standard deviation 0.04 by hand
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert len(row_of(sweep, "head alone").runs) == 1


def test_a_rate_is_chosen_by_clients_own_models_where_all_runs_have_them(sweep):
    """At 0.3 they validate better, and the global model does not."""
    for seed in range(3):
        for name, own in (("a", 0.3), ("b", 0.6)):
            edit(sweep / f"{name}{seed}", **{"val/personal_acc": own})
    assert row_of(sweep, "random").lr == 0.3
    edit(sweep / "a1", **{"val/personal_acc": None})
    assert row_of(sweep, "random").lr == 0.1


def test_a_learning_rate_that_lost_a_seed_does_not_compete(sweep):
    a_run(sweep / "lucky", lr=1.0, seed=0, val=0.99)
    assert row_of(sweep, "random").lr == 0.1


def test_differences_are_paired_by_seed(sweep):
    """Test accuracies 0.80 0.84 0.88 against 0.78 0.81 0.84: differences 0.02 0.03 0.04, mean 0.03."""
    table = table_of(sweep)
    row = row_of(sweep, "random")
    dense = dense_of(row, table)
    found = row.against(dense, "test/acc")
    assert dense.name == "dense"
    assert found.mean == pytest.approx(0.03)
    oracle = stats.ttest_rel([0.80, 0.84, 0.88], [0.78, 0.81, 0.84]).confidence_interval()
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((oracle.low, oracle.high))


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=8))
@settings(derandomize=True, deadline=None)
def test_paired_interval_is_that_of_the_paired_t_test(pairs):
    one, other = np.array(pairs).T
    if np.ptp(one - other) < 1e-6:  # SciPy warns of a loss of precision
        return
    oracle = stats.ttest_rel(one, other).confidence_interval()
    seeds = range(len(pairs))
    found = paired(dict(zip(seeds, one, strict=True)), dict(zip(seeds, other, strict=True)))
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((oracle.low, oracle.high))
    assert found.excludes_zero == (oracle.low > 1e-9 or oracle.high < -1e-9)


def test_a_single_seed_has_no_interval_and_proves_nothing():
    single = paired({0: 0.9, 1: 0.5}, {0: 0.1})
    assert single.mean == pytest.approx(0.8)
    assert math.isnan(single.half)
    assert not single.excludes_zero
    assert paired({0: 0.9}, {1: 0.1}).text() == Interval.of([]).text() == "\N{EN DASH}"


def test_the_table_as_a_person_reads_it(sweep, capsys):
    """0.84 and 0.74 with a standard deviation of 0.04 over 3 seeds: half of 9.9; differences 2, 3, 4: half of 2.5."""
    report.main([str(sweep)])
    lines = printed(capsys).splitlines()
    assert "| random | iid | 80% | 0.1* | 20.0% | 2.5 | 84.0 ± 9.9 | **+3.0 ± 2.5 ▲** | 74.0 ± 9.9 | 3 |" in lines
    assert "| head alone | iid | no mask | 0.1 | 20.0% | 1.0 | 40.0 | -38.0 | 30.0 | 1 |" in lines
    assert "| dense | 81.0 ± 7.5 |" in lines  # rule by partition; dense is not compared with itself
    assert "| random | **84.0 ± 9.9 ▲** |" in lines
    assert "| random | \N{EN DASH} | **84.0 ± 9.9 ▲** |" in lines  # rule by sparsity: none without a mask
    assert not any(".png" in line for line in lines)


points = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), max_size=12)


@given(points)
@settings(derandomize=True, deadline=None)
def test_the_front_is_what_nobody_dominates(points):
    def beaten(p):
        return any(q[0] <= p[0] and q[1] >= p[1] and q != p for q in points)

    found = pareto.front(points)
    assert sorted(found) == [i for i, p in enumerate(points) if not beaten(p)]
    assert [points[i][0] for i in found] == sorted(points[i][0] for i in found)


def test_rounds_and_bytes_to_a_target(tmp_path):
    """Dense tests at 0.80, so 0.95 of it is 0.76 of validation: seed 0 gets there in round 2, seed 1 never."""
    a_run(tmp_path / "d", "dense", test=0.80, curve=(0.80,))
    a_run(tmp_path / "r0", seed=0, curve=(0.5, 0.76, 0.5), sent=2_000_000)
    a_run(tmp_path / "r1", seed=1, curve=(0.5, 0.6, 0.75), sent=2_000_000)
    (table,) = convergence.target_section(table_of(tmp_path), 0.95).blocks
    assert table.body == [
        ["iid", "76.0", "dense", "no mask", "1.0", "1.0", "3.0", "0 of 1"],
        ["iid", "76.0", "random", "80%", "2.0", "4.0", "12.0", "1 of 2"],
    ]


def test_rounds_and_bytes_to_an_accuracy_of_rows_of_any_length(tmp_path):
    """Of two lengths; only the first is at 0.76 or above, in its second round."""
    a_run(tmp_path / "d", "dense", curve=(0.5, 0.76, 0.8), sent=2_000_000)
    a_run(tmp_path / "r", curve=(0.5, 0.75), sent=2_000_000)
    (table,) = convergence.reach_section(table_of(tmp_path), 0.76).blocks
    assert table.body == [
        ["iid", "dense", "no mask", "2.0", "4.0", "12.0", "0 of 1"],
        ["iid", "random", "80%", "–", "–", "–", "1 of 1"],
    ]


def test_a_curve_is_the_mean_of_each_round(tmp_path):
    a_run(tmp_path / "r0", seed=0, curve=(0.5, 0.7))
    a_run(tmp_path / "r1", seed=1, curve=(0.6, 0.8, 0.9))
    found = convergence.curve(row_of(tmp_path, "random").runs, "val/acc")
    assert [(r, round(i.mean, 6)) for r, i in found] == [(1, 0.55), (2, 0.75), (3, 0.9)]
    assert found[0][1].half == pytest.approx(12.706 * 0.05, rel=1e-4)  # t(0.975, 1) times the standard error


def test_overlap_leaves_out_what_always_trains(tmp_path):
    """Bodies 1100 and 0110: one coordinate of three in common; heads train whole."""
    for rule, bits in {"random": [1, 1, 0, 0], "lowest_magnitude": [0, 1, 1, 0]}.items():
        folder = a_run(tmp_path / rule, rule)
        body = torch.tensor(bits, dtype=torch.bool)
        Mask({"body": body, "head": torch.ones(3, dtype=torch.bool)}).save(folder / "mask.safetensors")
    (section,), problems = overlap.section(table_of(tmp_path))
    table = section.blocks[1]
    assert table.body == [["lowest_magnitude", "1.00", "0.33"], ["random", "0.33", "1.00"]]
    assert (
        table.caption == "digits, mlp, iid, sparsity 80%, seed 0; by chance 0.33"
    )  # half of the body trains: 0.5 / 1.5
    assert problems == []
    (tmp_path / "random/mask.safetensors").write_bytes(b"torn")
    sections, (problem,) = overlap.section(table_of(tmp_path))
    assert sections == []
    assert problem.name == "random"


def test_overlap_within_a_rule(tmp_path):
    for seed, (clients, rounds) in enumerate([(0.2, [0.5, 0.9]), (0.4, [0.7, 0.9]), (None, [])]):
        path = a_run(tmp_path / f"own{seed}", seed=seed) / "summary.json"
        facts = {"mask_overlap_clients": clients, "mask_overlap_rounds": rounds}
        path.write_text(json.dumps(json.loads(path.read_text()) | facts))
    a_run(tmp_path / "other", "dense")
    (section,) = overlap.within(table_of(tmp_path))
    # n = 2: t(0.975, 1) = 12.706, standard error 0.1
    assert section.blocks[0].body == [["random", "iid", "80%", "0.30 ± 1.27", "0.60 ± 1.27"]]
    assert overlap.within([row_of(tmp_path, "dense")]) == []


def test_scaled_task_vectors_have_a_table(sweep, capsys):
    figures = {"alpha": 0.8, "val/acc": 0.91, "test/acc": 0.85, "test/acc_at_1": 0.84}
    (sweep / "a0/scale.json").write_text(json.dumps(figures))
    (sweep / "a1/scale.json").write_text("{")
    report.main([str(sweep)])
    out = printed(capsys)
    assert "| a0 | 0.8 | 91.0 | 85.0 | 84.0 |" in out
    assert "| a1 | 0" not in out


# ---- what is averaged, and its name


def test_runs_that_differ_in_more_than_seed_and_rate_are_not_averaged(tmp_path):
    for rounds in (3, 30):
        for rule in ("dense", "random"):
            a_run(tmp_path / f"{rule}{rounds}", rule, val=rounds / 100, federation={"rounds": rounds})
    table = table_of(tmp_path)
    names = ["dense, federation.rounds=3", "dense, federation.rounds=30"]
    assert [row.name for row in table if not row.sparsity] == names
    (row,) = [row for row in table if row.name == "random, federation.rounds=30"]
    assert dense_of(row, table).name == "dense, federation.rounds=30"


def test_partitions_of_one_kind_are_told_apart(tmp_path):
    for beta in (0.1, 0.5):
        a_run(tmp_path / f"{beta}", partition="dirichlet", deal={"beta": beta})
    a_run(tmp_path / "iid")
    assert [row.partition for row in table_of(tmp_path)] == ["dirichlet(0.1)", "dirichlet(0.5)", "iid"]


def test_keys_that_come_with_a_rule_are_not_named_those_that_vary_within_it_are(tmp_path):
    a_run(tmp_path / "r", "random", mask_rule={"_target_": "rules.Random"})
    for power in (1, 2):
        a_run(tmp_path / f"f{power}", "fisher", mask_rule={"_target_": "rules.Fisher", "power": power, "largest": True})
    assert [row.name for row in table_of(tmp_path)] == [
        "fisher, mask_rule.power=1",
        "fisher, mask_rule.power=2",
        "random",
    ]


def test_an_experiment_names_what_comes_with_it(tmp_path):
    """Older folders keep the choice in Hydra's own file; newer ones in the summary, where none is the word None."""
    choices = yaml.safe_dump({"hydra": {"runtime": {"choices": {"experiment": "m8"}}}})
    for rounds in (3, 30):
        folder = a_run(tmp_path / f"{rounds}", val=rounds / 100, federation={"rounds": rounds})
        if rounds == 30:
            (folder / ".hydra/hydra.yaml").write_text(choices)
        else:
            edit(folder, experiment="None")
    assert [row.name for row in table_of(tmp_path)] == ["random", "random, m8"]


def test_a_method_names_what_comes_with_it_and_its_clients_own_models_have_a_table(tmp_path, capsys):
    """Its own keys, and what trains, are not told; what varies beside it is."""
    for method, local, rounds in (("fedit", [], 3), ("fedsa", ["*.lora_B.*"], 3), ("fedsa", ["*.lora_B.*"], 30)):
        model = {"trainable": method, "local": local}
        folder = tmp_path / f"{method}{rounds}"
        a_run(folder, "dense", test=0.0, model=model, federation={"rounds": rounds})
        own = {"personal/acc_mean": 0.5, "personal/acc_std": 0.25, "personal/acc_worst10": 0.125, "personal/loss": 0.75}
        edit(folder, method=method, **(own if local else {}))
    names = [f"dense, {name}" for name in ("fedit, federation.rounds=3", "fedsa, federation.rounds=3")]
    assert [row.name for row in table_of(tmp_path)] == [*names, "dense, fedsa, federation.rounds=30"]
    report.main([str(tmp_path)])
    assert printed(capsys).count("| iid | 50.0 | 25.0 | 12.5 | 0.750 |") == 2


def test_a_dense_run_of_every_sparsity_counts_once(tmp_path):
    for ratio in (0.5, 0.8, 0.95):
        a_run(tmp_path / f"{ratio}", "dense", sparsity={"ratio": ratio})
    a_run(tmp_path / "other", "dense", test=0.6)
    kept, repeated, apart = once(read_runs([tmp_path])[0])
    assert (len(kept), repeated, [p.name for p in apart]) == (1, 3, ["other"])
    assert len(row_of(tmp_path, "dense").runs) == 1


# ---- reading: nothing acts, nothing is fatal


def test_no_runs_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match="no finished run"):
        report.main([str(tmp_path)])
    (a_run(tmp_path / "torn") / "summary.json").write_text("{")
    with pytest.raises(SystemExit, match="no finished run.*; torn: summary.json is damaged: it is not JSON$"):
        report.main([str(tmp_path)])


def test_a_target_that_is_no_fraction_is_refused(sweep, capsys):
    with pytest.raises(SystemExit):
        report.main([str(sweep), "--target", "95"])
    assert "--target: must be a fraction above 0 and at most 1, not 95" in capsys.readouterr().err


def edit(folder, **figures):
    summary = json.loads((folder / "summary.json").read_text()) | figures
    kept = {key: value for key, value in summary.items() if value != "gone"}
    (folder / "summary.json").write_text(json.dumps(kept))


def config_of(folder, text):
    (folder / ".hydra/config.yaml").write_text(text)


DAMAGE = {
    "no summary": (lambda f: (f / "summary.json").unlink(), "not finished: no summary.json after round 3 of 3"),
    "no config": (lambda f: shutil.rmtree(f / ".hydra"), "no .hydra/config.yaml"),
    "torn JSON": (
        lambda f: (f / "summary.json").write_text('{"val/acc": 0.'),
        "summary.json is damaged: it is not JSON",
    ),
    "not UTF-8": (lambda f: (f / "summary.json").write_bytes(b"\xff"), "summary.json is damaged: it is not JSON"),
    "a list": (lambda f: (f / "summary.json").write_text("[]"), "summary.json is damaged: it holds no keys"),
    "missing": (lambda f: edit(f, **{"val/acc": "gone"}), "summary.json lacks val/acc"),
    "NaN": (lambda f: edit(f, **{"test/acc": math.nan}), "summary.json holds no finite number for test/acc"),
    "words": (lambda f: edit(f, bytes_up="many"), "summary.json holds no finite number for bytes_up"),
    "torn YAML": (lambda f: config_of(f, "a: [1"), "config.yaml is damaged: it is not YAML"),
    "no rate": (lambda f: config_of(f, "a: 1"), "optimizer.lr in .hydra/config.yaml must be a number, not nothing"),
    "itself": (
        lambda f: config_of(f, "a: &a {b: *a}"),
        "config.yaml is damaged: it repeats itself by an alias, which no run writes",
    ),
    "code": (
        lambda f: config_of(f, f"a: !!python/object/apply:os.mkdir ['{f}/made']"),
        "config.yaml is damaged: it is not YAML",
    ),
    "no curve": (
        lambda f: (f / "metrics.csv").unlink(),
        "metrics.csv is missing or damaged: the run is in the tables, not in the curves",
    ),
    "torn CSV": (
        lambda f: (f / "metrics.csv").write_text("round,val/acc\n1,0.5\n2,0."),
        "metrics.csv is damaged: it ends after round 1 of 3",
    ),
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_damaged_folders_are_listed_not_fatal(sweep, damage, capsys):
    harm, reason = DAMAGE[damage]
    folder = a_run(sweep / "deep" / "x")
    harm(folder)
    report.main([str(sweep)])
    assert f"| deep/x | {reason} |" in printed(capsys).splitlines()
    assert not (folder / "made").exists()


NASTY = [
    "<script>alert(1)</script>",
    "a|b\nc",
    "![x](http://example.org/x.png)",
    "\x1b[2Jrule",
    "_a$b$ <b>`*",
    "\u2603",
]


class Seen(HTMLParser):
    """Keeps the tags, every address and every visible cell."""

    def __init__(self):
        super().__init__()
        self.tags, self.addresses, self.ids, self.text = [], [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_data(self, data):
        self.text += data


def test_names_are_shown_never_obeyed(tmp_path, capsys):
    for i, name in enumerate(NASTY):
        a_run(tmp_path / f"run{i}", rule=name, partition=name)
    report.main([str(tmp_path), "--out", str(tmp_path / "out")])
    out = printed(capsys)
    lines = (tmp_path / "out/report.md").read_text().splitlines()
    assert "\x1b" not in out
    assert not any("<" in line or "](http" in line.replace("\\]", "") for line in lines)
    main_table = lines[lines.index("## Results") + 4 :][: 2 + len(NASTY)]
    assert [line.replace("\\|", "").count("|") for line in main_table] == [11] * len(main_table)
    seen = Seen()
    seen.feed((tmp_path / "out/report.html").read_text())
    assert not {"script", "iframe", "link", "object"} & set(seen.tags)
    assert seen.tags.count("b") == 0  # no difference here is bold, and the name's <b> is text
    assert "<script>alert(1)</script>" in seen.text


def test_the_page_needs_nothing_beside_it(sweep, tmp_path):
    report.main([str(sweep), "--out", str(tmp_path / "out")])
    seen = Seen()
    seen.feed((tmp_path / "out/report.html").read_text())
    inside = {address[1:] for address in seen.addresses if address.startswith("#")}
    others = [address for address in seen.addresses if not address.startswith(("#", "data:image/png;base64,"))]
    assert others == []
    assert inside == set(seen.ids)
    assert seen.tags.count("img") == len(list((tmp_path / "out").glob("*.png"))) == 3


def files_of(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_same_folders_give_the_same_bytes(sweep, tmp_path):
    (a_run(tmp_path / "more/r", rule="lowest_magnitude") / "metrics.csv").unlink()
    (a_run(tmp_path / "more/torn") / "summary.json").write_text("{")
    places = [[sweep, tmp_path / "more"], [tmp_path / "more", sweep], [sweep, sweep / "a0", tmp_path / "more"]]
    moved = tmp_path / "moved"
    for folder in places[0]:
        shutil.copytree(folder, moved / folder.name)
    written = []
    for i, folders in enumerate([*places, [moved / "sweep", moved / "more"]]):
        report.main([*map(str, folders), "--out", str(tmp_path / f"out{i}")])
        written.append(files_of(tmp_path / f"out{i}"))
    assert len([name for name in written[0] if "/" not in name]) == 5
    assert "tables/results.csv" in written[0]
    assert "more/torn" in written[0]["report.md"].decode()
    assert all(files == written[0] for files in written)


# ---- pictures and pages


def drawn(sweep):
    table = table_of(sweep)
    return {"pareto": pareto.pareto_figure(table, "bytes_up"), "curves": convergence.convergence_figure(table, 0.8)}


@pytest.mark.parametrize("picture", ["pareto", "curves"])
def test_nothing_lies_on_the_legend(sweep, picture):
    figure = drawn(sweep)[picture]
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box, width = legend.get_window_extent(), figure.bbox.width
    assert 0 <= box.x0 < box.x1 <= width
    assert not any(box.overlaps(axes.get_tightbbox()) for axes in figure.axes)


def test_a_rule_has_one_colour_in_all_pictures(sweep):
    colours = []
    for figure in drawn(sweep).values():
        (legend,) = figure.legends
        handles = dict(zip([t.get_text() for t in legend.get_texts()], legend.legend_handles, strict=True))
        colours.append([handles[name].get_color() for name in ("dense", "head alone", "random")])
    assert colours[0] == colours[1]
    assert len(set(colours[0])) == 3


def test_rows_of_one_rule_share_its_colour_and_differ_in_their_line():
    found = styles(["random", "random, head.init=probe", "mine", "dense"])
    first, second = found["random"], found["random, head.init=probe"]
    assert first.colour == second.colour
    assert (first.line, first.fill) != (second.line, second.fill)
    assert len({style.colour for style in found.values()}) == 3


def test_markdown_of_a_section():
    table = Table(["a", "b"], [[Bold("1"), "x|y"]], "what")
    picture = Picture("p", "seen", draw=lambda: None)
    text = markdown("T", [Section("S", "Read.", [table, picture])])
    body = "**what**\n\n| a | b |\n| ---: | --- |\n| **1** | x\\|y |\n\n![seen](p.png)\n"
    assert text == f"# T\n\n## S\n\nRead.\n\n{body}"


def test_what_train_leaves_behind_is_what_the_report_reads(run_in, tmp_path, capsys):
    summaries = {rule: run_in(rule, f"mask_rule={rule}")[0] for rule in ("dense", "random", "highest_magnitude")}
    capsys.readouterr()
    report.main([str(tmp_path)])
    out = printed(capsys)
    for rule, summary in summaries.items():
        assert f"| {100 * summary['test/acc']:.1f} |" in next(
            x for x in out.splitlines() if x.startswith(f"| {rule} |")
        )
    assert "## Mask overlap" in out
    assert "## Left out" not in out
