"""Checks of incompatible options, all in this file and before training; each error is one line."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedsparse.core.checks import check_number
from fedsparse.core.space import ParamSpace
from fedsparse.core.subspace import Subspace
from fedsparse.data.augment import augment
from fedsparse.data.datasets import Dataset
from fedsparse.federation.client.drift import DriftCorrection
from fedsparse.federation.exchange.exchange import Exchange, Full
from fedsparse.federation.exchange.filters import SignFlip
from fedsparse.federation.exchange.fractions import check_fraction
from fedsparse.federation.exchange.sparsifiers import Pattern
from fedsparse.federation.factors import Factors
from fedsparse.federation.phases import Phases
from fedsparse.federation.server.aggregation import Aggregation, AverageRows, FedNova, Robust, WeightedMean
from fedsparse.federation.server.merging import Merging
from fedsparse.federation.server.server import Server
from fedsparse.job.parts import Course, Method, Problem
from fedsparse.masks import Exploration
from fedsparse.masks.rules import FromFile
from fedsparse.optim.sgdm import SparseSGDM


def check_method(method: Method, problem: Problem, course: Course) -> None:
    """Refuse incompatible parts of a method; the server's optimizer is tried on one coordinate.

    Raises:
        ValueError: one line, with the options to set.

    """
    module, holds, space = method.make_module(problem.net, 1), [len(part) > 0 for part in problem.parts], problem.space
    everything = torch.ones_like(space.local)
    exchange = method.make_exchange(everything, lambda clients: everything.expand(len(clients), -1))
    check_together(exchange, method.aggregation, module.objective, module.make_optimizer([torch.zeros(1)]))
    if module.decay is not None and (module.objective.messages or isinstance(method.aggregation, FedNova)):
        raise ValueError(
            "aggregation=fednova and objective=scaffold weigh local steps of one learning rate: set "
            "schedule.within=constant"
        )
    check_pruning(exchange, method.sparsity.mode)
    check_sizes(exchange, method.aggregation, holds, course.clients)
    check_names(exchange, space, everything)
    server = Server(torch.zeros(1, 1), method.make_server, Subspace(everything[:1]), method.untouched)
    check_server(server.optimizer)
    merging = None if method.merging is None else method.merging(problem.net)
    if merging is not None:
        check_merging(merging, exchange, method.aggregation, module.objective, server.optimizer)
    if method.ranks:
        check_ranks(method, problem, merging)


def check_phases(phases: Phases, method: Method, keep_model: bool = False) -> None:
    """Refuse incompatible phases, mask rules and stores.

    Raises:
        ValueError: one line, with the options to set.

    """
    rule, explore = method.rule, phases.explore
    name, from_file = type(rule).__name__, isinstance(rule, FromFile)
    if rule.need(Exploration) and (explore is None or not explore.informs_mask):
        raise ValueError(f"the mask rule {name} chooses by an exploration that informs it: set phases=explore")
    if rule.calibration and not phases.has("calibrate"):
        raise ValueError(f"the mask rule {name} needs the phase calibrate, which phases leaves out")
    if explore is not None and not rule.need(Exploration) and not explore.updates_model:
        raise ValueError(
            f"the mask rule {name} takes nothing from an exploration: set phases=default, or explore.keep_model=true "
            "for a head start"
        )
    if explore is None and keep_model:
        raise ValueError("explore.keep_model=true needs an exploration, and there is none: set phases=explore")
    if method.changes and from_file:
        raise ValueError(
            "mask_rule=from_file takes the mask of the file for the whole run: leave sparsity.schedule and "
            "sparsity.renew_every null"
        )
    if (method.changes or explore is not None) and method.apart:
        raise ValueError("masks that change need mask.owner=global, and adapters of one rank (lora.ranks=null)")
    if method.changes and method.store == "file":
        raise ValueError("masks that are chosen anew need federation.store=memory: rows of a file have one length")
    if method.sparsity.mode == "prune" and method.apart:
        raise ValueError(
            "sparsity.mode=prune needs mask.owner=global and lora.ranks=null: what is zero is zero for all"
        )


def check_augmentation(chosen: Any, dataset: Dataset) -> None:
    """Refuse augmentation of data other than images; it is tried on one sample.

    Raises:
        ValueError: one line, with the options to set.

    """
    change = augment(chosen)
    if change is not None and dataset.tokens:
        raise ValueError(f"data.augment={chosen} changes images and this data is text; set data.augment=none")
    if change is not None:
        change(dataset.train.x[torch.tensor([0])], torch.zeros(1, change.numbers, dtype=torch.float64))


def check_together(
    exchange: Exchange, aggregation: Aggregation, objective: DriftCorrection, optimizer: torch.optim.Optimizer
) -> None:
    """Refuse combinations of exchange, aggregation, objective and optimizer that give wrong results.

    Raises:
        ValueError: one line, with the options to set.

    """
    if exchange.feedback and (exchange.payload, aggregation.denominator) != ("change", "participants"):
        raise ValueError(
            "exchange.feedback carries changes over, and divided by their senders alone they would count in full: set "
            "exchange.payload=change aggregation=coordinate_mean aggregation.denominator=participants"
        )
    if exchange.compat and (aggregation.denominator != "senders" or isinstance(aggregation, FedNova)):
        raise ValueError("exchange.compat=original averages over senders: set aggregation=coordinate_mean")
    if objective.messages and exchange.per_coordinate:
        raise ValueError("objective=scaffold needs exchange=full or exchange=masked, with one mask for all clients")
    if (objective.messages or isinstance(aggregation, FedNova)) and not isinstance(optimizer, SparseSGDM):
        raise ValueError(
            "aggregation=fednova and objective=scaffold need optimizer=sgdm: their step weights are those of SGD with "
            "momentum"
        )


def check_pruning(exchange: Exchange, mode: str) -> None:
    """Refuse an exchange that sends pruned coordinates.

    Raises:
        ValueError: one line, with the options to set.

    """
    if mode == "prune" and isinstance(exchange, Full):
        raise ValueError("exchange=full would send what is pruned, as zeros: set exchange=masked")


def check_server(optimizer: torch.optim.Optimizer) -> None:
    """Refuse a learning rate or momentum that torch's optimizers accept, but diverge with.

    Raises:
        ValueError: one line that names the key.

    """
    for group in optimizer.param_groups:
        check_number("server.lr", group["lr"], above=0)
        check_number("server.momentum", group.get("momentum", 0), least=0, below=1)


def check_ranks(method: Method, problem: Problem, merging: Merging | None) -> None:
    """Refuse ranks of clients whose B would be averaged: one of a smaller rank would start from columns beyond it.

    Raises:
        ValueError: one line, with the options to set.

    """
    if method.own_masks:
        raise ValueError("lora.ranks say what each client trains: set mask.owner=global")
    groups = method.topology.group(range(len(method.ranks)))
    mixed = len(set(zip(groups, method.ranks, strict=True))) > method.topology.groups
    if mixed and Factors(problem.adapters, problem.space).ups and not (merging is not None and merging.restarts):
        raise ValueError(
            "lora.ranks and method=fedit, or another that averages B, would give a client columns beyond its rank: set "
            "method=flora, fedsa or local, or topology=departments, each with one rank"
        )


def check_merging(
    merging: Merging,
    exchange: Exchange,
    aggregation: Aggregation,
    objective: DriftCorrection,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Refuse parts beside which merged adapters are not the mean of the clients' updates.

    What is merged is a weighted mean of whole updates: another average, or a server that does not step to the mean,
    would leave its part out or count it twice. Control variates are of a start that a fresh adapter does not have.
    Where every round begins with fresh adapters, what a client's own mask leaves out has not moved, and adds nothing.

    Raises:
        ValueError: one line, with the options to set.

    """
    wanted = "merging=fedex and merging=flora are exact for the weighted mean of whole updates alone"
    if type(aggregation) is not WeightedMean:
        raise ValueError(f"{wanted}: set aggregation=weighted_mean")
    if exchange.per_coordinate and not (merging.restarts and exchange.rule is None):
        raise ValueError(f"{wanted}: set exchange=full or exchange=masked, with one mask for all clients")
    steps = [optimizer.defaults[key] for key in ("lr", "momentum", "weight_decay") if key in optimizer.defaults]
    if type(optimizer) is not torch.optim.SGD or steps != [1, 0, 0]:
        raise ValueError(f"{wanted}: set server=fedavg, with server.lr=1.0 and neither momentum nor weight decay")
    if objective.messages:
        raise ValueError(f"{wanted}, and control variates shift them: set objective=none or objective=fedprox")


