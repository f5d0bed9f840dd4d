"""The folders of a fleet: that of the server, and one for each node, which is copied to the node's machine.

``fleet/`` holds ``fleet.yaml``, ``authority/``, ``server/``, ``keys/`` with the nodes' public keys, ``flower/`` with
the SuperLink's database and log and Flower's own files, ``runs/``, and ``node-0/``, ... until these are moved.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from fedsparse.core.checks import check_whole

FLEET, NODE, IGNORE = "fleet.yaml", "node.yaml", ".gitignore"
AUTHORITY, SERVER, KEYS, FLOWER, RUNS = "authority", "server", "keys", "flower", "runs"
CERTIFICATE, KEY, PUBLIC = "certificate.pem", "key", "key.pub"
MOST_NODES, LARGEST_PORT = 10_000, 65_535
Read = TypeVar("Read", bound="Fleet | Node")


@dataclass(frozen=True)
class Fleet:
    """What all commands on the server's machine need to know.

    Attributes:
        folder: of the fleet.
        host: name or address by which nodes reach the server.
        port: on which it listens, for everything.
        nodes: how many there are.
        insecure: without TLS and keys, on this machine alone.

    """

    folder: Path
    host: str
    port: int
    nodes: int
    insecure: bool

    @property
    def authority(self) -> Path:
        """Certificate of the authority."""
        return self.folder / AUTHORITY / CERTIFICATE

    @property
    def certificate(self) -> Path:
        """Certificate of the server."""
        return self.folder / SERVER / CERTIFICATE

    @property
    def key(self) -> Path:
        """Private key of the server."""
        return self.folder / SERVER / KEY

    @property
    def keys(self) -> Sequence[Path]:
        """Public keys of the nodes."""
        return [self.folder / KEYS / f"node-{number}.pub" for number in range(self.nodes)]

    @property
    def flower(self) -> Path:
        """Folder of Flower's own files."""
        return self.folder / FLOWER

    @classmethod
    def read(cls, folder: Path) -> Fleet:
        """Read a fleet's folder.

        Raises:
            ValueError: it is none.

        """
        return _read(cls, folder, FLEET, "a fleet", "python -m fedsparse.deploy init makes one")


@dataclass(frozen=True)
class Node:
    """What a node needs to know, in a folder of its own.

    Attributes:
        folder: of the node.
        host: name or address of the server.
        port: of the server.
        client: number of the client that the node is.
        insecure: without TLS and keys, on the server's machine alone.

    """

    folder: Path
    host: str
    port: int
    client: int
    insecure: bool

    @property
    def authority(self) -> Path | None:
        """Certificate of the authority that signed the server's; None without TLS."""
        return None if self.insecure else self.folder / CERTIFICATE

    @property
    def key(self) -> Path | None:
        """Private key; None without TLS."""
        return None if self.insecure else self.folder / KEY

    @property
    def address(self) -> str:
        """Server's ``host:port``."""
        return address(self.host, self.port)

    @classmethod
    def read(cls, folder: Path) -> Node:
        """Read a node's folder.

        Raises:
            ValueError: it is none.

        """
        return _read(cls, folder, NODE, "a node", "python -m fedsparse.deploy init makes them in the folder of a fleet")


def address(host: str, port: int) -> str:
    """Join host and port, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def loopback(host: str) -> bool:
    """Whether a host is this machine itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def init(folder: Path, host: str, port: int, nodes: int, days: int, insecure: bool) -> Fleet:
    """Write the folder of a fleet, with an authority, the server's certificate and a key for each node.

    Args:
        folder: of the fleet; nothing in it is overwritten.
        host: name or address by which nodes reach the server.
        port: on which it listens.
        nodes: how many there are.
        days: how long certificates are valid.
        insecure: without certificates and keys, on this machine alone.

    Returns:
        The fleet.

    Raises:
        ValueError: the folder is there already, or a number or the host is wrong.

    """
    fleet = Fleet(folder, host, port, nodes, insecure)
    _check(fleet, days)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty, and nothing in it is overwritten: give another folder")
    for name in (".", AUTHORITY, SERVER, KEYS, FLOWER, RUNS):
        (folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
    if not insecure:
        _write_certificates(fleet, days)
    for client in range(nodes):
        _write_node(fleet, client)
    _write(folder / FLEET, _text(fleet))
    _write(folder / IGNORE, "*\n")
    return fleet


def _check(fleet: Fleet, days: int) -> None:
    """Refuse numbers and hosts that no fleet can have."""
    for key, value, most in (
        ("nodes", fleet.nodes, MOST_NODES),
        ("port", fleet.port, LARGEST_PORT),
        ("days", days, 9999),
    ):
        check_whole(key, value, 1)
        if value > most:
            raise ValueError(f"{key} is {value}, above {most}")
    name = fleet.host.replace(":", "").replace("-", "").replace(".", "")
    if not name.isalnum() or not name.isascii() or fleet.host.startswith("-"):
        raise ValueError(f"host is {fleet.host!r}, which is neither a name of a machine nor an address")
    if fleet.insecure and not loopback(fleet.host):
        raise ValueError(
            f"without TLS nodes and server are one machine: --insecure needs --host 127.0.0.1, not {fleet.host}"
        )


def _write_certificates(fleet: Fleet, days: int) -> None:
    """Make authority and server certificate."""
    from fedsparse.deploy.certificates import Authority

    authority = Authority(fleet.folder.resolve().name, days)
    for name, pair in ((AUTHORITY, authority.pair()), (SERVER, authority.server(fleet.host))):
        _write(fleet.folder / name / KEY, pair.key)
        _write(fleet.folder / name / CERTIFICATE, pair.public)


def _write_node(fleet: Fleet, client: int) -> None:
    """Make the folder of a node, and keep its public key for the server."""
    node = Node(fleet.folder / f"node-{client}", fleet.host, fleet.port, client, fleet.insecure)
    node.folder.mkdir(mode=0o700)
    if not fleet.insecure:
        from fedsparse.deploy.certificates import node as made

        pair = made()
        _write(node.folder / KEY, pair.key)
        _write(node.folder / PUBLIC, pair.public)
        _write(fleet.keys[client], pair.public)
        _write(node.folder / CERTIFICATE, fleet.authority.read_bytes())
    _write(node.folder / NODE, _text(node))
    _write(node.folder / IGNORE, "*\n")


def _text(values: Fleet | Node) -> str:
    """YAML of all but the folder, which may move."""
    return yaml.safe_dump({key: value for key, value in asdict(values).items() if key != "folder"}, sort_keys=False)


def _write(path: Path, content: str | bytes) -> None:
    """Write a file that only its owner may read and that is not there yet."""
    data = content.encode() if isinstance(content, str) else content
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


def _read(made: type[Read], folder: Path, name: str, kind: str, advice: str) -> Any:
    """Read the YAML file of a folder into its class."""
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{folder} is not the folder of {kind}: it has no {name}; {advice}")
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    fields = {key: kind for key, kind in made.__annotations__.items() if key != "folder"}
    if not isinstance(found, Mapping) or {k: type(v).__name__ for k, v in found.items()} != fields:
        raise ValueError(f"{path} does not hold {', '.join(f'{key} ({kind})' for key, kind in fields.items())} alone")
    return made(folder, **found)
