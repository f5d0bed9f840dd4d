"""Flower's simulation with Ray: FedAvg over one worker of as many CPUs as the other runners have threads."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}  # before they are imported

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.common.serde import message_to_proto
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from fedsparse.bench.alone import main
from fedsparse.bench.loop import flat
from fedsparse.bench.memory import descendants
from fedsparse.bench.pairs import Feed, Trained
from fedsparse.bench.peers.flower_client import client
from fedsparse.bench.problems import CLIENTS, Task


class Strategy(FedAvg):
    """FedAvg that tells a feed when a round begins, and measures the last one's messages and workers.

    Attributes:
        bytes_up: serialised length of the last round's replies.
        elsewhere: peak memory of Ray's processes.

    """

    def __init__(self, feed: Feed, rounds: int) -> None:
        super().__init__(fraction_evaluate=0.0, min_train_nodes=CLIENTS, min_available_nodes=CLIENTS)
        self.feed, self.rounds = feed, rounds
        self.bytes_up = self.elsewhere = 0

    def configure_train(self, *arguments: Any) -> Iterable[Message]:
        """A round begins."""
        self.feed.tick()
        return super().configure_train(*arguments)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        """Look at the last replies, whose round does not count; then average."""
        replies = list(replies)
        if any(reply.has_error() for reply in replies) or len(replies) < CLIENTS:
            raise RuntimeError(f"Flower: {[r.error.reason for r in replies if r.has_error()] or 'replies are missing'}")
        if server_round == self.rounds:
            self.elsewhere = descendants()
            self.bytes_up = sum(message_to_proto(reply).ByteSize() for reply in replies)
        return super().aggregate_train(server_round, replies)


def train(task: Task, feed: Feed) -> Trained:
    """Run the simulation: messages through Flower's grid, clients in a Ray worker."""
    net, strategy, final = task.net(), Strategy(feed, task.rounds), {}
    (sgd, on), server = next(iter(feed.options.items())), ServerApp()
    config = {"model": task.problem.name, "threads": torch.get_num_threads(), "sgd": sgd, "on": on}

    def run(grid: Grid, context: Context) -> None:
        start = ArrayRecord(net.state_dict())
        final.update(strategy.start(grid, start, task.rounds, train_config=ConfigRecord(config)).arrays)

    server.main()(run)
    run_simulation(server, client, CLIENTS, backend_config=_resources(torch.get_num_threads()))
    tensors = [torch.from_numpy(final[name].numpy()) for name, _ in net.named_parameters()]
    return Trained(flat(tensors), strategy.bytes_up, strategy.elsewhere)


def _resources(cpus: int) -> dict[str, Any]:
    """As many CPUs as there are threads, and one worker that has them all."""
    init = {"num_cpus": cpus, "log_to_driver": False, "include_dashboard": False}
    return {"init_args": init, "client_resources": {"num_cpus": cpus, "num_gpus": 0.0}}


if __name__ == "__main__":
    main(train, sys.argv[1:], version("flwr"))
