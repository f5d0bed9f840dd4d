"""What ``trainer.precision`` may be, and the dtype that it means."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

DOUBLE, HALF = "64-true", "16-mixed"
PRECISIONS = ("32-true", DOUBLE, "bf16-mixed", HALF)


def dtype_of(precision: str) -> torch.dtype | None:
    """Find the dtype that network, rows and inputs are brought to; None leaves them as they are."""
    return torch.float64 if precision == DOUBLE else None


@contextmanager
def made_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Let a network that makes tensors in its forward make them in a dtype, as Lightning does while it trains."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
