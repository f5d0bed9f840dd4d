"""The values of ``trainer.precision``, and their dtypes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DOUBLE, HALF = "64-true", "16-mixed"
PRECISIONS = ("32-true", DOUBLE, "bf16-mixed", HALF)


def dtype_of(precision: str) -> torch.dtype | None:
    """Look up the dtype to which network, rows and inputs are converted; None for no conversion."""
    import torch  # here, so that the values are listed without it

    return torch.float64 if precision == DOUBLE else None


@contextmanager
def made_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Set torch's default dtype, for networks that create tensors in a forward, as Lightning does in training."""
    import torch  # here, so that the values are listed without it

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
