"""Builds the parts of a run from its configuration. Later stages do not read the configuration."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from fedsparse.core import parallel
from fedsparse.core.checks import check_choice, check_flag, check_number
from fedsparse.core.precisions import dtype_of
from fedsparse.core.seeding import Purpose
from fedsparse.core.space import ParamSpace, listed
from fedsparse.core.targets import Weigh, count
from fedsparse.data.augment import augment
from fedsparse.data.balance import Balance
from fedsparse.data.checks import checked_integer
from fedsparse.data.datamodule import FederatedDataModule
from fedsparse.data.datasets import Dataset
from fedsparse.data.evaluated import evaluated
from fedsparse.data.images import inputs_for
from fedsparse.data.phased import PhasedPlan
from fedsparse.data.rounds import LocalWork, RoundPlan
from fedsparse.data.torch_sets import from_torch, sets_of
from fedsparse.federation.client.drift import DriftCorrection
from fedsparse.federation.client.graphs import MOST
from fedsparse.federation.exchange.build import exchange_of
from fedsparse.federation.exchange.exchange import Exchange, OwnMasks
from fedsparse.federation.phases import Phase, Phases
from fedsparse.federation.ranks import checked_ranks, rank_masks, ranks_of_clients
from fedsparse.federation.schedule import check_schedule, few_rates, within
from fedsparse.federation.server.merging import Merging
from fedsparse.federation.server.mixing import Comparison, GlobalMixing, Mixing, RankedMixing
from fedsparse.federation.server.regrouping import Regrouping
from fedsparse.federation.server.sampling import participants, uniform
from fedsparse.federation.server.topology import Departments, Topology
from fedsparse.federation.trajectory import Trajectory
from fedsparse.job.checks import check_augmentation, check_method, check_phases
from fedsparse.job.keys import JOBS, required, target_of
from fedsparse.job.limits import seconds_of
from fedsparse.job.model import build_net, check_classes, check_fit, check_head, check_kind, check_parametrized, of_data
from fedsparse.job.parts import Assembly, Course, Method, Problem
from fedsparse.job.shards import deal_shards, deal_validation
from fedsparse.masks import Sparsity
from fedsparse.models.attention import attentions
from fedsparse.models.lora import adapters
from fedsparse.models.vision import seeded
from fedsparse.preparation.calibration import Calibration
from fedsparse.preparation.head import Head
from fedsparse.simulation.devices import accelerator, device_of
from fedsparse.simulation.module import ClientModule
from fedsparse.simulation.trainer import Session

log = logging.getLogger("fedsparse")
AUTO = "auto"  # federation.cohort: measured, by cohorts.fastest; a callback's monitor: Problem.monitor


def assemble(cfg: DictConfig) -> Assembly:
    """Load the data, build the model and all other parts, and check that they are compatible.

    Raises:
        ValueError: a part cannot be built as configured, or parts are incompatible; one line.

    """
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    calibration = Calibration(**cfg.calibration)  # checked before the phases, which copy some of its numbers
    instantiate(cfg.sparsity)  # checked before data and model are loaded, which takes seconds
    problem = assemble_problem(cfg)
    check_schedule(instantiate(target_of("schedule", cfg.schedule)), cfg.federation.rounds)
    course = assemble_course(cfg, problem)
    method = assemble_method(cfg, problem, course, calibration)
    check_method(method, problem, course)
    check_augmentation(cfg.data.augment, problem.dataset)
    make_data = partial(FederatedDataModule, augment=augment(cfg.data.augment), **streaming(cfg.data))
    save = cfg.explore.get("save", False)  # older stored runs lack the key
    check_flag("explore.save", save)
    check_phases(course.phases, method, keep_model=cfg.explore.keep_model)
    session = assemble_session(cfg, config, problem)
    return Assembly(problem, course, method, session, make_data, config, cfg.pictures, save)


def with_problem(assembly: Assembly, problem: Problem) -> Assembly:
    """Replace the problem of an assembly, and plan its rounds again."""
    return replace(assembly, problem=problem, course=assemble_course(OmegaConf.create(assembly.config), problem))


def assemble_problem(cfg: DictConfig) -> Problem:
    """Load the data, partition it over the clients, and build the model.

    Raises:
        ValueError: a part cannot be built as configured, or model and data are incompatible.

    """
    streaming(cfg.data)
    dataset, parts, tests = deal_shards(
        evaluated(load_dataset(target_of("data", cfg.data)), cfg.federation.get("eval_share", 1.0)),
        instantiate(cfg.partition),
        cfg.federation.num_clients,
        cfg.seed,
        users="users" in cfg.partition,
        test="test" in cfg.partition,
        local_test=cfg.data.get("local_test"),
    )
    dtype, head = dtype_of(cfg.trainer.precision), cfg.model.head
    sized = _with_sizes(target_of("model", cfg.model), dataset, cfg.seed)
    builder = _adapted(_from_file(sized, cfg.model), cfg.get("lora"))
    net, space = build_net(
        seeded(lambda: instantiate(builder), cfg.seed),  # so that a resume builds the same, whatever a builder does
        dtype,
        head,
        trainable=cfg.model.trainable,
        local=listed(cfg.model.local),
        init=cfg.head.init,
        frozen=cfg.head.frozen,
    )
    if cfg.sparsity.mode == "prune":
        check_parametrized(net)
    check_classes(net, head, dataset)
    check_kind(net, dataset, cohort_of(cfg))
    check_head(cfg.head.init, dataset)
    channels_last = cfg.federation.get("channels_last", False)  # older stored runs lack the key
    inputs = inputs_for(dataset, getattr(net, "pretrained_cfg", None) or None, dtype, channels_last)
    if dataset.fingerprint:
        log.info("data fingerprint %s", dataset.fingerprint)
    name = cfg.model.get("name", cfg.model._target_)
    check_fit(net, dataset, inputs, cfg.trainer.precision, name, "size" in cfg.data)
    arguments: dict[str, Any] = OmegaConf.to_container(builder)  # type: ignore[assignment]
    return Problem(
        dataset,
        parts,
        tests,
        _validation(cfg, dataset, parts, space),
        net,
        space,
        head,
        inputs,
        arguments,
        cfg.trainer.precision,
        cfg.data.batch_size,
        cfg.seed,
        adapters(net) if cfg.get("lora") else {},
        departments=(departments := dataset.departments_of(parts)),
        truth=dataset.truth if departments else (),
    )


def _validation(cfg: DictConfig, dataset: Dataset, parts: Sequence[np.ndarray], space: ParamSpace) -> list[np.ndarray]:
    """Deal the validation split to the clients whose own models are evaluated; empty where nothing stays with them."""
    if not (bool(space.local.any()) or cfg.federation.buffers == "local"):
        return []
    vals = deal_validation(dataset, parts, cfg.seed, users="users" in cfg.partition)
    if not any(len(part) for part in vals):
        log.warning("no client has a sample of the validation split: the best round is that of the global model")
    return vals


def assemble_course(cfg: DictConfig, problem: Problem) -> Course:
    """Plan the rounds: the clients of each, and their samples.

    Raises:
        ValueError: an option has an invalid value.

    """
    federation, eligible = cfg.federation, problem.eligible
    count = participants(federation.clients_per_round, federation.num_clients)
    draw = partial(instantiate(cfg.sampling), eligible=eligible, count=count, seed=cfg.seed)

    def sample(round: int, purpose: Purpose) -> Sequence[int]:
        return draw(round, purpose=purpose)

    work = LocalWork(cfg.data.batch_size, federation.local_steps, federation.local_epochs, federation.weight)
    cohort = cohort_of(cfg)
    bound = 1 if cohort == AUTO else cohort
    drawn = partial(draw, purpose=Purpose.SAMPLING)
    plan = RoundPlan(problem.parts, work, drawn, bound, cfg.seed, parallel.processes(), parallel.process())
    phases = Phases.of(OmegaConf.to_container(cfg.phases, resolve=True))  # type: ignore[arg-type]
    count_of = partial(participants, num_clients=federation.num_clients)
    plans = [_plan_of(phase, plan, eligible, count_of, federation.clients_per_round) for phase in phases.rounds]
    stages = [(p.rounds, stage_plan, phases.before(p)) for p, stage_plan in zip(phases.rounds, plans, strict=True)]
    return Course(phases, plan, PhasedPlan(stages, plan), sample, cohort == AUTO)


def cohort_of(cfg: DictConfig) -> Any:
    """Look up ``federation.cohort``; null is the model's on a CPU, and ``auto`` on a GPU, where launches cost most."""
    if cfg.federation.cohort is not None:
        return cfg.federation.cohort
    return AUTO if device_of(accelerator(cfg.trainer.accelerator)).type == "cuda" else cfg.model.cohort


