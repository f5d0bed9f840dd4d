"""The server of a deployed run meets its clients: who is there, what each holds, and whether it fits."""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedsparse.core import files
from fedsparse.core.folder import NODES
from fedsparse.core.monitor import ACCURACY, PERSONAL_ACCURACY
from fedsparse.deploy.limits import check_deployed
from fedsparse.deploy.messages import Answer, Link, Malformed, Reply
from fedsparse.deploy.post import Member, Post
from fedsparse.deploy.remote import RemoteClients
from fedsparse.job.assemble import with_problem
from fedsparse.job.deployed import Deployed
from fedsparse.job.parts import Assembly
from fedsparse.job.reach import Joined
from fedsparse.job.resume import Job

log = logging.getLogger("fedsparse")
START = 600.0  # seconds that a server waits for its nodes at least


def join(link: Link, deployed: Deployed, job: Job, assembly: Assembly) -> Joined:
    """Find the clients of a run at their nodes, and take over what they hold.

    Raises:
        ValueError: the run has a part that is not deployed, or nodes are missing or do not fit; one line.

    """
    check_deployed(assembly)
    stored = stored_nodes(job.folder)
    run = str(stored.get("run") or secrets.token_hex(8))
    before = {int(client): int(count) for client, count in stored.get("samples", {}).items()}
    post = Post(link, run, deployed.hash, deployed.options)
    members, alone = meet(post, deployed, assembly, before)
    samples = {client: member.samples for client, member in sorted(members.items())}
    declared = dict(sorted((before | samples).items()))  # also of a node that is away this time
    files.write(job.folder / NODES, json.dumps({"run": run, "samples": declared}, indent=2) + "\n")
    log.info("deployed run %s: %d clients with %d samples", run, len(samples), sum(samples.values()))
    assembly = at_nodes(assembly, samples, alone)
    remote = RemoteClients(post, members, assembly, deployed.options.max_share)
    own = remote.evaluate if bool(assembly.problem.space.local.any()) else None
    return Joined(assembly, remote.gather, remote.take_part, own, apart=True)


def stored_nodes(folder: Path) -> dict[str, Any]:
    """Read the run's id and what its clients declared; empty for a new run."""
    path = folder / NODES
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def meet(
    post: Post, deployed: Deployed, assembly: Assembly, before: Mapping[int, int]
) -> tuple[dict[int, Member], bool]:
    """Ask all nodes who they are until enough are there: members, and whether each has data of its own.

    Args:
        post: asks them.
        deployed: the configuration, which they take over.
        assembly: the parts of the run, to which they must fit.
        before: samples that clients declared when the run began; empty for a new run.

    Raises:
        ValueError: too few come in time, or one does not fit; one line.

    """
    options, text = deployed.options, deployed.text()
    wanted = options.min_clients or len(before) or len(assembly.problem.eligible)
    asked, members, alone = dict[int, int](), dict[int, Member](), set[bool]()
    patience = max(options.timeout, START)
    end = time.monotonic() + patience
    log.info("waiting for %d clients", wanted)
    while len(members) < wanted:
        for node in set(post.link.nodes()) - set(asked):
            asked[node] = post.introduce(node, text)
        for reply in post.link.pull():
            try:
                answer = introduction(reply, asked.get(reply.node), post.run, members)
                if answer is not None:
                    _check_member(answer, members, assembly, before)
            except ValueError as error:
                if options.min_clients is None:  # all are needed
                    raise
                log.warning("%s", error)
                continue
            if answer is not None:
                members[answer.client] = Member(reply.node, answer.samples)
                alone.add(bool(answer.fields.get("alone")))
        if len(members) < wanted and time.monotonic() > end:
            raise ValueError(
                f"{len(members)} of {wanted} clients are there after {patience:g} s; start the other nodes, or set "
                "deploy.min_clients"
            )
        time.sleep(0.02)
    if len(alone) > 1:
        raise ValueError("some nodes have data.root of their own and some have not; give it to all, or to none")
    return members, alone == {True}


def introduction(reply: Reply, number: int | None, run: str, members: Mapping[int, Member]) -> Answer | None:
    """Read what a node says of itself; None of an answer to an earlier server, and of one that is doubled.

    Raises:
        ValueError: the node failed, or its answer cannot be read; one line.

    """
    if reply.error is not None:
        raise ValueError(f"node {reply.node} cannot take part: {' '.join(reply.error.split())[:300]}")
    try:
        answer = Answer.read(reply.meta, reply.payload)
    except Malformed as error:
        raise ValueError(f"node {reply.node} cannot take part, its answer cannot be read: {error}") from None
    known = members.get(answer.client)
    return None if (answer.number, answer.run) != (number, run) or (known and known.node == reply.node) else answer


def _check_member(answer: Answer, members: Mapping[int, Member], assembly: Assembly, before: Mapping[int, int]) -> None:
    """Refuse a client that does not fit.

    Raises:
        ValueError: one line.

    """
    client, dataset, parts = answer.client, assembly.problem.dataset, assembly.problem.parts
    shape, mine = answer.fields.get("shape"), list(dataset.train.x.shape[1:])
    if client in members:
        raise ValueError(f"two nodes are client {client}; each needs a partition-id of its own")
    if answer.fields.get("classes") != dataset.classes or (shape != mine and not answer.fields.get("alone")):
        raise ValueError(
            f"client {client} has {answer.fields.get('classes')} classes and samples of shape {shape}, where the "
            f"server's data has {dataset.classes} and {mine}"
        )
    if client >= len(parts):
        raise ValueError(f"client {client} is beyond federation.num_clients={len(parts)}")
    if not answer.fields.get("alone") and answer.samples != len(parts[client]):
        raise ValueError(
            f"client {client} holds {answer.samples} samples, where the partition gives it {len(parts[client])}: its "
            "copy of the data is another one"
        )
    if before and answer.samples != before.get(client):
        raise ValueError(f"client {client} holds {answer.samples} samples, and declared {before.get(client)} before")


def at_nodes(assembly: Assembly, samples: Mapping[int, int], alone: bool) -> Assembly:
    """Take over what clients hold: their counts, where data are their own, and who is there."""
    problem = assembly.problem
    if not alone and set(problem.eligible) <= set(samples):
        return assembly
    nothing, parts = np.zeros(0, dtype=np.int64), list(problem.parts)
    for client, part in enumerate(problem.parts):
        held = np.arange(samples.get(client, 0)) if alone else part  # positions at the node: nothing is read here
        parts[client] = held if client in samples else nothing
    if not alone:
        return with_problem(assembly, replace(problem, parts=parts))
    monitor = PERSONAL_ACCURACY if bool(problem.space.local.any()) else ACCURACY
    assembly = replace(assembly, session=replace(assembly.session, monitor=monitor), pictures=False)
    return with_problem(assembly, replace(problem, parts=parts, tests=[], vals=[]))
