"""Flower's client; a module of its own, so that Ray's workers import it and keep what it caches."""

from __future__ import annotations

from functools import lru_cache

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn
from torch.nn import functional as F

from fedsparse.bench.problems import LR, MOMENTUM, PROBLEMS, Batches, Task

client = ClientApp()


@lru_cache(maxsize=1)
def _prepared(model: str, threads: int) -> tuple[Task, nn.Module]:
    """Build data and network once a worker."""
    torch.set_num_threads(threads)
    task = Task(PROBLEMS[model], 1)
    return task, task.net().train()


@lru_cache(maxsize=1)
def _batches(task: Task, round: int) -> Batches:
    """Gather a round's batches once a worker."""
    return task.batches(round)


def train(message: Message, context: Context) -> Message:
    """Train one client from the weights of the message, and send its own back."""
    config = message.content["config"]
    task, net = _prepared(config["model"], config["threads"])
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    options = {config["sgd"]: config["on"]}
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=MOMENTUM, **options)
    for x, y in _batches(task, config["server-round"] - 1)[context.node_config["partition-id"]]:
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    records = {"arrays": ArrayRecord(net.state_dict()), "metrics": MetricRecord({"num-examples": 1})}
    return Message(content=RecordDict(records), reply_to=message)


client.train()(train)
