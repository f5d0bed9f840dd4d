"""Writes the results of a run: summary.json, curves, and the printed table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fedsparse.core import files, parallel
from fedsparse.core.folder import ADAPTERS, ADAPTERS_PICTURE, CLUSTERS, CLUSTERS_PICTURE, CURVES, METRICS, SUMMARY
from fedsparse.core.monitor import ACCURACY, OWN_ACCURACY, TEST_ACCURACY, headline_of, monitor_of
from fedsparse.core.precisions import dtype_of, made_in
from fedsparse.core.rows import read_rows
from fedsparse.core.space import ParamSpace
from fedsparse.federation.exchange.ledger import Ledger
from fedsparse.federation.federation import Federation
from fedsparse.job.parts import Assembly, Problem
from fedsparse.job.prepare import picture
from fedsparse.job.resume import Job
from fedsparse.job.tracked import chosen
from fedsparse.masks import Mask, overlaps
from fedsparse.masks.bitmaps import masks_of
from fedsparse.models.flops import pruning_figures
from fedsparse.preparation.calibration import Calibrated
from fedsparse.simulation.devices import device_of, peak_memory
from fedsparse.simulation.progress import human_bytes

# the config groups whose chosen options are in the summary
CHOICES = (
    *("mask_rule", "partition", "data", "model", "experiment", "method"),
    *("exchange", "aggregation", "server", "objective", "link"),
)
_HEADLINES = {TEST_ACCURACY: "test accuracy", OWN_ACCURACY: "accuracy of clients' own models"}
# parts that a run's heading leaves out
_USUAL = {"objective": "none", "exchange": "masked", "aggregation": "weighted_mean", "server": "fedavg"}
NEAR = 0.02  # above chance: accuracy within it counts as having learned nothing


def sha256(row: Tensor) -> str:
    """Compute the SHA-256 of a row's bytes, in hex."""
    return hashlib.sha256(row.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def best_row(rows: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    """Find the first row with the best validation accuracy, of own models where there are any; empty without rows.

    >>> best_row([{"round": 1, "val/acc": 0.5}, {"round": 2}, {"round": 3, "val/acc": 0.7}])["round"]
    3
    """
    key = monitor_of(*[row for row in rows if ACCURACY in row][-1:])  # an older version wrote the first rows
    return max((row for row in rows if key in row), key=lambda row: row[key], default={})


def summarise(
    job: Job, assembly: Assembly, federation: Federation, found: Calibrated, mask: Mask, seconds: float
) -> dict[str, Any]:
    """Compute the contents of summary.json.

    Args:
        job: the run; its folder holds metrics.csv.
        assembly: the parts of the run; its network is the last global model.
        federation: of the run.
        found: masks and overlaps of the calibration.
        mask: of the last round.
        seconds: of all rounds.

    """
    problem, course, ledger = assembly.problem, assembly.course, federation.ledger
    space, net, rows = problem.space, problem.net, read_rows(job.folder / METRICS)
    parameters = sum(p.numel() for p in net.parameters())
    last = next((row for row in reversed(rows) if ACCURACY in row), {})
    best = best_row(rows[course.phases.explored :])
    always = space.where(assembly.method.sparsity.always_train)
    return {
        **{key: value for key, value in last.items() if "/" in key and not key.startswith("train")},
        "test/acc_best": best.get("test/acc"),
        **({"personal/acc_best": best[own]} if (own := "personal/acc_mean") in best else {}),
        "rounds": len(rows),
        "rounds_asked": course.phases.total,
        "num_parameters": parameters,
        "trainable_fraction": int(mask.row(space).sum()) / parameters,
        **ledger.figures(),
        "link_seconds": ledger.link_seconds,
        "dropped_updates": len(federation.dropped),
        "global_sha256": sha256(space.read(net)),
        "data_fingerprint": problem.dataset.fingerprint or None,
        "seconds": seconds,
        **peak_memory(device_of(assembly.session.accelerator)),
        "seed": problem.seed,
        "cohort": course.cohort,
        "processes": parallel.processes(),
        "head": assembly.method.head.init,
        "sparsity": sparsity_of(mask, always, space),
        "client_steps": ledger.client_steps,
        **_chance(assembly, ledger),
        **(_pruned(problem) if assembly.method.sparsity.mode == "prune" else {}),
        "mask_overlap_rounds": list(found.overlap),
        "mask_overlap_clients": mean_client_overlap(found, space),
        **{key: chosen(job.choices.get(key)) for key in CHOICES},
        **_exchanged(assembly.config["exchange"], job.choices.get("exchange")),
    }


def _chance(assembly: Assembly, ledger: Ledger) -> dict[str, float | None]:
    """Compute the figures that explain a run at chance: chance, clipped share of steps, learning rate."""
    options, dataset = assembly.config["optimizer"], assembly.problem.dataset
    labels = dataset.common_test.labels[: 0 if dataset.sequences else None]  # sequences have no chance level
    clipped = None if options["clip_norm"] is None else ledger.clipped_steps / max(1, ledger.round_steps)
    chance = int(np.bincount(labels).max()) / len(labels) if len(labels) else None
    return {"chance": chance, "clipped_fraction": clipped, "clip_norm": options["clip_norm"], "lr": options["lr"]}


def _pruned(problem: Problem) -> dict[str, float]:
    """Compute the pruned model's compression and FLOPs."""
    net = problem.space.tensors(problem.net)[0]  # Lightning has moved it back to the CPU
    x = problem.dataset.train.x[torch.tensor([0])].to(net.device)
    with made_in(dtype_of(problem.precision)):
        return pruning_figures(problem.net, problem.inputs(x))


def _exchanged(options: Mapping[str, Any], chosen: str | None) -> dict[str, Any]:
    """Collect the options of the exchange; only an exchange without a rule is ``_partial_``."""
    named = {f"exchange_{key}": options.get(key) for key in ("fraction", "feedback", "precision", "payload", "compat")}
    return named | {"exchange_rule": None if "_partial_" in options else options.get("by", chosen)}


def sparsity_of(mask: Mask, always: Tensor, space: ParamSpace) -> float:
    """Compute the fraction of counted coordinates that do not train; the mask's ``ratio``, if it has one.

    Args:
        mask: the mask.
        always: bool (P,), coordinates that are not counted.
        space: its space.

    """
    if "ratio" in mask.metadata:
        return float(mask.metadata["ratio"])
    counted = mask.row(space)[~always]
    return 1 - int(counted.sum()) / max(1, len(counted))


def mean_client_overlap(found: Calibrated, space: ParamSpace) -> float | None:
    """Compute the mean Jaccard index over pairs of clients with own masks; None with fewer than two."""
    bitmaps = found.bitmaps[(found.bitmaps > 0).any(1)] if len(found.bitmaps) else found.bitmaps
    if len(bitmaps) < 2:
        return None
    matrix = overlaps(masks_of(bitmaps, space))
    pairs = torch.triu_indices(len(bitmaps), len(bitmaps), 1)
    return float(matrix[pairs[0], pairs[1]].mean())


def write_results(folder: Path, summary: Mapping[str, Any], pictures: bool = True) -> None:
    """Write the pictures, then the summary, which marks a run as finished."""
    if pictures:
        from fedsparse.analysis.curves import curves_figure  # here: a run without pictures draws none

        picture(folder / CURVES, lambda: curves_figure(read_rows(folder / METRICS), _title(summary)))
        _draw_adapters(folder, summary)
    files.write(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")


def _title(summary: Mapping[str, Any]) -> str:
    """Write what a run is: data, model, partition, mask rule, fraction frozen, parts that are not the usual ones, seed.

    >>> run = {"data": "digits", "model": "mlp", "partition": "iid", "mask_rule": "random", "sparsity": 0.8, "seed": 0}
    >>> _title(run | {"server": "fedadam", "exchange": "masked"})
    'digits, mlp, iid, random 80% frozen, server=fedadam, seed 0'
    """
    frozen = f" {100 * summary['sparsity']:g}% frozen" * bool(summary["sparsity"])
    task = f"{summary['data']}, {summary['model']}, {summary['partition']}"
    other = [f", {key}={summary[key]}" for key, usual in _USUAL.items() if summary.get(key, usual) not in (usual, None)]
    return f"{task}, {summary['mask_rule']}{frozen}{''.join(other)}, seed {summary['seed']}"


def _draw_adapters(folder: Path, summary: Mapping[str, Any]) -> None:
    """Draw what averaging did to adapters, and the clusters of departments, where a round wrote any."""
    from fedsparse.analysis.adapters_plot import adapters_figure, read_adapters  # here, as above
    from fedsparse.analysis.clusters_plot import clusters_figure, read_clusters

    table, clusters = folder / ADAPTERS, folder / CLUSTERS
    if table.is_file() and table.read_text(encoding="utf-8", errors="replace").count("\n") > 1:  # more than its header
        title = f"low-rank adapters, method {summary['method'] or 'of its own'}"
        picture(folder / ADAPTERS_PICTURE, lambda: adapters_figure(read_adapters(table), title))
    if clusters.is_file() and clusters.stat().st_size:
        picture(folder / CLUSTERS_PICTURE, lambda: clusters_figure(read_clusters(clusters), "clusters of departments"))


def print_table(folder: Path, summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the table of results."""
    rounds = "1 round" if summary["rounds"] == 1 else f"{summary['rounds']} rounds"
    table = Table(title=f"{_title(summary)}, {rounds}", title_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in _shown(summary):
        table.add_row(name, value)
    console = console or Console()
    console.print(table)
    if line := at_chance(summary):
        console.print(line, soft_wrap=True)
    console.print(f"run folder: {folder}", soft_wrap=True)


def headline(summary: Mapping[str, Any]) -> str:
    """Format the test accuracy that counts: of own models where something stays with the clients.

    >>> headline({"test/acc": 0.0, "personal/acc_mean": 0.919})
    "accuracy of clients' own models 91.9%"
    """
    key = headline_of(summary)
    return f"{_HEADLINES[key]} {summary[key]:.1%}"


def at_chance(summary: Mapping[str, Any]) -> str:
    """Write a line about a run at chance, with clipping and learning rate; empty if it is above chance.

    >>> at_chance({"test/acc": 0.5, "chance": 0.1, "clipped_fraction": 0.97, "clip_norm": 1.0, "lr": 0.05})
    ''
    """
    accuracy, chance = summary.get(headline_of(summary)), summary.get("chance")
    if accuracy is None or chance is None or accuracy > chance + NEAR:
        return ""
    clipped = summary["clipped_fraction"]
    how = "no local step was clipped" if not clipped else f"{clipped:.0%} of the local steps were clipped"
    return (
        f"{headline(summary)} is within two points of chance ({chance:.1%}, the largest class of the test "
        f"split): {how} at optimizer.clip_norm={'null' if clipped is None else summary['clip_norm']}, at "
        f"optimizer.lr={summary['lr']}; try other values, or more rounds"
    )


def _shown(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Format the rows of the table: labels and values."""
    whose = ", of what is shared alone" * (headline_of(summary) == OWN_ACCURACY)
    percent = {
        "accuracy of clients' own models, mean": "personal/acc_mean",
        "accuracy of clients' own models, worst tenth": "personal/acc_worst10",
        "accuracy of clients' own models, best round by validation": "personal/acc_best",
        f"test accuracy{whose}": "test/acc",
        f"test accuracy, best round by validation{whose}": "test/acc_best",
        f"accuracy per client, mean{whose}": "client/acc_mean",
        f"accuracy per client, worst tenth{whose}": "client/acc_worst10",
        "top-1 of participants' own models on their test parts": "participants/local/top1_mean",
        "top-1 of the global model there": "participants/global/top1_mean",
        "top-1 of the global model, non-participants": "non_participants/global/top1_mean",
        "weights that trained, head included": "trainable_fraction",
    }
    rows = [(label, f"{summary[key]:.1%}") for label, key in percent.items() if summary.get(key) is not None]
    if "compression" in summary:
        saved = summary["flops_sparse"] / summary["flops"]
        rows.append(("weights over those that are not zero", f"{summary['compression']:.2f}"))
        rows.append(("forward FLOPs if zeros cost nothing", f"{saved:.1%} of {summary['flops']:,.0f}"))
    if (gap := summary.get("gap/generalisation/top1_mean")) is not None:
        rows.append(("generalisation gap of top-1, out minus in", f"{100 * gap:+.1f} points"))
    if "client_steps" in summary:
        rows.append(("local steps of all clients, preparation included", f"{summary['client_steps']:,}"))
    up, dense = summary["bytes_up"], summary["bytes_dense"]
    rows.append(("sent up in rounds", f"{human_bytes(up)} ({up / dense:.1%} of dense)"))
    rows.append(("received in rounds", human_bytes(summary["bytes_down"])))
    setup = summary["bytes_setup_up"] + summary["bytes_setup_down"]
    rows.append(("head, calibration and first models", human_bytes(setup)))
    rows.append(("all traffic", human_bytes(summary["bytes_total"])))
    rows.append((f"time of the rounds' messages, link {summary['link']}", f"{summary['link_seconds']:.1f} s"))
    rows.append(("dropped updates", str(summary["dropped_updates"])))
    rows.append(("time in rounds", f"{summary['seconds']:.1f} s"))
    return rows
