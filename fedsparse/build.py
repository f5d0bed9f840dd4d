"""From a configuration to the parts of a run: data, clients, model, phases."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from fedsparse.core import parallel
from fedsparse.core.checks import check_choice, check_flag
from fedsparse.core.precisions import dtype_of
from fedsparse.core.seeding import Purpose
from fedsparse.core.space import ParamSpace
from fedsparse.core.subspace import Subspace
from fedsparse.core.weights import distinct
from fedsparse.data.augment import augment
from fedsparse.data.checks import checked_integer
from fedsparse.data.datasets import Dataset
from fedsparse.data.images import Inputs, TokenInputs, inputs_for
from fedsparse.data.phased import PhasedPlan
from fedsparse.data.rounds import LocalWork, RoundPlan
from fedsparse.federation.client.drift import Objective
from fedsparse.federation.combinations import check_names, check_pruning, check_server, check_sizes, check_together
from fedsparse.federation.exchange.exchange import Exchange, OwnMasks
from fedsparse.federation.exchange.wire.message import known_size
from fedsparse.federation.phases import Phase, Phases
from fedsparse.federation.schedule import check_schedule
from fedsparse.federation.server.sampling import participants, uniform
from fedsparse.federation.server.server import Server
from fedsparse.masks import Sparsity
from fedsparse.models.heads import attentions
from fedsparse.nets import build_net, check_classes, check_fit, check_kind
from fedsparse.preparation.calibration import Calibration
from fedsparse.shares import build_clients
from fedsparse.simulation.callback import FederatedRounds
from fedsparse.simulation.module import ClientModule
from fedsparse.simulation.personal import Personal

log = logging.getLogger("fedsparse")
AUTO = "auto"  # federation.cohort, to be measured


@dataclass(frozen=True)
class Parts:
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
        tensors = [tensor for tensor in distinct(self.net.state_dict()) if tensor.is_floating_point()]
        dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
        return known_size(sum(tensor.numel() for tensor in tensors), 0, dtype).total


def build_federation(cfg: DictConfig) -> Parts:
    """Load the data, deal it to the clients, and build the model.

    Raises:
        ValueError: data, partition or model cannot be had as configured.

    """
    streaming(cfg)
    Calibration(**cfg.calibration)  # before the phases, which take some of its numbers over
    dataset, parts, tests = build_clients(cfg, build_dataset(cfg))
    net, space = build_net(cfg, dataset)
    check_classes(cfg, net, dataset)
    check_kind(cfg, net, dataset)
    build_sparsity(cfg, net).check_names([name for name, _ in net.named_parameters()])
    check_schedule(instantiate(cfg.schedule), cfg.federation.rounds)
    if dataset.fingerprint:
        log.info("data fingerprint %s", dataset.fingerprint)
    inputs = inputs_for(dataset, getattr(net, "pretrained_cfg", None) or None, dtype_of(cfg.trainer.precision))
    check_fit(cfg, net, dataset, inputs)
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
    learn = [own for phase, (_, own, _) in zip(phases.rounds, plans, strict=True) if not phase.explores]
    _try_parts(cfg, dataset, parts, space, min(len(own.sample(0)) for own in learn))
    return Parts(dataset, parts, tests, net, space, count, plan, phased, phases, sample, inputs)


def build_dataset(cfg: DictConfig) -> Dataset:
    """Load the data.

    Raises:
        ValueError: the function that loads it returns something else.

    """
    dataset = instantiate(cfg.data.source)
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"data.source._target_={cfg.data.source._target_} returns a {type(dataset).__name__}; it has to return "
            "fedsparse.data.datasets.Dataset(train, val, test, classes, name), each part a Split(x, y) of tensors"
        )
    return dataset


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


def _try_parts(
    cfg: DictConfig, dataset: Dataset, parts: Sequence[np.ndarray], space: ParamSpace, taking_part: int
) -> None:
    """Try on one image and one coordinate what is needed later only, so that what does not suit is refused at once."""
    chosen = augment(cfg.data.augment)
    if chosen is not None and dataset.tokens:
        raise ValueError(f"data.augment={cfg.data.augment} changes images and this data is text; set data.augment=none")
    if chosen is not None:
        chosen(dataset.train.x[torch.tensor([0])], torch.zeros(1, chosen.numbers, dtype=torch.float64))
    one = torch.ones(1, dtype=torch.bool)
    exchange = build_exchange(cfg, one, ~one, lambda clients: one.expand(len(clients), 1))
    aggregation, objective = instantiate(cfg.aggregation), build_objective(cfg, parts)
    check_together(exchange, aggregation, objective, instantiate(cfg.optimizer.build)([torch.zeros(1)]))
    check_pruning(exchange, cfg.sparsity.mode)
    check_sizes(exchange, aggregation, [len(part) > 0 for part in parts], taking_part)
    check_names(exchange, space, torch.ones_like(space.local))
    server = Server(torch.zeros(1, 1), instantiate(cfg.server.optimizer), Subspace(one), cfg.server.untouched)
    check_server(server.optimizer)
    instantiate(cfg.link)
    build_personal(cfg)


def own_masks(cfg: DictConfig) -> bool:
    """Whether every client has a mask of its own.

    Raises:
        ValueError: ``mask.owner`` is neither of its choices.

    """
    check_choice("mask.owner", cfg.mask.owner, "global", "client")
    return bool(cfg.mask.owner == "client")


def build_module(
    cfg: DictConfig, federation: Parts, net: nn.Module | None = None, cohort: int | None = None
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
        cohort=cohort or federation.cohort,
        clip_norm=cfg.optimizer.clip_norm,
        inputs=federation.inputs,
        compile=cfg.federation.get("compile", False),
        objective=build_objective(cfg, federation.parts),
        buffers=cfg.federation.buffers,
        seed=cfg.seed,
    )


def build_sparsity(cfg: DictConfig, net: nn.Module) -> Sparsity:
    """Build how many coordinates train; whole units of attention layers are their heads."""
    built: Sparsity = instantiate(cfg.sparsity)
    return replace(built, heads=tuple(attentions(net))) if built.unit == "output" else built


def build_objective(cfg: DictConfig, parts: Sequence[np.ndarray]) -> Objective:
    """Build what clients minimise beside their loss; one that asks for the number of clients is told who holds data."""
    asks = "num_clients" in cfg.objective and cfg.objective.num_clients is None
    counted = {"num_clients": sum(len(part) > 0 for part in parts)} if asks else {}
    built: Objective = instantiate(cfg.objective, **counted)
    return built


def build_exchange(
    cfg: DictConfig, trained: Tensor, local: Tensor, masks: OwnMasks, space: ParamSpace | None = None
) -> Exchange:
    """Build the exchange of the coordinates that train, bool (P,), or of each client's own among them."""
    own = {"masks": masks} if own_masks(cfg) else {}
    build = instantiate(cfg.exchange.build, _convert_="object")
    exchange: Exchange = build(trained=trained, local=local, space=space, **own)
    return exchange


def build_personal(cfg: DictConfig, path: Path | None = None, rounds: FederatedRounds | None = None) -> Personal | None:
    """Build what evaluates every client while they learn, if it is asked for; its table lies at ``path``.

    Raises:
        ValueError: an option is none of its choices.

    """
    chosen = cfg.get("evaluation")  # a run stored before there was a choice has none
    if chosen and "_target_" not in chosen:
        raise ValueError(f"evaluation.{next(iter(chosen))} needs evaluation=per_client")
    return instantiate(chosen, _convert_="all")(seed=cfg.seed, path=path, rounds=rounds) if chosen else None


def streaming(cfg: DictConfig) -> dict[str, Any]:
    """Read whether samples are streamed and by how many workers; a configuration without a word of it does not.

    Raises:
        ValueError: one line that names the key.

    """
    stream, workers = cfg.data.get("stream", False), cfg.data.get("workers", 0)
    check_flag("data.stream", stream)
    return {"stream": stream, "workers": checked_integer("data.workers", workers, 0)}
