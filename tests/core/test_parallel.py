"""Several processes against one, and against a plain loop."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pair import fit, in_processes
from plain import plain_fedavg, replay
from safetensors.torch import load_file
from small import Small, small_data, small_net, uneven_parts
from test_federation import MASKS, WORK, batchnorm_net

from fedsparse.core import parallel
from fedsparse.core.space import ParamSpace
from fedsparse.data.rounds import PADDING, deal
from fedsparse.federation.client.training import LOCAL
from fedsparse.federation.server.aggregation import Tally

ROUNDS = 3


def build(name, cohort=1, count=5, processes=1, process=0):
    """One of the federations that are compared; 5 clients do not divide by 2, and their steps are ragged."""
    place = {"processes": processes, "process": process}
    if name == "personal":
        net = small_net()
        space = ParamSpace.of(net, local="3.*")
        return Small(net, small_data(), uneven_parts(), count=count, space=space, **place)
    if name.startswith("batchnorm"):
        options = {"work": WORK["epochs"], "buffers": name.split()[1]}
        return Small(batchnorm_net(), small_data(), uneven_parts(), count=count, **place, **options)
    net = small_net()
    mask = MASKS[{"dense": False, "masked": True}[name]](net)
    options = {"work": WORK["epochs"], "mask": mask, "cohort": cohort, "clip": 0.5, "weight_decay": 0.01}
    return Small(net, small_data(), uneven_parts(), count=count, **place, **options)


CASES = {
    "dense": {}, "masked": {}, "dense, stacked": {"cohort": 2}, "masked, fewer clients than processes": {"count": 1},
    "personal": {}, "batchnorm average": {}, "batchnorm local": {},
}  # fmt: skip


def outcome(small):
    """What must not depend on the number of processes."""
    ledger = small.federation.ledger
    kept = {client: row.tolist() for client, row in sorted(small.federation.stores[LOCAL].rows.items())}
    state = {name: value.clone() for name, value in small.net.state_dict().items()}
    return state, ledger.figures(), ledger.has_model, kept, small.rounds.loss


def place():
    """Which process this is, for a plan."""
    return {"processes": parallel.processes(), "process": parallel.process()}


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Outcomes of all cases in two processes, of both processes; and what they reduced."""

    def work():
        reduced, real = [], torch.distributed.all_reduce
        torch.distributed.all_reduce = lambda tensor, *a, **k: (reduced.append(tensor.numel()), real(tensor, *a, **k))[
            1
        ]
        found = {}
        for case, options in CASES.items():
            reduced.clear()
            small = fit(build(case.split(",")[0], **place(), **options), ROUNDS, folder / str(parallel.process()))
            found[case] = (outcome(small), [n for n in reduced if n > 1])
        return found

    folder = tmp_path_factory.mktemp("several")
    return in_processes(work, 2, folder)


@pytest.mark.parametrize("case", list(CASES))
def test_two_processes_equal_one(case, several, tmp_path):
    single = outcome(build(case.split(",")[0], **CASES[case]).fit(ROUNDS, tmp_path))
    for process in several:
        state, *counted, kept, loss = process[case][0]
        for name, value in single[0].items():
            if "num_batches" not in name:  # BatchNorm's counter stays with the process
                torch.testing.assert_close(state[name], value, rtol=0, atol=1e-9)
        assert counted == list(single[1:3])
        assert kept.keys() == single[3].keys()
        for client, row in kept.items():
            assert row == pytest.approx(single[3][client], abs=1e-9)
        assert loss == pytest.approx(single[4], abs=1e-9)


@pytest.mark.parametrize("case", ["dense", "masked"])
def test_two_processes_equal_a_plain_loop(case, several):
    small = build(case)
    masks = small.space.unflatten(small.mask) if case == "masked" else None
    options = {"lr": small.lr, "momentum": small.momentum, "weight_decay": 0.01, "clip": 0.5, "masks": masks}
    train = small.dataset.train
    plain, losses = plain_fedavg(copy.deepcopy(small.net), train.x, train.y, replay(small.plan, ROUNDS), **options)
    state, *_, loss = several[1][case][0]
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=1e-9)
    assert loss == pytest.approx(losses[-1], abs=1e-9)


