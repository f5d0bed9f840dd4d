"""A run, carried out: build, prepare head and mask, train, write. Of several processes one leads, the others follow."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from fedsparse import build, cohorts, fitting, results, team
from fedsparse.core import parallel, signals
from fedsparse.core.precisions import dtype_of, made_in
from fedsparse.core.weights import save_weights
from fedsparse.data.datamodule import FederatedDataModule
from fedsparse.federation.exchange.ledger import Ledger
from fedsparse.federation.masking import MaskSchedule, zero
from fedsparse.federation.reports import Diverged
from fedsparse.finished import WEIGHTS
from fedsparse.masks import Mask
from fedsparse.models.flops import pruning_figures
from fedsparse.preparation.calibration import Calibrated
from fedsparse.prepare import (
    MASK,
    OVERLAP,
    PICTURE,
    draw,
    mean_client_overlap,
    prepare,
    record,
    save_deviation,
    sparsity_of,
)
from fedsparse.resume import Job
from fedsparse.simulation.callback import FederatedRounds
from fedsparse.simulation.checkpoint import LAST, choose_checkpoint, read_checkpoint
from fedsparse.simulation.csv_logger import read_rows
from fedsparse.simulation.module import ClientModule
from fedsparse.simulation.tracking import hand_on
from fedsparse.trial import check_trainable

log = logging.getLogger("fedsparse")


class Unfinished(ValueError):
    """A limit ended a run before its last round; it can go on."""


@dataclass(frozen=True)
class Start:
    """What the rounds begin with, as the leading process prepared it.

    Attributes:
        found: mask, and the clients' own masks.
        ledger: bytes so far.
        net: the model's tensors by name, on the CPU.
        cohort: upper bound of the clients that train together.
        checkpoint: what a resumed run goes on from.

    """

    found: Calibrated
    ledger: Ledger
    net: dict[str, Tensor]
    cohort: int
    checkpoint: Path | None


@dataclass(frozen=True)
class Training:
    """The parts of a training that are asked something afterwards."""

    trainer: lightning.Trainer
    rounds: FederatedRounds
    callbacks: fitting.Callbacks
    choice: MaskSchedule


def execute(job: Job) -> dict[str, Any]:
    """Carry out a run with as many processes as it asks for; returns its summary.

    Raises:
        Unfinished: a limit ended it; one line says how to go on.
        Stopped: a signal did, and a line has said how to go on.

    """
    quiet()
    try:
        with signals.heeded(), team.team(team.size_of(job.cfg)):
            log.info("process %d", os.getpid())
            return _lead(job)
    except (KeyboardInterrupt, signals.Stopped) as error:
        stop = error if isinstance(error, signals.Stopped) else signals.Stopped(signal.SIGINT)
        if not stop.said:
            saved = (job.folder / "checkpoints" / LAST).exists()
            _say(stop.number, "what was saved before stays" if saved else "no round is saved yet", job)
        raise signals.Stopped(stop.number, said=True) from None


def _lead(job: Job) -> dict[str, Any]:
    federation = build.build_federation(job.cfg)
    parallel.share(job)  # only now: what the data set downloads is there for all
    module = build.build_module(job.cfg, federation)
    start = _start(job, federation, module)
    parallel.share(start)
    training = _train(job, federation, module, start)
    _stopped(job, training)
    save_weights(federation.net, job.folder / WEIGHTS)  # first, whatever may go wrong with figures of it
    if job.cfg.explore.get("save") and training.choice.observed is not None:
        save_deviation(job.folder, federation.space.unflatten(training.choice.observed.cpu()))
    if training.choice.mask is not start.found.mask or not (job.folder / PICTURE).exists():
        draw(job, training.choice.mask)  # once, however often it was chosen anew
    summary = _summary(job, federation, start.found, training)
    results.write_results(job.folder, summary, job.cfg.pictures)
    training.callbacks.artifacts.close(training.trainer.loggers)
    return summary | {"folder": str(job.folder)}


def follow() -> None:
    """Train other clients of the same rounds, until the leading process has nothing more to do.

    Raises:
        ValueError: this process cannot build what the leading one could.

    """
    warnings.simplefilter("ignore")  # the leading process warns
    try:
        while (job := parallel.share()) is not None:
            quiet()
            federation = build.build_federation(job.cfg)
            module, start = build.build_module(job.cfg, federation), parallel.share()
            if start is None:
                return
            federation.net.load_state_dict(start.net)
            module.set_mask(start.found.mask.row(federation.space), start.found.bitmaps)
            cohorts.set_cohort(federation, module, start.cohort)
            _train(job, federation, module, start)
    except Diverged:
        return  # the leading process says so


def _start(job: Job, federation: build.Parts, module: ClientModule) -> Start:
    """Prepare a run's first round, or find what a resumed one goes on from."""
    ledger, checkpoint = Ledger(), _checkpoint(job, federation)
    if checkpoint is None:
        check_trainable(job.cfg, federation)
    found = prepare(job, federation, module, ledger) if checkpoint is None else _stored(job, federation, checkpoint)
    module.set_mask(found.mask.row(federation.space), found.bitmaps)
    if checkpoint is None and job.cfg.sparsity.mode == "prune":
        zero(federation.net, federation.space, torch.as_tensor(module.mask))
    state = {} if checkpoint is None else read_checkpoint(checkpoint, federation.space)
    cohorts.settle_cohort(job.cfg, federation, module, state.get("cohort"))
    net = {name: tensor.cpu() for name, tensor in federation.net.state_dict().items()} if parallel.joined() else {}
    return Start(found, ledger, net, federation.plan.bound, checkpoint)


