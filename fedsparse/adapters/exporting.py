"""Exports: adapters in PEFT's format with their inventory and figures, and plain models with an adapter merged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from fedsparse.adapters.base import hosted
from fedsparse.adapters.folders import digests, publish
from fedsparse.adapters.kept import Kept, Model, Moment
from fedsparse.adapters.measure import COMMON, Outcome, outcome, part_of, parts
from fedsparse.adapters.packing import CHANGES, configuration, divide, write
from fedsparse.core import files
from fedsparse.core.folder import MERGED, PEFT, WEIGHTS
from fedsparse.core.weights import save_weights
from fedsparse.data.tokens import quiet_transformers
from fedsparse.models.copies import copied
from fedsparse.models.lora import merged

INVENTORY, FIGURES = "adapters.json", "evaluation.json"
# the maps of evaluation.json, by the names of the original's files
CLIENT_PATHS, DEPARTMENT_PATHS = "client_lora_federated", "dept_lora_federated"
DEPARTMENT_FIGURES, CLIENT_FIGURES = "federated_eval", "client_eval_all_rounds"
Placed = tuple[Moment, Model]
LOAD = "PeftModel.from_pretrained(base, folder)"
LOAD_CHANGED = f'base.load_state_dict(load_file(folder + "/{CHANGES}"), strict=False), then {LOAD}'


def export(
    kept: Kept,
    out: Path | None = None,
    rounds: Sequence[int] = (),
    departments: Sequence[str] | None = None,
    clients: Sequence[int] | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Write adapters in PEFT's format, ``adapters.json`` and ``evaluation.json``.

    Args:
        kept: the run.
        out: folder to write; None: ``peft`` in the run folder.
        rounds: whose clients' adapters are written; the departments' are of the last of these. Empty: the last round.
        departments: names; None with no clients either: all.
        clients: ids of clients that keep something; None with no departments either: all.

    Returns:
        The folder, and what ``adapters.json`` holds.

    Raises:
        ValueError: a round, department or client is unknown, or the folder has other content.

    """
    moments = [kept.at(number) for number in sorted(set(rounds) or {kept.last})]
    found = [(moment, model) for moment in moments for model in moment.chosen(departments, clients)]
    shared = [(moment, model) for moment, model in found if model.client is None and moment is moments[-1]]
    chosen = [*shared, *((moment, model) for moment, model in found if model.client is not None)]
    target = kept.folder / PEFT if out is None else out
    for left in target.parent.glob(f".{target.name}-*"):  # of a killed export
        shutil.rmtree(left, ignore_errors=True)
    publish(target, partial(_fill, kept=kept, moments=moments, chosen=chosen))
    inventory: dict[str, Any] = json.loads((target / INVENTORY).read_text(encoding="utf-8"))
    return target, inventory


def place_of(model: Model, moment: Moment) -> str:
    """Name the folder of a model in an export.

    >>> import torch
    >>> place_of(Model("client_3", torch.zeros(1), "global", 3), Moment(10, [], {}))
    'clients/3/round_10'
    """
    return f"adapters/{model.name}" if model.client is None else f"clients/{model.client}/round_{moment.round}"


def _fill(folder: Path, kept: Kept, moments: Sequence[Moment], chosen: Sequence[Placed]) -> None:
    """Write all files of an export into an empty folder."""
    problem, entries = kept.assembly.problem, list[dict[str, Any]]()
    for moment, model in chosen:
        net, own = kept.load(moment, model), folder / place_of(model, moment)
        own.mkdir(parents=True)
        rank = kept.rank_of(model)
        divided = divide(net, kept.base, problem.adapters, problem.space, moment.changed, rank)
        settings = {layer: s if rank is None else s.of_rank(rank) for layer, s in kept.settings.items()}
        write(own, configuration(net, kept.base, settings, divided.saved), divided)
        entries.append(_entry(kept, moment, model, own))
    files.write(folder / FIGURES, json.dumps(evaluation(kept, moments, chosen), indent=2) + "\n")
    found = {**_described(kept), "adapters": entries, "files": digests(folder)}
    files.write(folder / INVENTORY, json.dumps(found, indent=2) + "\n")


