"""How many clients train stacked: as typed, or measured."""

from __future__ import annotations

import logging

import lightning
import torch
from omegaconf import DictConfig

from fedsparse.core.precisions import HALF
from fedsparse.federation.client.training import Clients, can_stack
from fedsparse.federation.exchange.update import Start
from fedsparse.job.assemble import AUTO, Parts, build_module
from fedsparse.models.copies import copied
from fedsparse.simulation.autotune import choose, measure
from fedsparse.simulation.devices import accelerator
from fedsparse.simulation.module import ClientModule
from fedsparse.simulation.trial import obstacle

log = logging.getLogger("fedsparse")


def settle_cohort(cfg: DictConfig, federation: Parts, module: ClientModule, stored: int | None) -> None:
    """Fix the size of cohorts if ``federation.cohort=auto`` leaves it open.

    Args:
        cfg: the configuration.
        federation: data, model and clients; its plan deals cohorts of this size from now on.
        module: the clients, with their masks.
        stored: the size that the run began with, where it is resumed.

    """
    if cfg.federation.cohort != AUTO:
        return
    set_cohort(federation, module, stored or _fastest(cfg, federation, module))


def set_cohort(federation: Parts, module: ClientModule, bound: int) -> None:
    """Let at most so many clients train stacked."""
    federation.plan.bound = bound
    module.cohort = federation.cohort


def _fastest(cfg: DictConfig, federation: Parts, module: ClientModule) -> int:
    """Measure a local step with several sizes, on copies of the network."""
    if federation.dataset.tokens or not can_stack(federation.net) or len(torch.as_tensor(module.bitmaps)):
        return 1
    precision = None if cfg.trainer.precision == HALF else cfg.trainer.precision
    fabric = lightning.Fabric(accelerator=accelerator(cfg), devices=1, precision=precision)
    split, size = federation.dataset.train, cfg.data.batch_size

    def trial(cohort: int) -> Clients:
        tried = build_module(cfg, federation, copied(federation.net), cohort).to(fabric.device).train()
        tried.set_mask(torch.as_tensor(module.mask))
        clients = tried.form()
        values = clients.subspace.of(clients.theta.detach()).clone()
        clients.begin(Start(values, clients.lr, (0,) * cohort), range(cohort))
        return clients

    few = torch.arange(min(size, len(split.y)))
    batch = (split.x[few].to(fabric.device), split.y[few].to(fabric.device))
    if obstacle(module, federation.inputs(batch[0][:2]), batch[1][:2]):
        return 1
    with fabric.autocast():
        seconds = measure(trial, batch, -(-len(federation.plan.sample(0)) // federation.plan.processes))
    log.info("federation.cohort=auto, ms a client and step: %s", {k: round(1e3 * s, 2) for k, s in seconds.items()})
    return choose(seconds)
