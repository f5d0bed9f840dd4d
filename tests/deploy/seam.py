"""Stand-ins for what Flower calls: a worker that sends bytes back, and a server that counts rounds of them."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from types import ModuleType


class Worker:
    """Sends what it gets back, reversed; keeps a count in its folder, and in memory how often this object was asked."""

    def __init__(self, folder, client, own):
        self.folder, self.client, self.own, self.asked = folder, client, own, 0

    def answer(self, meta, payload):
        if meta == "raise":
            raise ValueError(f"client {self.client} was told to")
        file = self.folder / "count"
        count = int(file.read_text()) + 1 if file.is_file() else 1
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(str(count))
        self.asked += 1
        said = {"client": self.client, "own": list(self.own), "count": count, "asked": self.asked, "meta": meta}
        return json.dumps(said), payload[::-1]


def gather(link, nodes, longest=120):
    """Wait for an answer of each node."""
    replies, end = [], time.monotonic() + longest
    while len(replies) < len(nodes) and time.monotonic() < end:
        replies += link.pull()
        time.sleep(0.1)
    return {reply.node: reply for reply in replies}


def compose(overrides):
    """Numbers of the overrides, as JSON; ``bad=1`` is refused."""
    asked = {key: int(value) for key, _, value in (one.partition("=") for one in overrides if "." not in one)}
    if "bad" in asked:
        raise ValueError("bad is 1, which is refused")
    more = {"deploy": {"insecure": "deploy.insecure=true" in overrides}, "overrides": list(overrides)}
    return json.dumps({"nodes": 1, "rounds": 1, "size": 1000} | asked | more)


def serve(link, config, folder, resume):
    """Play rounds of echoes: of so many nodes, rounds and bytes; then ``raise`` and ``fail`` as asked."""
    asked = json.loads(config)
    while len(nodes := link.nodes()) < asked["nodes"]:
        time.sleep(0.1)
    seconds, said = [], []
    for round in range(asked["rounds"]):
        payload = hashlib.shake_256(str(round).encode()).digest(asked["size"])
        start = time.monotonic()
        link.push(dict.fromkeys(nodes, (f"round {round}", payload)), round)
        replies = gather(link, nodes)
        seconds.append(time.monotonic() - start)
        assert set(replies) == set(nodes), f"round {round}: answers of {sorted(replies)}"
        assert all(reply.error is None and reply.payload == payload[::-1] for reply in replies.values())
        said = sorted((json.loads(reply.meta) for reply in replies.values()), key=lambda one: one["client"])
    seen = {"seconds": seconds, "said": said, "resume": resume}
    if asked.get("raise"):
        link.push(dict.fromkeys(nodes, ("raise", b"")), asked["rounds"])
        seen["errors"] = sorted(reply.error for reply in gather(link, nodes).values())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "echo.json").write_text(json.dumps(seen))
    (folder / "deployed.yaml").write_text(config)
    if asked.get("fail"):
        raise ValueError("the server was told to fail")


def install():
    """Put the stand-ins where Flower's side imports them from."""
    members = {"deploy.worker": Worker, "deploy.serve": serve, "job.deployed": compose}
    for name, member in members.items():
        module = ModuleType(f"fedsparse.{name}")
        vars(module)[member.__name__] = member
        sys.modules[module.__name__] = module
