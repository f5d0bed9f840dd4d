"""What a change would bring: one piece for the row, and for the hand-written loop's step a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch.nn import functional as F

from fedsparse.bench.gpu import cases
from fedsparse.bench.gpu.cases import Case
from fedsparse.bench.gpu.device import milliseconds
from fedsparse.bench.gpu.federations import Prepared, alone, beside, relative
from fedsparse.bench.gpu.one_piece import OnePieceModule
from fedsparse.bench.gpu.session import Figures, Session
from fedsparse.bench.problems import MOMENTUM


def prototype(session: Session) -> None:
    """Measure both."""
    large = cases.vit(session.tiny)
    for name, density in (("dense", 1.0), ("20% mask", 0.2)):
        case = replace(large, density=density, rounds=3 if session.tiny else 7)
        session.attempt(
            f"prototype one piece, vit_s bf16 {name} K=1", 25, partial(_one_piece, case, session), kind="one piece"
        )
    if session.device.type != "cuda":
        session.say("graph", skipped="only CUDA has graphs")
        return
    for name, case in (("mlp", cases.small("mlp", 1)), ("vit_digits", cases.small("vit_digits", 1)), ("vit_s", large)):
        session.attempt(f"graph, {name} {case.precision}", 15, partial(_graph, case, session.device), kind="graph")


def _one_piece(case: Case, session: Session) -> Figures:
    """Measure the prototype beside the loop, and how far one round of it ends from one of today."""
    changed, device = replace(case, module=OnePieceModule), session.device
    today, then = (alone(replace(c, rounds=1), device).row for c in (case, changed))
    return beside(changed, device, session.left) | {"relative_to_today": relative(then, today)}


def _graph(case: Case, device: torch.device) -> Figures:
    """Time the loop's step, eager and replayed."""
    net = Prepared(case.net().to(device).train(), case, device)
    x, y = case.data.train.held[: case.batch].to(device), case.data.train.y[: case.batch].to(device)
    sgd = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=MOMENTUM, foreach=True)

    def step() -> None:
        sgd.zero_grad(set_to_none=True)
        F.cross_entropy(net(x), y).backward()
        sgd.step()

    _aside(step)
    eager = milliseconds(step, device)
    captured = torch.cuda.CUDAGraph()
    sgd.zero_grad(set_to_none=True)
    with torch.cuda.graph(captured):
        step()
    replayed = milliseconds(captured.replay, device)
    return {"eager_ms": eager, "graph_ms": replayed, "gain": round(eager / replayed, 2)}


def _aside(step: Callable[[], None], times: int = 5) -> None:
    """Take steps on a stream of their own, as a capture asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(times):
            step()
    torch.cuda.current_stream().wait_stream(side)
