"""Tables of a report: all rows, rules by partition and by sparsity, clients, scaled task vectors, what is left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fedsparse.analysis.baseline import dense_of, differing, nearest
from fedsparse.analysis.files import DASH, finite, json_of
from fedsparse.analysis.folders import Problem, Run
from fedsparse.analysis.page import Bold, Section, Table
from fedsparse.analysis.statistics import Interval
from fedsparse.analysis.table import Row, Task, partitions, sparsities, tasks
from fedsparse.core.folder import SCALE

_HEAD = (
    "partition",
    "sparsity",
    "lr",
    "trained",
    "sent up, MB",
    "test accuracy, %",
    "difference to dense, points",
    "worst tenth of clients, %",
    "seeds",
)
MARKED = "Bold, ▲ or ▼: the interval of the difference to dense, paired by seed, lies above or below 0."
_OWN = (
    " †: something stays with each client; the mean over clients of their own models, each on its part of the test "
    "split."
)


def overview(table: Sequence[Row]) -> Section:
    """Show all rows, the best test accuracy of each partition first."""
    order = sorted(table, key=lambda row: (row.partition, -row.over_seeds(row.headline).mean))
    text = (
        "Mean over seeds ± half the 95 % confidence interval (Student's t), at the learning rate with the best mean "
        "validation accuracy (*: the smallest or largest of those tried). Sparsity is the fraction frozen; 'trained' "
        f"counts the head too. {MARKED} Other differences are noise as far as these seeds tell; and of twenty rows "
        "that do not differ from dense at all, one is bold by chance. Dense trains everything, at its own best rate, "
        "and shares all else: data, model, partition, rounds, optimizer, objective, head, server and average."
    )
    results = Table([rule_head(table), *_HEAD], [_cells(row, dense_of(row, table)) for row in order])
    return Section("Results", text + own_note(table), [results, _without_dense(order, table)])


def by_partition(table: Sequence[Row]) -> Section:
    """Show rules by partitions, one table for each data set, model and sparsity; rows without a mask stand in all."""
    text = f"Test accuracy, %, of each rule (rows) on each partition (columns): mean ± 95 % interval. {MARKED}"
    tables = [
        _cross([row for row in rows if row.sparsity in (0, s)], table, partitions(rows), _partition, said(task, _at(s)))
        for task, rows in tasks(table).items()
        for s in sparsities(rows) or [0.0]
    ]
    return Section("Rule by partition", text + own_note(table), tables)


def by_sparsity(table: Sequence[Row]) -> Section:
    """Show rules by sparsities, one table for each data set, model and partition."""
    text = f"Test accuracy, %, of each rule (rows) at each fraction frozen (columns): mean ± 95 % interval. {MARKED}"
    tables = []
    for task, rows in tasks(table).items():
        columns = [share(s) for s in sorted({row.sparsity for row in rows})]
        for part in partitions(rows):
            shown = [row for row in rows if row.partition == part]
            tables.append(_cross(shown, table, columns, lambda row: share(row.sparsity), said(task, part)))
    return Section("Rule by sparsity", text + own_note(table), tables)


def clients(table: Sequence[Row]) -> Section:
    """Show how accuracy spreads over clients."""
    keys = ("client/acc_mean", "client/acc_std", "client/acc_worst10")
    shown = [row for row in table if not row.own]  # whose global model lacks what stays
    spread = {id(row): [row.over_seeds(key).percent() for key in keys] for row in shown}
    body = [[row.name, row.partition, share(row.sparsity), *spread[id(row)], _worst(row, table)] for row in shown]
    heads = [
        "mean over clients, %",
        "standard deviation, points",
        "worst tenth, %",
        "worst tenth, difference to dense, points",
    ]
    text = (
        "The global model on each client's part of the test split. The mean weighs all clients alike; the worst tenth "
        f"is the mean over the tenth of the clients with the lowest accuracy, noisy where parts are small. {MARKED}"
    )
    return Section("Accuracy per client", text, [Table([rule_head(table), "partition", "sparsity", *heads], body)])


def own_models(table: Sequence[Row]) -> Iterable[Section]:
    """Show the accuracy of clients' own models, of rows where something stays with each client."""
    keys = ("personal/acc_mean", "personal/acc_std", "personal/acc_worst10")
    shown = [row for row in table if row.by_seed(keys[0])]
    loss = {id(row): f"{row.over_seeds('personal/loss').mean:.3f}" for row in shown}
    body = [[row.name, row.partition, *(row.over_seeds(k).percent() for k in keys), loss[id(row)]] for row in shown]
    heads = ["mean over clients, %", "standard deviation, points", "worst tenth, %", "loss"]
    text = (
        "Where something stays with each client, these figures count, and not those of the global model, which lacks "
        "it: every client's own model on its part of the test split."
    )
    found = Table([rule_head(table), "partition", *heads], body)
    return [Section("Clients' own models", text, [found])] if body else []


def scaled(runs: Sequence[Run]) -> Iterable[Section]:
    """Show theta_0 + alpha (theta_T - theta_0), for the runs that hold a ``scale.json``."""
    body = [[run.name, *_scale_cells(found)] for run in runs if (found := _scale(run))]
    text = (
        "theta_0 + alpha (theta_T - theta_0): what training added, scaled by the alpha with the best validation "
        "accuracy. alpha = 1 is the model as trained."
    )
    head = ["run", "alpha", "validation accuracy, %", "test accuracy, %", "test accuracy at alpha = 1, %"]
    return [Section("Scaled task vector", text, [Table(head, body)])] if body else []


