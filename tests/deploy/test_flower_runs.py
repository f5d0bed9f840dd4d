"""Whole runs over Flower, against the simulator: one is stopped, a node is killed, and it goes on to the same bits."""

from __future__ import annotations

import json
import signal

import pytest
from fleets import Commands, free_port, needs_flower

pytestmark = [pytest.mark.slow, pytest.mark.soak, needs_flower]
RUN = [
    *("model=mlp", "data=digits", "mask_rule=dense", "head.init=random", "logger=csv", "pictures=false"),
    *("calibration.cache=null", "federation.num_clients=2", "federation.clients_per_round=1.0", "federation.rounds=40"),
    *(
        "federation.local_steps=2",
        "federation.cohort=1",
        "exchange=topk",
        "exchange.fraction=0.1",
        "exchange.feedback=1.0",
    ),
    *("aggregation=coordinate_mean", "aggregation.denominator=participants"),
]


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def test_a_run_that_was_stopped_goes_on_to_the_simulator_s_bits(tmp_path):
    """With error feedback, so that what clients keep between rounds counts."""
    commands, fleet = Commands(tmp_path, stand_ins=False), tmp_path / "fleet"
    made = commands.call("init", fleet, "--host", "127.0.0.1", "--nodes", 2, "--port", free_port())
    assert made.returncode == 0, made.stderr
    with (
        commands.running("server", fleet, "--memory", line="server ready"),
        commands.running("node", fleet / "node-0", line="is connected"),
    ):
        with (
            commands.running("node", fleet / "node-1", line="is connected", number=signal.SIGKILL),
            commands.running("submit", fleet, *RUN, line="round 2/40", number=signal.SIGINT) as (process, log),
        ):
            pass
        assert process.returncode == 130, log.read_text()
        (run,) = (path for path in (fleet / "runs").iterdir() if path.is_dir())
        assert not (run / "summary.json").exists()
        with commands.running("node", fleet / "node-1", line="is connected"):
            resumed = commands.call("submit", fleet, f"resume={run.name}")
            assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    simulated = commands.call(*RUN, "hydra.run.dir=simulated", module="fedsparse.train")
    assert simulated.returncode == 0, simulated.stderr
    here, there = summary(tmp_path / "simulated"), summary(run)
    for key in ("global_sha256", "bytes_up", "bytes_down", "test/acc", "rounds"):
        assert there[key] == here[key], key
