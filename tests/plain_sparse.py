"""Sparse federated averaging in plain loops, a coordinate at a time where it matters: oracles of the exchanges."""

from __future__ import annotations

import copy
import math

import torch
from torch.nn import functional as F


def gradient(net, row, x, y, batch):
    """Gradient of the mean loss of a batch at a flat row."""
    net = copy.deepcopy(net)
    torch.nn.utils.vector_to_parameters(row, net.parameters())
    grads = torch.autograd.grad(F.cross_entropy(net(x[batch]), y[batch]), list(net.parameters()))
    return torch.cat([g.flatten() for g in grads])


def train(net, row, data, batches, *, lr, momentum=0.0, mask=None, more=None):
    """SGD with momentum from a flat row; ``more(row)`` is added to each gradient."""
    velocity = None
    for batch in batches:
        g = gradient(net, row, data.x, data.y, batch)
        g = g if more is None else g + more(row)
        g = g if mask is None else torch.where(mask, g, 0.0)
        velocity = g if velocity is None else momentum * velocity + g
        row = row - lr * velocity
    return row


def rounds_of(small, dealt, new_row, **options):
    """Let all clients of each round train; ``new_row(row, [(client, weight, row after)])`` closes it."""
    row = small.row.clone()
    for r, clients in enumerate(dealt):
        ids = small.plan.sample(r)
        assert len(ids) == len(clients)
        after = [
            (c, weight, train(small.net, row, small.dataset.train, batches, **options))
            for c, (batches, weight) in zip(ids, clients, strict=True)
        ]
        row = new_row(row, after)
    return row


def best(scores, fraction):
    """Places of the floor(fraction * n + 0.5) largest, of equal ones the first."""
    k = max(1, math.floor(fraction * len(scores) + 0.5))
    return set(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k])


def top_change_mean(row, after, fraction, senders):
    """Each coordinate's mean change over those who sent it, or over all who took part."""
    total, changes = sum(weight for _, weight, _ in after), []
    for _, weight, new in after:
        change = (new - row).tolist()
        changes.append((weight, change, best([abs(c) for c in change], fraction)))
    moved = []
    for i, value in enumerate(row.tolist()):
        heard = [(w, c[i]) for w, c, sent in changes if i in sent]
        over = sum(w for w, _ in heard) if senders else total
        moved.append(value + sum(w * c for w, c in heard) / over if heard else value)
    return torch.tensor(moved, dtype=row.dtype)


def original_mean(row, after, fraction, sizes):
    """FL4Health's way: of a tensor, zeros for what a client did not send; its mean over who sent something of it."""
    wanted, sent = max(1, math.ceil(fraction * len(row))), []
    for _, weight, new in after:
        change, values = (new - row).abs().tolist(), new.tolist()
        least = sorted(change, reverse=True)[wanted - 1]
        sent.append((weight, [v if c >= least else 0.0 for c, v in zip(change, values, strict=True)]))
    moved, start = [], 0
    for size in sizes:
        part = slice(start, start + size)
        heard = [(w, values[part]) for w, values in sent if any(v != 0 for v in values[part])]
        total = sum(w for w, _ in heard)
        means = (
            [sum(w * values[i] for w, values in heard) / total for i in range(size)] if heard else row[part].tolist()
        )
        moved += means
        start += size
    return torch.tensor(moved, dtype=row.dtype)
