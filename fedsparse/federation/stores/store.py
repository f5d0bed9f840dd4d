"""What a client keeps between rounds: a row, allocated at its first write, in memory or in a memory-mapped file.

Shapes: K clients of the cohort, n values of a row.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fedsparse.core import files
from fedsparse.core.checks import check_choice
from fedsparse.core.subspace import Carry

KINDS = ("memory", "file")
Kept = dict[str, tuple[tuple[int, ...], Tensor]]  # by the store's name: client ids, and a row each
DTYPES = ("float16", "float32", "float64")
_FIRST = 16  # rows of a new file; it doubles when they are used up


class ClientStore(Protocol):
    """Rows by client id."""

    def get(self, client: int, default: Tensor) -> Tensor:
        """Kept row (n,) of a client, or the default where it has none."""

    def write(self, clients: Sequence[int], rows: Tensor) -> None:
        """Keep rows (K, n) of K clients; a padding row (id below 0) is not kept."""

    def move(self, carry: Carry) -> None:
        """Let every kept row (n,) follow a mask that changes."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to find the rows as they are now."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the rows of a checkpoint."""

    def saved(self) -> None:
        """Be told that a checkpoint to resume from, with the last state, is whole on the disk."""


@dataclass(frozen=True)
class Part:
    """Rows of some of the coordinates that train.

    Attributes:
        store: of the rows.
        marks: bool (P,), of which coordinates they are.

    """

    store: ClientStore
    marks: Tensor

    def move(self, carry: Carry) -> None:
        """Let the rows follow a mask that changes."""
        self.store.move(carry.within(self.marks))


def read(store: ClientStore, clients: Sequence[int], default: Tensor) -> Tensor:
    """Read rows (K, n) of K clients; ``default`` (K, n) where a client has none yet."""
    kept = [store.get(client, default[k]).to(default.device) for k, client in enumerate(clients)]
    return torch.stack(kept) if kept else default


class MemoryStore:
    """Rows in memory, and in every checkpoint."""

    def __init__(self) -> None:
        self.rows: dict[int, Tensor] = {}

    def get(self, client: int, default: Tensor) -> Tensor:
        """Kept row of a client."""
        return self.rows.get(client, default)

    def write(self, clients: Sequence[int], rows: Tensor) -> None:
        """Keep copies."""
        self.rows |= {client: rows[k].detach().cpu().clone() for k, client in enumerate(clients) if client >= 0}

    def move(self, carry: Carry) -> None:
        """Carry every row over."""
        self.rows = {client: carry(row) for client, row in self.rows.items()}

    def state_dict(self) -> dict[str, Any]:
        """All rows."""
        return {"rows": dict(self.rows)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the rows of a checkpoint."""
        self.rows = {int(client): row for client, row in state["rows"].items()}

    def saved(self) -> None:
        """Nothing to do: the checkpoint holds the rows."""


class FileStore:
    """Rows in a file beside the checkpoints, for states that do not fit in memory; a checkpoint says where they lie.

    A slot that one of the last two checkpoints refers to is not written again: the client's next row goes to another.
    So after a kill both still find their rows, and the file holds at most three for each client.

    Args:
        path: the file; it is made at the first write.

    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.slots: dict[int, int] = {}
        self.shape: tuple[int, int] = (0, 0)
        self.dtype = "float32"
        self.pinned: deque[list[int]] = deque([[], []], maxlen=2)
        self.locked: set[int] = set()  # the pinned slots: what a write must not touch
        self.free: list[int] = []
        self.file: Any = None  # both are opened with the first row
        self.rows: Any = None

    def get(self, client: int, default: Tensor) -> Tensor:
        """Copy of the kept row of a client."""
        slot = self.slots.get(client)
        return default if slot is None else torch.from_numpy(self.rows[slot].copy())

    def write(self, clients: Sequence[int], rows: Tensor) -> None:
        """Keep rows: in the client's own slot, or in another if a checkpoint refers to that."""
        for client, row in zip(clients, rows.detach().cpu(), strict=True):
            if client >= 0:
                slot = self.slots.get(client)
                self.slots[client] = self._new(row) if slot is None or slot in self.locked else slot
                self._put(self.slots[client], row.numpy())

    def _new(self, row: Tensor) -> int:
        """Take a free slot; the file grows if there is none."""
        if not self.free:
            before, self.dtype = self.shape[0], row.numpy().dtype.name
            self.shape = (max(_FIRST, 2 * before), len(row))
            self.free = list(range(self.shape[0] - 1, before - 1, -1))
            self._open()
        return self.free.pop()

    def _put(self, slot: int, row: np.ndarray) -> None:
        """Write a row through the file: written through the map, a full disk would end the process by a signal."""
        data = np.ascontiguousarray(row, dtype=self.dtype)
        files.put(self.file, slot * data.nbytes, data.data)

    def _length(self) -> int:
        """Bytes of a row."""
        return self.shape[1] * np.dtype(self.dtype).itemsize

    def _open(self) -> None:
        """Open the file, at its length of now, and map it; what was never written takes no room on the disk."""
        files.unshare(self.path)
        self.file = files.change(self.path, self.shape[0] * self._length())
        self.rows = np.memmap(self.path, dtype=self.dtype, mode="r", shape=self.shape)

    def move(self, carry: Carry) -> None:
        """Do nothing if no row is kept yet; the file's rows have one length.

        Raises:
            ValueError: there are rows.

        """
        if self.slots:
            raise ValueError("a mask that changes while clients keep something needs federation.store=memory")

    def state_dict(self) -> dict[str, Any]:
        """Where each client's row lies, and what the checkpoint before may refer to."""
        if self.slots:
            os.fsync(self.file.fileno())
        return {"slots": dict(self.slots), "shape": self.shape, "dtype": self.dtype, "before": list(self.pinned[-1])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Find the rows of a checkpoint again.

        Raises:
            ValueError: the file is not there, or cut off.

        """
        self.slots, self.shape, self.dtype = dict(state["slots"]), tuple(state["shape"]), state["dtype"]
        if self.dtype not in DTYPES:  # of objects the file would hold addresses
            raise ValueError(f"what the clients keep in {self.path} is of type {self.dtype!r}, not of {DTYPES}")
        self.pinned.extend([state["before"], list(self.slots.values())])
        if self.slots and not self.path.is_file():
            raise ValueError(f"{self.path} is missing: it holds what the clients keep between rounds")
        if self.slots and self.path.stat().st_size < (max(self.slots.values()) + 1) * self._length():
            raise ValueError(f"{self.path} is cut off: rows that the clients keep between rounds are not in it")
        if self.slots:
            self._open()
        self._release()

    def saved(self) -> None:
        """Pin the slots of the new checkpoint, and free those that only older ones refer to."""
        self.pinned.append(list(self.slots.values()))
        self._release()

    def _release(self) -> None:
        self.locked = {slot for slots in self.pinned for slot in slots}
        used = self.locked | set(self.slots.values())
        self.free = [slot for slot in range(self.shape[0] - 1, -1, -1) if slot not in used]


def make_store(kind: str, path: Path) -> ClientStore:
    """Make the store that ``federation.store`` names.

    Raises:
        ValueError: another name.

    """
    check_choice("federation.store", kind, *KINDS)
    return MemoryStore() if kind == "memory" else FileStore(path)
