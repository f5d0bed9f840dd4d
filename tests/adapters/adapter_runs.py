"""Short runs with adapters on the digits."""

from __future__ import annotations

from fedsparse import run

SHORT = ["logger=csv", "pictures=false", "calibration.cache=null", "calibration.head_steps=1", "model=vit_digits"]
SHORT += ["federation.num_clients=4", "federation.clients_per_round=3", "federation.local_steps=2", "optimizer.lr=0.3"]
SHORT += ["federation.cohort=1", "lora.dropout=0.0", "lora.r=4"]
DEPARTMENTS = ["method=fedsa", "topology=departments", "topology.of=2", "federation.rounds=2"]


def trained(folder, *options):
    return run([*SHORT, *options, f"hydra.run.dir={folder}"])
