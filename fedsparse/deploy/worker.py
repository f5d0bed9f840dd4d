"""A client's work, bytes to bytes: what the simulator calls in its process, for a client that is alone with its data.

What the client keeps lies in a folder, so that a process that starts anew goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from fedsparse.core import files
from fedsparse.deploy.messages import Answer, Malformed, Request
from fedsparse.deploy.party import Learner, Party
from fedsparse.job.deployed import Deployed

CONFIG, FIRST, ROUNDS = "config.yaml", "first", "rounds"
FIRSTS = ("model", "mask", "head")
KEPT = 4  # rounds whose state stays: a server that restarts goes back by one or two
LACKS = "lacks"  # the field of an answer without a message: what the client has lost, or never had
BASE = "base"
AWAY = -2  # of ``Participation.at``: the learner has another state than that of a round


@dataclass
class Participation:
    """What a client has in a run: its parts, and its folder.

    Attributes:
        folder: of the run at this client.
        config: hash of its configuration.
        party: the client.
        alone: whether its data set is its own.
        learner: as it trains; None before its first round in this process.
        at: the round whose state the learner has; -1 before its first, ``AWAY`` after an evaluation.
        loaded: whether the network has the first model.

    """

    folder: Path
    config: str
    party: Party
    alone: bool
    learner: Learner | None = None
    at: int = -1
    loaded: bool = False


class Worker:
    """One client's work in any number of runs.

    Args:
        folder: what the client keeps, by run.
        client: its id.
        own: overrides of the node's own keys (``job.deployed.OWN``), such as ``data.root=/srv/mine``.

    """

    def __init__(self, folder: Path, client: int, own: Sequence[str] = ()) -> None:
        self.folder, self.client, self.own = folder, client, tuple(own)
        self.alone = any(override.startswith("data.") for override in own)
        self.runs: dict[str, Participation] = {}

    def answer(self, meta: str, payload: bytes) -> tuple[str, bytes]:
        """Do what a request asks, and write the answer.

        Raises:
            ValueError: the request is malformed, another client's, or of another configuration; one line.

        """
        request = Request.read(meta, payload)
        if request.kind != "join" and request.client != self.client:
            raise Malformed(f"the request is for client {request.client}, and this is client {self.client}")
        if not request.run.isalnum():  # it names a folder
            raise Malformed(f"{request.run[:40]!r} is no id of a run")
        if request.kind == "join":
            self._note(request)
        run = self._run(request)
        work = {"join": _introduce, "prepare": _prepare, "train": _train, "evaluate": _evaluate}[request.kind]
        fields, message = work(run, request)
        return Answer(request.number, request.run, self.client, run.party.samples, fields, message).write()

    def _note(self, request: Request) -> None:
        """Store the configuration of a run that begins, or goes on.

        Raises:
            Malformed: it is not what the server's hash says.

        """
        text, path = str(request.fields.get("text", "")), self.folder / request.run / CONFIG
        found = Deployed.read(text).hash
        if found != request.config:
            raise Malformed(f"the configuration's hash is {found}, and the server says {request.config[:40]!r}")
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write(path, text)

    def _run(self, request: Request) -> Participation:
        """Find what the client has in a run; a process that has just started builds it anew.

        Raises:
            Malformed: the run is unknown here, or of another configuration.

        """
        folder = self.folder / request.run
        if request.run not in self.runs:
            if not (folder / CONFIG).is_file():
                raise Malformed(f"run {request.run} is unknown at this node")
            deployed = Deployed.read((folder / CONFIG).read_text(encoding="utf-8"))
            _check_hash(deployed.hash, request)
            party = Party(partial(deployed.at_node, self.own, self.client, self.alone), self.client)
            self.runs[request.run] = Participation(folder, deployed.hash, party, self.alone)
        _check_hash(self.runs[request.run].config, request)
        return self.runs[request.run]


def _check_hash(config: str, request: Request) -> None:
    if config != request.config:
        raise Malformed(f"run {request.run} has the configuration {config} here, not {request.config[:40]}")


def _introduce(run: Participation, request: Request) -> tuple[dict[str, Any], bytes]:
    """Say what the client is: whether its data are its own, their classes, and the shape of a sample."""
    dataset = run.party.assembly.problem.dataset
    shape = list(dataset.train.x.shape[1:])
    return {"alone": run.alone, "classes": dataset.classes, "shape": shape}, b""


def _prepare(run: Participation, request: Request) -> tuple[dict[str, Any], bytes]:
    """Run a task before the first round."""
    parts = dict(request.parts)
    first = _first(run, {"model": parts.pop("model", b"")}, implied=False)
    if not first["model"]:
        return {LACKS: "model"}, b""
    if "model" in request.parts or not run.loaded:
        run.party.load(first["model"])
        run.loaded = True
    return {}, run.party.prepare(str(request.fields.get("task", "")), request.round, parts)


def _train(run: Participation, request: Request) -> tuple[dict[str, Any], bytes]:
    """Train in a round, from where the client stopped when its last update was admitted."""
    number = request.round
    ready = _ready(run, request)
    if isinstance(ready, str):
        return {LACKS: ready}, b""
    ready.receive(request.parts.get("row", b""), "model" in request.parts)
    base = ready.base
    trained = ready.train(number, float(request.fields["weight"]))
    run.at = number
    needed = {int(request.fields["holds"]), max(_rounds(run, number) - set(request.fields["refused"]), default=-1)}
    _store(run, number, {BASE: base, **ready.kept()}, needed)
    return dict(trained.fields), trained.message


def _evaluate(run: Participation, request: Request) -> tuple[dict[str, Any], bytes]:
    """Evaluate the client's own model after a round; the values of the next round are those of before."""
    ready = _ready(run, request)
    if isinstance(ready, str):
        return {LACKS: ready}, b""
    run.at = AWAY
    ready.receive(request.parts.get("row", b""), "model" in request.parts)
    return {name: list(pair) for name, pair in ready.evaluate().items()}, b""


