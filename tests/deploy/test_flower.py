"""The commands as typed, over Flower itself, with stand-ins for what learns: bytes both ways, refusals, signals."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace

import pytest
from fleets import Commands, free_port, needs_flower

from fedsparse.deploy.fleet import Node
from fedsparse.deploy.joining import check

pytestmark = [pytest.mark.slow, needs_flower]
OWN = ["data.root=/srv/mine", "note='a b\"c'"]


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    return Commands(tmp_path_factory.mktemp("flower"))


def made(commands, name, nodes=2, port=None, insecure=False):
    """Make a fleet -> its folder."""
    typed = ["init", name, "--host", "127.0.0.1", "--nodes", nodes, "--port", port or free_port()]
    typed += ["--insecure"] * insecure
    done = commands.call(*typed)
    assert done.returncode == 0, done.stderr
    return commands.folder / name


@pytest.fixture(scope="module")
def fleet(commands):
    """The folder of a fleet of two nodes whose server runs."""
    folder = made(commands, "fleet")
    with commands.running("server", folder, line="server ready"):
        yield folder


def echo_of(fleet, said):
    """What the stand-in of a server has seen in the run whose folder a command has printed."""
    (folder,) = re.findall(r"^fedsparse: (\S+/runs/\S+)$", said, flags=re.MULTILINE)
    return json.loads((fleet.parent / folder / "echo.json").read_text())


@pytest.mark.parametrize(("isolation", "line"), [("kept", "is connected"), ("subprocess", "SuperNode ID")])
def test_bytes_go_to_nodes_and_back(commands, fleet, isolation, line):
    with ExitStack() as stack:
        for name in ("node-0", "node-1"):
            typed = ("node", fleet / name, *OWN, "--isolation", isolation)
            stack.enter_context(commands.running(*typed, line=line))
        done = commands.call("submit", fleet, "nodes=2", "rounds=3", "size=1000000", "raise=1")
        assert done.returncode == 0, done.stdout + done.stderr
        seen, listed = echo_of(fleet, done.stdout), commands.call("status", fleet).stdout
    assert [(one["client"], one["own"], one["asked"], one["meta"]) for one in seen["said"]] == [
        (client, OWN, 3 if isolation == "kept" else 1, "round 2") for client in (0, 1)
    ]
    assert [one["count"] for one in seen["said"]] == [3, 3] if isolation == "kept" else [6, 6]  # in the same folder
    assert seen["errors"] == [f"<class 'ValueError'>:<'client {client} was told to'>" for client in (0, 1)]
    assert listed.count("online") == 2 + 1  # and the title of the column
    traffic = re.findall(r"finished:completed\D+\d+\D+([\d,]+)", listed)[0]
    assert 12_000_000 <= int(traffic.replace(",", "")) < 1.02 * 12_000_000


def test_a_run_that_fails_fails_the_command_and_goes_on_by_resume(commands, fleet):
    with commands.running("node", fleet / "node-0", line="is connected"):
        refused = commands.call("submit", fleet, "bad=1")
        assert (refused.returncode, refused.stderr) == (1, "fedsparse: bad is 1, which is refused\n")
        failed = commands.call("submit", fleet, "fail=1")
        assert failed.returncode == 1
        assert "is finished:failed: ServerApp failed with exception: the server was told to fail" in failed.stderr
        run = max(path.name for path in (fleet / "runs").iterdir() if path.is_dir())
        resumed = commands.call("submit", fleet, f"resume={run}", "fail=0")
        assert resumed.returncode == 0, resumed.stdout + resumed.stderr
        assert echo_of(fleet, resumed.stdout)["resume"] is True
        unknown = commands.call("submit", fleet, "resume=nothing")
        assert "resume=nothing" in unknown.stderr


def test_without_tls_a_run_says_that_it_knows(commands):
    """In memory, so that this way of a server is taken too."""
    folder = made(commands, "plain", 1, insecure=True)
    with (
        commands.running("server", folder, "--memory", line="server ready"),
        commands.running("node", folder / "node-0", line="is connected"),
    ):
        refused = commands.call("submit", folder)
        assert refused.stderr.endswith("is a fleet without TLS: deploy.insecure=true submits to it\n")
        done = commands.call("submit", folder, "deploy.insecure=true")
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_node_is_told_why_it_cannot_join(commands, fleet):
    port = int(re.search(r"port: (\d+)", (fleet / "fleet.yaml").read_text())[1])
    other = made(commands, "other", 1, port) / "node-0"
    stranger = commands.call("node", other)
    assert (stranger.returncode, stranger.stderr.count("\n")) == (1, 1)
    assert "did not sign its certificate" in stranger.stderr
    shutil.copy(fleet / "node-0" / "certificate.pem", other)
    unknown = commands.call("node", other)
    assert (unknown.returncode, unknown.stderr.count("\n")) == (1, 1)
    assert unknown.stderr.startswith("fedsparse: the server does not accept this node: [code: 2004]")
    taken = commands.call("server", fleet)
    assert (taken.returncode, taken.stderr.count("\n")) == (1, 1)
    assert "Address already in use" in taken.stderr


@contextmanager
def listening(host, greet):
    """A server that greets one client, in a thread -> its port."""
    with socket.create_server((host, 0)) as server, ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: greet(server.accept()[0]))
        yield server.getsockname()[1]


def test_a_server_of_another_name_or_without_tls_is_refused_before_anything_is_sent(fleet):
    """The server is the standard library's."""
    heard, context = [], ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(fleet / "server" / "certificate.pem", fleet / "server" / "key")

    def tls(connection):
        with suppress(OSError), context.wrap_socket(connection, server_side=True) as safe:
            heard.append(safe.recv(100))

    def plain(connection):
        with connection:
            connection.recv(10_000)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    node = Node.read(fleet / "node-0")
    with (
        listening("127.0.0.2", tls) as port,
        pytest.raises(ValueError, match=r"^the server's certificate is not for 127\.0\.0\.2: "),
    ):
        check(replace(node, host="127.0.0.2", port=port))
    with (
        listening("127.0.0.1", plain) as port,
        pytest.raises(ValueError, match=r"127\.0\.0\.1:\d+ does not speak TLS: "),
    ):
        check(replace(node, port=port))
    assert heard == []
    with listening("127.0.0.1", tls) as port:
        check(replace(node, port=port))
    assert heard == [b""]  # the right server is not sent anything yet either


