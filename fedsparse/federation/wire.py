"""How a message looks on the wire: a fixed header, then values, then buffers; no pickle.

A payload keeps its values as tensors where they are and knows its exact lengths; ``messages`` writes the bytes. That
the lengths are those of the bytes is a test, so that a simulation need not copy every update to the host to count it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# magic, version, dtype code, reserved, number of values, number of buffer values, weight, mean loss
HEADER = struct.Struct("<4sBBHIIdd")
MAGIC, VERSION = b"FSPX", 1
DTYPES = {0: torch.float32, 1: torch.float64, 2: torch.float16, 3: torch.bfloat16}
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Payload:
    """What K clients send, or are sent.

    Attributes:
        clients: K ids, or K times -1 for what the server sends.
        values: (K, n) values in the order that both sides know.
        buffers: (K, Q) float buffers.
        weight: K weights.
        loss: K mean losses.

    """

    clients: tuple[int, ...]
    values: Tensor
    buffers: Tensor
    weight: tuple[float, ...]
    loss: tuple[float, ...]

    @property
    def length(self) -> int:
        """Bytes of one client's message; all K are equally long."""
        return HEADER.size + self.values[0].nbytes + self.buffers[0].nbytes

    def messages(self) -> list[bytes]:
        """Write each client's message as bytes."""
        return [self._message(k) for k in range(len(self.clients))]

    def _message(self, k: int) -> bytes:
        sizes = self.values.shape[1], self.buffers.shape[1]
        code = CODES[self.values.dtype]
        header = HEADER.pack(MAGIC, VERSION, code, 0, *sizes, self.weight[k], self.loss[k])
        return header + _to_bytes(self.values[k]) + _to_bytes(self.buffers[k])

    @classmethod
    def read(cls, messages: Sequence[bytes], clients: Sequence[int]) -> Payload:
        """Read the messages of K clients.

        Raises:
            ValueError: a message is damaged, of another version, or of another length than it says.

        """
        parts = [_read(message) for message in messages]
        return cls(
            clients=tuple(clients),
            values=torch.stack([values for values, _, _, _ in parts]),
            buffers=torch.stack([buffers for _, buffers, _, _ in parts]),
            weight=tuple(weight for _, _, weight, _ in parts),
            loss=tuple(loss for _, _, _, loss in parts),
        )


def _to_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _read(message: bytes) -> tuple[Tensor, Tensor, float, float]:
    """Check and split one message into values, buffers, weight and loss."""
    if len(message) < HEADER.size:
        raise ValueError(f"a message of {len(message)} bytes is shorter than its header of {HEADER.size}")
    magic, version, code, _, count, extra, weight, loss = HEADER.unpack_from(message)
    if magic != MAGIC or version != VERSION or code not in DTYPES:
        raise ValueError("not a fedsparse message, or one of another version")
    dtype = DTYPES[code]
    expected = HEADER.size + (count + extra) * dtype.itemsize
    if len(message) != expected:
        raise ValueError(f"a message says {expected} bytes and has {len(message)}")
    body = torch.from_numpy(np.frombuffer(message, dtype=np.uint8, offset=HEADER.size).copy()).view(dtype)
    return body[:count], body[count:], weight, loss