def _ready(run: Participation, request: Request) -> Learner | str:
    """Bring the client to where it stopped when its last update was admitted; or say what it lacks."""
    fields, parts, number = request.fields, request.parts, request.round
    holds, refused = int(fields["holds"]), set(fields["refused"])
    first = _first(run, {name: parts.get(name, b"") for name in FIRSTS}, implied=bool(fields["implied"]))
    whole, known = "model" in parts, _rounds(run, number)
    if not first["model"] or not (whole or holds < 0 or holds in known):
        return "model"
    learner = _learner(run, first, whole)
    if learner.keeps and holds >= 0 and holds not in known and holds not in refused:
        return f"what it keeps since round {holds + 1}"
    last = max(known - refused, default=-1)
    if not run.at == holds == last:
        if not whole and holds >= 0:
            learner.put(_stored(run, holds)[BASE])
        learner.keep({} if last < 0 else _stored(run, last))
    return learner


def _learner(run: Participation, first: dict[str, Any], whole: bool) -> Learner:
    """Find the client as it trains; it is built anew when a whole model arrives."""
    if run.learner is not None and whole:  # its network trains already: begin with a new one
        run.party, run.learner = run.party.anew(), None
    if run.learner is None:
        run.learner, run.at = run.party.learner(**first), -1
    return run.learner


def _first(run: Participation, given: dict[str, bytes], implied: bool) -> dict[str, Any]:
    """Store what a message brings of model, mask and head, and read what earlier ones brought.

    Returns:
        By name the messages, empty where there are none, and ``implied``: whether the model has no zeros of the mask.

    """
    folder = run.folder / FIRST
    folder.mkdir(exist_ok=True)
    if given["model"]:
        for old in folder.iterdir():
            old.unlink()
    for name, message in given.items():
        if message:
            files.write(folder / f"{name}.bin", message)
    if given["model"] and implied:
        files.write(folder / "implied", b"")
    paths = {name: folder / f"{name}.bin" for name in FIRSTS}
    found: dict[str, Any] = {name: path.read_bytes() if path.is_file() else b"" for name, path in paths.items()}
    return found | {"implied": (folder / "implied").is_file()}


def _path(run: Participation, round: int) -> Path:
    return run.folder / ROUNDS / f"{round}.safetensors"


def _stored(run: Participation, round: int) -> dict[str, Tensor]:
    return load_file(_path(run, round))


def _rounds(run: Participation, number: int) -> set[int]:
    """List the rounds before a round whose state is stored."""
    return {int(file.stem) for file in (run.folder / ROUNDS).glob("*.safetensors") if int(file.stem) < number}


def _store(run: Participation, round: int, rows: dict[str, Tensor], needed: set[int]) -> None:
    """Store the state after a round, and remove that of rounds to which no server goes back."""
    path = _path(run, round)
    path.parent.mkdir(exist_ok=True)
    files.write(path, save({name: row.detach().cpu().contiguous() for name, row in rows.items()}))
    stored = sorted(int(file.stem) for file in path.parent.glob("*.safetensors"))
    for old in stored[:-KEPT]:
        if old not in needed:
            _path(run, old).unlink()
