"""Stores of one row a client between rounds, allocated at its first write, in memory or in a memory-mapped file.

Shapes: K clients of the cohort, n values of a row.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fedsparse.core import files
from fedsparse.core.checks import check_choice
from fedsparse.core.subspace import Carry
from fedsparse.core.transfer import on_device

KINDS = ("memory", "file")
Kept = dict[str, tuple[tuple[int, ...], Tensor]]  # by the store's name: client ids, and a row each
DTYPES = ("float16", "float32", "float64")
SHARE = 0.25  # of a GPU's memory, that the rows of one store may take
_FIRST = 16  # rows of a new file; it doubles when they are used up


class ClientStore(Protocol):
    """Rows by client id."""

    def get(self, client: int, default: Tensor) -> Tensor:
        """Read the row (n,) of a client, or the default if it has none."""

    def write(self, clients: Sequence[int], rows: Tensor) -> None:
        """Store rows (K, n) of K clients; a padding row (id below 0) is left out."""

    def move(self, carry: Carry) -> None:
        """Carry every row (n,) over to another mask."""

    def state_dict(self) -> dict[str, Any]:
        """State from which a checkpoint restores the rows as they are now."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the rows of a checkpoint."""

    def saved(self) -> None:
        """Release what no checkpoint needs, after one with the last ``state_dict`` is complete on the disk."""


@dataclass(frozen=True)
class Part:
    """Rows of some of the coordinates that train.

    Attributes:
        store: of the rows.
        marks: bool (P,), the coordinates of the rows.

    """

    store: ClientStore
    marks: Tensor

    def move(self, carry: Carry) -> None:
        """Carry the rows over to another mask."""
        self.store.move(carry.within(self.marks))


def read(store: ClientStore, clients: Sequence[int], default: Tensor) -> Tensor:
    """Read rows (K, n) of K clients; of ``default`` (K, n) where a client has none."""
    kept = [on_device(store.get(client, default[k]), default.device) for k, client in enumerate(clients)]
    return torch.stack(kept) if kept else default