def superlink(process):
    """Id of the SuperLink that a server command has started."""
    listed = subprocess.run(["ps", "-A", "-ww", "-o", "pid=,ppid=,args="], capture_output=True, text=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()]
    (found,) = (int(pid) for pid, parent, args in rows if int(parent) == process.pid and "superlink" in args)
    return found


def test_nodes_come_back_after_the_superlink_is_killed(commands):
    fleet = made(commands, "killed", 1)
    with ExitStack() as stack:
        process, log = stack.enter_context(commands.running("server", fleet, line="server ready"))
        stack.enter_context(commands.running("node", fleet / "node-0", line="is connected"))
        os.kill(superlink(process), signal.SIGKILL)
        assert process.wait(30) == 1
        assert "the SuperLink ended with status -9" in log.read_text()
        stack.enter_context(commands.running("server", fleet, line="server ready"))
        done = commands.call("submit", fleet)  # which waits for a node that is connected
        assert done.returncode == 0, done.stdout + done.stderr
        assert echo_of(fleet, done.stdout)["said"][0]["count"] == 1


def test_a_signal_at_the_keyboard_stops_a_run_and_leaves_no_process(commands, fleet):
    """``running`` sees to the processes; the run is one whose nodes never come."""
    with commands.running("submit", fleet, "nodes=9", line="is started", number=signal.SIGINT) as (process, log):
        pass
    assert process.returncode == 130
    assert "fedsparse: SIGINT: stopped before the end" in log.read_text()
    assert "finished:stopped" in commands.call("status", fleet).stdout
