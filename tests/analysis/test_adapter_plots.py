"""Pictures of adapters and of clusters, read back from what is drawn."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest

from fedsparse.analysis.adapters_plot import adapters_figure, over_layers, read_adapters
from fedsparse.analysis.clusters_plot import clusters_figure, read_clusters
from fedsparse.analysis.curves import curves_figure
from fedsparse.federation.adapters import COLUMNS
from fedsparse.job.summary import write_results

CSV = f"""{COLUMNS}
1,0,q,3,0.5,6,1
1,0,v,4,0.5,8,2
2,0,q,0,0,1,1
2,0,v,0,0,0,0
1,1,q,1,0.1,10,1
2,1,q,2,0.1,20,1
"""
NAMES = ("row", "A", "A-start", "B", "BA")


def line(number, labels, before=None, truth=None, size=3):
    same = np.equal.outer(labels, labels)
    cosines = {of: np.where(same, 1.0, -0.25).tolist() for of in NAMES[:size]}
    return {"round": number, "labels": labels, "k": len(set(labels)), "ari_before": before, "ari_truth": truth} | {
        "cosines": cosines
    }


LINES = [line(2, [0, 1, 0], truth=-0.5), line(4, [0, 1, 1], before=0.25, truth=1.0)]


def written(tmp_path):
    (tmp_path / "lora.csv").write_text(CSV)
    (tmp_path / "clusters.jsonl").write_text("".join(json.dumps(each) + "\n" for each in LINES))
    return tmp_path


def test_each_department_is_a_line_over_all_layers(tmp_path):
    rows = read_adapters(written(tmp_path) / "lora.csv")
    drawn = [
        [(list(one.get_xdata()), list(one.get_ydata())) for one in axes.lines] for axes in adapters_figure(rows).axes
    ]
    assert drawn[0] == [([1, 2], [5.0, 0.0]), ([1, 2], [1.0, 2.0])]
    assert drawn[1] == [([1, 2], [0.5, 0.0]), ([1, 2], [0.1, 0.1])]
    assert drawn[2] == [([1, 2], [10.0, 1.0]), ([1, 2], [10.0, 20.0])]


def test_one_model_has_its_layers_too(tmp_path):
    rows = [row for row in read_adapters(written(tmp_path) / "lora.csv") if row["group"] == "0"]
    error = adapters_figure(rows).axes[0]
    assert [list(one.get_ydata()) for one in error.lines] == [[3.0, 0.0], [4.0, 0.0], [5.0, 0.0]]
    assert over_layers([])["error"] == {}


def test_clusters_are_drawn_as_they_were(tmp_path):
    figure = clusters_figure(read_clusters(written(tmp_path) / "clusters.jsonl"), "three")
    assignment, indices, *matrices = figure.axes[:5]
    assert np.array_equal(assignment.collections[0].get_array(), [[0, 0], [1, 1], [0, 1]])
    assert [tick.get_text() for tick in assignment.get_xticklabels()] == ["2", "4"]
    assert [list(one.get_ydata()) for one in indices.lines] == [[-0.5, 1.0], [0.25]]
    assert indices.get_ylim()[0] < -0.5
    assert [axes.get_title() for axes in matrices] == ["all that trains", "A", "A-start"]
    for axes in matrices:
        assert np.array_equal(axes.images[0].get_array(), [[1, -0.25, -0.25], [-0.25, 1, 1], [-0.25, 1, 1]])


@pytest.mark.parametrize(("members", "rounds", "size"), [(2, 1, 1), (40, 50, 5)])
def test_few_and_many(members, rounds, size):
    lines = [line(number + 1, [member % 12 for member in range(members)], size=size) for number in range(rounds)]
    figure = clusters_figure(lines)
    figure.canvas.draw()
    assert max(figure.get_size_inches()) < 20


def test_a_run_writes_them_beside_its_curves(tmp_path, caplog):
    folder = written(tmp_path)
    (folder / "metrics.csv").write_text("round,val/acc,val/loss,bytes_up\n1,0.5,2,10\n2,0.6,1,20\n")
    summary = {"mask_rule": "dense", "partition": "iid", "method": "fedit", "data": "digits", "model": "mlp"}
    summary |= {"sparsity": 0.0, "seed": 0}
    write_results(folder, summary, pictures=False)
    assert not (folder / "clusters.png").exists()
    write_results(folder, summary)
    for name in ("curves.png", "adapters.png", "clusters.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"
    (folder / "clusters.jsonl").write_text('{"round": 1')
    with caplog.at_level(logging.WARNING):
        write_results(folder, summary)  # what is damaged is a warning, and the summary is written
    assert "clusters.png is left out" in caplog.text


def test_curves_have_the_figures_of_clients_own_models_and_no_accuracy_below_0():
    own = {"personal/acc_mean": 0.1, "personal/loss": 4.0}
    rows = [{"round": n, "val/acc": 0.0, "val/loss": 6.0, "bytes_up": n, **own} for n in (1, 2)]
    accuracy, loss, _ = curves_figure(rows).axes
    assert [list(line.get_ydata()) for line in accuracy.lines] == [[0.0, 0.0], [0.1, 0.1]]
    assert [list(line.get_ydata()) for line in loss.lines] == [[6.0, 6.0], [4.0, 4.0]]
    for right, least in ((0.0, 0.0), (0.9, 0.85)):
        alone = [{"round": n, "val/acc": right, "val/loss": 6.0, "bytes_up": n} for n in (1, 2)]
        assert least <= curves_figure(alone).axes[0].get_ylim()[0] <= right