def missing(problems: Sequence[Problem], repeated: int) -> Iterable[Section]:
    """List what was left out, with its reason."""
    count = (
        f"{repeated} finished runs repeat settings and seed of another (dense ones do at each sparsity): not counted. "
    )
    listed = "Folders that the tables leave out, unless their line says otherwise."
    text = count * bool(repeated) + listed * bool(problems)
    body = [[problem.name, problem.reason] for problem in problems]
    tables = [Table(["folder", "reason"], body)] if body else []
    return [Section("Left out", text, tables)] if body or repeated else []


def rule_head(table: Sequence[Row]) -> str:
    """Head the column of names: where everything trains, a sparse exchange is named instead of a mask rule."""
    return "mask rule or exchange" if any(row.exchange for row in table) else "mask rule"


def difference(row: Row, dense: Row | None, key: str) -> str:
    """Write the paired difference to dense; a dash for dense itself, and where no seed is shared."""
    if dense is None or dense.runs == row.runs:
        return DASH
    found = row.against(dense, key)
    return mark(found.percent("+"), found)


def accuracy(row: Row) -> str:
    """Write a row's test accuracy, of the clients' own models where something stays with them."""
    return row.over_seeds(row.headline).percent() + " †" * row.own


def megabytes(count: float, digits: int = 1) -> str:
    """Write bytes in megabytes, of 10^6 bytes; of less than one two digits that are not 0.

    >>> megabytes(16_420_000), megabytes(59_760), megabytes(0)
    ('16.4', '0.060', '0.0')
    """
    value = count / 1e6
    return f"{value:.{digits}f}" if value >= 1 or not value else f"{value:#.2g}"


def own_note(table: Sequence[Row]) -> str:
    """Explain the mark of own models, where a row has it."""
    return _OWN if any(row.own for row in table) else ""


def said(task: Task, *more: str) -> str:
    """Write data, model and what else a table or a picture is of.

    >>> said(("digits", "mlp"), "iid", "")
    'digits, mlp, iid'
    """
    return ", ".join(filter(None, [*task, *more]))


def mark(text: str, difference: Interval) -> str:
    """Set a text in bold, with an arrow, where a difference lies above or below 0."""
    return Bold(f"{text} {'▲' if difference.mean > 0 else '▼'}") if difference.excludes_zero else text


def share(sparsity: float) -> str:
    """Write a sparsity; a row without a mask has none.

    >>> share(0.95), share(0.0)
    ('95%', 'no mask')

    """
    return f"{100 * sparsity:g}%" if sparsity else "no mask"


def _at(sparsity: float) -> str:
    return f"sparsity {share(sparsity)}" if sparsity else ""


def _partition(row: Row) -> str:
    return row.partition


def _cells(row: Row, dense: Row | None) -> list[str]:
    lr = f"{row.lr:g}" + "*" * row.lr_at_edge
    sent = megabytes(row.over_seeds("bytes_up").mean)
    trained = f"{row.over_seeds('trainable_fraction').mean:.1%}"
    against = difference(row, dense, row.headline)
    figures = [accuracy(row), against, row.over_seeds(row.worst).percent()]
    return [row.name, row.partition, share(row.sparsity), lr, trained, sent, *figures, str(len(row.runs))]


def _without_dense(order: Sequence[Row], table: Sequence[Row]) -> Table:
    """List the rows that no dense run shares the rest with, beside the nearest one."""
    alone = [(row, nearest(row, table)) for row in order if dense_of(row, table) is None]
    body = [
        [row.name, row.partition, share(row.sparsity), near[0].name, differing(near[1])]
        for row, near in alone
        if near is not None
    ]
    head = [rule_head(table), "partition", "sparsity", "nearest dense row", "differs in"]
    return Table(head, body, "Rows without a difference to dense")


def _worst(row: Row, table: Sequence[Row]) -> str:
    return difference(row, dense_of(row, table), row.worst)


def _cross(
    shown: Sequence[Row], table: Sequence[Row], columns: Sequence[str], column: Callable[[Row], str], caption: str
) -> Table:
    """Lay rows out by name and one more property; each is marked by its own difference to dense."""
    cells = {(row.name, column(row)): _against(row, table) for row in shown}
    names = dict.fromkeys(row.name for row in sorted(shown, key=lambda row: (not row.dense, row.name)))
    body = [[name, *(cells.get((name, place), DASH) for place in columns)] for name in names]
    return Table([rule_head(table), *columns], body, caption)


def _against(row: Row, table: Sequence[Row]) -> str:
    dense = dense_of(row, table)
    difference = Interval(math.nan, math.nan) if dense is None else row.against(dense, row.headline)
    return mark(accuracy(row), difference)


def _scale(run: Run) -> dict[str, Any] | None:
    """Read a scale.json; None if there is none, or it holds no figures."""
    try:
        found = json_of(run.folder / SCALE)
    except (OSError, ValueError):
        return None
    return found if finite(found.get("alpha")) else None


def _scale_cells(found: dict[str, Any]) -> list[str]:
    keys = ("val/acc", "test/acc", "test/acc_at_1")
    return [f"{found['alpha']:g}", *(f"{100 * found[k]:.1f}" if finite(found.get(k)) else DASH for k in keys)]
