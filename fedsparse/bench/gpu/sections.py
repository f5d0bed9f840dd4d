"""The sections that train in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from fedsparse.bench.gpu import cases
from fedsparse.bench.gpu.cases import BFLOAT, FLOAT, SMALL, Case
from fedsparse.bench.gpu.federations import alone, alone_figures, beside, relative
from fedsparse.bench.gpu.parts import Parts
from fedsparse.bench.gpu.profile import Profile
from fedsparse.bench.gpu.session import Figures, Session
from fedsparse.bench.gpu.waits import Waits

Changes = dict[str, Any]
# seconds that a model's first case may take: clients one by one, of which a hundred take four steps a round
GUESSES = {"mlp": 25.0, "conv": 25.0, "vit_digits": 60.0}


def vit(session: Session) -> None:
    """ViT-S/16: rounds beside the loop's, and waits."""
    case = cases.vit(session.tiny)
    together = f"K={case.clients}"
    checks: dict[str, Changes] = {
        "vit_s bf16 dense K=1": {},
        "vit_s bf16 20% random mask K=1": {"density": 0.2},
        f"vit_s bf16 dense {together}": {"cohort": case.clients},
        "vit_s float32 dense K=1": {"precision": FLOAT, "rounds": max(3, case.rounds // 2)},
    }
    for name, changes in checks.items():
        run = partial(beside, replace(case, **changes), session.device, session.left)
        session.attempt(name, 45, run, kind="vit pairs")
    for name, changes in list(checks.items())[:3]:
        run = partial(_waits, replace(case, **changes, rounds=3), session.device)
        session.attempt(f"waits, {name}", 20, run, kind="vit waits")


def small(session: Session) -> None:
    """Train many clients of small networks one by one and stacked, and one by one under a mask."""
    clients, rounds = (4, 3) if session.tiny else (100, 6)
    for model in SMALL:
        case = cases.small(model, clients, rounds)
        checks: dict[str, Changes] = {f"K={k}": {"cohort": k} for k in ((1, 2, 4) if session.tiny else (1, 10, 100))}
        checks["K=1, 20% mask (the loop is dense)"] = {"density": 0.2, "rounds": min(5, rounds)}
        for name, changes in checks.items():
            run = partial(beside, replace(case, **changes), session.device, session.left)
            session.attempt(f"{model} {name}, {clients} clients a round", GUESSES[model], run, kind=f"small {model}")


def bert(session: Session) -> None:
    """BERT-base: all of it sent, and the largest tenth with error feedback."""
    case = cases.bert(session.tiny)
    checks: dict[str, Changes] = {
        "bert_base bf16 dense": {},
        "bert_base bf16 topk 10% with feedback": {"exchange": cases.topk},
    }
    for name, changes in checks.items():
        changed = replace(case, **changes)
        session.attempt(name, 60, partial(_in_parts, changed, session), kind="bert pairs")
        session.attempt(f"waits, {name}", 30, partial(_waits, changed, session.device, 2), kind="bert waits")


def profile(session: Session) -> None:
    """Profile a round of ViT-S/16, and of many clients of a small network."""
    large = replace(cases.vit(session.tiny), rounds=3)
    few = cases.small("vit_digits", 3 if session.tiny else 20)
    checks: dict[str, tuple[Case, float]] = {
        "vit_s dense K=1": (large, 40),
        "vit_s 20% mask K=1": (replace(large, density=0.2), 40),
        f"vit_digits K=1, 20% mask, {few.clients} clients": (replace(few, density=0.2), 20),
    }
    for name, (case, needs) in checks.items():
        session.attempt(f"profile, {name}", needs, partial(_profile, case, session.device))


def determinism(session: Session) -> None:
    """Train the same federation twice, with and without deterministic kernels."""
    case = replace(cases.vit(session.tiny), rounds=2)
    for precision in (BFLOAT, FLOAT):
        for strict in (False, True):
            name = f"same ViT-S federation twice, {precision}, deterministic={strict}"
            run = partial(_twice, replace(case, precision=precision), session.device, strict)
            session.attempt(name, 25, run, kind=f"twice {precision}")


def _waits(case: Case, device: torch.device, first: int = 1) -> Figures:
    """Count waits from a round on."""
    waits = Waits(first)
    ran = alone(case, device, [waits])
    return waits.figures() | alone_figures(ran)


def _profile(case: Case, device: torch.device) -> Figures:
    """Profile the last round."""
    found = Profile(case.rounds - 1)
    alone(case, device, [found])
    return found.figures()


def _in_parts(case: Case, session: Session) -> Figures:
    """Train beside the loop, and time clients and what follows them apart."""
    parts = Parts(session.device)
    return beside(case, session.device, session.left, parts=parts) | parts.figures()


def _twice(case: Case, device: torch.device, strict: bool) -> Figures:
    """Compare the rows of two runs."""
    with _deterministic(strict):
        first, second = (alone(case, device).row for _ in range(2))
    return {"equal_bits": torch.equal(first, second), "relative": relative(second, first)}


@contextmanager
def _deterministic(strict: bool) -> Iterator[None]:
    """Let torch use deterministic kernels alone; the switch is the process's."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(strict)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
