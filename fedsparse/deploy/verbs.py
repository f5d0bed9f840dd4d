"""What ``python -m fedsparse.deploy`` does: one function for each verb."""

from __future__ import annotations

import datetime
import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from fedsparse.core.folder import DEPLOYED
from fedsparse.deploy import app, joining, superlink
from fedsparse.deploy.fleet import RUNS, Fleet, Node
from fedsparse.deploy.fleet import init as init_fleet
from fedsparse.deploy.place import Place
from fedsparse.deploy.processes import ask, check_flower, started
from fedsparse.job.sweep import locked

COMPLETED = "finished:completed"


def init(options: Namespace) -> None:
    """Make a fleet."""
    check_flower()
    fleet = init_fleet(options.folder, options.host, options.port, options.nodes, options.days, options.insecure)
    print(f"{fleet.nodes} nodes and their server, {fleet.host}, port {fleet.port}: {fleet.folder}")
    print(f"copy {fleet.folder}/node-<number> to the machine of each node, over a safe channel, and delete it here")


def server(options: Namespace) -> None:
    """Run the SuperLink until a signal."""
    check_flower()
    fleet = Fleet.read(options.folder)
    superlink.check_port(fleet)
    superlink.connect(fleet)
    with started(superlink.command(fleet, options.memory), fleet.flower, superlink.log_of(fleet)) as process:
        superlink.wait_for(fleet, process)
        registered = superlink.register(fleet) if not fleet.insecure else ()
        print(f"fedsparse: server ready: {fleet.host}, port {fleet.port}, {len(registered)} nodes registered")
        raise ValueError(f"the SuperLink ended with status {process.wait()}: {superlink.log_of(fleet)} says why")


def node(options: Namespace) -> None:
    """Run a node until a signal."""
    check_flower()
    made = Node.read(options.folder)
    joining.check(made)
    place = joining.place(made, options.overrides)
    with locked(made.folder):
        joining.leave_killed(made)
        if options.isolation == "subprocess":
            _supernode(made, joining.for_supernode(made, place, options.port))
        else:
            _kept(made, place)


def _kept(made: Node, place: Place) -> None:
    """Run a node in this process."""
    from fedsparse.deploy.internals import connected
    from fedsparse.deploy.node import keep

    with connected(made.address, made.authority, made.key) as connection, joining.noted(made, connection.node):
        print(f"fedsparse: node {made.client} is connected to {made.address} as {connection.node}")
        keep(connection, place)


def _supernode(made: Node, command: Sequence[str]) -> None:
    """Run Flower's own SuperNode."""
    with started(command, made.folder / "flower") as process:
        raise ValueError(f"the SuperNode ended with status {process.wait()}")


def submit(options: Namespace) -> None:
    """Start a run, follow it to its end, and fail if it does."""
    check_flower()
    fleet = Fleet.read(options.folder)
    typed = [one for one in options.overrides if not one.startswith("resume=")]
    resumed = [one.removeprefix("resume=") for one in options.overrides if one.startswith("resume=")]
    folder = _earlier(fleet, resumed[-1]) if resumed else fleet.folder / RUNS / _now()
    earlier = _overrides_of(folder) if resumed else []
    from fedsparse.job.deployed import compose  # here, so that a wrong argument is refused without Hydra

    config = compose([*earlier, *typed])
    if fleet.insecure and not (yaml.safe_load(config).get("deploy") or {}).get("insecure"):
        raise ValueError(f"{fleet.folder} is a fleet without TLS: deploy.insecure=true submits to it")
    superlink.connect(fleet)
    run = _start(fleet, config, folder, bool(resumed))
    print(f"fedsparse: run {run} is started: {folder}")
    try:
        with started(["flwr", "log", run, superlink.CONNECTION], fleet.flower) as process:
            process.wait()
        status = superlink.finished(fleet, run)
    except BaseException:
        ask(["flwr", "stop", run, superlink.CONNECTION], fleet.flower)
        raise
    if status["status"] != COMPLETED:
        raise ValueError(f"run {run} is {status['status']}: {superlink.last(status['status-details'])} ({folder})")
    print(f"fedsparse: {folder}")


def _start(fleet: Fleet, config: str, folder: Path, resume: bool) -> str:
    """Send a run to the SuperLink -> its id."""
    with tempfile.TemporaryDirectory(dir=fleet.flower) as place:
        app.write(Path(place) / "app", config, folder, resume)
        return str(superlink.flwr(fleet, "run", str(Path(place) / "app"), superlink.CONNECTION)["run-id"])


def _now() -> str:
    """Name of a run's folder."""
    return datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


def _earlier(fleet: Fleet, name: str) -> Path:
    """Find a run's folder, by its path or by its name."""
    for folder in (fleet.folder / RUNS / name, Path(name)):
        if name and folder.is_dir():
            return folder
    raise ValueError(f"resume={name}: {fleet.folder / RUNS} holds no run of this name, and it is no folder")


def _overrides_of(folder: Path) -> list[str]:
    """What was typed for an earlier run."""
    path = folder / DEPLOYED
    found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    overrides = found.get("overrides") if isinstance(found, dict) else None
    if not isinstance(overrides, list) or not all(isinstance(one, str) for one in overrides):
        raise ValueError(f"resume={folder}: {path} is not there, or does not say what was typed")
    return overrides


def status(options: Namespace) -> None:
    """Print nodes and runs."""
    check_flower()
    fleet = Fleet.read(options.folder)
    if not superlink.answers(fleet):
        raise ValueError(f"no server at {superlink.near(fleet)}: python -m fedsparse.deploy server {fleet.folder}")
    superlink.connect(fleet)
    called = {id: name for name, id in superlink.names(fleet).items()}
    nodes, runs = Table("node", "id", "status", "seconds online"), Table("run", "status", "seconds", "bytes", "reason")
    for one in superlink.nodes(fleet):
        online = f"{one['online-elapsed']:.0f}" if one["status"] == "online" else ""
        nodes.add_row(called.get(one["node-id"], ""), one["node-id"], one["status"], online)
    for one in superlink.runs(fleet):
        traffic, reason = one["network-traffic"]["total-bytes"], superlink.last(one["status-details"])
        runs.add_row(one["run-id"], one["status"], f"{one['elapsed']:.0f}", f"{traffic:,}", reason)
    for table in (nodes, runs):
        Console().print(table)


VERBS: Mapping[str, Callable[[Namespace], None]] = {
    "init": init,
    "server": server,
    "node": node,
    "submit": submit,
    "status": status,
}
