"""Executes a run: assemble, prepare head and mask, train, write. Of several processes the first leads."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from torch import Tensor

from fedsparse.core import parallel, signals
from fedsparse.core.folder import (
    ADAPTERS,
    CHECKPOINTS,
    CLUSTERS,
    LAST,
    MASK,
    MASK_PICTURE,
    TRAFFIC,
    TRAJECTORY,
    WEIGHTS,
)
from fedsparse.core.folder import store as store_file
from fedsparse.core.lines import RoundLines
from fedsparse.core.weights import save_weights
from fedsparse.data.datamodule import FederatedDataModule
from fedsparse.federation.adapters import COLUMNS, AdapterTable
from fedsparse.federation.client.training import LOCAL, Clients
from fedsparse.federation.clustering import ClusterTable
from fedsparse.federation.diverged import Diverged
from fedsparse.federation.exchange.ledger import Ledger, Traffic
from fedsparse.federation.federation import Federation
from fedsparse.federation.masking import MaskSchedule, zero
from fedsparse.federation.stores.store import ClientStore, make_store
from fedsparse.federation.watcher import Watcher
from fedsparse.job.assemble import assemble
from fedsparse.job.budget import evaluation_line
from fedsparse.job.checks import check_names
from fedsparse.job.cohorts import fastest
from fedsparse.job.parts import Assembly
from fedsparse.job.prepare import OVERLAP, draw, prepare, record, save_deviation
from fedsparse.job.reach import Join, Joined, in_one_process
from fedsparse.job.resume import Job
from fedsparse.job.summary import summarise, write_results
from fedsparse.job.tracked import clients_table, identity_of
from fedsparse.job.trial import check_trainable
from fedsparse.masks import Mask
from fedsparse.preparation.calibration import Calibrated
from fedsparse.simulation import processes
from fedsparse.simulation.callback import FederatedRounds
from fedsparse.simulation.checkpoint import choose_checkpoint, read_checkpoint
from fedsparse.simulation.devices import kernels
from fedsparse.simulation.evaluation import Evaluation
from fedsparse.simulation.module import ClientModule
from fedsparse.simulation.origin import Origin
from fedsparse.simulation.own_models import OwnModels
from fedsparse.simulation.tracking import hand_on
from fedsparse.simulation.trainer import Callbacks, Trainer, build_callbacks, build_loggers, build_trainer

log = logging.getLogger("fedsparse")


class Unfinished(ValueError):
    """A limit ended a run before its last round; it can be resumed."""


@dataclass(frozen=True)
class Start:
    """The state before the first round, as prepared by the leading process.

    Attributes:
        found: mask, and the clients' own masks.
        ledger: bytes of the preparation.
        net: the model's tensors by name, on the CPU; empty in a single process.
        bound: largest cohort.
        checkpoint: of a resumed run; None: the run is new.

    """

    found: Calibrated
    ledger: Ledger
    net: dict[str, Tensor]
    bound: int
    checkpoint: Path | None


@dataclass(frozen=True)
class Training:
    """The parts of a training that are read after it; ``max_time`` is ``trainer.max_time``."""

    trainer: Trainer
    rounds: FederatedRounds
    callbacks: Callbacks
    choice: MaskSchedule
    max_time: Any


def execute(job: Job, join: Join = in_one_process) -> dict[str, Any]:
    """Execute a run in the configured number of processes; returns its summary.

    Args:
        job: the run.
        join: brings the clients in, once the run is assembled, before anything is prepared.

    Raises:
        Unfinished: a limit ended it; one line, with the argument to resume.
        Stopped: a signal ended it; the same line was printed.

    """
    quiet()
    try:
        with signals.heeded(), processes.team(processes.size_of(job.cfg.trainer)):
            log.info("process %d", os.getpid())
            return _lead(job, join)
    except (KeyboardInterrupt, signals.Stopped) as error:
        stop = error if isinstance(error, signals.Stopped) else signals.Stopped(signal.SIGINT)
        if not stop.said:
            saved = (job.folder / CHECKPOINTS / LAST).exists()
            _say(stop.number, "what was saved before stays" if saved else "no round is saved yet", job)
        raise signals.Stopped(stop.number, said=True) from None


def _lead(job: Job, join: Join) -> dict[str, Any]:
    joined = join(job, assemble(job.cfg))
    parallel.share(job)  # after the data set's download, which the others then read
    session = joined.assembly.session
    with kernels(session.deterministic, session.tf32):
        return _complete(job, joined)


def _complete(job: Job, joined: Joined) -> dict[str, Any]:
    """Prepare, train, and write the results; returns the summary."""
    assembly = joined.assembly
    module = assembly.module()
    origin = assembly.origin(module)  # before the head sees data
    start = _start(job, joined, module, origin)
    parallel.share(start)
    assembly = replace(assembly, course=assembly.course.bounded(start.bound))
    module.stack(assembly.course.cohort)
    training = _train(job, replace(joined, assembly=assembly), module, start, origin)
    _stopped(job, training)
    save_weights(assembly.problem.net, job.folder / WEIGHTS)  # first, so that no error in a figure loses them
    if assembly.keep_deviation and training.choice.observed is not None:
        save_deviation(job.folder, assembly.problem.space.unflatten(training.choice.observed.cpu()))
    changed = training.choice.mask is not start.found.mask or not (job.folder / MASK_PICTURE).exists()
    if changed and assembly.pictures:
        draw(job.folder, training.choice.mask)  # once, of the last mask
    federation, seconds = training.rounds.federation, training.callbacks.log.seconds
    summary = summarise(job, assembly, federation, start.found, training.choice.mask, seconds)
    write_results(job.folder, summary, assembly.pictures)
    clients = partial(clients_table, job.folder, assembly.problem)
    training.callbacks.artifacts.close(training.trainer.loggers, summary["rounds"], summary, clients)
    return summary | {"folder": str(job.folder)}


def follow() -> None:
    """Train this process's clients of the same rounds, until the leading process ends.

    Raises:
        ValueError: a part cannot be built in this process.

    """
    warnings.simplefilter("ignore")  # the leading process gives them
    try:
        while (job := parallel.share()) is not None:
            quiet()
            assembly = assemble(job.cfg)
            start = parallel.share()
            if start is None:
                return
            with kernels(assembly.session.deterministic, assembly.session.tf32):
                _train_along(job, replace(assembly, course=assembly.course.bounded(start.bound)), start)
    except Diverged:
        return  # the leading process reports it


def _train_along(job: Job, assembly: Assembly, start: Start) -> None:
    """Train from what the leading process has prepared."""
    module = assembly.module()
    origin = assembly.origin(module)
    assembly.problem.net.load_state_dict(start.net)
    module.set_mask(start.found.mask.row(assembly.problem.space), start.found.bitmaps)
    _train(job, Joined(assembly), module, start, origin)


def _start(job: Job, joined: Joined, module: ClientModule, origin: Origin) -> Start:
    """Prepare a run's first round, or read the state of a resumed run."""
    assembly = joined.assembly
    problem, ledger, checkpoint = assembly.problem, Ledger(), _checkpoint(job, assembly, origin)
    if checkpoint is None:
        check_trainable(assembly, module.buffer_policy)
    if checkpoint is None:
        found = prepare(job, assembly, module, ledger, joined.gather)
    else:
        found = _stored(job, assembly, checkpoint)
    module.set_mask(found.mask.row(problem.space), found.bitmaps)
    if checkpoint is None and assembly.method.sparsity.mode == "prune":
        zero(problem.net, problem.space, torch.as_tensor(module.mask))
    bound = assembly.course.plan.bound
    if assembly.course.measured:
        stored = None if checkpoint is None else read_checkpoint(checkpoint, problem.space).get("cohort")
        bound = stored or fastest(assembly, module)
    net = {name: tensor.cpu() for name, tensor in problem.net.state_dict().items()} if parallel.joined() else {}
    return Start(found, ledger, net, bound, checkpoint)


