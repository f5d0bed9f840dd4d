"""What ``run`` and ``sweep`` return: figures of runs, and ways to what their folders hold; overrides from keywords."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsparse.core.folder import MASK, METRICS
from fedsparse.core.monitor import headline_of
from fedsparse.core.rows import read_rows
from fedsparse.job.sweep import short_path

if TYPE_CHECKING:
    from torch import Tensor

    from fedsparse.masks import Mask


class Outcome(dict[str, Any]):
    """The figures of ``summary.json`` by name, with the run folder as ``folder``."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self["folder"])

    def model(self, checkpoint: str = "last", trusted: Sequence[str] = ()) -> dict[str, Tensor]:
        """Read the model of a checkpoint as a state dict; see ``fedsparse.weights``.

        Raises:
            ValueError: there is no such checkpoint, or it is damaged.

        """
        from fedsparse.job.finished import saved_weights  # here, so that figures alone need no torch

        return saved_weights(self.folder, checkpoint, trusted)

    def mask(self) -> Mask:
        """Read the mask of the last round."""
        from fedsparse.masks import Mask  # here, as above

        return Mask.load(self.folder / MASK)

    def metrics(self) -> Any:
        """Read ``metrics.csv``, one row a round: a pandas DataFrame where pandas is installed, else a list of dicts."""
        rows = read_rows(self.folder / METRICS)
        try:
            import pandas
        except ImportError:
            return rows
        return pandas.DataFrame(rows)


class Outcomes(list[Outcome]):
    """The runs of a sweep, a row each: what was swept, then the figures of ``summary.json``, and the run folder.

    A name that has both is what was swept: with ``sparsity=["s50", "s80"]`` the row's ``sparsity`` is the option.
    ``print`` shows a table of what was swept, accuracy, bytes, seconds and folder; ``frame()`` has every figure.

    Args:
        rows: of the runs.
        swept: names of what was swept.

    """

    def __init__(self, rows: Iterable[Outcome], swept: Sequence[str]) -> None:
        super().__init__(rows)
        self.swept = tuple(swept)

    def frame(self) -> Any:
        """Make a pandas DataFrame, a row a run.

        Raises:
            ValueError: pandas is not installed.

        """
        try:
            import pandas
        except ImportError:
            raise ValueError("frame() needs pandas: pip install pandas; the rows themselves are dicts") from None
        return pandas.DataFrame(self)

    def __str__(self) -> str:
        """Format the table."""
        from fedsparse.simulation.progress import human_bytes  # here, so that figures alone need no torch

        heads = sorted({headline_of(row) for row in self})
        lines = [[*self.swept, *heads, "bytes_total", "seconds", "folder"]]
        for row in self:
            accuracies = [f"{row[head]:.1%}" if head in row else "" for head in heads]
            figures = [*accuracies, human_bytes(row["bytes_total"]), f"{row['seconds']:.1f}"]
            lines.append([*(str(row[name]) for name in self.swept), *figures, short_path(row.folder)])
        *widths, _ = (max(map(len, column)) for column in zip(*lines, strict=True))
        aligned = [[cell.rjust(width) for cell, width in zip(line, widths, strict=False)] for line in lines]
        return "\n".join("  ".join([*cells, line[-1]]) for cells, line in zip(aligned, lines, strict=True))

    __repr__ = __str__


def typed(keys: Mapping[str, Any], above: str = "", sweeps: bool = False) -> Iterator[str]:
    """Write keywords as overrides; a mapping sets keys of a group.

    Args:
        keys: the keywords.
        above: of the group, with a dot at its end.
        sweeps: whether a list holds several values, one for each cell; a tuple is always one value, a list.

    Raises:
        ValueError: a list of values to sweep is empty.

    >>> list(typed({"mask_rule": "random", "federation": {"rounds": 3}, "head": {"frozen": True}}))
    ['mask_rule=random', 'federation.rounds=3', 'head.frozen=true']
    >>> list(typed({"seed": [0, 1], "model": {"hidden": (64, 32)}}, sweeps=True))
    ['seed=choice(0,1)', 'model.hidden=[64,32]']
    """
    for key, value in keys.items():
        if isinstance(value, Mapping):
            yield from typed(value, f"{above}{key}.", sweeps)
        elif sweeps and isinstance(value, list):
            if not value:
                raise ValueError(f"{above}{key}=[]: a sweep needs at least one value of it; an empty list is ()")
            yield f"{above}{key}=choice({','.join(map(_written, value))})"
        else:
            yield f"{above}{key}={_written(value)}"


def _written(value: Any) -> str:
    """Write a value in Hydra's grammar.

    >>> _written(None), _written([1, "a b"]), _written("x"), _written("")
    ('null', "[1,'a b']", 'x', "''")
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_written, value))}]"
    text = str(value)
    if not isinstance(value, str) or (text and all(c.isalnum() or c in "_-./:*" for c in text)):
        return text
    escaped = text.replace("'", "\\'")
    return f"'{escaped}'"
