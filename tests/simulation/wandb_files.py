"""Reads the file of an offline run of Weights & Biases, without its code: a log in blocks, as LevelDB writes it."""

import json
import struct
import time

from wandb.proto import wandb_internal_pb2

BLOCK, HEADER = 32768, 7  # bytes; the file's own header and that of a part are equally long
WHOLE, LAST = 1, 4  # kinds of parts that end a record


def payloads(data):
    """Bytes of every record."""
    at, parts = HEADER, []
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # no part begins in the last bytes of a block
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        parts.append(data[at + HEADER : at + HEADER + length])
        at += HEADER + length
        if kind in (WHOLE, LAST):
            yield b"".join(parts)
            parts = []


def parsed(payload):
    record = wandb_internal_pb2.Record()
    record.ParseFromString(payload)
    return record


def records(segment):
    """Records of a segment, a folder ``offline-run-*``, once the process that writes it has written the last one."""
    (path,) = segment.glob("*.wandb")
    for _ in range(200):
        found = [parsed(payload) for payload in payloads(path.read_bytes())]
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        time.sleep(0.05)
    raise TimeoutError(f"{path} has no end")


def values(items):
    """The values of items by key; those of nested keys are joined by dots."""
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


class Segment:
    """What a segment holds: the run, the axes of figures, rows, summary, configuration, and artifacts by type."""

    def __init__(self, folder):
        self.folder, self.rows, self.summary, self.config, self.axes, self.artifacts = folder, [], {}, {}, {}, {}
        for record in records(folder):
            kind = record.WhichOneof("record_type")
            content = getattr(record, kind)
            if kind == "run":
                self.run = content
            if kind == "history":
                self.rows.append(values(content.item))
            if kind == "summary":
                self.summary |= values(content.update)
            if kind == "config":
                self.config |= values(content.update)
            if kind == "metric":
                self.axes[content.glob_name or content.name] = content.step_metric
            if kind == "artifact":
                self.artifacts[content.type] = content


def segments(folder):
    """The segments of a run folder, in the order in which they began."""
    return [Segment(path) for path in sorted(folder.glob("wandb/offline-run-*"))]
