"""Figures per client, against a loop over the clients."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsparse.federation.evaluation import client_figures


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=25), st.integers(0, 99))
def test_accuracies_per_client_equal_a_loop(sizes, seed):
    """Clients share samples, and some have none."""
    rng = np.random.default_rng(seed)
    correct = rng.random(30) < 0.7
    tests = [rng.choice(30, size, replace=False) for size in sizes]
    figures = client_figures(correct, tests)
    each = sorted(sum(bool(correct[i]) for i in part) / len(part) for part in tests if len(part))
    if not each:
        assert figures == {}
        return
    worst = each[: max(1, len(each) // 10)]
    assert figures["client/acc_mean"] == pytest.approx(sum(each) / len(each))
    assert figures["client/acc_worst10"] == pytest.approx(sum(worst) / len(worst))
    spread = (sum((a - sum(each) / len(each)) ** 2 for a in each) / len(each)) ** 0.5
    assert figures["client/acc_std"] == pytest.approx(spread, abs=1e-12)