def _train(job: Job, federation: build.Parts, module: ClientModule, start: Start) -> Training:
    """Train to the last round."""
    closed, leads = 0, parallel.process() == 0
    if start.checkpoint is not None:
        closed = read_checkpoint(start.checkpoint, federation.space)["epoch"] + 1
    if closed > federation.phases.total:
        raise ValueError(
            f"{closed} rounds are closed already; with federation.rounds={job.cfg.federation.rounds} the run has fewer"
        )
    choice = _choice(job, federation, start.found, leads)
    rounds = fitting.build_rounds(job.cfg, federation, choice, start.ledger, module, job.folder, closed)
    callbacks = fitting.build_callbacks(job.cfg, rounds, federation, choice, job.folder, _beside_others() or not leads)
    if callbacks.personal is not None:
        callbacks.personal.table.drop_from(closed + 1)
    loggers = fitting.build_loggers(job.cfg, job.folder, job.group, closed) if leads else []
    trainer = fitting.build_trainer(job.cfg, callbacks, loggers, federation.phases.total)
    trainer.fit(module, fitting.build_datamodule(job.cfg, federation), ckpt_path=start.checkpoint)
    return Training(trainer, rounds, callbacks, choice)


def _choice(job: Job, federation: build.Parts, found: Calibrated, leads: bool) -> MaskSchedule:
    """Make what chooses masks while clients train; the leading process writes them down."""
    report = partial(record, job) if leads else _silent
    rule, sparsity = instantiate(job.cfg.mask_rule), build.build_sparsity(job.cfg, federation.net)
    return MaskSchedule(rule, sparsity, federation.space, job.cfg.seed, found.mask, report, found.observed)


def _silent(mask: Mask) -> Mask:
    return mask


def _stopped(job: Job, training: Training) -> None:
    """End the run if a signal or a limit asked for it: the round is closed and saved.

    Raises:
        Stopped: a signal did.
        Unfinished: ``trainer.max_time`` did, before the last round.

    """
    received, closed = training.callbacks.stop.received, training.trainer.current_epoch
    if received:
        training.callbacks.artifacts.close(training.trainer.loggers)
        _say(received[0], f"round {closed} is closed and saved", job)
        hand_on(received)
        raise signals.Stopped(received[0], said=True)
    if training.callbacks.stop.overtime and closed < training.rounds.federation.phases.total:
        training.callbacks.artifacts.close(training.trainer.loggers)
        limit = f"trainer.max_time={job.cfg.trainer.max_time}"
        raise Unfinished(f"{limit}: round {closed} is closed and saved; go on with resume={job.folder}")


def _say(number: signal.Signals, state: str, job: Job) -> None:
    """Say in one line, on the terminal and in run.log, what a signal has ended and how to go on."""
    line = f"{number.name}: {state}; go on with resume={job.folder}"
    log.info(line)
    print(f"fedsparse: {line}", file=sys.stderr, flush=True)


def _summary(job: Job, federation: build.Parts, found: Calibrated, training: Training) -> dict[str, Any]:
    """Gather what summary.json holds."""
    always, mask = federation.space.where(job.cfg.sparsity.always_train), training.choice.mask
    return results.summarise(
        federation,
        training.rounds,
        mask,
        read_rows(job.folder / "metrics.csv"),
        seconds=training.callbacks.log.seconds,
        seed=job.cfg.seed,
        cohort=federation.cohort,
        processes=parallel.processes(),
        head=job.cfg.head.init,
        sparsity=sparsity_of(mask, always, federation.space),
        client_steps=training.rounds.federation.ledger.client_steps,
        **_chance(job, federation, training.rounds.federation.ledger),
        **_pruned(job, federation),
        mask_overlap_rounds=list(found.overlap),
        mask_overlap_clients=mean_client_overlap(found, federation.space),
        **_chosen(job),
        **_exchanged(job),
    )