def check_sizes(exchange: Exchange, aggregation: Aggregation, holds: Sequence[bool], taking_part: int) -> None:
    """Refuse options that do not fit the number of clients, or of clients in a round.

    Args:
        exchange: the exchange, with its filters.
        aggregation: the server's average.
        holds: whether a client has data, for every client.
        taking_part: clients of the smallest learning round.

    Raises:
        ValueError: one line, with values that fit.

    """
    fraction = getattr(exchange.rule, "fraction", None)
    if fraction is not None:
        check_fraction(fraction, len(holds))
    for chosen_filter in exchange.filters:
        if isinstance(chosen_filter, SignFlip):
            _check_attackers(chosen_filter, holds)
    if isinstance(aggregation, Robust):
        _check_average(aggregation.average, taking_part)


def check_names(exchange: Exchange, space: ParamSpace, trained: Tensor) -> None:
    """Refuse ``exchange.names`` that match no trained and shared tensor.

    Args:
        exchange: the exchange, with its rule.
        space: names of the tensors.
        trained: bool (P,), True where a coordinate trains.

    Raises:
        ValueError: one line that lists the names of such tensors.

    """
    if isinstance(exchange.rule, Pattern):
        parts = space.unflatten(trained.to(space.local.device) & ~space.local)
        exchange.rule.check([name for name, part in parts.items() if bool(part.any())])


def _check_attackers(attack: SignFlip, holds: Sequence[bool]) -> None:
    """Refuse attackers that are no clients, or have no data."""
    if attack.last >= len(holds):
        raise ValueError(f"exchange.attackers are clients 0 to {attack.last}; there are {len(holds)} clients")
    idle = sorted(client for client in attack.clients if not holds[client])
    if idle:
        able = [client for client, holder in enumerate(holds) if holder][: len(attack.clients)]
        raise ValueError(
            f"exchange.attackers: {', '.join(map(str, idle))} of these clients hold no data and never take part; the "
            f"first that do are exchange.attackers={able}"
        )


def _check_average(average: AverageRows, taking_part: int) -> None:
    """Refuse options of a robust average that do not fit the number of rows; the others are checked by a trial."""
    options: dict[str, Any] = average.keywords if isinstance(average, partial) else {}
    for key, least, most in (("attackers", 0, taking_part - 3), ("keep", 1, taking_part)):
        value = options.get(key)
        if value is None and (key == "keep" or key not in options):
            continue
        described = f"aggregation.average.{key}, of {taking_part} clients in a round,"
        check_number(described, value, whole=True, least=least, most=most)
    rows = options.get("attackers", 0) + 3
    average(torch.zeros(rows, 1), torch.ones(rows, 1, dtype=torch.bool), torch.ones(rows))