def _plan_of(
    phase: Phase, plan: RoundPlan, eligible: Sequence[int], count: Callable[..., int], share: float | int
) -> RoundPlan:
    """Plan a phase: its clients and their local work; the federation's options are the defaults."""
    purpose, sample = Purpose.EXPLORE if phase.explores else Purpose.BATCHES, plan.sample
    if phase.explores or phase.clients is not None:
        drawn = count(share if phase.clients is None else phase.clients, key=phase.clients_key)
        stream = Purpose.EXPLORERS if phase.explores else Purpose.SAMPLING
        sample = partial(uniform, eligible=eligible, count=drawn, seed=plan.seed, purpose=stream)
    alone = phase.explores and phase.updates_model
    if alone and plan.processes > 1:
        raise ValueError("explore.keep_model=true lets one client go on from the other, so it needs one process")
    work = _work(phase, plan.work)
    return RoundPlan(plan.parts, work, sample, plan.bound, plan.seed, plan.processes, plan.process, purpose, alone)


def _work(phase: Phase, work: LocalWork) -> LocalWork:
    """Local work of a client in a round of a phase."""
    given = phase.local_steps is not None or phase.local_epochs is not None
    steps, epochs = (phase.local_steps, phase.local_epochs) if given else (work.steps, work.epochs)
    return replace(work, steps=steps, epochs=epochs, weight=phase.weight or work.weight)


