"""What a message of Flower holds: one record of two values, the description and the payload."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flwr.app import Message, RecordDict

KEY, META, PAYLOAD = "fedsparse", "meta", "payload"


def pack(meta: str, payload: bytes) -> RecordDict:
    """Put a description and a payload into the content of a message."""
    from flwr.app import ConfigRecord, RecordDict  # here, so that the module is read where Flower is absent

    return RecordDict({KEY: ConfigRecord({META: meta, PAYLOAD: payload})})


def unpack(message: Message) -> tuple[str, bytes]:
    """Take description and payload out of a message that another machine has sent.

    Raises:
        ValueError: it does not hold exactly these two, of these types.

    """
    record = message.content.get(KEY) if message.has_content() else None
    values = dict(record.items()) if record is not None and len(message.content) == 1 else {}
    meta, payload = values.get(META), values.get(PAYLOAD)
    if len(values) != 2 or not isinstance(meta, str) or not isinstance(payload, bytes):
        raise ValueError(f"a message does not hold the record {KEY} of {META} and {PAYLOAD} alone")
    return meta, payload
