"""Rows after every so many rounds, written into the run folder: what a landscape is drawn through.

Shapes: R rows of P coordinates.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedsparse.core import files, parallel
from fedsparse.core.checks import check_choice, check_flag, check_number, check_whole
from fedsparse.federation.exchange.update import Update
from fedsparse.federation.reports import Report
from fedsparse.federation.server.aggregation import Change
from fedsparse.federation.watcher import Watcher
from fedsparse.models.pathnorm import path_norm

if TYPE_CHECKING:
    from fedsparse.federation.round import Round

DTYPES = {"float32": (torch.float32, "F32"), "float16": (torch.float16, "F16")}


class Trajectory(Watcher):
    """Writes the first global row and that after every ``every`` rounds to a safetensors file (``conf/trajectory``).

    The file has room for all rounds when it is made, and a row is written in place: so a round costs one row, whatever
    the number of rounds. ``rounds`` says which rows are there, -1 where none is yet; it is written after the row.

    Args:
        path: the file; None writes nothing, as in all but the first of several processes.
        total: rounds of the run.
        every: rounds between two rows.
        dtype: ``float32``, or ``float16`` at half the size, from which no client can be trained again exactly.
        clients: ids of those whose row after training is kept too, in a file each, after the rounds in which they take
            part: of clients that keep something between rounds, which are not trained again from a global row.
        path_norm: whether the path norm of the global model is computed after every round, for the log.
        population: number of clients; None: unknown.
        shape: of a sample as the network takes it, for the path norm.

    Attributes:
        trained: rows of this round, by client.
        norm: the path norm after the last round; None without.

    Raises:
        ValueError: an option out of range.

    """

    def __init__(
        self,
        path: Path | None,
        total: int,
        every: int = 1,
        dtype: str = "float32",
        clients: Sequence[int] = (),
        path_norm: bool = False,
        *,
        population: int | None = None,
        shape: Sequence[int] = (),
    ) -> None:
        check_whole("trajectory.every", every, 1)
        check_choice("trajectory.dtype", dtype, *DTYPES)
        check_flag("trajectory.path_norm", path_norm)
        if isinstance(clients, str) or not isinstance(clients, Sequence):
            raise ValueError(f"trajectory.clients is {clients!r}; it must be a list of clients, such as [0,3]")
        for client in clients:
            check_number("trajectory.clients", client, whole=True, least=0, most=population and population - 1)
        self.path, self.total, self.every, self.clients = path, total, every, frozenset(clients)
        self.path_norm, self.shape = path_norm, tuple(shape)
        self.dtype, self.word = DTYPES[dtype]
        self.trained: dict[int, Tensor] = {}
        self.norm: float | None = None

    def open(self, round: Round) -> None:
        """Write the row that the first round starts from.

        Raises:
            ValueError: several global models, or one without a path norm.

        """
        self.trained = {}
        if round.number == 0:
            if len(round.federation.server.rows) > 1:
                raise ValueError("trajectory=global needs one global model; set topology=flat, or trajectory=none")
            self._measure(round)
            self._write(self.path, 0, round.federation.server.rows[0])

    def receive(self, round: Round, trained: Update, received: Update) -> None:
        """Take the rows of the clients that are kept, where they are due."""
        server = round.federation.server
        for client, values in zip(trained.clients, trained.values if trained.values is not None else (), strict=False):
            if client in self.clients and self._due(round):
                self.trained[client] = server.rows[0].clone()
                server.subspace.write(self.trained[client], values)

    def close(self, round: Round, reports: Sequence[Report], change: Change) -> None:
        """Write the rows of a closed round that is due, and measure the model."""
        self._measure(round)
        everyone = parallel.gather(self.trained) if self.clients else []
        if self._due(round):
            self._write(self.path, round.number + 1, round.federation.server.rows[0])
        for client, row in (pair for part in everyone for pair in part.items()):
            self._write(self.path and client_file(self.path, client), round.number + 1, row)

    def figures(self) -> dict[str, float]:
        """Give the path norm after the last closed round."""
        return {} if self.norm is None else {"path_norm": self.norm}

    def _due(self, round: Round) -> bool:
        return (round.number + 1) % self.every == 0

    def _measure(self, round: Round) -> None:
        """Compute the path norm of the global model.

        Raises:
            ValueError: the model has none.

        """
        if self.path_norm:
            try:
                self.norm = path_norm(round.federation.clients.net, self.shape)
            except ValueError as error:
                raise ValueError(f"{error}; set trajectory.path_norm=false") from error

    def _write(self, path: Path | None, closed: int, row: Tensor) -> None:
        """Write the row (P,) after so many closed rounds to its place, and then that it is there."""
        if path is None:
            return
        values, place = row.detach().to("cpu", self.dtype).numpy(), closed // self.every
        layout = Layout(1 + self.total // self.every, values.size, self.word, values.itemsize)
        if not path.exists() or not layout.fits(path):
            _make(path, layout)
        with files.named(path), path.open("r+b") as file:
            file.seek(layout.rows_at + place * values.nbytes)
            file.write(values.tobytes())
            file.flush()
            file.seek(layout.rounds_at + 8 * place)
            file.write(struct.pack("<q", closed))


def client_file(path: Path, client: int) -> Path:
    """Name the file of a client's rows, beside that of the global ones.

    >>> client_file(Path("trajectory.safetensors"), 3).name
    'trajectory.client_3.safetensors'
    """
    return path.with_name(f"{path.stem}.client_{client}{path.suffix}")


@dataclass(frozen=True)
class Layout:
    """Where what lies in the file: a header, R int64 numbers of rounds, R rows of P values.

    Attributes:
        count: R.
        size: P.
        word: of the values' dtype, as safetensors calls it.
        width: bytes of a value.

    """

    count: int
    size: int
    word: str
    width: int

    @property
    def header(self) -> bytes:
        """Length and JSON of a safetensors file."""
        first, last = 8 * self.count, 8 * self.count + self.count * self.size * self.width
        named = {
            "rounds": {"dtype": "I64", "shape": [self.count], "data_offsets": [0, first]},
            "rows": {"dtype": self.word, "shape": [self.count, self.size], "data_offsets": [first, last]},
        }
        text = json.dumps(named, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    @property
    def rounds_at(self) -> int:
        """Offset of the numbers of rounds."""
        return len(self.header)

    @property
    def rows_at(self) -> int:
        """Offset of the rows."""
        return self.rounds_at + 8 * self.count

    def fits(self, path: Path) -> bool:
        """Whether a file is laid out so."""
        with path.open("rb") as file:
            return file.read(len(self.header)) == self.header


def _make(path: Path, layout: Layout) -> None:
    """Make a file without rows, or with those of before, where a resumed run was given more rounds.

    The file is written beside its target, so that a kill leaves the one of before; where nothing is written yet the
    system keeps no bytes of it.
    """
    known = read_rounds(path) if path.exists() else []
    rounds = np.array([*known, *[-1] * (layout.count - len(known))], dtype=np.int64)

    def content(file: Any) -> None:
        file.write(layout.header + rounds.tobytes())
        for closed in known:
            file.write(read_row(path, closed).numpy().tobytes())
        os.ftruncate(file.fileno(), layout.rows_at + layout.count * layout.size * layout.width)

    files.write(path, content)


def read_rounds(path: Path) -> list[int]:
    """List the numbers of closed rounds whose row is in the file, ascending; 0 is the start of the first round.

    Raises:
        ValueError: the file is damaged.

    """
    return [closed for closed in _numbers(path) if closed >= 0]


def read_row(path: Path, closed: int) -> Tensor:
    """Read the global row (P,) after so many closed rounds.

    Raises:
        ValueError: it was not kept, or the file is damaged.

    """
    rounds = _numbers(path)
    if closed not in rounds:
        kept = ", ".join(str(number) for number in rounds if number >= 0)
        raise ValueError(f"{path} holds no row after {closed} rounds; it holds those after {kept}")
    with safe_open(path, "pt") as file:
        row: Tensor = file.get_slice("rows")[rounds.index(closed)]
    return row


def _numbers(path: Path) -> list[int]:
    """Read the number of closed rounds of each row, -1 where none is yet."""
    try:
        with safe_open(path, "pt") as file:
            numbers: list[int] = file.get_tensor("rounds").tolist()
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the trajectory {path} is damaged ({type(error).__name__}); remove it") from error
    return numbers