def _chance(job: Job, federation: build.Parts, ledger: Ledger) -> dict[str, float | None]:
    """What a reader wants to know of a run that learned nothing: chance, clipping and rate."""
    clip_norm, labels = job.cfg.optimizer.clip_norm, federation.dataset.common_test.y
    clipped = None if clip_norm is None else ledger.clipped_steps / max(1, ledger.round_steps)
    chance = int(labels.bincount().max()) / len(labels) if len(labels) else None
    return {"chance": chance, "clipped_fraction": clipped, "clip_norm": clip_norm, "lr": job.cfg.optimizer.lr}


def _pruned(job: Job, federation: build.Parts) -> dict[str, float]:
    """What pruning leaves of the model, where the run prunes."""
    if job.cfg.sparsity.mode != "prune":
        return {}
    net = federation.space.tensors(federation.net)[0]  # Lightning has moved it back to the CPU
    x = federation.dataset.train.x[torch.tensor([0])].to(net.device)
    with made_in(dtype_of(job.cfg.trainer.precision)):
        return pruning_figures(federation.net, federation.inputs(x))


def _beside_others() -> bool:
    """Whether this is one of several jobs that a launcher of Hydra runs at the same time."""
    return HydraConfig.initialized() and not str(HydraConfig.get().launcher._target_).endswith("BasicLauncher")


def _chosen(job: Job) -> dict[str, str | None]:
    """The options that name a run, as the summary keeps them."""
    keys = (
        *("mask_rule", "partition", "data", "model", "experiment"),
        *("exchange", "aggregation", "server", "objective", "link"),
    )
    return {key: None if job.choices.get(key) in (None, "None", "null") else job.choices[key] for key in keys}


def _exchanged(job: Job) -> dict[str, Any]:
    """What of the exchange a reader of the summary wants to know."""
    options = OmegaConf.to_container(job.cfg.exchange, resolve=True)
    assert isinstance(options, dict)
    found = {f"exchange_{key}": options.get(key) for key in ("fraction", "feedback", "precision", "payload", "compat")}
    chosen = job.choices.get("exchange")
    ruled = "rule" in options["build"]
    return found | {"exchange_rule": options.get("by", chosen) if ruled else None}


def _stored(job: Job, federation: build.Parts, checkpoint: Path) -> Calibrated:
    """Take the masks of a checkpoint, under the metadata of the run's mask file."""
    state = read_checkpoint(checkpoint, federation.space)["state_dict"]
    path = job.folder / MASK
    metadata = Mask.load(path).metadata if path.is_file() else {}
    overlap = tuple(json.loads(metadata.get(OVERLAP, "[]")))
    return Calibrated(Mask(federation.space.unflatten(state["mask"]), metadata), state["bitmaps"], overlap)


def _checkpoint(job: Job, federation: build.Parts) -> Path | None:
    """Choose what a resumed run goes on from."""
    if not job.resumed:
        return None
    path, complaints = choose_checkpoint(job.folder / "checkpoints", federation.space)
    if path is not None:
        stored = read_checkpoint(path, federation.space)[FederatedDataModule.__qualname__]["fingerprint"]
        _check_data(stored, federation.dataset.fingerprint)
    for complaint in complaints:
        log.warning("%s; the one before it is used", complaint)
    return path


def _check_data(stored: str, found: str) -> None:
    """Refuse to go on with other data than the run began with.

    Raises:
        ValueError: text that is read from the running Python differs by its version, files may have been replaced.

    """
    if stored != found:
        raise ValueError(
            f"the data is not what this run began with (fingerprint {stored}, now {found}): texts of "
            "data=stdlib_docs differ by the version of Python, and files may have changed; begin a new run"
        )


def quiet() -> None:
    """Keep what Lightning says about itself off the terminal; warnings that a person can act on stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for text in (
        "does not have many workers",
        "Checkpoint directory",
        "`isinstance\\(treespec",
        "smaller than the logging",
        "GPU available but not used",  # Lightning's advice to take an Apple GPU too
        "sync_dist=True",  # all processes hold the same figures
    ):
        warnings.filterwarnings("ignore", f".*{text}.*")
