"""A federation of plain objects, without Hydra and without a Trainer: ten clients, half of the weights train."""

from functools import partial

import torch
from torch.nn.functional import cross_entropy

from fedsparse import Clients, Exchange, Federation, ParamSpace, SparseSGDM
from fedsparse.data import LocalWork, RoundPlan, datasets, partition
from fedsparse.federation import play, server
from fedsparse.masks import top_fraction

if __name__ == "__main__":
    torch.manual_seed(0)
    data = datasets.digits()
    x, y = data.train.x, data.train.y
    sample = partial(server.uniform, eligible=range(10), count=5, seed=0)
    plan = RoundPlan(partition.iid(y, num_clients=10, seed=0), LocalWork(batch_size=16, steps=10), sample)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    space = ParamSpace.of(net)
    mask = top_fraction(space.read(net).abs(), 0.5)

    def losses(forward, x, y):
        return cross_entropy(forward(x), y, reduction="none")

    def fetch(cohort):
        return x[cohort.samples], y[cohort.samples]

    clients = Clients(net, space, mask, partial(SparseSGDM, lr=0.1), losses, fetch)
    federation = Federation(clients, Exchange(mask, space.local), server.WeightedMean(), server.Flat())
    for number in range(5):
        loss = play(federation, clients, plan.cohorts(number), number)
        accuracy = float((net(data.test.x).argmax(1) == data.test.y).double().mean())
        print(f"round {number + 1}: loss {loss:.3f}, accuracy {accuracy:.3f}")
