"""The accuracies that count: on validation to choose rounds and runs by, on test to report first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# of the global model, and of the clients' own models, where something stays with the clients
ACCURACY, PERSONAL_ACCURACY, PERSONAL_LOSS = "val/acc", "val/personal_acc", "val/personal_loss"
TEST_ACCURACY, OWN_ACCURACY = "test/acc", "personal/acc_mean"


def monitor_of(*figures: Mapping[str, Any]) -> str:
    """Name the accuracy by which figures of rounds or runs compare: that of own models, where all have it.

    >>> monitor_of({"val/acc": 0.1, "val/personal_acc": 0.5}), monitor_of({"val/acc": 0.1})
    ('val/personal_acc', 'val/acc')
    """
    return PERSONAL_ACCURACY if all(PERSONAL_ACCURACY in each for each in figures) else ACCURACY


def headline_of(summary: Mapping[str, Any]) -> str:
    """Name the test accuracy of a run that counts: the mean over own models, where the global one lacks what stays.

    >>> headline_of({"test/acc": 0.0, "personal/acc_mean": 0.9}), headline_of({"test/acc": 0.9})
    ('personal/acc_mean', 'test/acc')
    """
    own = summary.get(OWN_ACCURACY)
    return TEST_ACCURACY if own is None or not isinstance(own, int | float) else OWN_ACCURACY
