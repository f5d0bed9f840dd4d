"""Clusters of clients within departments: a client moves to the model of those whose last updates are like its own.

Shapes: G global rows, N clients, K of a cohort, P coordinates of which n train, M clients of a department.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsparse.core.checks import check_choice, check_whole
from fedsparse.core.seeding import Purpose, number
from fedsparse.federation.client.buffers import Buffers
from fedsparse.federation.clusters import METRICS, cluster, embed
from fedsparse.federation.exchange.update import Update
from fedsparse.federation.server.mixing import SEEDS, Comparison
from fedsparse.federation.server.server import Server
from fedsparse.federation.server.topology import Departments
from fedsparse.federation.stores.store import ClientStore, MemoryStore

log = logging.getLogger("fedsparse")
SENT = "client_sent"  # the store's name


class Regrouping:
    """Assigns the clients of each department to its groups, by k-means of what each sent last.

    In the first rounds each department has one model, which all of its clients train. When clients are assigned, its
    groups start from that model. Later assignments keep the groups' models, and a cluster takes the group with which it
    has the most clients in common. A client that has sent nothing yet is in the largest group of its department. A
    group without a client is a copy of the largest one, its optimizer's moments and float buffers included.

    Args:
        departments: which clients are together, and the number of groups of each department.
        comparison: of clients' models.
        of: what is compared; see ``ClusterMixing``.
        metric: ``cosine`` or ``euclidean``.
        every: rounds between two assignments.
        seed: the run's seed.

    Attributes:
        store: of each client the travelling coordinates of the model that it sent last.

    Raises:
        ValueError: an invalid option, or factors that are not in the rows.

    """

    def __init__(
        self,
        departments: Departments,
        comparison: Comparison,
        of: str = "BA",
        metric: str = "cosine",
        every: int = 1,
        seed: int = 0,
    ) -> None:
        comparison.check("topology.cluster_of", of)
        check_choice("topology.cluster_metric", metric, *METRICS)
        check_whole("topology.cluster_every", every, 1)
        self.departments, self.comparison, self.of, self.metric = departments, comparison, of, metric
        self.every, self.seed = every, seed
        self.store: ClientStore = MemoryStore()

    def keep_in(self, make: Callable[[str], ClientStore]) -> None:
        """Replace the store by the one that ``make`` builds by name."""
        self.store = make(SENT)

    def sent(self, server: Server, received: Update, group: Sequence[int]) -> Tensor:
        """Read the travelling coordinates (K, *) of the models that K clients of these groups have sent."""
        values = server.broadcast(group) + received.rows
        return values[:, server.subspace.of(self._travels(server))]

    def close(self, round: int, server: Server, buffers: Buffers) -> None:
        """Assign the clients after a round, from 0, where that is due; groups without a client are copies, as ever."""
        departments, before = self.departments, self.departments.labels
        self._fill(server, buffers)  # whose first clients are to begin with what this round has learned
        if (round + 1) % self.every == 0:
            labels = list(before)
            for department in range(departments.number):
                clients = [client for client, of in enumerate(departments.members) if of == department]
                for client, label in zip(clients, self._labels(clients, server, (round, department)), strict=True):
                    labels[client] = label
            departments.assign(labels)
            self._fill(server, buffers)
        if moved := sum(old != new for old, new in zip(before, departments.labels, strict=True)):
            log.info("round %d: %d clients go on with another model of their department", round + 1, moved)

    def _fill(self, server: Server, buffers: Buffers) -> None:
        """Copy the model of a department's largest group to those without a client."""
        for group, largest in self.departments.empty():
            server.copy(group, largest)
            buffers.copy(group, largest)

    def _labels(self, clients: Sequence[int], server: Server, ids: tuple[int, int]) -> list[int]:
        """Assign the clients of a department to its groups, from 0; ``ids`` key the random numbers of k-means."""
        present, nothing = [self.departments.labels[client] for client in clients], torch.zeros(0)
        held = [self.store.get(client, nothing) for client in clients]
        seen = [place for place, values in enumerate(held) if len(values)]
        if len(seen) < 2:
            return present
        rows = server.rows[0].cpu().repeat(len(seen), 1)  # what does not train or travel is compared as equal
        rows[:, self._travels(server).cpu()] = torch.stack([held[place].cpu() for place in seen])
        points = embed(self.comparison.gram(self.of, rows), self.metric)
        k = min(self.departments.within, len(seen))
        found = cluster(points, k=k, seed=number(self.seed, Purpose.CLUSTERS, *ids) % SEEDS).labels
        labels = matched(found, [present[place] for place in seen], self.departments.within)
        known = dict(zip(seen, labels, strict=True))
        return [known.get(place, most(labels)) for place in range(len(clients))]

    def _travels(self, server: Server) -> Tensor:
        """Mark the coordinates that train and travel, bool (P,)."""
        mask = server.subspace.mask
        return mask & ~self.comparison.factors.space.local.to(mask.device)

    def state_dict(self) -> dict[str, Any]:
        """The group of each client within its department."""
        return {"labels": list(self.departments.labels)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the assignment of a checkpoint."""
        self.departments.assign(state["labels"])


def matched(found: Sequence[int], present: Sequence[int], groups: int) -> list[int]:
    """Number clusters by groups, each by the one with which it has the most clients in common (Kuhn 1955).

    Args:
        found: cluster of each of M clients.
        present: group of each.
        groups: number of groups, at least that of clusters.

    >>> matched([0, 0, 1, 1, 1], [1, 1, 1, 0, 0], groups=2)
    [1, 1, 0, 0, 0]
    """
    from scipy.optimize import linear_sum_assignment  # here, as few runs need it

    common = np.zeros((max(found) + 1, groups))
    np.add.at(common, (list(found), list(present)), 1)
    group_of = linear_sum_assignment(common, maximize=True)[1].tolist()
    return [group_of[label] for label in found]


def most(labels: Sequence[int]) -> int:
    """Find the most frequent label, of equals the lowest.

    >>> most([2, 1, 1, 2, 0])
    1
    """
    return int(np.bincount(labels).argmax())
