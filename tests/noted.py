"""What each client ended each round with, noted while a run trains."""

from __future__ import annotations

from contextlib import contextmanager

from fedsparse.federation.client.training import Clients


@contextmanager
def noted(monkeypatch):
    """Note the values (n,) of every client by (round, client)."""
    train, values = Clients.train, {}

    def of(self, start, cohort):
        update = train(self, start, cohort)
        values.update({(cohort.round, client): update.values[k].clone() for k, client in enumerate(cohort.clients)})
        return update

    with monkeypatch.context() as patch:
        patch.setattr(Clients, "train", of)
        yield values
