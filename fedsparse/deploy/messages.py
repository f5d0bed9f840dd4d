"""What server and nodes send each other: a line of JSON, and a payload of messages in the wire format.

The payload has what the ledger counts; the line says whose it is. All is checked as it is read; nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from fedsparse.core.checks import check_choice

FORMAT = 1
KINDS = ("join", "prepare", "train", "evaluate")
LONGEST = 1 << 22  # characters of a line; a configuration has some thousands
MOST_PARTS = 16


class Reply(NamedTuple):
    """One answer as it arrived.

    Attributes:
        node: that sent it.
        meta: its line.
        payload: its bytes.
        error: why there is none; then both are empty.

    """

    node: int
    meta: str
    payload: bytes
    error: str | None = None


class Link(Protocol):
    """The server's way to its nodes; it carries bytes, and knows nothing of learning."""

    def nodes(self) -> Sequence[int]:
        """List the nodes that are connected now."""

    def push(self, messages: Mapping[int, tuple[str, bytes]], round: int) -> None:
        """Send each node a line and a payload, without waiting; ``round`` labels them."""

    def pull(self) -> list[Reply]:
        """List what has arrived since the last call, without waiting."""


class Malformed(ValueError):
    """A message does not say what it must."""


@dataclass(frozen=True)
class Request:
    """What the server asks of a client.

    Attributes:
        number: of the request; each has another.
        run: id of the run.
        kind: one of ``KINDS``.
        client: id of the client.
        round: from 0.
        config: hash of the configuration.
        fields: plain values that the kind reads.
        parts: messages by name, whose lengths the ledger counts.

    """

    number: int
    run: str
    kind: str
    client: int
    round: int
    config: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, bytes] = field(default_factory=dict)

    def write(self) -> tuple[str, bytes]:
        """Write line and payload."""
        parts = {name: part for name, part in self.parts.items() if part}
        head = {"format": FORMAT, "number": self.number, "run": self.run, "kind": self.kind, "client": self.client}
        lengths = [[name, len(part)] for name, part in parts.items()]
        more = {"round": self.round, "config": self.config, "fields": dict(self.fields), "parts": lengths}
        return json.dumps(head | more), b"".join(parts.values())

    @classmethod
    def read(cls, meta: str, payload: bytes) -> Request:
        """Read line and payload.

        Raises:
            ValueError: they are no request.

        """
        line, parts = _line(meta), dict[str, bytes]()
        kind = _text(line, "kind")
        check_choice("kind", kind[:40], *KINDS)
        lengths, at = line.get("parts"), 0
        if not isinstance(lengths, list) or len(lengths) > MOST_PARTS:
            raise Malformed("parts is no short list")
        for entry in lengths:
            name, length = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
            if not isinstance(name, str) or not _counts(length) or name in parts:
                raise Malformed("parts has an entry that is no name with a length")
            parts[name] = payload[at : at + int(length)]  # type: ignore[arg-type]
            at += int(length)  # type: ignore[arg-type]
        if at != len(payload):
            raise Malformed(f"the payload has {len(payload)} bytes, where its parts have {at}")
        numbers = [_number(line, key) for key in ("number", "client", "round")]
        texts = [_text(line, key) for key in ("run", "config")]
        return cls(numbers[0], texts[0], kind, numbers[1], numbers[2], texts[1], _fields(line), parts)


@dataclass(frozen=True)
class Answer:
    """What a client answers.

    Attributes:
        number: of the request.
        run: id of the run.
        client: id of the client.
        samples: that it holds.
        fields: plain values.
        payload: its message; empty where there is none.

    """

    number: int
    run: str
    client: int
    samples: int
    fields: Mapping[str, Any] = field(default_factory=dict)
    payload: bytes = b""

    def write(self) -> tuple[str, bytes]:
        """Write line and payload."""
        head = {"format": FORMAT, "number": self.number, "run": self.run, "client": self.client}
        return json.dumps(head | {"samples": self.samples, "fields": dict(self.fields)}), self.payload

    @classmethod
    def read(cls, meta: str, payload: bytes) -> Answer:
        """Read line and payload.

        Raises:
            Malformed: they are no answer.

        """
        line = _line(meta)
        number, client, samples = (_number(line, key) for key in ("number", "client", "samples"))
        return cls(number, _text(line, "run"), client, samples, _fields(line), bytes(payload))


def _line(meta: str) -> dict[str, Any]:
    if not isinstance(meta, str) or len(meta) > LONGEST:
        raise Malformed("the line is no text of a possible length")
    try:
        line = json.loads(meta)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"the line is no JSON ({type(error).__name__})") from None
    if not isinstance(line, dict) or line.get("format") != FORMAT:
        raise Malformed(f"the line is no object of format {FORMAT}")
    return line


def _counts(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _number(line: Mapping[str, Any], key: str) -> int:
    value = line.get(key)
    if not _counts(value):
        raise Malformed(f"{key} is no whole number of 0 or more")
    return int(value)  # type: ignore[arg-type]


def _text(line: Mapping[str, Any], key: str) -> str:
    value = line.get(key)
    if not isinstance(value, str):
        raise Malformed(f"{key} is no text")
    return value


def _fields(line: Mapping[str, Any]) -> dict[str, Any]:
    fields = line.get("fields")
    if not isinstance(fields, dict):
        raise Malformed("fields is no object")
    return fields
