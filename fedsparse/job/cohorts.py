"""Finds the fastest size of cohorts, for ``federation.cohort=auto``."""

from __future__ import annotations

import logging

import torch

from fedsparse.federation.client.training import Clients, can_stack
from fedsparse.federation.exchange.update import Start
from fedsparse.job.parts import Assembly
from fedsparse.job.trial import obstacle
from fedsparse.models.copies import copied
from fedsparse.models.text_net import TextNet
from fedsparse.simulation.autotune import choose, largest, measure
from fedsparse.simulation.devices import fabric_of
from fedsparse.simulation.module import ClientModule

log = logging.getLogger("fedsparse")


def fastest(assembly: Assembly, module: ClientModule) -> int:
    """Find the fastest K by local steps on copies of the network, with the mask of ``module``."""
    problem, session, plan = assembly.problem, assembly.session, assembly.course.plan
    alone = isinstance(problem.net, TextNet) and not problem.net.stackable
    if alone or not can_stack(problem.net) or len(torch.as_tensor(module.bitmaps)):
        return 1
    fabric, split = fabric_of(session.accelerator, session.precision), problem.dataset.train

    def trial(cohort: int) -> Clients:
        tried = assembly.method.make_module(copied(problem.net), cohort).to(fabric.device).train()
        tried.set_mask(torch.as_tensor(module.mask))
        clients = tried.form()
        values = clients.subspace.of(clients.theta.detach()).clone()
        clients.start(Start(values, clients.lr, (0,) * cohort), range(cohort))
        return clients

    few = torch.arange(min(problem.batch_size, len(split.y)))
    batch = (split.x[few].to(fabric.device), split.y[few].to(fabric.device))
    if obstacle(module, problem.inputs(batch[0][:2]), batch[1][:2]):
        return 1
    clients = -(-len(plan.sample(0)) // plan.processes)
    with fabric.autocast():
        if fabric.device.type == "cuda":
            return largest(trial, batch, clients)
        seconds = measure(trial, batch, clients)
    log.info("federation.cohort=auto, ms a client and step: %s", {k: round(1e3 * s, 2) for k, s in seconds.items()})
    return choose(seconds)