def _train(job: Job, joined: Joined, module: ClientModule, start: Start, origin: Origin) -> Training:
    """Train to the last round.

    Raises:
        ValueError: more rounds are closed than configured.

    """
    assembly, leads = joined.assembly, parallel.process() == 0
    problem, phases = assembly.problem, assembly.course.phases
    closed = 0 if start.checkpoint is None else read_checkpoint(start.checkpoint, problem.space)["epoch"] + 1
    asked = assembly.config["federation"]["rounds"]
    if closed > phases.total:
        raise ValueError(f"{closed} rounds are closed already; with federation.rounds={asked} the run has fewer")
    method = assembly.method
    report = partial(record, job) if leads else _silent
    choice = MaskSchedule(
        method.rule, method.sparsity, problem.space, problem.seed, start.found.mask, report, start.found.observed
    )
    rounds = FederatedRounds(_federate(job.folder, assembly, module, choice, start.ledger, closed), joined.take_part)
    identity = identity_of(job.folder, job.choices, job.group)
    session = replace(assembly.session, config=assembly.session.config | {"options": dict(identity.options)})
    callbacks = build_callbacks(
        session,
        rounds,
        Evaluation(problem.tests, problem.dataset.own, rounds.group),
        OwnModels(rounds, joined.own) if problem.vals or joined.own is not None else None,
        lambda round: len(assembly.course.phased.sample(round)),
        phases,
        lambda: choice.mask,
        job.folder,
        shared=_beside_others() or not leads,
    )
    if callbacks.personal is not None:
        callbacks.personal.table.drop_from(closed + 1)
    evaluated = len(problem.dataset.val.y) + len(problem.dataset.test.y)
    if leads and (line := evaluation_line(evaluated, assembly.course.plan.samples(0), assembly.session.eval_every)):
        log.warning("%s", line)
    loggers = build_loggers(session.loggers, job.folder, identity, closed) if leads else []
    trainer = build_trainer(session, callbacks, loggers, phases.total, origin)
    data = assembly.datamodule(bundle=math.inf) if joined.apart else assembly.datamodule()
    trainer.fit(module, data, ckpt_path=start.checkpoint)
    return Training(trainer, rounds, callbacks, choice, assembly.config["trainer"].get("max_time"))