def assemble_method(cfg: DictConfig, problem: Problem, course: Course, calibration: Calibration) -> Method:
    """Build mask rule, clients, exchange and server.

    Raises:
        ValueError: an option has an invalid value.

    """
    check_choice("mask.owner", cfg.mask.owner, "global", "client")
    own_masks, exchange = cfg.mask.owner == "client", _exchange_of(cfg.exchange)
    topology = _topology(cfg.topology, problem)
    ranks = _ranks(cfg.get("lora"), topology, problem)

    def make_exchange(trained: Tensor, masks: OwnMasks) -> Exchange:
        optional = {"masks": masks} if own_masks or ranks else {}
        return exchange(trained=trained, local=problem.space.local, space=problem.space, **optional)

    return Method(
        rule=instantiate(cfg.mask_rule),
        sparsity=_sparsity(cfg.sparsity, problem.net),
        own_masks=own_masks,
        ranks=ranks,
        head=Head(**cfg.head),
        calibration=replace(calibration, rounds=course.phases.prepares("calibrate") or calibration.rounds),
        make_module=_module_maker(cfg, problem),
        make_exchange=make_exchange,
        aggregation=instantiate(cfg.aggregation),
        topology=topology,
        regrouping=_regrouping(cfg, topology, problem),
        mixing=_mixing(cfg, topology, problem, ranks),
        merging=_merging(cfg, topology, problem, ranks),
        make_server=instantiate(target_of("server", cfg.server)),
        untouched=cfg.server.untouched,
        schedule=instantiate(target_of("schedule", cfg.schedule)),
        trajectory=_trajectory(cfg.get("trajectory"), course.phases.total, problem),
        link=instantiate(cfg.link),
        store=cfg.federation.store,
    )


def _trajectory(options: DictConfig | None, rounds: int, problem: Problem) -> Callable[..., Trajectory] | None:
    """Build the constructor of the trajectory; None without one, as in older stored runs."""
    if not options:
        return None
    sample = problem.inputs(problem.dataset.train.x[torch.arange(1)])
    make = partial(instantiate(options), total=rounds, population=len(problem.parts), shape=sample.shape[1:])
    make(path=None)  # checks the options before training
    return make


def _topology(options: DictConfig, problem: Problem) -> Topology:
    """Build the topology; where the options list no departments, they are those that the data names, if it does."""
    node, known = target_of("topology", options), list(problem.departments)
    given = {"of": known} if known and "of" in node and node.of is None else {}
    built: Topology = instantiate(node, **given, _convert_="all")
    return built


def _ranks(lora: DictConfig | None, topology: Topology, problem: Problem) -> tuple[int, ...]:
    """Find the rank of each client's adapters; empty if all have one, as in older stored runs.

    Raises:
        ValueError: invalid ranks, or clients that change models.

    """
    if not lora or lora.get("ranks") is None:
        return ()
    if isinstance(topology, Departments) and topology.within > 1:
        raise ValueError("topology.clusters_within compares adapters of one rank: set lora.ranks=null")
    clients = range(len(problem.parts))
    members = topology.group(clients) if topology.groups > 1 else problem.departments or clients
    named = topology.groups > 1 or bool(problem.departments)
    return ranks_of_clients(checked_ranks(lora.ranks), members, named)


