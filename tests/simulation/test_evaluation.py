"""Figures per client, against a loop over the clients."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsparse.simulation.evaluation import Evaluation, client_figures


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=25), st.integers(0, 99))
def test_accuracies_per_client_equal_a_loop(sizes, seed):
    """Clients share samples, and some have none."""
    rng = np.random.default_rng(seed)
    correct = rng.random(30) < 0.7
    tests = [rng.choice(30, size, replace=False) for size in sizes]
    figures = client_figures(correct[:, None], tests)
    each = sorted(sum(bool(correct[i]) for i in part) / len(part) for part in tests if len(part))
    if not each:
        assert figures == {}
        return
    worst = each[: max(1, len(each) // 10)]
    assert figures["client/acc_mean"] == pytest.approx(sum(each) / len(each))
    assert figures["client/acc_worst10"] == pytest.approx(sum(worst) / len(worst))
    spread = (sum((a - sum(each) / len(each)) ** 2 for a in each) / len(each)) ** 0.5
    assert figures["client/acc_std"] == pytest.approx(spread, abs=1e-12)


def test_figures_of_both_splits_and_of_clients_by_hand():
    """Two batches of the test split, whose last sample is a client's own: it counts for the client only."""
    told = {}
    module = SimpleNamespace(log_dict=lambda figures, **_: told.update(figures))
    evaluation = Evaluation([np.array([0, 1]), np.array([2]), np.array([]), np.array([0])], client_only=1)
    right, wrong = [0.0, 1.0], [1.0, 0.0]  # every label is 1

    def batch(*logits, losses):
        correct = torch.tensor(logits).argmax(1) == 1
        return {"correct": correct.unsqueeze(1), "losses": torch.tensor(losses).unsqueeze(1)}  # of one global model

    evaluation.on_validation_start(None, module)
    evaluation.on_validation_batch_end(None, None, batch(right, wrong, losses=[1.0, 3.0]), None, 0, 0)
    evaluation.on_validation_batch_end(None, None, batch(right, right, losses=[1.0, 2.0]), None, 0, 1)
    evaluation.on_validation_batch_end(None, None, batch(wrong, losses=[9.0]), None, 1, 1)
    evaluation.on_validation_epoch_end(None, module)
    assert told == evaluation.figures
    assert (told["val/acc"], told["val/loss"]) == (0.5, 2.0)
    assert (told["test/acc"], told["test/loss"]) == (1.0, 1.5)
    assert (told["client/acc_mean"], told["client/acc_worst10"]) == (2 / 3, 0.0)  # two of two, none of one, one of one


def test_each_client_has_the_accuracy_of_its_own_global_model_and_the_splits_the_mean_of_all():
    module = SimpleNamespace(log_dict=lambda figures, **_: None)
    tests = [np.array([0, 1]), np.array([0, 1]), np.array([1])]
    evaluation = Evaluation(tests, group=lambda clients: tuple(client % 2 for client in clients))
    right, wrong = [0.0, 1.0], [1.0, 0.0]  # every label is 1
    logits = torch.tensor([[right, wrong], [right, right]])  # the first model is right twice, the second once
    batch = {"correct": logits.argmax(2) == 1, "losses": torch.tensor([[1.0, 2.0], [3.0, 6.0]])}
    evaluation.on_validation_start(None, module)
    for split in (0, 1):
        evaluation.on_validation_batch_end(None, None, batch, None, 0, split)
    evaluation.on_validation_epoch_end(None, module)
    figures = evaluation.figures
    assert (figures["test/acc"], figures["test/loss"]) == (0.75, 3.0)
    assert figures["client/acc_mean"] == pytest.approx((1.0 + 0.5 + 1.0) / 3)
    assert figures["client/acc_worst10"] == 0.5


@pytest.mark.parametrize(("epoch", "every"), [(0, 5), (6, 5), (7, 1)])
def test_the_last_round_is_evaluated_whatever_eval_every_is(epoch, every):
    trainer = SimpleNamespace(current_epoch=epoch, max_epochs=8, check_val_every_n_epoch=5)
    Evaluation().on_train_epoch_start(trainer, None)
    assert trainer.check_val_every_n_epoch == every