@pytest.mark.parametrize("case", ["dense", "masked", "personal"])
def test_a_round_takes_one_reduction_of_what_trains(case, several):
    small = build(case)
    trained = small.space.size if small.mask is None else int(small.mask.sum())
    numbers = 3  # the sum of the weights, of the steps, and of the losses
    for process in several:
        assert process[case][1] == [trained + numbers] * ROUNDS


def test_a_dropped_update_is_known_to_all_processes(tmp_path):
    def work():
        small = build("dense", **place())
        small.dataset.train.x[small.parts[6]] = math.nan
        fit(small, 2, tmp_path / str(parallel.process()))
        return [(d.round, d.client) for d in small.federation.dropped], small.row

    first, second = in_processes(work, 2, tmp_path)
    single = build("dense")
    single.dataset.train.x[single.parts[6]] = math.nan
    single.fit(2, tmp_path)
    assert first[0] == second[0] == [(d.round, d.client) for d in single.federation.dropped] != []
    assert torch.equal(first[1], second[1])
    torch.testing.assert_close(first[1], single.row, rtol=0, atol=1e-9)


def test_what_is_shared_and_gathered(tmp_path):
    def work():
        place = parallel.process()
        return parallel.share({"from": place}), parallel.gather(place * 10), parallel.processes()

    assert in_processes(work, 3, tmp_path) == [({"from": 0}, [0, 10, 20], 3)] * 3
    assert (parallel.share("alone"), parallel.gather("alone"), parallel.process()) == ("alone", ["alone"], 0)


def test_a_tally_sums_what_host_and_device_know(tmp_path):
    def work():
        tally = Tally(1, 3, 0, torch.device("cpu"))
        tally.rows += parallel.process() + 1
        tally.weight, tally.loss = [2.0 + parallel.process()], 0.5
        tally.all_reduce()
        return tally.rows.tolist(), tally.weight, tally.loss

    assert in_processes(work, 2, tmp_path) == [([[3.0, 3.0, 3.0]], [5.0], 1.0)] * 2


# dealing


@given(st.lists(st.integers(0, 50), max_size=6), st.integers(1, 4))
def test_everyone_is_dealt_once_and_no_process_is_much_too_long(loads, processes):
    dealt = deal(loads, processes)
    assert sorted(place for places in dealt for place in places) == list(range(len(loads)))
    longest = max(sum(loads[i] for i in places) for places in dealt)
    assert longest <= (4 / 3 - 1 / (3 * processes)) * shortest_possible(loads, processes) + 1e-9  # Graham 1969


def shortest_possible(loads, processes):
    """The best of all ways to deal."""
    ways = product(range(processes), repeat=len(loads))
    return min(max(sum(x for x, p in zip(loads, way, strict=True) if p == q) for q in range(processes)) for way in ways)


@pytest.mark.parametrize("cohort", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 4, 7])
@pytest.mark.parametrize("processes", [2, 3])
def test_all_processes_have_as_many_cohorts_and_share_the_clients(cohort, count, processes):
    options = {"cohort": cohort, "count": count, "processes": processes}
    smalls = [build("dense", process=process, **options) for process in range(processes)]
    for round in range(3):
        dealt = [small.plan.cohorts(round) for small in smalls]
        assert {len(cohorts) for cohorts in dealt} == {small.plan.number_of_cohorts(round) for small in smalls}
        assert {len(c.clients) for cohorts in dealt for c in cohorts} == {smalls[0].module.cohort}
        clients = [client for cohorts in dealt for c in cohorts for client in c.clients if client != PADDING]
        assert sorted(clients) == sorted(smalls[0].plan.sample(round))


# as a person runs it

