"""From a configuration to the objects of a run."""

from __future__ import annotations

import copy
import logging
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from fedsparse.data.augment import augment
from fedsparse.data.checks import checked_integer
from fedsparse.data.datamodule import FederatedDataModule
from fedsparse.data.datasets import Dataset
from fedsparse.data.images import Inputs, TokenInputs, inputs_for
from fedsparse.data.own_tests import own_tests, with_own_tests
from fedsparse.data.partition import client_tests
from fedsparse.data.phased import PhasedPlan
from fedsparse.data.rounds import LocalWork, RoundPlan
from fedsparse.data.splits import user_tests
from fedsparse.federation import parallel
from fedsparse.federation.artifacts import Artifacts
from fedsparse.federation.autotune import choose, measure
from fedsparse.federation.buffers import Buffers
from fedsparse.federation.checkpoint import LAST, AtomicCheckpointIO, RoundCheckpoint
from fedsparse.federation.choice import MaskChoice, length_of
from fedsparse.federation.client import HALF, ClientModule, can_stack
from fedsparse.federation.combinations import check_names, check_pruning, check_sizes, check_together
from fedsparse.federation.csv import RoundCSV
from fedsparse.federation.evaluation import Evaluation
from fedsparse.federation.exchange import Exchange, OwnMasks
from fedsparse.federation.ledger import Ledger
from fedsparse.federation.objective import Objective
from fedsparse.federation.parallel import CohortStrategy
from fedsparse.federation.personal import CLIENTS, Personal
from fedsparse.federation.phases import Phase, Phases
from fedsparse.federation.precision import HalfPrecision
from fedsparse.federation.progress import RoundProgress
from fedsparse.federation.rounds import BUFFERS, LOCAL, FederatedRounds
from fedsparse.federation.sampling import participants, uniform
from fedsparse.federation.server import Server
from fedsparse.federation.store import ClientStore, make_store
from fedsparse.federation.tracking import GracefulStop, RoundLog
from fedsparse.federation.traffic import Traffic
from fedsparse.federation.wire import known_size
from fedsparse.keys import Purpose
from fedsparse.masks import Mask, Sparsity
from fedsparse.models.heads import attentions
from fedsparse.models.trainable import trainable_filter
from fedsparse.places import Coordinates
from fedsparse.space import ParamSpace, Patterns, matches

log = logging.getLogger("fedsparse")
AUTO = "auto"  # federation.cohort, to be measured
TRAFFIC = "traffic.csv"


@dataclass(frozen=True)
class Federation:
    """Data, model and clients of a run, before anything is trained."""

    dataset: Dataset
    parts: Sequence[np.ndarray]
    tests: Sequence[np.ndarray]
    net: nn.Module
    space: ParamSpace
    count: int
    plan: RoundPlan
    phased: PhasedPlan
    phases: Phases
    sample: Any
    inputs: Inputs | TokenInputs

    @property
    def cohort(self) -> int:
        """K, clients that train together."""
        return self.plan.cohort_size(len(self.plan.sample(0)))

    @property
    def model_length(self) -> int:
        """Bytes of the first model: a message of every parameter and float buffer, trained or not."""
        tensors = [tensor for tensor in self.net.state_dict().values() if tensor.is_floating_point()]
        dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
        return known_size(sum(tensor.numel() for tensor in tensors), 0, dtype).total


