"""A small federation without Hydra, in the dtype a test asks for."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lightning
import numpy as np
import torch
from torch import nn

from fedsparse.core.space import ParamSpace
from fedsparse.data.datamodule import FederatedDataModule
from fedsparse.data.datasets import Dataset, Split
from fedsparse.data.rounds import LocalWork, RoundPlan
from fedsparse.federation.client.drift import NoCorrection
from fedsparse.federation.exchange.exchange import Exchange
from fedsparse.federation.federation import Federation
from fedsparse.federation.phases import Phase, Phases
from fedsparse.federation.schedule import constant
from fedsparse.federation.server.aggregation import WeightedMean
from fedsparse.federation.server.sampling import uniform
from fedsparse.federation.server.topology import Flat
from fedsparse.federation.watcher import Watcher
from fedsparse.optim.sgdm import SparseSGDM
from fedsparse.simulation.callback import FederatedRounds
from fedsparse.simulation.module import ClientModule


def small_net(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def small_data(n=150, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n + 60, 1, 3, 4, generator=g, dtype=torch.float64).to(dtype)
    y = (x.flatten(1)[:, :3] + 0.3 * torch.randn(n + 60, 3, generator=g, dtype=torch.float64).to(dtype)).argmax(1)
    cut = [Split(x[a:b], y[a:b]) for a, b in ((0, n), (n, n + 30), (n + 30, n + 60))]
    return Dataset(*cut, classes=3, name="small")


def uneven_parts(n=150, clients=7):
    """Parts of different sizes, so that steps are ragged."""
    edges = np.cumsum(np.arange(1, clients + 1) ** 1.5)
    edges = np.concatenate([[0], np.floor(edges / edges[-1] * n)]).astype(int)
    return [np.arange(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]


class Ending(Watcher):
    """Calls a function with each round that ends: the server has stepped, and the network shows the new model."""

    def __init__(self, see):
        self.see = see

    def close(self, round, reports, change):
        self.see(round)


@dataclass
class Small:
    """One federation; ``fit`` runs it."""

    net: nn.Module
    dataset: Dataset
    parts: list[np.ndarray]
    work: LocalWork = field(default_factory=lambda: LocalWork(8, 3, None))
    count: int = 5
    cohort: int = 1
    mask: torch.Tensor | None = None
    exchange: Any = Exchange
    aggregation: Any = WeightedMean
    objective: Any = NoCorrection
    untouched: str = "hold"
    lr: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 0.0
    make: Any = None  # builds another optimizer of the clients than SparseSGDM
    clip: float | None = None
    server: Any = partial(torch.optim.SGD, lr=1.0)
    schedule: Any = constant
    buffers: str = "average"
    compile: bool = False
    space: ParamSpace | None = None
    processes: int = 1
    process: int = 0
    seed: int = 0
    client: Any = ClientModule
    topology: Any = field(default_factory=Flat)
    callbacks: list = field(default_factory=list)
    data: dict = field(default_factory=dict)

    def __post_init__(self):
        sample = partial(uniform, eligible=range(len(self.parts)), count=self.count, seed=self.seed)
        self.plan = RoundPlan(self.parts, self.work, sample, self.cohort, self.seed, self.processes, self.process)
        self.space = self.space or ParamSpace.of(self.net)
        row = torch.ones(self.space.size, dtype=torch.bool) if self.mask is None else self.mask
        sgdm = partial(SparseSGDM, momentum=self.momentum, weight_decay=self.weight_decay)
        make = partial(self.make or sgdm, lr=self.lr)
        self.module = self.client(
            self.net,
            self.space,
            row,
            make,
            cohort=self.plan.cohort_size(self.count),
            clip_norm=self.clip,
            compile=self.compile,
            objective=self.objective(),
            buffers=self.buffers,
            seed=self.seed,
        )
        self.given = {
            "exchange": self.exchange(trained=row, local=self.space.local, space=self.space),
            "aggregation": self.aggregation(),
            "topology": self.topology,
            "make_server": self.server,
            "untouched": self.untouched,
            "schedule": self.schedule,
        }  # as keywords of the federation
        self.rounds = FederatedRounds(lambda clients: Federation(clients, **self.given))

    @property
    def federation(self):
        return self.rounds.federation

    def once_made(self, change):
        """Call ``change(federation)`` when the federation is made, before the first round."""
        make = self.rounds.federate

        def federate(clients):
            federation = make(clients)
            change(federation)
            return federation

        self.rounds.federate = federate

    def after_rounds(self, see):
        """Call ``see(round)`` when a round ends."""
        self.given.setdefault("watchers", []).append(Ending(see))

    def fit(self, rounds, folder, **options):
        self.given.setdefault("phases", Phases([Phase("learn", rounds=rounds)]))
        trainer = lightning.Trainer(
            max_epochs=rounds,
            accelerator="cpu",
            logger=False,
            callbacks=[self.rounds, *self.callbacks],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            reload_dataloaders_every_n_epochs=1,
            use_distributed_sampler=False,
            default_root_dir=folder,
            **options,
        )
        trainer.fit(self.module, FederatedDataModule(self.dataset, self.plan, **self.data))
        self.trainer = trainer
        return self

    @property
    def row(self):
        return self.space.read(self.net)