PAIR = ["trainer.accelerator=cpu", "trainer.devices=2", "model=mlp", "federation.cohort=1"]


@pytest.mark.slow
def test_a_run_in_two_processes_leaves_what_one_leaves(run_in):
    one, alone = run_in(
        "one", *PAIR[2:], "partition=quantity", "federation.local_epochs=1", "federation.local_steps=null"
    )
    two, both = run_in("two", *PAIR, "partition=quantity", "federation.local_epochs=1", "federation.local_steps=null")
    differ = {key for key in one if one[key] != two[key]}
    assert differ <= {"processes", "seconds", "peak_memory", "folder", "global_sha256"}
    assert (one["processes"], two["processes"]) == (1, 2)
    rows = [(folder / "metrics.csv").read_text().count("\n") for folder in (alone, both)]
    assert rows[0] == rows[1] == 4
    assert sorted(p.name for p in alone.rglob("*") if p.is_file()) == sorted(
        p.name for p in both.rglob("*") if p.is_file()
    )
    assert "RANK" not in os.environ


SPARSE = ["exchange=topk", "exchange.feedback=1.0", "aggregation=coordinate_mean"]
TOGETHER = {  # in two processes as in one: to the bit (0), or to rounding, in accuracy and loss
    "topk, feedback": ([*SPARSE, "aggregation.denominator=participants"], 1e-6),
    "scaffold": (["objective=scaffold"], 1e-6),
    "median": (["aggregation=median"], 0),
    "fednova": (["aggregation=fednova", "federation.local_epochs=1", "federation.local_steps=null"], 1e-6),
}


@pytest.mark.slow
@pytest.mark.parametrize(("options", "far"), TOGETHER.values(), ids=TOGETHER)
def test_two_processes_send_and_average_as_one(run_in, options, far):
    (one, alone), (two, both) = (
        run_in(name, *places, *options, "partition=quantity") for name, places in (("one", PAIR[2:]), ("two", PAIR))
    )
    assert (one["processes"], two["processes"]) == (1, 2)
    assert {key: one[key] for key in one if "bytes" in key} == {key: two[key] for key in two if "bytes" in key}
    assert (alone / "traffic.csv").read_text() == (both / "traffic.csv").read_text()
    models = [load_file(folder / "model.safetensors") for folder in (alone, both)]
    for name, value in models[0].items():
        torch.testing.assert_close(models[1][name], value, rtol=0, atol=far)
    if not far:
        assert one["global_sha256"] == two["global_sha256"]


def command(folder, *options):
    shared = [*PAIR, "logger=csv", "pictures=false", "calibration.cache=null", f"hydra.run.dir={folder}"]
    return [sys.executable, "-m", "fedsparse.train", *shared, *options]


def begun(folder, rounds=3):
    """Wait until some rounds are closed."""
    table, end = folder / "metrics.csv", time.monotonic() + 300
    while time.monotonic() < end and not (table.is_file() and table.read_text().count("\n") > rounds):
        time.sleep(0.05)