def _mixing(cfg: DictConfig, topology: Topology, problem: Problem, ranks: Sequence[int]) -> Mixing | None:
    """Build what mixes the rows of groups; None without, as in older stored runs.

    Raises:
        ValueError: there is one group.

    """
    options, share = cfg.get("mixing"), cfg.topology.get("global_mix", 0.0)
    check_number("topology.global_mix", share, least=0, most=1)
    if not options and not share:
        return None
    if topology.groups < 2:
        key = "mixing" if options else "topology.global_mix"
        raise ValueError(
            f"{key} joins the models of departments, and there is one: set topology=departments, with topology.of=2 or "
            "more"
        )
    made: Mixing | None = None
    if options:
        start, truth = problem.space.read(problem.net), problem.truth_of(topology)
        make = instantiate(options, _convert_="all")
        made = make(problem.space, problem.adapters, start, topology.groups, truth)
    made = GlobalMixing(share, made) if share else made
    if not ranks or made is None:
        return made
    own = dict(zip(topology.group(range(len(ranks))), ranks, strict=True))
    of_groups = [own[group] for group in range(topology.groups)]
    return RankedMixing(made, rank_masks(problem.adapters, problem.space, of_groups))


def _regrouping(cfg: DictConfig, topology: Topology, problem: Problem) -> Regrouping | None:
    """Build what assigns clients to groups of their departments; None where a department has one, as in older runs."""
    options = cfg.topology
    if not isinstance(topology, Departments) or topology.within == 1:
        return None
    comparison = Comparison(problem.space, problem.adapters, problem.space.read(problem.net))
    return Regrouping(topology, comparison, options.cluster_of, options.cluster_metric, options.cluster_every, cfg.seed)


def _merging(
    cfg: DictConfig, topology: Topology, problem: Problem, ranks: Sequence[int]
) -> Callable[[nn.Module], Merging] | None:
    """Build the constructor of what merges adapters; None without, as in older stored runs.

    Raises:
        ValueError: there are several global models, or rows of a trajectory would lack what is merged.

    """
    if not cfg.get("merging"):
        return None
    if topology.groups > 1:
        raise ValueError("merging changes the one model of all clients: set topology=flat")
    if cfg.get("trajectory"):
        raise ValueError("trajectory=global keeps what trains, and merging changes the rest: set trajectory=none")
    make = partial(instantiate(cfg.merging), adapters=problem.adapters, space=problem.space, ranks=ranks)
    make(problem.net)  # checks before training
    return make


def _exchange_of(options: DictConfig) -> Callable[..., Exchange]:
    """Build the constructor of the exchange from its target and the options common to all exchanges."""
    part = instantiate(target_of("exchange", options), _convert_="object")
    common = {key: options[key] for key in JOBS["exchange"] if key in options}
    filters = {name: instantiate(chosen) for name, chosen in (options.get("filters") or {}).items()}
    return exchange_of(part, **common | {"filters": filters})


def _sparsity(options: DictConfig, net: nn.Module) -> Sparsity:
    """Build the sparsity; with ``unit=output`` the units of attention layers are their heads."""
    built: Sparsity = instantiate(options)
    built.check_names([name for name, _ in net.named_parameters()])
    return replace(built, attention=tuple(attentions(net))) if built.unit == "output" else built


def _module_maker(cfg: DictConfig, problem: Problem) -> Callable[[nn.Module, int], ClientModule]:
    """Build the constructor of a cohort's clients, which takes a network and K."""
    client, optimizer = instantiate(cfg.client), instantiate(target_of("optimizer", cfg.optimizer))
    options, weigh = cfg.objective, _weigh(cfg.data, problem.dataset)
    decay = within(cfg.schedule.get("within", "constant"))  # a schedule of one's own may lack the key
    schedule = instantiate(target_of("schedule", cfg.schedule))
    # a learning rate is part of a graph, which pays where it is replayed in later rounds too
    graph = cfg.federation.get("graph", False) and few_rates(schedule, cfg.federation.rounds, MOST)
    counted = "num_clients" in options and options.num_clients is None  # null: the number of clients with data

    def make(net: nn.Module, cohort: int) -> ClientModule:
        objective: DriftCorrection = instantiate(options, **({"num_clients": len(problem.eligible)} if counted else {}))
        everything = torch.ones(problem.space.size, dtype=torch.bool)
        return client(
            net,
            problem.space,
            everything,
            optimizer,
            cohort=cohort,
            clip_norm=cfg.optimizer.clip_norm,
            inputs=problem.inputs,
            compile=cfg.federation.get("compile", False),
            graph=graph,
            objective=objective,
            buffers=cfg.federation.buffers,
            weigh=weigh,
            seed=cfg.seed,
            decay=decay,
        )

    return make


