"""What a client keeps between rounds: its local coordinates, allocated at the first write."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class ClientStore:
    """Rows of the coordinates that stay with each client, by client id."""

    def __init__(self) -> None:
        self.rows: dict[int, Tensor] = {}

    def read(self, clients: Sequence[int], default: Tensor) -> Tensor:
        """Kept rows (K, n) of K clients; ``default`` (K, n) where a client has none yet."""
        kept = [self.rows.get(client, default[k]).to(default.device) for k, client in enumerate(clients)]
        return torch.stack(kept)

    def write(self, clients: Sequence[int], rows: Tensor) -> None:
        """Keep rows (K, n) of K clients; a padding row (id below 0) is not kept."""
        self.rows |= {client: rows[k].detach().cpu().clone() for k, client in enumerate(clients) if client >= 0}

    def state_dict(self) -> dict[int, Tensor]:
        """Rows by client, for a checkpoint."""
        return dict(self.rows)

    def load_state_dict(self, state: dict[int, Tensor]) -> None:
        """Take the rows of a checkpoint."""
        self.rows = {int(client): row for client, row in state.items()}
