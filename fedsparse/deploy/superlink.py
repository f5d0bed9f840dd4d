"""The SuperLink of a fleet: its commands, and what Flower's command line says about nodes and runs."""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsparse.core import files
from fedsparse.deploy.fleet import Fleet, address, loopback
from fedsparse.deploy.processes import ask, waited

DATABASE, LOG, NAMES, CONNECTION = "state.db", "superlink.log", "nodes.json", "fleet"
START, PROBE = 60.0, 5.0  # seconds until a SuperLink answers; that one question may take


def bound(fleet: Fleet) -> str:
    """Address on which the SuperLink listens: all of the machine's, unless the fleet is this machine alone."""
    if loopback(fleet.host):
        return fleet.host
    return "::" if ":" in fleet.host else "0.0.0.0"


def near(fleet: Fleet) -> str:
    """Address under which commands on the server's machine reach the SuperLink."""
    return address(fleet.host if loopback(fleet.host) else "127.0.0.1", fleet.port)


def command(fleet: Fleet, memory: bool = False) -> Sequence[str]:
    """Command line of the SuperLink.

    Args:
        fleet: of the SuperLink.
        memory: whether it keeps nodes, messages and runs in memory, which takes half the time of a database.

    """
    files = {"ssl-ca-certfile": fleet.authority, "ssl-certfile": fleet.certificate, "ssl-keyfile": fleet.key}
    secure = [part for name, path in files.items() for part in (f"--{name}", str(path.resolve()))]
    return [
        "flower-superlink",
        *(["--insecure"] if fleet.insecure else [*secure, "--enable-supernode-auth"]),
        *("--host", bound(fleet), "--port", str(fleet.port)),
        *([] if memory else ["--database", str((fleet.flower / DATABASE).resolve())]),
        "--disable-runtime-dependency-installation",  # or it would run uv for every run
    ]


def connect(fleet: Fleet) -> None:
    """Write the connection that Flower's command line uses."""
    trust = "insecure = true" if fleet.insecure else f"root-certificates = {json.dumps(str(fleet.authority.resolve()))}"
    lines = [
        "[superlink]",
        f'default = "{CONNECTION}"',
        f"[superlink.{CONNECTION}]",
        f'address = "{near(fleet)}"',
        trust,
    ]
    (fleet.flower / "config.toml").write_text("\n".join([*lines, ""]), encoding="utf-8")


def check_port(fleet: Fleet) -> None:
    """Refuse a port on which something listens already.

    Raises:
        ValueError: it does, or the address is not this machine's.

    """
    try:
        family = socket.getaddrinfo(bound(fleet), fleet.port, type=socket.SOCK_STREAM)[0][0]
        with socket.create_server((bound(fleet), fleet.port), family=family):
            pass
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error
        raise ValueError(f"the server cannot listen on {bound(fleet)}, port {fleet.port}: {reason}") from None


def answers(fleet: Fleet) -> bool:
    """Whether the SuperLink answers."""
    host = near(fleet).rpartition(":")[0].strip("[]")
    try:
        if fleet.insecure:
            connection = http.client.HTTPConnection(host, fleet.port, timeout=PROBE)
        else:
            context = ssl.create_default_context(cafile=str(fleet.authority))
            connection = http.client.HTTPSConnection(host, fleet.port, timeout=PROBE, context=context)
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False


def wait_for(fleet: Fleet, process: subprocess.Popen) -> None:
    """Wait until a SuperLink that was started answers.

    Raises:
        ValueError: it ended, or does not answer; with the last line of its log.

    """
    waited(lambda: process.poll() is not None or answers(fleet), START)
    if process.poll() is not None or not answers(fleet):
        log = log_of(fleet)
        raise ValueError(f"the SuperLink does not run: {last(log.read_text(errors='replace'))} ({log} says more)")


def flwr(fleet: Fleet, *arguments: str) -> Any:
    """Run a command of Flower's command line -> the JSON object that it prints.

    Raises:
        ValueError: it failed; with its reason.

    """
    done = ask(["flwr", *arguments, "--format", "json"], fleet.flower)
    found = _object(done.stdout)
    if done.returncode or not found.get("success"):
        raise ValueError(found.get("error-message") or last(done.stderr) or f"flwr {arguments[0]} failed")
    return found


def register(fleet: Fleet) -> Mapping[str, str]:
    """Register the public keys of nodes that the SuperLink does not know yet -> id of each node by its name."""
    listed = {node["node-id"] for node in nodes(fleet)}
    ids = {name: id for name, id in names(fleet).items() if id in listed}
    for key in fleet.keys:
        if key.stem not in ids:
            ids[key.stem] = str(flwr(fleet, "supernode", "register", str(key.resolve()), CONNECTION)["node-id"])
            files.write(fleet.flower / NAMES, json.dumps(ids))
    return ids


def names(fleet: Fleet) -> Mapping[str, str]:
    """Ids of the nodes that were registered, by their names."""
    path = fleet.flower / NAMES
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def nodes(fleet: Fleet) -> list[dict[str, Any]]:
    """What the SuperLink knows about nodes."""
    return flwr(fleet, "supernode", "list", CONNECTION)["nodes"]


def runs(fleet: Fleet, *only: str) -> list[dict[str, Any]]:
    """What the SuperLink knows about runs, the newest first.

    Args:
        fleet: of the SuperLink.
        *only: ``--run-id`` and an id, for one run.

    """
    return flwr(fleet, "list", CONNECTION, *only)["runs"]


def finished(fleet: Fleet, run: str) -> dict[str, Any]:
    """Wait until a run whose log has ended is finished too -> what the SuperLink knows about it.

    Raises:
        ValueError: it goes on.

    """
    end = time.monotonic() + START
    while True:
        (found,) = runs(fleet, "--run-id", run)
        if found["status"].startswith("finished"):
            return found
        if time.monotonic() > end:
            raise ValueError(f"run {run} is {found['status']}, and its log has ended")


def last(text: str) -> str:
    """Last line of a text that says something."""
    return next((" ".join(line.split()) for line in reversed(text.splitlines()) if line.strip()), "")


def _object(text: str) -> dict[str, Any]:
    """Read the JSON object that a text ends with; empty without one."""
    start = text.find("{")
    try:
        return json.loads(text[start:]) if start >= 0 else {}
    except json.JSONDecodeError:
        return {}


def log_of(fleet: Fleet) -> Path:
    """File of the SuperLink's log."""
    return fleet.flower / LOG
