"""What ``run`` returns: the figures of a run, and ways to what it left in its folder; and overrides from keywords."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsparse.core.folder import MASK, METRICS
from fedsparse.core.rows import read_rows

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


def typed(keys: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """Write keywords as overrides; a mapping sets keys of a group.

    >>> list(typed({"mask_rule": "random", "federation": {"rounds": 3}, "head": {"frozen": True}}))
    ['mask_rule=random', 'federation.rounds=3', 'head.frozen=true']
    """
    for key, value in keys.items():
        if isinstance(value, Mapping):
            yield from typed(value, f"{above}{key}.")
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