def _weigh(options: DictConfig, dataset: Dataset) -> Weigh | None:
    """Choose the weights of samples in a batch's loss, by ``data.loss_per``; older stored runs lack the key.

    Raises:
        ValueError: another value.

    """
    per = options.get("loss_per", "token")
    check_choice("data.loss_per", per, "token", "sample")
    return count if dataset.sequences and per == "token" else None


def assemble_session(cfg: DictConfig, config: dict[str, Any], problem: Problem) -> Session:
    """Build the session: trainer, loggers, callbacks, evaluation by client.

    Raises:
        ValueError: an option has an invalid value.

    """
    evaluation = cfg.get("evaluation")  # older stored runs lack the key
    if evaluation and "_target_" not in evaluation:
        raise ValueError(f"evaluation.{next(iter(evaluation))} needs evaluation=per_client")
    personal = None
    if evaluation:
        personal = partial(instantiate(evaluation, _convert_="all"), seed=cfg.seed, balance=_balance(problem))
        personal()  # checks the options before training
    return Session(
        trainer=instantiate(cfg.trainer),
        accelerator=accelerator(cfg.trainer.accelerator),
        precision=cfg.trainer.precision,
        deterministic=cfg.trainer.get("deterministic") or False,
        tf32=cfg.federation.get("tf32", False),
        max_time=seconds_of(config["trainer"].get("max_time")),
        eval_every=cfg.federation.eval_every,
        checkpoint_every=cfg.federation.checkpoint_every,
        monitor=problem.monitor,
        loggers={name: instantiate(logger, _convert_="all") for name, logger in (cfg.logger or {}).items()},
        callbacks=[_callback(options, problem.monitor) for options in (cfg.callbacks or {}).values() if options],
        personal=personal,
        config=config,
    )


def _callback(options: Any, monitor: str) -> Any:
    """Build a callback; ``monitor: auto`` is the accuracy of validation that chooses rounds."""
    given = {"monitor": monitor} if options.get("monitor") == AUTO else {}
    return instantiate(options, **given)


def _balance(problem: Problem) -> Balance | None:
    """Count the clients' classes; None where targets are sequences."""
    dataset = problem.dataset
    return None if dataset.sequences else Balance.of(problem.parts, dataset.train.labels, dataset.classes)


def load_dataset(source: DictConfig) -> Dataset:
    """Load the data.

    Raises:
        ValueError: the loading function returns neither a ``Dataset`` nor torch's data sets.

    """
    returned = instantiate(source)
    if isinstance(returned, Dataset):
        return returned
    if (sets := sets_of(returned)) is not None:
        return from_torch(*sets)
    raise ValueError(
        f"data._target_={source._target_} returns a {type(returned).__name__}; it has to return "
        "fedsparse.data.datasets.Dataset(train, val, test, classes, name), each part a Split(x, y) of tensors; or "
        "torch's data sets of pairs (x, y): one, a tuple (train, val, test), or a dict with train, val and test"
    )


def _with_sizes(builder: DictConfig, dataset: Dataset, seed: int) -> DictConfig:
    """Set those arguments of a network that follow from the data and are null, or left out where they are required.

    A seed that is required and left out is that of the run.
    """
    missing = required(builder._target_) - builder.keys()
    sizes = of_data(dataset) | {"seed": seed}
    given = {key for key in sizes if key in missing or (key != "seed" and key in builder and builder[key] is None)}
    return OmegaConf.merge(builder, {key: sizes[key] for key in given})  # type: ignore[return-value]


def _from_file(builder: DictConfig, model: DictConfig) -> DictConfig:
    """Load ``model.checkpoint`` into the network of a builder that takes none itself."""
    if model.get("checkpoint") is None or "checkpoint" in builder:
        return builder
    given = {"checkpoint": str(model.checkpoint), "head": listed(model.head)}
    return OmegaConf.create({"_target_": "fedsparse.models.loading.started", "net": builder, **given})


def _adapted(builder: DictConfig, lora: DictConfig | None) -> DictConfig:
    """Build the network with adapters around the network of a builder; as it is without, as in older stored runs."""
    if not lora:
        return builder
    adapters: dict[str, Any] = OmegaConf.to_container(target_of("lora", lora), resolve=True)  # type: ignore[assignment]
    if (ranks := lora.get("ranks")) is not None:
        adapters["r"] = max(checked_ranks(ranks))
    return OmegaConf.create({**adapters, "_partial_": False, "net": builder})


def streaming(data: Any) -> dict[str, Any]:
    """Read the options of streaming; by default samples are not streamed.

    Raises:
        ValueError: one line that names the key.

    """
    check_flag("data.stream", data.get("stream", False))
    return {"stream": data.get("stream", False), "workers": checked_integer("data.workers", data.get("workers", 0), 0)}
