"""Topologies: the global row that each client starts from and is averaged into."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from fedsparse.core.checks import check_number, check_whole


class Topology(Protocol):
    """Groups of clients, each with one global row."""

    @property
    def groups(self) -> int:
        """Number of global rows G."""

    def group(self, clients: Sequence[int]) -> tuple[int, ...]:
        """Map K clients to the index (0 to G - 1) of their global row."""


class Flat:
    """One global row for all clients."""

    groups = 1

    def group(self, clients: Sequence[int]) -> tuple[int, ...]:
        """Map all clients to row 0."""
        return (0,) * len(clients)


class Departments:
    """Groups of clients with a global row each, or with several (``Regrouping`` assigns the clients to these).

    Args:
        of: department of each client, from 0; or the number of departments, which clients then make up in even blocks;
            None: each department is ``clients_per_department`` consecutive clients, the last one perhaps fewer.
        num_clients: number of clients.
        clients_per_department: of ``of`` None.
        clusters_within: groups of each department, of whose clients all begin in the first.

    Attributes:
        members: department of each client.
        number: of departments.
        within: groups of a department.
        groups: number of all groups.
        labels: group of each client within its department.

    Raises:
        ValueError: not one department for each client, or a department without a client.

    >>> Departments(2, 5).group([0, 2, 3, 4])
    (0, 0, 1, 1)
    >>> Departments(None, 5).members
    (0, 0, 0, 1, 1)
    """

    def __init__(
        self,
        of: int | Sequence[int] | None,
        num_clients: int,
        clients_per_department: int = 3,
        clusters_within: int = 1,
    ) -> None:
        check_whole("topology.clients_per_department", clients_per_department, 1)
        check_whole("topology.clusters_within", clusters_within, 1)
        if of is None:
            self.members = tuple(client // clients_per_department for client in range(num_clients))
        elif isinstance(of, int):
            check_number("topology.of", of, whole=True, least=1, most=num_clients)
            self.members = tuple(client * of // num_clients for client in range(num_clients))
        elif isinstance(of, str) or not isinstance(of, Sequence):
            raise ValueError(f"topology.of is {of!r}; it must be null, a number of departments, or one for each client")
        else:
            self.members = tuple(of)
            for department in self.members:
                check_whole("topology.of", department, 0)
        if len(self.members) != num_clients:
            raise ValueError(
                f"topology.of lists the departments of {len(self.members)} clients, and there are {num_clients} "
                "(federation.num_clients)"
            )
        self.number, self.within = max(self.members) + 1, clusters_within
        self.groups, self.labels = self.number * self.within, (0,) * num_clients
        if empty := sorted(set(range(self.number)) - set(self.members)):
            raise ValueError(f"topology.of gives department {empty[0]} no client; number them from 0 without a gap")

    def group(self, clients: Sequence[int]) -> tuple[int, ...]:
        """Map clients to the groups of their departments; padding rows, below 0, to group 0."""
        return tuple(self.members[c] * self.within + self.labels[c] if c >= 0 else 0 for c in clients)

    def assign(self, labels: Sequence[int]) -> None:
        """Move every client to a group of its department, from 0."""
        self.labels = tuple(labels)

    def empty(self) -> list[tuple[int, int]]:
        """List the groups without a client, each with the largest group of its department, of equals the first."""
        sizes = Counter(self.group(range(len(self.members))))
        found = list[tuple[int, int]]()
        for department in range(self.number):
            groups = range(department * self.within, (department + 1) * self.within)
            largest = max(groups, key=lambda group: sizes[group])
            found += [(group, largest) for group in groups if not sizes[group]]
        return found