class MemoryStore:
    """Rows in memory, on the device where they were computed while they fit there; every checkpoint contains them.

    Args:
        most: bytes that rows may take on another device than the CPU, which holds the others; None: a share of
            ``SHARE`` of a GPU's memory.

    """

    def __init__(self, most: int | None = None) -> None:
        self.rows: dict[int, Tensor] = {}
        self.most = most

    def get(self, client: int, default: Tensor) -> Tensor:
        """Read the row of a client."""
        return self.rows.get(client, default)

    def write(self, clients: Sequence[int], rows: Tensor) -> None:
        """Store copies where the rows are, or on the CPU if they do not fit there."""
        for client, row in zip(clients, rows.detach(), strict=True):
            if client >= 0:
                self.rows.pop(client, None)
                self.rows[client] = row.clone() if self._fits(row) else row.cpu().clone()

    def _fits(self, row: Tensor) -> bool:
        """Whether a row fits beside those that are on its device."""
        if row.device.type == "cpu":
            return True
        held = sum(other.nbytes for other in self.rows.values() if other.device == row.device)
        return held + row.nbytes <= (room(row.device) if self.most is None else self.most)

    def move(self, carry: Carry) -> None:
        """Carry every row over to another mask."""
        self.rows = {client: carry(row) for client, row in self.rows.items()}

    def state_dict(self) -> dict[str, Any]:
        """All rows, on the CPU."""
        return {"rows": {client: row.cpu() for client, row in self.rows.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the rows of a checkpoint."""
        self.rows = {int(client): row for client, row in state["rows"].items()}

    def saved(self) -> None:
        """Do nothing: the checkpoint contains the rows."""


class FileStore:
    """Rows in a file beside the checkpoints, for states that do not fit in memory; a checkpoint stores their slots.

    A slot that one of the last two checkpoints refers to is not overwritten: the client's next row goes to another.
    So both can be resumed from after a kill, and the file has at most three rows for each client.

    Args:
        path: the file, created at the first write.

    Attributes:
        slots: slot of each client's row.
        shape: rows and columns of the file.
        pinned: slots of the last two checkpoints.
        free: slots without a needed row.

    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.slots: dict[int, int] = {}
        self.shape: tuple[int, int] = (0, 0)
        self.dtype = "float32"
        self.pinned: deque[list[int]] = deque([[], []], maxlen=2)
        self.locked: set[int] = set()  # all pinned slots, which must not be overwritten
        self.free: list[int] = []
        self.file: Any = None  # both are opened with the first row
        self.rows: Any = None

    def get(self, client: int, default: Tensor) -> Tensor:
        """Read a copy of the row of a client."""
        slot = self.slots.get(client)
        return default if slot is None else torch.from_numpy(self.rows[slot].copy())

    def write(self, clients: Sequence[int], rows: Tensor) -> None:
        """Store rows: in the client's slot, or in a free one if a checkpoint refers to that slot."""
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
        """Write a row with a system call: a write through the map would end the process by a signal on a full disk."""
        data = np.ascontiguousarray(row, dtype=self.dtype)
        files.put(self.file, slot * data.nbytes, data.data)

    def _length(self) -> int:
        """Bytes of a row."""
        return self.shape[1] * np.dtype(self.dtype).itemsize

    def _open(self) -> None:
        """Open and map the file at its present length; rows that were never written take no space on the disk."""
        files.unshare(self.path)
        self.file = files.change(self.path, self.shape[0] * self._length())
        self.rows = np.memmap(self.path, dtype=self.dtype, mode="r", shape=self.shape)

    def move(self, carry: Carry) -> None:
        """Do nothing without rows; rows of a file have one length and cannot follow a mask.

        Raises:
            ValueError: there are rows.

        """
        if self.slots:
            raise ValueError("a mask that changes while clients keep something needs federation.store=memory")

    def state_dict(self) -> dict[str, Any]:
        """Flush the file; the slot of each client's row, and the slots that the previous checkpoint refers to."""
        if self.slots:
            os.fsync(self.file.fileno())
        return {"slots": dict(self.slots), "shape": self.shape, "dtype": self.dtype, "before": list(self.pinned[-1])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the slots of a checkpoint.

        Raises:
            ValueError: the file is missing or too short, or its dtype is none of ``DTYPES``.

        """
        self.slots, self.shape, self.dtype = dict(state["slots"]), tuple(state["shape"]), state["dtype"]
        if self.dtype not in DTYPES:  # a file of dtype object would be read as memory addresses
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
        """Pin the slots of the new checkpoint, and free those that neither it nor the one before refers to."""
        self.pinned.append(list(self.slots.values()))
        self._release()

    def _release(self) -> None:
        self.locked = {slot for slots in self.pinned for slot in slots}
        used = self.locked | set(self.slots.values())
        self.free = [slot for slot in range(self.shape[0] - 1, -1, -1) if slot not in used]


def room(device: torch.device) -> float:
    """Bytes that the rows of one store may take on a device: a share of a GPU's memory, all of another's.

    >>> room(torch.device("cpu"))
    inf
    """
    return SHARE * torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf


def make_store(kind: str, path: Path) -> ClientStore:
    """Build the store that ``federation.store`` names.

    Raises:
        ValueError: an unknown name.

    """
    check_choice("federation.store", kind, *KINDS)
    return MemoryStore() if kind == "memory" else FileStore(path)


def stored_rows(state: Mapping[str, Any], path: Path) -> dict[int, Tensor]:
    """Read all rows that a checkpoint's state of a store refers to, without changing the store's file.

    Args:
        state: of ``MemoryStore`` or ``FileStore``, of one of the last two checkpoints: older slots are overwritten.
        path: of the file store's file.

    Returns:
        Rows (n,) by client.

    Raises:
        ValueError: the file is missing or too short, or its dtype is none of ``DTYPES``.

    """
    if "rows" in state:
        return {int(client): row for client, row in state["rows"].items()}
    slots, shape, dtype = dict(state["slots"]), tuple(state["shape"]), state["dtype"]
    if not slots:
        return {}
    if dtype not in DTYPES:
        raise ValueError(f"what the clients keep in {path} is of type {dtype!r}, not of {DTYPES}")
    needed = (max(slots.values()) + 1) * shape[1] * np.dtype(dtype).itemsize
    if not path.is_file() or path.stat().st_size < needed:
        raise ValueError(f"{path} is missing or cut off: it holds what the clients keep between rounds")
    rows = np.memmap(path, dtype=dtype, mode="r", shape=(max(slots.values()) + 1, shape[1]))
    return {int(client): torch.from_numpy(rows[slot].copy()) for client, slot in slots.items()}
