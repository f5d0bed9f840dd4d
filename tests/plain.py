"""A plain-Python FedAvg of forty lines: the oracle of the federation. No vmap, no Lightning, no rows."""

from __future__ import annotations

import copy

import torch
from torch.nn import functional as F


def plain_fedavg(net, x, y, rounds, *, lr, momentum=0.0, weight_decay=0.0, clip=None, masks=None, server_momentum=0.0):
    """FedAvg of state dicts, written down as the paper does.

    Args:
        net: the starting network, left alone.
        x, y: all training samples.
        rounds: per round a list of (batches, weight), one for each client; batches is a list of index lists.
        masks: name -> bool tensor, True where a coordinate trains; None for dense.

    Returns:
        the global network, and the mean loss of each round.
    """
    net, losses = copy.deepcopy(net), []
    velocity = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for clients in rounds:
        total = sum(weight for _, weight in clients)
        mean = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
        loss_sum = 0.0
        for batches, weight in clients:
            client, buffers, seen, loss_here = copy.deepcopy(net), {}, 0, 0.0
            for batch in batches:
                loss = F.cross_entropy(client(x[batch]), y[batch])
                gradients = torch.autograd.grad(loss, list(client.parameters()))
                loss_here, seen = loss_here + loss.item() * len(batch), seen + len(batch)
                grads = dict(zip([n for n, _ in client.named_parameters()], gradients, strict=True))
                if masks:
                    grads = {n: torch.where(masks[n], g, 0.0) for n, g in grads.items()}
                if clip:
                    norm = sum(float((g**2).sum()) for g in grads.values()) ** 0.5
                    grads = {n: g * min(1.0, clip / (norm + 1e-6)) for n, g in grads.items()}
                with torch.no_grad():
                    for n, p in client.named_parameters():
                        d = grads[n] + weight_decay * p
                        if masks:
                            d = torch.where(masks[n], d, 0.0)
                        buffers[n] = d if n not in buffers else momentum * buffers[n] + d
                        p -= lr * buffers[n]
            loss_sum += weight * loss_here / seen
            for n, p in client.named_parameters():
                mean[n] += weight * p.detach() / total
        losses.append(loss_sum / total)
        with torch.no_grad():
            for n, p in net.named_parameters():
                velocity[n] = server_momentum * velocity[n] + (mean[n] - p)
                p += velocity[n]
    return net, losses


def replay(plan, rounds):
    """What a RoundPlan dealt, as plain lists for ``plain_fedavg``."""
    dealt = []
    for r in range(rounds):
        clients = []
        for cohort in plan.cohorts(r):
            for row, _ in cohort.members:
                steps = [
                    samples[:n].tolist()
                    for samples, n in zip(cohort.samples[row], [c[row] for c in cohort.count], strict=True)
                    if n
                ]
                clients.append((steps, cohort.weight[row]))
        dealt.append(clients)
    return dealt
