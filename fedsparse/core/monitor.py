"""The validation accuracy that chooses: the best round of a run, when it stops early, and the best of several runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# of the global model, and of the clients' own models, where something stays with the clients
ACCURACY, PERSONAL_ACCURACY, PERSONAL_LOSS = "val/acc", "val/personal_acc", "val/personal_loss"


def monitor_of(*figures: Mapping[str, Any]) -> str:
    """Name the accuracy by which figures of rounds or runs compare: that of own models, where all have it.

    >>> monitor_of({"val/acc": 0.1, "val/personal_acc": 0.5}), monitor_of({"val/acc": 0.1})
    ('val/personal_acc', 'val/acc')
    """
    return PERSONAL_ACCURACY if all(PERSONAL_ACCURACY in each for each in figures) else ACCURACY
