"""A node joins its server: what can be wrong with the connection is found before Flower is asked."""

from __future__ import annotations

import secrets
import socket
import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fedsparse.core import files
from fedsparse.deploy.fleet import Node, loopback
from fedsparse.deploy.place import Place

KEPT, SESSION = "kept", "session"  # what a node keeps between rounds; id of its session while it is connected
PROBE = 10.0  # seconds
FREE = range(20_000, 32_000)
WRONG_NAME = (62, 64)  # OpenSSL's numbers of a host name and of an address that the certificate does not have


def place(node: Node, own: Sequence[str]) -> Place:
    """Where the node works.

    Args:
        node: the node.
        own: overrides for it alone.

    """
    return Place((node.folder / KEPT).resolve(), node.client, tuple(own))


def check(node: Node) -> None:
    """Refuse a server that is not there, does not speak TLS or is not the one of this fleet, before anything is sent.

    Raises:
        ValueError: it is one of these, or the node's files are not there.

    """
    if node.insecure and not loopback(node.host):
        raise ValueError(f"without TLS nodes and server are one machine, and the server is {node.host}")
    for path in filter(None, (node.authority, node.key)):
        if not path.is_file():
            raise ValueError(f"{path} is not there: copy the whole folder of the node")
    try:
        with socket.create_connection((node.host, node.port), PROBE) as plain:
            if node.authority is not None:
                _shake_hands(plain, node, node.authority)
    except OSError as error:
        raise ValueError(f"no server at {node.address}: {error.strerror or error}") from None


def _shake_hands(plain: socket.socket, node: Node, authority: Path) -> None:
    """Open a TLS connection, and close it."""
    context = ssl.create_default_context(cafile=str(authority))
    try:
        with context.wrap_socket(plain, server_hostname=node.host):
            return
    except ssl.SSLCertVerificationError as error:
        if error.verify_code in WRONG_NAME:
            raise ValueError(f"the server's certificate is not for {node.host}: {error.verify_message}") from None
        raise ValueError(
            f"the server at {node.address} is not of this fleet: {authority} did not sign its certificate "
            f"({error.verify_message})"
        ) from None
    except (ssl.SSLError, ConnectionError, TimeoutError) as error:
        reason = getattr(error, "reason", None) or error
        raise ValueError(f"the server at {node.address} does not speak TLS: {reason}") from None


def leave_killed(node: Node) -> None:
    """End the session of a process of this node that was killed, so that the server takes the node back at once."""
    path = node.folder / SESSION
    if node.authority is not None and node.key is not None and path.is_file():
        from fedsparse.deploy.internals import leave

        if (id := path.read_text(encoding="utf-8")).isdecimal():
            leave(node.address, node.authority, node.key, int(id))
        path.unlink()


@contextmanager
def noted(node: Node, id: int) -> Iterator[None]:
    """Keep the id of a node's session in its folder within a ``with`` block; after a kill it is still there."""
    path = node.folder / SESSION
    files.write(path, str(id))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def for_supernode(node: Node, place: Place, port: int | None) -> Sequence[str]:
    """Command line of Flower's own SuperNode.

    Args:
        node: the node.
        place: where it works.
        port: for its own processes; None takes a free one.

    """
    trust = ["--insecure"]
    if node.authority is not None:
        trust = ["--root-certificates", str(node.authority), "--auth-supernode-private-key", str(node.key)]
    own = ["--host", "127.0.0.1", "--port", str(port or free_port())]
    return ["flower-supernode", *trust, "--superlink", node.address, *own, "--node-config", place.for_flower()]


def free_port() -> int:
    """A port of this machine on which nothing listens now, below those that systems give to outgoing connections."""
    while True:
        port = secrets.choice(FREE)
        try:
            with socket.create_server(("127.0.0.1", port)):
                return port
        except OSError:
            continue
