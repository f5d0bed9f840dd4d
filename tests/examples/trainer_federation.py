"""The federation of ``plain_federation.py`` under a Lightning Trainer: an epoch is a round, a batch some cohorts."""

from functools import partial

import lightning
import torch

from fedsparse import ClientModule, Exchange, FederatedDataModule, FederatedRounds, Federation, ParamSpace, SparseSGDM
from fedsparse.data import LocalWork, RoundPlan, datasets, partition
from fedsparse.federation import server
from fedsparse.masks import top_fraction

if __name__ == "__main__":
    torch.manual_seed(0)
    data = datasets.digits()
    sample = partial(server.uniform, eligible=range(10), count=5, seed=0)
    parts = partition.iid(data.train.y, num_clients=10, seed=0)
    plan = RoundPlan(parts, LocalWork(batch_size=16, steps=10), sample)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    space = ParamSpace.of(net)
    mask = top_fraction(space.read(net).abs(), 0.5)

    module = ClientModule(net, space, mask, partial(SparseSGDM, lr=0.1))
    exchange = Exchange(mask, space.local)
    federate = partial(Federation, exchange=exchange, aggregation=server.WeightedMean(), topology=server.Flat())
    rounds = FederatedRounds(federate)
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_epochs=5, reload_dataloaders_every_n_epochs=1, callbacks=[rounds], **options)
    trainer.fit(module, FederatedDataModule(data, plan))
    accuracy = float((net(data.test.x).argmax(1) == data.test.y).double().mean())
    print(f"loss {rounds.loss:.3f}, accuracy {accuracy:.3f}")
