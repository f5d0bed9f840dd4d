"""What a GPU's host waits for and what it launches, counted on the pretended device."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import lightning
import pytest
import torch
from pretend import DEVICE, pretended
from torch.nn import functional as F

from fedsparse.bench.gpu.cases import small
from fedsparse.bench.gpu.federations import federation
from fedsparse.data.datamodule import FederatedDataModule


class Counting(lightning.Callback):
    """Notes the counts of the second round's cohorts, each from the end of the one before; stands behind the rounds."""

    def __init__(self, counts):
        self.counts, self.found = counts, []

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if trainer.current_epoch == 1 and index and not trainer.is_last_batch:
            self.found.append((Counter(self.counts.waits), Counter(self.counts.launches)))
        self.counts.clear()


def counted(case):
    with pretended() as counts:
        module, rounds = federation(case)
        counting = Counting(counts)

        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False)
        trainer = lightning.Trainer(
            max_epochs=2,
            accelerator="cpu",
            devices=1,
            callbacks=[rounds, counting],
            limit_val_batches=0,
            reload_dataloaders_every_n_epochs=1,
            **quiet,
        )
        trainer.fit(module, FederatedDataModule(case.data, case.plan(case.cohort), bundle=0.0))
    return counting.found


@pytest.mark.parametrize("changes", [{}, {"density": 0.2}, {"cohort": 2}], ids=str)
def test_a_cohort_costs_one_wait(changes):
    found = counted(replace(small("mlp", 6, 2), **changes))
    assert found
    for waits, _ in found:
        assert waits == {"transfer.py:read": 1}


def of_a_loop(net, steps=2):
    """Count the launches of a step of torch's own loop, its optimizer's apart, which torch fuses."""
    with pretended() as counts:
        net.to(DEVICE)
        x, y = torch.randn(32, 1, 8, 8, device=DEVICE), torch.zeros(32, dtype=torch.long, device=DEVICE)
        counts.clear()
        for _ in range(steps):
            net.zero_grad()
            F.cross_entropy(net(x), y).backward()
        return sum(counts.launches.values()) / steps


@pytest.mark.parametrize(("model", "most"), [("mlp", 16), ("vit_digits", 16)])
def test_a_masked_step_launches_little_more_than_forward_and_backward(model, most):
    case = replace(small(model, 3, 2), density=0.2)
    ours = min(sum(launches.values()) / case.steps for _, launches in counted(case))
    assert of_a_loop(case.net()) < ours <= of_a_loop(case.net()) + most
