"""From the parts of a run to the one Trainer that carries it out."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.utils import instantiate
from lightning.pytorch.plugins.precision import Precision
from omegaconf import DictConfig, OmegaConf

from fedsparse.build import Parts, build_exchange, build_personal, streaming
from fedsparse.core import files, parallel
from fedsparse.core.precisions import DOUBLE, HALF
from fedsparse.data.augment import augment
from fedsparse.data.datamodule import FederatedDataModule
from fedsparse.devices import accelerator, build_device
from fedsparse.federation.client.training import LOCAL
from fedsparse.federation.combinations import check_names
from fedsparse.federation.exchange.ledger import Ledger
from fedsparse.federation.exchange.traffic import Traffic
from fedsparse.federation.federation import Federation
from fedsparse.federation.masking import MaskSchedule
from fedsparse.federation.phases import Phases
from fedsparse.federation.stores.store import ClientStore, make_store
from fedsparse.limits import seconds_of
from fedsparse.simulation import strategy
from fedsparse.simulation.artifacts import Artifacts, begun
from fedsparse.simulation.callback import FederatedRounds
from fedsparse.simulation.checkpoint import LAST, AtomicCheckpointIO, RoundCheckpoint
from fedsparse.simulation.csv_logger import RoundCSV
from fedsparse.simulation.evaluation import Evaluation
from fedsparse.simulation.module import ClientModule
from fedsparse.simulation.personal import CLIENTS, Personal
from fedsparse.simulation.precision import DoublePrecision, HalfPrecision
from fedsparse.simulation.progress import RoundProgress
from fedsparse.simulation.tracking import GracefulStop, RoundLog

TRAFFIC = "traffic.csv"


def build_rounds(
    cfg: DictConfig,
    parts: Parts,
    choice: MaskSchedule,
    ledger: Ledger,
    module: ClientModule,
    folder: Path,
    closed: int = 0,
) -> FederatedRounds:
    """Build the rounds; what clients keep may lie in the run folder, whose tables hold so many rounds already."""
    row = torch.as_tensor(module.mask).cpu()
    exchange = build_exchange(cfg, row, parts.space.local, module.own_masks, parts.space)
    check_names(exchange, parts.space, row)
    make = partial(_store, cfg.federation.store, folder)
    exchange.keep_in(make)
    module.keep_in(make)
    ledger.link = instantiate(cfg.link)
    traffic = Traffic(folder / TRAFFIC if parallel.process() == 0 else None)
    traffic.drop_from(closed + 1)
    federate = partial(
        Federation,
        exchange=exchange,
        aggregation=instantiate(cfg.aggregation),
        topology=instantiate(cfg.topology),
        make_server=instantiate(cfg.server.optimizer),
        untouched=cfg.server.untouched,
        phases=parts.phases,
        schedule=instantiate(cfg.schedule),
        choice=choice,
        store=make(LOCAL),
        ledger=ledger,
        traffic=traffic,
        model_length=parts.model_length,
    )
    return FederatedRounds(federate)


def _store(kind: str, folder: Path, name: str) -> ClientStore:
    """Make a store of what clients keep, in memory or in the run folder."""
    return make_store(kind, folder / f"{name}.bin")


def build_checkpoints(
    cfg: DictConfig, folder: Path, rounds: FederatedRounds, phases: Phases
) -> list[lightning.Callback]:
    """Best by validation, and last; both written when a round closes, and the rounds are told of the last."""
    shared: dict[str, Any] = {
        "dirpath": folder / "checkpoints",
        "save_top_k": 1,
        "enable_version_counter": False,
        "save_on_train_epoch_end": True,
    }
    every = cfg.federation.checkpoint_every
    best = RoundCheckpoint(phases.explores, **shared, monitor="val/acc", mode="max", filename="best")
    last = RoundCheckpoint(told=rounds.saved, **shared, filename=LAST.removesuffix(".ckpt"), every_n_epochs=every)
    return [best, last]


@dataclass(frozen=True)
class Callbacks:
    """The callbacks of a run; those that are asked something afterwards by name."""

    rounds: FederatedRounds
    log: RoundLog
    stop: GracefulStop
    artifacts: Artifacts
    others: list[lightning.Callback]
    personal: Personal | None = None

    def listed(self) -> list[lightning.Callback]:
        """In the order that Lightning is to call them: the protocol first, checkpoints last."""
        before, after = ([], []) if self.personal is None else ([self.personal.before], [self.personal])
        watching = [self.log.evaluation, self.log, self.stop, self.artifacts]
        return [*before, self.rounds, *after, *watching, *self.others]


def build_callbacks(
    cfg: DictConfig,
    rounds: FederatedRounds,
    federation: Parts,
    choice: MaskSchedule,
    folder: Path,
    shared: bool = False,
) -> Callbacks:
    """Build all callbacks; ``shared`` if other runs write to the same terminal at the same time."""
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    evaluation = Evaluation(federation.tests, federation.dataset.own, rounds.group)
    progress = RoundProgress(rounds, evaluation, lambda round: len(federation.phased.sample(round)), shared=shared)
    chosen = [instantiate(callback) for callback in (cfg.callbacks or {}).values()]
    artifacts = Artifacts(folder, config, lambda: choice.mask.by_layer())
    others = [progress, *chosen, *build_checkpoints(cfg, folder, rounds, federation.phases)]
    stop = GracefulStop(seconds_of(OmegaConf.to_container(cfg.trainer, resolve=True).get("max_time")))  # type: ignore[union-attr]
    personal = build_personal(cfg, folder / CLIENTS if parallel.process() == 0 else None, rounds)
    return Callbacks(rounds, RoundLog(rounds, evaluation, personal), stop, artifacts, others, personal)


def build_loggers(cfg: DictConfig, folder: Path, group: str | None, round: int) -> list[Any]:
    """Build metrics.csv, and the loggers of the group ``logger``, without those that cannot be begun.

    Args:
        cfg: the configuration.
        folder: the run folder.
        group: name shared by the runs of a sweep.
        round: rounds closed so far; rows after it are dropped from metrics.csv.

    """
    table = RoundCSV(folder)
    table.drop_from(round + 1)
    chosen = cfg.logger or {}
    options = {"wandb": {"group": group, "id": _run_id(folder), "resume": "allow"}} if "wandb" in chosen else {}
    built = [instantiate(chosen[name])(save_dir=str(folder), **options.get(name, {})) for name in chosen]
    return [table, *(logger for logger in built if begun(logger))]


def build_trainer(cfg: DictConfig, callbacks: Callbacks, loggers: list[Any], rounds: int) -> lightning.Trainer:
    """Build the one Trainer that runs the whole federation, for so many rounds."""
    own = _own_precision(cfg)
    several = {"strategy": strategy.CohortStrategy()} if parallel.joined() else {}
    found = [environment] if (environment := strategy.environment()) else []
    return instantiate(cfg.trainer)(
        **({} if own is None else {"precision": None}),
        **several,
        accelerator=accelerator(cfg),
        max_epochs=rounds,
        max_time=None,
        check_val_every_n_epoch=cfg.federation.eval_every,
        callbacks=callbacks.listed(),
        logger=loggers,
        plugins=[AtomicCheckpointIO(), *found, *([] if own is None else [own])],
        num_sanity_val_steps=0,
        reload_dataloaders_every_n_epochs=1,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        log_every_n_steps=1,
    )


def _own_precision(cfg: DictConfig) -> Precision | None:
    """Build the plugin of a precision that Lightning's own would not do; None for the others."""
    if cfg.trainer.precision == HALF:
        return HalfPrecision(build_device(cfg))
    return DoublePrecision() if cfg.trainer.precision == DOUBLE else None


def build_datamodule(cfg: DictConfig, federation: Parts) -> FederatedDataModule:
    """Build the loaders of cohorts and splits."""
    chosen = augment(cfg.data.augment)
    return FederatedDataModule(
        federation.dataset, federation.phased, federation.tests, augment=chosen, **streaming(cfg)
    )


def _run_id(folder: Path) -> str:
    """Name of the run for Weights & Biases: made once, kept in the folder, so that a resume goes on in the same run."""
    path = folder / ".run_id"
    if not path.exists():
        files.write(path, secrets.token_hex(4))
    return path.read_text().strip()