def build_federation(cfg: DictConfig) -> Federation:
    """Load the data, deal it to the clients, and build the model.

    Raises:
        ValueError: data, partition or model cannot be had as configured.

    """
    streaming(cfg)
    dataset, parts, tests = build_clients(cfg, instantiate(cfg.data.source))
    net, space = build_net(cfg, dataset)
    _check_classes(cfg, net, dataset)
    _check_kind(cfg, net, dataset)
    if dataset.fingerprint:
        log.info("data fingerprint %s", dataset.fingerprint)
    inputs = inputs_for(dataset, getattr(net, "pretrained_cfg", None) or None)
    _try_parts(cfg, dataset, parts, space)
    federation = cfg.federation
    count = participants(federation.clients_per_round, federation.num_clients)
    eligible = [client for client, part in enumerate(parts) if len(part)]
    sampler = instantiate(cfg.sampling)

    def sample(round: int, purpose: Purpose = Purpose.SAMPLING) -> Sequence[int]:
        return sampler(round, eligible=eligible, count=count, seed=cfg.seed, purpose=purpose)

    work = LocalWork(cfg.data.batch_size, federation.local_steps, federation.local_epochs, federation.weight)
    bound = 1 if federation.cohort == AUTO else federation.cohort
    plan = RoundPlan(parts, work, sample, bound, cfg.seed, parallel.processes(), parallel.process())
    phases = Phases.of(OmegaConf.to_container(cfg.phases, resolve=True))  # type: ignore[arg-type]
    plans = [(phase.rounds, _plan_of(cfg, phase, plan, eligible), phases.before(phase)) for phase in phases.rounds]
    phased = PhasedPlan(plans, plan)
    return Federation(dataset, parts, tests, net, space, count, plan, phased, phases, sample, inputs)


def _plan_of(cfg: DictConfig, phase: Phase, plan: RoundPlan, eligible: Sequence[int]) -> RoundPlan:
    """Plan a phase: who takes part and what each does, the federation's own where the phase has no word of it."""
    work, purpose, sample = _work(phase, plan.work), Purpose.BATCHES, plan.sample
    if phase.explores:
        purpose = Purpose.EXPLORE
    if phase.explores or phase.clients is not None:
        share = cfg.federation.clients_per_round if phase.clients is None else phase.clients
        chosen = participants(share, cfg.federation.num_clients, phase.clients_key)
        stream = Purpose.EXPLORERS if phase.explores else Purpose.SAMPLING
        sample = partial(uniform, eligible=eligible, count=chosen, seed=cfg.seed, purpose=stream)
    alone = phase.explores and phase.updates_model
    if alone and plan.processes > 1:
        raise ValueError("explore.keep_model=true lets one client go on from the other, so it needs one process")
    return RoundPlan(plan.parts, work, sample, plan.bound, plan.seed, plan.processes, plan.process, purpose, alone)


def _work(phase: Phase, work: LocalWork) -> LocalWork:
    """What a client does in a round of a phase."""
    given = phase.local_steps is not None or phase.local_epochs is not None
    steps, epochs = (phase.local_steps, phase.local_epochs) if given else (work.steps, work.epochs)
    return replace(work, steps=steps, epochs=epochs, weight=phase.weight or work.weight)


def _try_parts(cfg: DictConfig, dataset: Dataset, parts: Sequence[np.ndarray], space: ParamSpace) -> None:
    """Try on one image and one coordinate what is needed later only, so that what does not suit is refused at once."""
    chosen = augment(cfg.data.augment)
    if chosen is not None and dataset.tokens:
        raise ValueError(f"data.augment={cfg.data.augment} changes images and this data is text; set data.augment=none")
    if chosen is not None:
        chosen(dataset.train.x[torch.tensor([0])], torch.zeros(1, chosen.numbers, dtype=torch.float64))
    one = torch.ones(1, dtype=torch.bool)
    exchange = build_exchange(cfg, one, ~one, lambda clients: one.expand(len(clients), 1))
    aggregation, objective = instantiate(cfg.aggregation), build_objective(cfg)
    check_together(exchange, aggregation, objective, instantiate(cfg.optimizer.build)([torch.zeros(1)]))
    check_pruning(exchange, cfg.sparsity.mode)
    count = participants(cfg.federation.clients_per_round, cfg.federation.num_clients)
    check_sizes(exchange, aggregation, len(parts), min(count, sum(len(part) > 0 for part in parts)))
    check_names(exchange, space, torch.ones_like(space.local))
    Server(torch.zeros(1, 1), instantiate(cfg.server.optimizer), Coordinates(one), cfg.server.untouched)
    instantiate(cfg.link)
    build_personal(cfg)


