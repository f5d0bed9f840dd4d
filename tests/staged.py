"""Small federations of several phases, and a plain loop over a dense row for masks that change."""

from __future__ import annotations

from functools import partial

import torch
from plain_sparse import best, gradient
from small import Small, small_data, small_net, uneven_parts

from fedsparse.core.seeding import Purpose
from fedsparse.data.phased import PhasedPlan
from fedsparse.data.rounds import LocalWork, RoundPlan
from fedsparse.federation.exchange.ledger import Traffic
from fedsparse.federation.masking import MaskSchedule, zero
from fedsparse.federation.phases import Phases
from fedsparse.federation.server.sampling import uniform
from fedsparse.masks import Mask, Sparsity
from fedsparse.masks.rules import AutoFLIP


def staged(phases, rule=None, sparsity=None, net=None, explorers=7, start=None, **options):
    """A small federation of these phases; ``start`` is the first mask's row, everything by default."""
    small = Small(small_net() if net is None else net, small_data(), uneven_parts(), mask=start, **options)
    stages, plan = [], small.plan
    for phase in phases:
        work, sample, purpose = plan.work, plan.sample, Purpose.BATCHES
        if phase.local_steps or phase.local_epochs:
            work = LocalWork(8, phase.local_steps, phase.local_epochs, phase.weight or work.weight)
        if phase.explores:
            ids, purpose = range(len(small.parts)), Purpose.EXPLORE
            sample = partial(uniform, eligible=ids, count=explorers, seed=small.seed, purpose=Purpose.EXPLORERS)
        alone = phase.explores and phase.updates_model
        place = (small.processes, small.process)
        own = RoundPlan(plan.parts, work, sample, plan.bound, plan.seed, *place, purpose, alone)
        stages.append((phase.rounds, own, 0))  # one phase of each kind
    small.plan = PhasedPlan(stages, plan)
    small.given["phases"] = Phases(phases)
    row = torch.ones(small.space.size, dtype=torch.bool) if start is None else start
    rule, sparsity = AutoFLIP() if rule is None else rule, Sparsity(0.8) if sparsity is None else sparsity
    small.given["choice"] = MaskSchedule(rule, sparsity, small.space, small.seed, Mask.of(small.space, row))
    if sparsity.mode == "prune":
        zero(small.net, small.space, row)
    return small


def total(phases):
    return sum(phase.rounds for phase in phases)


def dealt(plan, round):
    """What a plan deals in a round: (client, batches, weight), in client order of the plan."""
    found = []
    for cohort in plan.cohorts(round):
        for row, client in cohort.members:
            counts = [step[row] for step in cohort.count]
            batches = [samples[:n].tolist() for samples, n in zip(cohort.samples[row], counts, strict=True) if n]
            found.append((client, batches, cohort.weight[row]))
    return found


def masks_by_round(small):
    """Record the mask that each round of a federation trains with, bool (P,), as its clients see it."""
    seen, start = [], small.rounds.on_train_epoch_start

    def spy(trainer, module):
        start(trainer, module)
        seen.append(module.clients.subspace.mask.clone())
        assert torch.equal(torch.as_tensor(module.mask), seen[-1])

    small.rounds.on_train_epoch_start = spy
    return seen


def entries_by_round(small):
    """Record what each client of a round sent and received, by the round from 0."""
    entries, traffic = {}, Traffic()
    write = traffic.write
    traffic.write = lambda round, rows: (entries.update({round - 1: list(rows)}), write(round, rows))
    small.given["traffic"] = traffic
    return entries


class DensePlain:
    """The whole of a run over rows of all P coordinates: what stops training is set to zero at once, by hand."""

    def __init__(self, small, prune=False, adam=None, server_momentum=0.0, fraction=None, scaffold=False, mu=0.0):
        size, like = small.space.size, small.row
        self.small, self.prune, self.adam, self.beta = small, prune, adam, server_momentum
        self.fraction, self.scaffold, self.mu = fraction, scaffold, mu
        self.row, self.mask = like.clone(), torch.ones(size, dtype=torch.bool)
        self.m, self.v, self.steps = torch.zeros_like(like), torch.zeros_like(like), 0
        self.left = {c: torch.zeros_like(like) for c in range(len(small.parts))}
        self.own = {c: torch.zeros_like(like) for c in range(len(small.parts))}
        self.common, self.memory = torch.zeros_like(like), None

    def remask(self, mask):
        """Let other coordinates train."""
        self.mask = mask
        for row in (self.m, self.v, self.common, *self.left.values(), *self.own.values()):
            row[~mask] = 0.0
        if self.prune:
            self.row[~mask] = 0.0

    def client(self, batches, more):
        """SGD with momentum and weight decay on what trains."""
        small, row, velocity = self.small, self.row.clone(), None
        for batch in batches:
            g = gradient(small.net, row, small.dataset.train.x, small.dataset.train.y, batch)
            g = torch.where(self.mask, g + more + small.weight_decay * row, 0.0)
            velocity = g if velocity is None else small.momentum * velocity + g
            row = row - small.lr * velocity
        return row - self.row

    def learn(self, clients):
        """One round of clients (client, batches, weight)."""
        mean, weights, kept = torch.zeros_like(self.row), sum(w for *_, w in clients), {}
        heard, signs = torch.zeros(len(self.row), dtype=torch.bool), torch.zeros_like(self.row)
        for client, batches, weight in clients:
            change = self.client(batches, self.common - self.own[client])
            if self.scaffold:
                kept[client] = self.own[client] - self.common - change / (self.small.lr * len(batches))
                kept[client][~self.mask] = 0.0
            sent = self.send(client, change)
            heard |= sent != 0
            mean += weight / weights * sent
            signs += weight / weights * sent.sign()
        for client, row in kept.items():
            self.common += (row - self.own[client]) / len(self.own)
            self.own[client] = row
        told = self.row * mean
        self.step(mean, heard)
        return told, signs

    def send(self, client, change):
        """With a fraction: the largest of change plus what was left, and the rest is left."""
        if self.fraction is None:
            return change
        wanted = torch.where(self.mask, change + self.left[client], 0.0)
        places = self.mask.nonzero().flatten().tolist()
        chosen = best([abs(wanted[i].item()) for i in places], self.fraction)
        sent = torch.zeros_like(wanted)
        for place in chosen:
            sent[places[place]] = wanted[places[place]]
        self.left[client] = wanted - sent
        return sent

    def step(self, mean, heard):
        """The server's step: Adam of torch with its bias correction, or momentum; unheard coordinates hold."""
        moves = self.mask if self.fraction is None else self.mask & heard
        if self.adam:
            self.steps += 1
            self.m = torch.where(self.mask, 0.9 * self.m + 0.1 * -mean, 0.0)
            self.v = torch.where(self.mask, 0.999 * self.v + 0.001 * mean**2, 0.0)
            m, v = self.m / (1 - 0.9**self.steps), self.v / (1 - 0.999**self.steps)
            step = -self.adam * m / (v.sqrt() + 1e-8)
        else:
            self.m = torch.where(self.mask, self.beta * self.m + mean, 0.0)
            step = self.m
        self.row = torch.where(moves, self.row + step, self.row)