def following(leader):
    """Processes that a process started."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(leader.pid)], capture_output=True, text=True).stdout
    return [int(pid) for pid in listed.split()]


def alive(pid):
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        time.sleep(0.1)
    return condition()


@pytest.mark.slow
def test_a_signal_closes_the_round_of_all_and_a_resume_gives_the_same_bits(tmp_path):
    from fedsparse import run

    leader = subprocess.Popen(command(tmp_path / "a", "federation.rounds=200"), stderr=subprocess.PIPE, text=True)
    begun(tmp_path / "a")
    others = following(leader)
    leader.send_signal(signal.SIGTERM)
    leader.communicate(timeout=60)
    assert leader.returncode == 143
    assert "is closed and saved" in (tmp_path / "a/run.log").read_text()
    assert others
    assert wait_until(lambda: not any(map(alive, others)))
    closed = (tmp_path / "a/metrics.csv").read_text().count("\n") - 1
    resumed = run([f"resume={tmp_path / 'a'}", f"federation.rounds={closed + 3}", "trainer.devices=2"])
    subprocess.run(command(tmp_path / "b", f"federation.rounds={closed + 3}"), check=True, capture_output=True)
    assert json.loads((tmp_path / "b/summary.json").read_text())["global_sha256"] == resumed["global_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["follower", pytest.param("leader", marks=pytest.mark.soak)])
def test_if_one_process_is_killed_the_other_ends(tmp_path, victim):
    leader = subprocess.Popen(command(tmp_path / "a", "federation.rounds=2000"), stderr=subprocess.PIPE, text=True)
    begun(tmp_path / "a")
    others = following(leader)
    os.kill(leader.pid if victim == "leader" else others[0], signal.SIGKILL)
    said = leader.communicate(timeout=60)[1].splitlines()
    assert wait_until(lambda: not any(map(alive, others)))
    if victim == "follower":
        assert leader.returncode == 1
        assert said[-1].startswith("fedsparse: process 1 of the run failed")


def slurm(rank):
    names = {"JOB_ID": 7, "JOB_NAME": "fed", "NTASKS": 2, "NTASKS_PER_NODE": 2, "PROCID": rank, "LOCALID": rank}
    where = {"NODEID": 0, "NODELIST": "127.0.0.1", "STEP_NODELIST": "127.0.0.1"}
    return {f"SLURM_{name}": str(value) for name, value in {**names, **where}.items()}


@pytest.mark.slow
@pytest.mark.parametrize("starter", ["torchrun", pytest.param("slurm", marks=pytest.mark.soak)])
def test_processes_that_others_start_meet_in_one_folder(tmp_path, starter):
    if starter == "torchrun":
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
        started = [subprocess.Popen([*launch, *command(tmp_path / "a")[1:]], stderr=subprocess.DEVNULL)]
    else:
        runs = [(command(tmp_path / name), os.environ | slurm(rank)) for rank, name in enumerate("ab")]
        started = [subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL) for command, env in runs]
    assert [process.wait(120) for process in started] == [0] * len(started)
    subprocess.run(command(tmp_path / "one", "trainer.devices=1"), check=True, capture_output=True)
    several, one = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("a", "one"))
    assert (several["processes"], one["processes"]) == (2, 1)
    assert several["global_sha256"] == one["global_sha256"]  # with one client at a time, to the bit
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "one"]


def sockets(pid):
    """Own and remote address of each TCP socket of a process, listening ones too, as the system lists them."""
    own = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            own.add(os.readlink(link))
    listed = [Path(f"/proc/{pid}/net/{name}").read_text().splitlines() for name in ("tcp", "tcp6")]
    lines = [line.split() for line in itertools.chain(*listed)]
    found = [cells for cells in lines if len(cells) > 9 and f"socket:[{cells[9]}]" in own]
    return [tuple(address.split(":")[0] for address in cells[1:3]) for cells in found]


def loopback(address):
    """Whether an address in hexadecimal is of this machine alone: 127.* or ::1."""
    return address.endswith("7F") or address == "0" * 24 + "01000000"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="reads /proc")
def test_processes_of_one_machine_listen_on_it_alone(tmp_path):
    """Even where gloo would take another interface: the environment names one, as a host's name may."""
    other = next((name for _, name in socket.if_nameindex() if name.startswith(("eth", "en"))), "")
    leader = subprocess.Popen(
        command(tmp_path / "a", "federation.rounds=100"),
        stderr=subprocess.DEVNULL,
        env=os.environ | ({"GLOO_SOCKET_IFNAME": other} if other else {}),
    )
    try:
        begun(tmp_path / "a")
        seen = [pair for pid in (leader.pid, *following(leader)) for pair in sockets(pid)]
    finally:
        leader.send_signal(signal.SIGTERM)
        leader.wait(60)
    assert len(seen) >= 2
    assert [own for own, _ in seen if not loopback(own)] == []
    assert [other for _, other in seen if not (loopback(other) or set(other) == {"0"})] == []