def build_clients(cfg: DictConfig, dataset: Dataset) -> tuple[Dataset, list[np.ndarray], list[np.ndarray]]:
    """Deal training samples and test parts to the clients; with ``data.local_test`` the latter are of their own."""
    parts = build_parts(cfg, dataset)
    if cfg.data.get("local_test") is None:
        return dataset, parts, build_tests(cfg, dataset, parts)
    parts, kept = own_tests(parts, _labels(dataset.train), cfg.data.local_test, cfg.seed)
    longer, tests = with_own_tests(dataset, kept)
    return longer, parts, tests


def build_parts(cfg: DictConfig, dataset: Dataset) -> list[np.ndarray]:
    """Deal the training split to the clients."""
    deal = instantiate(cfg.partition)
    users = {"users": dataset.train.users} if "users" in cfg.partition else {}
    return deal(labels=_labels(dataset.train), num_clients=cfg.federation.num_clients, seed=cfg.seed, **users)


def build_tests(cfg: DictConfig, dataset: Dataset, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Give every client its part of the test split: its user's, as the partition deals it, or by its own class mix."""
    if "users" in cfg.partition and dataset.train.users is not None and dataset.test.users is not None:
        return user_tests(dataset.train.users, dataset.test.users)
    if "test" in cfg.partition:
        deal, clients = instantiate(cfg.partition), cfg.federation.num_clients
        return list(deal(labels=_labels(dataset.test), num_clients=clients, seed=cfg.seed, test=True))
    return client_tests(parts, _labels(dataset.train), _labels(dataset.test), cfg.seed)


def build_net(cfg: DictConfig, dataset: Dataset) -> tuple[nn.Module, ParamSpace]:
    """Build the model and the space of its federated tensors; what is null in ``model.net`` is as the data has it."""
    net = instantiate(cfg.model.net, **_found(cfg, dataset))
    names = [name for name, _ in net.named_parameters()]
    chosen = trainable_filter(cfg.model.trainable, cfg.model.head, names)
    if cfg.head.frozen:
        chosen = _without(chosen, cfg.model.head, names)
    return net, ParamSpace.of(net, chosen, list(cfg.model.local))


def net_arguments(cfg: DictConfig, dataset: Dataset) -> dict[str, Any]:
    """Resolve ``model.net`` as a run builds it: plain values that ``make_net`` takes."""
    return {**OmegaConf.to_container(cfg.model.net, resolve=True), **_found(cfg, dataset)}  # type: ignore[dict-item]


def make_net(arguments: Mapping[str, Any]) -> nn.Module:
    """Build a network from what ``net_arguments`` gave."""
    net: nn.Module = instantiate(OmegaConf.create(dict(arguments)))
    return net


def _found(cfg: DictConfig, dataset: Dataset) -> dict[str, int]:
    """Fill in what is null in ``model.net`` from the data."""
    shape = tuple(dataset.train.x.shape[1:])  # (C, H, W), or (L,) of texts
    found = {
        "num_classes": dataset.classes,
        "in_chans": shape[0],
        "img_size": shape[-2:][0],
        "in_features": math.prod(shape),
    }
    return {k: v for k, v in found.items() if k in cfg.model.net and cfg.model.net[k] is None}


def _without(chosen: Callable[[str], bool], head: Patterns, names: Sequence[str]) -> Callable[[str], bool]:
    """Leave out the head's names."""
    if not any(chosen(name) and not matches(name, head) for name in names):
        raise ValueError(
            "head.frozen=true leaves nothing to train with this model.trainable; set one of them otherwise"
        )
    return lambda name: chosen(name) and not matches(name, head)


def build_device(cfg: DictConfig) -> torch.device:
    """Find the device that the Trainer will train on."""
    return lightning.Fabric(accelerator=cfg.trainer.accelerator, devices=1).device


def own_masks(cfg: DictConfig) -> bool:
    """Whether every client has a mask of its own.

    Raises:
        ValueError: ``mask.owner`` is neither of its choices.

    """
    if cfg.mask.owner not in ("global", "client"):
        raise ValueError(f"mask.owner is {cfg.mask.owner!r}; it must be global or client")
    return bool(cfg.mask.owner == "client")


def build_module(
    cfg: DictConfig, federation: Federation, net: nn.Module | None = None, cohort: int | None = None
) -> ClientModule:
    """Build the clients of a cohort; everything trains until a mask is set.

    Args:
        cfg: the configuration.
        federation: data, model and clients.
        net: a network in place of the federation's.
        cohort: K, in place of the plan's.

    """
    return instantiate(cfg.client)(
        federation.net if net is None else net,
        federation.space,
        torch.ones(federation.space.size, dtype=torch.bool),
        instantiate(cfg.optimizer.build),
        instantiate(cfg.server.optimizer),
        cohort=cohort or federation.cohort,
        clip_norm=cfg.optimizer.clip_norm,
        inputs=federation.inputs,
        compile=cfg.federation.get("compile", False),
        objective=build_objective(cfg),
        untouched=cfg.server.untouched,
    )


def build_sparsity(cfg: DictConfig, net: nn.Module) -> Sparsity:
    """Build how many coordinates train; whole units of attention layers are their heads."""
    built: Sparsity = instantiate(cfg.sparsity)
    return replace(built, heads=tuple(attentions(net))) if built.unit == "output" else built


def build_objective(cfg: DictConfig) -> Objective:
    """Build what clients minimise beside their loss."""
    built: Objective = instantiate(cfg.objective)
    return built


def settle_cohort(cfg: DictConfig, federation: Federation, module: ClientModule, stored: int | None) -> None:
    """Fix the size of cohorts if ``federation.cohort=auto`` leaves it open.

    Args:
        cfg: the configuration.
        federation: data, model and clients; its plan deals cohorts of this size from now on.
        module: the clients, with their masks.
        stored: the size that the run began with, where it is resumed.

    """
    if cfg.federation.cohort != AUTO:
        return
    set_cohort(federation, module, stored or _fastest(cfg, federation, module))


def set_cohort(federation: Federation, module: ClientModule, bound: int) -> None:
    """Let at most so many clients train stacked."""
    federation.plan.bound = bound
    module.cohort = federation.cohort


def _fastest(cfg: DictConfig, federation: Federation, module: ClientModule) -> int:
    """Measure a local step with several sizes, on copies of the network."""
    if federation.dataset.tokens or not can_stack(federation.net) or len(torch.as_tensor(module.bitmaps)):
        return 1
    precision = None if cfg.trainer.precision == HALF else cfg.trainer.precision
    fabric = lightning.Fabric(accelerator=cfg.trainer.accelerator, devices=1, precision=precision)
    split, size = federation.dataset.train, cfg.data.batch_size

    def trial(cohort: int) -> ClientModule:
        tried = build_module(cfg, federation, copy.deepcopy(federation.net), cohort).to(fabric.device).train()
        tried.set_mask(torch.as_tensor(module.mask))
        tried.configure_optimizers()
        tried.rows.bind()
        return tried

    with fabric.autocast():
        few = torch.arange(min(size, len(split.y)))
        batch = (split.x[few].to(fabric.device), split.y[few].to(fabric.device))
        seconds = measure(trial, batch, -(-len(federation.plan.sample(0)) // federation.plan.processes))
    log.info("federation.cohort=auto, ms a client and step: %s", {k: round(1e3 * s, 2) for k, s in seconds.items()})
    return choose(seconds)


def build_exchange(
    cfg: DictConfig, trained: Tensor, local: Tensor, masks: OwnMasks, space: ParamSpace | None = None
) -> Exchange:
    """Build the exchange of the coordinates that train, bool (P,), or of each client's own among them."""
    own = {"masks": masks} if own_masks(cfg) else {}
    build = instantiate(cfg.exchange.build, _convert_="object")
    exchange: Exchange = build(trained=trained, local=local, space=space, **own)
    return exchange


def build_rounds(
    cfg: DictConfig,
    federation: Federation,
    choice: MaskChoice,
    ledger: Ledger,
    module: ClientModule,
    folder: Path,
) -> FederatedRounds:
    """Build the protocol of a round; what clients keep may lie in the run folder."""
    row = torch.as_tensor(module.mask).cpu()
    exchange = build_exchange(cfg, row, federation.space.local, module.own_masks, federation.space)
    check_names(exchange, federation.space, row)
    make = partial(_store, cfg.federation.store, folder)
    exchange.keep_in(make)
    module.objective.stores |= {name: make(name) for name in module.objective.stores}
    ledger.link = instantiate(cfg.link)
    return FederatedRounds(
        exchange=exchange,
        aggregation=instantiate(cfg.aggregation),
        topology=instantiate(cfg.topology),
        buffers=Buffers(cfg.federation.buffers, make(BUFFERS)),
        ledger=ledger,
        store=make(LOCAL),
        schedule=instantiate(cfg.schedule),
        seed=cfg.seed,
        model_length=federation.model_length,
        mask_length=length_of(Mask.of(federation.space, row)),
        phases=federation.phases,
        choice=choice,
        traffic=Traffic(folder / TRAFFIC if parallel.process() == 0 else None),
    )


def _store(kind: str, folder: Path, name: str) -> ClientStore:
    """Make a store of what clients keep, in memory or in the run folder."""
    return make_store(kind, folder / f"{name}.bin")


def build_checkpoints(cfg: DictConfig, folder: Path) -> list[lightning.Callback]:
    """Best by validation, and last; both written when a round closes."""
    shared: dict[str, Any] = {
        "dirpath": folder / "checkpoints",
        "save_top_k": 1,
        "enable_version_counter": False,
        "save_on_train_epoch_end": True,
    }
    every = cfg.federation.checkpoint_every
    best = RoundCheckpoint(**shared, monitor="val/acc", mode="max", filename="best")
    return [best, RoundCheckpoint(**shared, filename=LAST.removesuffix(".ckpt"), every_n_epochs=every)]


@dataclass(frozen=True)
class Callbacks:
    """The callbacks of a run; those that are asked something afterwards by name."""

    rounds: FederatedRounds
    log: RoundLog
    stop: GracefulStop
    others: list[lightning.Callback]
    personal: Personal | None = None

    def listed(self) -> list[lightning.Callback]:
        """In the order that Lightning is to call them: the protocol first, checkpoints last."""
        before, after = ([], []) if self.personal is None else ([self.personal.before], [self.personal])
        return [*before, self.rounds, *after, self.log.evaluation, self.log, self.stop, *self.others]


def build_callbacks(
    cfg: DictConfig, rounds: FederatedRounds, federation: Federation, mask: Mask, folder: Path, shared: bool = False
) -> Callbacks:
    """Build all callbacks; ``shared`` if other runs write to the same terminal at the same time."""
    config = {**OmegaConf.to_container(cfg, resolve=True), "density": mask.by_layer()}  # type: ignore[dict-item]
    evaluation = Evaluation(federation.tests, federation.dataset.own)
    progress = RoundProgress(rounds, evaluation, lambda round: len(federation.phased.sample(round)), shared=shared)
    chosen = [instantiate(callback) for callback in (cfg.callbacks or {}).values()]
    others = [progress, Artifacts(folder, config), *chosen, *build_checkpoints(cfg, folder)]
    personal = build_personal(cfg, folder / CLIENTS if parallel.process() == 0 else None)
    return Callbacks(rounds, RoundLog(rounds, evaluation, personal), GracefulStop(), others, personal)


def build_personal(cfg: DictConfig, path: Path | None = None) -> Personal | None:
    """Build what evaluates every client, if it is asked for; its table lies at ``path``.

    Raises:
        ValueError: an option is none of its choices.

    """
    chosen = cfg.get("evaluation")  # a run stored before there was a choice has none
    if chosen and "_target_" not in chosen:
        raise ValueError(f"evaluation.{next(iter(chosen))} needs evaluation=per_client")
    return instantiate(chosen, _convert_="all")(seed=cfg.seed, path=path) if chosen else None


def build_loggers(cfg: DictConfig, folder: Path, group: str | None, round: int) -> list[Any]:
    """Build metrics.csv, and the loggers of the group ``logger``.

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
    return [table, *(instantiate(chosen[name])(save_dir=str(folder), **options.get(name, {})) for name in chosen)]


def build_trainer(cfg: DictConfig, callbacks: Callbacks, loggers: list[Any], rounds: int) -> lightning.Trainer:
    """Build the one Trainer that runs the whole federation, for so many rounds."""
    half = {"precision": None} if cfg.trainer.precision == HALF else {}
    several = {"strategy": CohortStrategy()} if parallel.joined() else {}
    found = [environment] if (environment := parallel.environment()) else []
    return instantiate(cfg.trainer)(
        **half,
        **several,
        max_epochs=rounds,
        check_val_every_n_epoch=cfg.federation.eval_every,
        callbacks=callbacks.listed(),
        logger=loggers,
        plugins=[AtomicCheckpointIO(), *found, *([HalfPrecision(build_device(cfg))] if half else [])],
        num_sanity_val_steps=0,
        reload_dataloaders_every_n_epochs=1,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        log_every_n_steps=1,
    )


def build_datamodule(cfg: DictConfig, federation: Federation) -> FederatedDataModule:
    """Build the loaders of cohorts and splits."""
    chosen = augment(cfg.data.augment)
    return FederatedDataModule(
        federation.dataset, federation.phased, federation.tests, augment=chosen, **streaming(cfg)
    )


def streaming(cfg: DictConfig) -> dict[str, Any]:
    """Read whether samples are streamed and by how many workers; a configuration without a word of it does not.

    Raises:
        ValueError: one line that names the key.

    """
    stream, workers = cfg.data.get("stream", False), cfg.data.get("workers", 0)
    if not isinstance(stream, bool):
        raise ValueError(f"data.stream is {stream!r}; it must be true or false")
    return {"stream": stream, "workers": checked_integer("data.workers", workers, 0)}


def _labels(split: Any) -> np.ndarray:
    return split.y.cpu().numpy()


def _check_classes(cfg: DictConfig, net: nn.Module, dataset: Dataset) -> None:
    """Refuse a head that cannot tell the classes of the data apart."""
    heads = [module for name, module in net.named_modules() if matches(f"{name}.weight", cfg.model.head)]
    outputs = next((head.out_features for head in heads if isinstance(head, nn.Linear)), dataset.classes)
    if outputs < dataset.classes:
        raise ValueError(
            f"the model's head has {outputs} outputs and the data {dataset.classes} classes; "
            f"set model.net.num_classes={dataset.classes}"
        )


def _check_kind(cfg: DictConfig, net: nn.Module, dataset: Dataset) -> None:
    """Refuse texts for a model of images, images for one of texts, and what a model of texts cannot do.

    Raises:
        ValueError: one line that names the keys.

    """
    longest = getattr(net, "longest", None)  # of a model of texts, the most tokens that it takes
    if dataset.tokens and longest is None:
        fitting = "model=next_char_lstm" if dataset.vocabulary else "model=bert_tiny or model=bert_base"
        raise ValueError(f"this data is text and the model takes images; choose {fitting}")
    if longest is None:
        return
    characters = getattr(net, "vocabulary", 0)  # 0: words of a tokenizer
    if not dataset.tokens:
        fitting = "data=shakespeare" if characters else "data=stdlib_docs or data=ag_news"
        raise ValueError(f"this data is images and the model takes text; choose {fitting}")
    if dataset.vocabulary != characters:
        held, taken = (f"{n} characters" if n else "words of a tokenizer" for n in (dataset.vocabulary, characters))
        fitting = "model=next_char_lstm" if dataset.vocabulary else "model=bert_tiny or model=bert_base"
        raise ValueError(f"this data is {held} and the model takes {taken}; choose {fitting}")
    if dataset.train.x.shape[1] > longest:
        raise ValueError(f"data.max_length={dataset.train.x.shape[1]}: the model takes at most {longest} tokens")
    if cfg.federation.cohort not in (1, AUTO):
        raise ValueError("a model of texts cannot be stacked over clients; set federation.cohort=1")


def _run_id(folder: Path) -> str:
    """Name of the run for Weights & Biases: made once, kept in the folder, so that a resume goes on in the same run."""
    path = folder / ".run_id"
    if not path.exists():
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip()