def _federate(
    folder: Path, assembly: Assembly, module: ClientModule, choice: MaskSchedule, ledger: Ledger, closed: int
) -> Callable[[Clients], Federation]:
    """Build the constructor of the federation, with client stores and tables in the run folder.

    Rows of tables after ``closed`` rounds are dropped.
    """
    method, row, leads = assembly.method, torch.as_tensor(module.mask).cpu(), parallel.process() == 0
    traffic = Traffic(folder / TRAFFIC if leads else None)
    traffic.drop_from(closed + 1)
    ledger.link = method.link
    exchange, make = method.make_exchange(row, module.own_masks), partial(_store, method.store, folder)
    check_names(exchange, assembly.problem.space, row)
    exchange.keep_in(make)
    module.keep_in(make)
    if method.regrouping is not None:
        method.regrouping.keep_in(make)
    return method.federate(
        exchange,
        assembly.course.phases,
        choice=choice,
        store=make(LOCAL),
        ledger=ledger,
        traffic=traffic,
        model_length=assembly.problem.model_length,
        head=assembly.prepared_head(row),
        watchers=_watchers(folder if leads else None, assembly, closed),
    )


def _watchers(folder: Path | None, assembly: Assembly, closed: int) -> list[Watcher]:
    """Build what writes rows and tables of adapters; only the process that leads has a folder."""
    trajectory, problem, found = assembly.method.trajectory, assembly.problem, list[Watcher]()
    if trajectory is not None:
        found.append(trajectory(path=folder and folder / TRAJECTORY))
    if problem.adapters:
        table = RoundLines(COLUMNS, folder and folder / ADAPTERS)
        table.drop_from(closed + 1)
        found.append(AdapterTable(table, problem.adapters, problem.space))
    if assembly.method.mixing is not None:
        truth = problem.truth_of(assembly.method.topology)
        found.append(ClusterTable(folder and folder / CLUSTERS, closed, truth))
    return found


