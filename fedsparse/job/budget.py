"""Rounds within a budget of client steps, so that methods are compared at equal cost, preparation included.

Client steps are those of ``client_steps`` in ``summary.json``: local steps, also of an exploration, and the gradients
that clients compute for head and calibration.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from omegaconf import DictConfig

MANY = 5_000  # samples


def rounds_within(budget: int, before: int, per_round: int) -> int:
    """Count the rounds that fit into a budget after preparation, rounded down.

    Args:
        budget: client steps in all.
        before: client steps before the first learning round.
        per_round: client steps of a round, clients times local steps.

    Raises:
        ValueError: less than one round fits.

    >>> rounds_within(1200, 0, 40), rounds_within(1200, 400, 40), rounds_within(1200, 20, 40)
    (30, 20, 29)
    """
    rounds = (budget - before) // per_round
    if rounds < 1:
        raise ValueError(f"{budget} client steps leave no round: {before} go before, and a round takes {per_round}")
    return rounds


def evaluation_line(evaluated: int, trained: int, every: int = 1) -> str:
    """Say what an evaluation costs where it takes much longer than its rounds; empty where it does not.

    A forward takes a third of a training step (Kaplan et al. 2020, section 2.1), so that it takes longer from three
    evaluated samples for each trained one on; said from ten on, and of splits that take more than a moment.

    Args:
        evaluated: samples of an evaluation.
        trained: samples on which the clients of a round train.
        every: rounds from one evaluation to the next.

    >>> evaluation_line(48_649, 1_280)[:80]
    'an evaluation takes a forward over 48,649 samples, where a round trains on 1,280'
    >>> evaluation_line(630, 1_280)
    ''

    """
    if evaluated < 10 * trained * every or evaluated < MANY:
        return ""
    return (
        f"an evaluation takes a forward over {evaluated:,} samples, where a round trains on {trained:,}: set "
        "federation.eval_every=10 or federation.eval_share=0.1 for less"
    )


def rounds_for_steps(budget: int, *, _root_: DictConfig) -> int:
    """Resolve ``${rounds_for_steps:<client steps>}`` of ``federation.rounds``: the rounds within this budget."""
    return rounds_within(budget, preparation(_root_), steps_of_round(_root_))


def steps_of_round(cfg: DictConfig) -> int:
    """Count the client steps of a learning round.

    Raises:
        ValueError: clients train by epochs, whose steps depend on the data.

    """
    if cfg.federation.local_steps is None:
        raise ValueError("a budget of client steps needs federation.local_steps; local_epochs must be null")
    return _clients(cfg, cfg.federation.clients_per_round) * int(cfg.federation.local_steps)


def preparation(cfg: DictConfig) -> int:
    """Count the client steps of the preparation, with ``calibration.batches`` (an upper bound) a client and round."""
    clients, explore = _clients(cfg, cfg.federation.clients_per_round), cfg.phases.get("explore")
    steps = clients * cfg.calibration.head_steps if cfg.head.init == "probe" else 0
    if _asks_clients(str(cfg.mask_rule.get("_target_"))) and cfg.calibration.where == "clients":
        steps += clients * cfg.calibration.rounds * cfg.calibration.batches
    return int(steps) + (0 if explore is None else _exploration(cfg, explore))


def _exploration(cfg: DictConfig, explore: Any) -> int:
    if explore.local_steps is None:
        raise ValueError("a budget of client steps needs explore.steps; explore.epochs must be null")
    chosen = cfg.federation.clients_per_round if explore.clients is None else explore.clients
    return int(explore.rounds) * _clients(cfg, chosen) * int(explore.local_steps)


def _asks_clients(target: str) -> bool:
    """Whether a mask rule is calibrated on the clients' data; other packages' rules are not imported: False."""
    module, _, name = target.rpartition(".")
    if not module.startswith("fedsparse."):
        return False
    from fedsparse.masks import MaskRule  # here, so that a configuration without a budget is composed without torch
    from fedsparse.masks.evidence import calibration

    rule = getattr(import_module(module), name, MaskRule)  # unknown names are refused later
    found = calibration(rule.needs)
    return found is not None and found.clients


def _clients(cfg: DictConfig, chosen: float | int) -> int:
    from fedsparse.federation.server.sampling import participants  # here, as above

    return participants(chosen, cfg.federation.num_clients)
