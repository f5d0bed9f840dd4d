"""What a run leaves behind: summary.json, model, pictures, and the table at the end."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fedsparse.analysis.curves import curves_figure
from fedsparse.analysis.partition_plot import partition_figure
from fedsparse.core import files
from fedsparse.job.assemble import Parts
from fedsparse.masks import Mask
from fedsparse.simulation.callback import FederatedRounds
from fedsparse.simulation.csv_logger import read_rows
from fedsparse.simulation.progress import human_bytes

log = logging.getLogger("fedsparse")
NEAR = 0.02  # above chance: what a run that learned nothing may reach by luck
BYTES = ("bytes_up", "bytes_down", "bytes_dense", "bytes_setup_up", "bytes_setup_down", "bytes_total")


def sha256(row: Tensor) -> str:
    """Fingerprint of a row's bits."""
    return hashlib.sha256(row.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def picture(path: Path, draw: Callable[[], Figure]) -> None:
    """Draw a picture; what goes wrong is said in one line, and no reason to lose a run."""
    try:
        figure = draw()
        files.write(path, lambda file: figure.savefig(file, format="png", dpi=120))
    except Exception as error:
        log.warning("%s is left out (%s: %s)", path.name, type(error).__name__, " ".join(str(error).split()))


def save_partition(federation: Parts, title: str, path: Path) -> None:
    """Draw clients x classes."""
    labels = federation.dataset.train.y.cpu().numpy()
    picture(path, lambda: partition_figure(labels, federation.parts, federation.dataset.classes, title))


def best_row(rows: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    """First row with the best validation accuracy; rows without validation do not count.

    >>> best_row([{"round": 1, "val/acc": 0.5}, {"round": 2}, {"round": 3, "val/acc": 0.7}])["round"]
    3
    """
    validated = [row for row in rows if "val/acc" in row]
    return max(validated, key=lambda row: row["val/acc"], default={})


def summarise(
    federation: Parts, rounds: FederatedRounds, mask: Mask, rows: Sequence[Mapping[str, float]], **facts: Any
) -> dict[str, Any]:
    """Gather the figures of ``summary.json``.

    Args:
        federation: data, model and clients; the model is the global one of the last round.
        rounds: the protocol with its ledger.
        mask: what trained.
        rows: the rows of metrics.csv.
        facts: seconds, seed, choices, and the like.

    """
    space, net = federation.space, federation.net
    parameters = sum(p.numel() for p in net.parameters())
    last = next((row for row in reversed(rows) if "val/acc" in row), {})
    figures = {key: value for key, value in last.items() if "/" in key and not key.startswith("train")}
    return {
        **figures,
        "test/acc_best": best_row(rows[federation.phases.explored :]).get("test/acc"),
        "rounds": len(rows),
        "rounds_asked": federation.phases.total,
        "num_parameters": parameters,
        "trainable_fraction": int(mask.row(space).sum()) / parameters,
        **rounds.federation.ledger.figures(),
        "link_seconds": rounds.federation.ledger.link_seconds,
        "dropped_updates": len(rounds.federation.dropped),
        "global_sha256": sha256(space.read(net)),
        "data_fingerprint": federation.dataset.fingerprint or None,
        **facts,
    }


def write_results(folder: Path, summary: Mapping[str, Any], pictures: bool = True) -> None:
    """Write curves and, last of all, the summary that marks a run as finished."""
    if pictures:
        title = f"mask rule {summary['mask_rule']}, partition {summary['partition']}"
        picture(folder / "curves.png", lambda: curves_figure(read_rows(folder / "metrics.csv"), title))
    files.write(folder / "summary.json", json.dumps(summary, indent=2) + "\n")


def print_table(folder: Path, summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Show a person what came out."""
    rounds = "1 round" if summary["rounds"] == 1 else f"{summary['rounds']} rounds"
    title = f"mask rule {summary['mask_rule']}, partition {summary['partition']}, {rounds}"
    table = Table(title=title, title_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in _shown(summary):
        table.add_row(name, value)
    console = console or Console()
    console.print(table)
    if line := at_chance(summary):
        console.print(line, soft_wrap=True)
    console.print(f"run folder: {folder}", soft_wrap=True)


def at_chance(summary: Mapping[str, Any]) -> str:
    """Say that a run has learned next to nothing, and how its steps were taken; empty where it has learned.

    >>> at_chance({"test/acc": 0.5, "chance": 0.1, "clipped_fraction": 0.97, "clip_norm": 1.0, "lr": 0.05})
    ''
    """
    accuracy, chance = summary.get("test/acc"), summary.get("chance")
    if accuracy is None or chance is None or accuracy > chance + NEAR:
        return ""
    clipped = summary["clipped_fraction"]
    how = "no local step was clipped" if not clipped else f"{clipped:.0%} of the local steps were clipped"
    return (
        f"test accuracy {accuracy:.1%} is within two points of chance ({chance:.1%}, the largest class of the test "
        f"split): {how} at optimizer.clip_norm={'null' if clipped is None else summary['clip_norm']}, at "
        f"optimizer.lr={summary['lr']}; try other values, or more rounds"
    )


def _shown(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows of the table: names and values for people."""
    percent = {
        "test accuracy": "test/acc",
        "test accuracy, best round by validation": "test/acc_best",
        "accuracy per client, mean": "client/acc_mean",
        "accuracy per client, worst tenth": "client/acc_worst10",
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
        rows.append(("generalisation gap of top-1, out minus in", f"{gap:+.1%}"))
    if "client_steps" in summary:
        rows.append(("local steps of all clients, preparation included", f"{summary['client_steps']:,}"))
    up, dense = summary["bytes_up"], summary["bytes_dense"]
    rows.append(("sent up", f"{human_bytes(up)} ({up / dense:.1%} of dense)"))
    rows.append(("all traffic, with first models", human_bytes(summary["bytes_total"])))
    rows.append((f"time of the rounds' messages, link {summary['link']}", f"{summary['link_seconds']:.1f} s"))
    rows.append(("dropped updates", str(summary["dropped_updates"])))
    rows.append(("time in rounds", f"{summary['seconds']:.1f} s"))
    return rows