def _store(kind: str, folder: Path, name: str) -> ClientStore:
    """Build a store of client state, in memory or in the run folder."""
    return make_store(kind, folder / store_file(name))


def _silent(mask: Mask) -> Mask:
    return mask


def _stopped(job: Job, training: Training) -> None:
    """End the run after a signal or a limit; the round is closed and saved.

    Raises:
        Stopped: a signal was received.
        Unfinished: ``trainer.max_time`` was reached before the last round.

    """
    received, closed = training.callbacks.stop.received, training.trainer.current_epoch
    if received:
        training.callbacks.artifacts.close(training.trainer.loggers, closed)
        _say(received[0], f"round {closed} is closed and saved", job)
        hand_on(received)
        raise signals.Stopped(received[0], said=True)
    if training.callbacks.stop.overtime and closed < training.rounds.federation.phases.total:
        training.callbacks.artifacts.close(training.trainer.loggers, closed)
        limit = f"trainer.max_time={training.max_time}"
        raise Unfinished(f"{limit}: round {closed} is closed and saved; go on with resume={job.folder}")


def _say(number: signal.Signals, state: str, job: Job) -> None:
    """Write one line to the terminal and run.log: the signal, the saved state, and the argument to resume."""
    line = f"{number.name}: {state}; go on with resume={job.folder}"
    log.info(line)
    print(f"fedsparse: {line}", file=sys.stderr, flush=True)


def _beside_others() -> bool:
    """Whether a launcher of Hydra runs several jobs at the same time."""
    return HydraConfig.initialized() and not str(HydraConfig.get().launcher._target_).endswith("BasicLauncher")


def _stored(job: Job, assembly: Assembly, checkpoint: Path) -> Calibrated:
    """Read the masks of a checkpoint, with the metadata of the run's mask file."""
    space, path = assembly.problem.space, job.folder / MASK
    state = read_checkpoint(checkpoint, space)["state_dict"]
    metadata = Mask.load(path).metadata if path.is_file() else {}
    overlap = tuple(json.loads(metadata.get(OVERLAP, "[]")))
    return Calibrated(Mask(space.unflatten(state["mask"]), metadata), state["bitmaps"], overlap)


def _checkpoint(job: Job, assembly: Assembly, origin: Origin) -> Path | None:
    """Choose the checkpoint of a resumed run: the last one that can be read; None of a new run.

    Raises:
        ValueError: none can be read, or data or weights are not those that the run began with.

    """
    if not job.resumed:
        return None
    space = assembly.problem.space
    path, complaints = choose_checkpoint(job.folder / CHECKPOINTS, space)
    if path is not None:
        stored = read_checkpoint(path, space)
        _check_data(stored[FederatedDataModule.__qualname__]["fingerprint"], assembly.problem.dataset.fingerprint)
        origin.check(stored)
    for complaint in complaints:
        log.warning("%s; the one before it is used", complaint)
    return path


def _check_data(stored: str, found: str) -> None:
    """Refuse to resume a run on other data.

    Raises:
        ValueError: the fingerprints differ, by another version of Python or replaced files.

    """
    if stored != found:
        raise ValueError(
            f"the data is not what this run began with (fingerprint {stored}, now {found}): texts of "
            "data=stdlib_docs differ by the version of Python, and files may have changed; begin a new run"
        )


def quiet() -> None:
    """Silence Lightning's messages and those of its warnings that need no action."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for text in (
        "does not have many workers",
        "Checkpoint directory",
        "`isinstance\\(treespec",
        "smaller than the logging",
        "GPU available but not used",  # also given for Apple GPUs
        "sync_dist=True",  # all processes log equal figures
        "callbacks used to create the checkpoint",  # of a run of before, whose best checkpoint had another monitor
    ):
        warnings.filterwarnings("ignore", f".*{text}.*")