def _entry(kept: Kept, moment: Moment, model: Model, folder: Path) -> dict[str, Any]:
    """Describe a written adapter."""
    changed = (folder / CHANGES).is_file()
    return {
        "name": model.name,
        "folder": place_of(model, moment),
        "department": model.department,
        "client": model.client,
        "clients": kept.members(model.department) if model.client is None else [model.client],
        "round": moment.round,
        "base_changes": "tensors that replace those of the base, whole" if changed else None,
        "load": LOAD_CHANGED if changed else LOAD,
    }


def _described(kept: Kept) -> dict[str, Any]:
    """Describe the run, and the base that the adapters need."""
    space, base = kept.space, kept.base
    local = [name for name, part in space.unflatten(space.local).items() if bool(part.any())]
    return {
        "method": kept.choices.get("method"),
        "rounds": kept.last,
        "base": {
            "name": base.name,
            "class": base.kind,
            "module": base.start.rstrip("."),
            "builder": kept.assembly.problem.arguments["net"],
            "fingerprint": base.fingerprint,
        },
        "stays_with_clients": local,
    }


def evaluation(kept: Kept, moments: Sequence[Moment], chosen: Sequence[Placed]) -> dict[str, Any]:
    """Compute the four maps: where clients' and departments' adapters are, and the figures of both.

    A department's figures are of the network as built (``before``) and with its adapter (``after``), on the test parts
    of its clients together, or on the whole test split where these have none. Those of a client with a test part are of
    its department's adapter (``department``) and of its own, if it is written (``own``), by round.

    Args:
        kept: the run.
        moments: the rounds, ascending.
        chosen: the models that are written, with their rounds.

    """
    start = kept.at(0)
    before = outcome(kept, start, start.models[0])  # all departments start alike
    shared = [(moment, model) for moment in moments for model in moment.departments]
    own = [(moment, model) for moment, model in chosen if model.client is not None]
    last = [(moment, model) for moment, model in chosen if model.client is None]
    after = {(moment.round, model.name): outcome(kept, moment, model) for moment, model in [*shared, *own]}
    rounds = [moment.round for moment in moments]
    return {
        CLIENT_PATHS: {str(n): {str(m.client): place_of(m, t) for t, m in own if t.round == n} for n in rounds},
        DEPARTMENT_PATHS: {model.name: place_of(model, moment) for moment, model in last},
        DEPARTMENT_FIGURES: {m.name: _department(kept, m.name, before, after[t.round, m.name]) for t, m in last},
        CLIENT_FIGURES: {str(number): _clients(kept, number, after) for number in rounds},
    }


def _department(kept: Kept, name: str, before: Outcome, after: Outcome) -> dict[str, Any]:
    """Compare two models on the test parts of a department."""
    part = part_of(kept, kept.members(name))
    part = part if len(part) else parts(kept)[COMMON]
    old, new = before.on(part), after.on(part)
    return {"before": old, "after": new, "gain": new["accuracy"] - old["accuracy"]}


def _clients(kept: Kept, number: int, after: Mapping[tuple[int, str], Outcome]) -> dict[str, Any]:
    """Evaluate the models of a round on the test part of each client that has one."""
    found = dict[str, Any]()
    for department in kept.departments:
        for client in kept.members(department):
            part, own = kept.assembly.problem.tests[client], (number, f"client_{client}")
            if len(part):
                figures: dict[str, Any] = {"of": department, "department": after[number, department].on(part)}
                found[str(client)] = figures | ({"own": after[own].on(part)} if own in after else {})
    return found


def merge(kept: Kept, moment: Moment, model: Model, out: Path | None = None) -> Path:
    """Write the plain network of a model: its adapters are added to the layers beside which they stand.

    Args:
        kept: the run.
        moment: the round.
        model: of that round.
        out: folder to write; None: ``merged/<name>`` in the run folder.

    Returns:
        The folder: as ``save_pretrained`` writes it of a transformers model, else ``model.safetensors``, a state dict
        by the names of the builder's network.

    Raises:
        ValueError: the folder has other content.

    """
    target = kept.folder / MERGED / model.name if out is None else out
    net = merged(copied(kept.load(moment, model)))
    publish(target, partial(_write_plain, net=net))
    return target


def _write_plain(folder: Path, net: nn.Module) -> None:
    """Write a network without adapters."""
    from transformers import PreTrainedModel

    _, module, _ = hosted(net)
    if isinstance(module, PreTrainedModel):
        with quiet_transformers():
            module.save_pretrained(folder)
    else:
        save_weights(net, folder / WEIGHTS)
