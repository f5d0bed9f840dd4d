"""Evaluation of a plane's points, in this process or shared by several.

Shapes: M points, K of a chunk, P coordinates.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fedsparse.core.precisions import dtype_of, made_in
from fedsparse.landscape.directions import Plane
from fedsparse.landscape.options import GLOBAL, Options
from fedsparse.landscape.scene import Scene
from fedsparse.landscape.surface import Evaluated, chunk_size, evaluate_plane, joined

AHEAD = 2  # chunks that a process is given before its first result is awaited, so that it never waits


class Points(Protocol):
    """Evaluates points of a plane on some data."""

    def __call__(self, plane: Plane, data: str, a: Tensor, b: Tensor) -> Iterator[Evaluated]:
        """Evaluate points (M,), (M,), chunk by chunk."""


@contextmanager
def shared(scene: Scene, trusted: Sequence[str] = ()) -> Iterator[Points]:
    """Evaluate points in as many processes as the options say; they end with the ``with`` block.

    Args:
        scene: of the run.
        trusted: names of packages whose code the run may name.

    """
    if scene.options.processes == 1:
        yield Here(scene)
        return
    team = Team(scene, trusted)
    try:
        yield team
    finally:
        team.close()


class Here:
    """Evaluates in this process.

    Args:
        scene: of the run.

    """

    def __init__(self, scene: Scene) -> None:
        self.scene = scene

    def __call__(self, plane: Plane, data: str, a: Tensor, b: Tensor) -> Iterator[Evaluated]:
        """Evaluate points chunk by chunk."""
        yield from evaluate_plane(self.scene.task, plane, a, b, self.scene.split(data, self.scene.options.samples))


class Team:
    """Evaluates in several processes, which start at the first call. Each builds the run anew from its folder.

    Args:
        scene: of the run.
        trusted: names of packages whose code the run may name.

    Attributes:
        ends: of the pipe to each process; it ends when its pipe is closed, so also when this process is killed.

    """

    def __init__(self, scene: Scene, trusted: Sequence[str]) -> None:
        options, self.size = scene.options, chunk_size(scene.task)
        plain = replace(options, models=(GLOBAL,), reference=None, plane="random", round=None, gif=False)
        self.arguments = (
            scene.models.folder,
            plain,
            tuple(trusted),
            max(1, torch.get_num_threads() // options.processes),
        )
        self.processes, self.ends = options.processes, list[Connection]()

    def __call__(self, plane: Plane, data: str, a: Tensor, b: Tensor) -> Iterator[Evaluated]:
        """Evaluate points; each process gets every other chunk, and results come in their order.

        Raises:
            RuntimeError: a process ended.

        """
        if not self.ends:
            self.ends = [self._start() for _ in range(self.processes)]
        rows = [tensor.cpu().numpy() for tensor in (plane.origin, plane.first, plane.second)]
        chunks = list(zip(a.split(self.size), b.split(self.size), strict=True))
        try:
            for end in self.ends:
                end.send((rows, data))
            given, waiting = cycle(self.ends), deque[Connection]()
            for at in chunks:
                if len(waiting) == AHEAD * self.processes:
                    yield _received(waiting.popleft())
                end = next(given)
                end.send([part.numpy() for part in at])
                waiting.append(end)
            while waiting:
                yield _received(waiting.popleft())
            for end in self.ends:
                end.send(None)
        except (EOFError, ConnectionError) as error:
            raise RuntimeError("a process that evaluates points ended; set processes=1 to see why") from error

    def _start(self) -> Connection:
        """Start a process: this end of its pipe."""
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        context.Process(target=work, args=(there, *self.arguments), daemon=True).start()
        there.close()
        return here

    def close(self) -> None:
        """End the processes."""
        for end in self.ends:
            end.close()


def _received(end: Connection) -> Evaluated:
    """Receive a chunk's values."""
    return Evaluated(*(torch.from_numpy(part) for part in end.recv()))


def work(end: Connection, folder: Path, options: Options, trusted: Sequence[str], threads: int) -> None:
    """Evaluate chunks of planes until the pipe is closed.

    Args:
        end: of the pipe.
        folder: of the run.
        options: of the landscape.
        trusted: names of packages whose code the run may name.
        threads: of torch.

    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that gives the chunks ends this one
    torch.set_num_threads(threads)
    scene = Scene.of(folder, options, trusted)
    try:
        with made_in(dtype_of(scene.models.assembly.problem.precision)):
            while True:
                rows, data = end.recv()
                origin, first, second = map(torch.from_numpy, rows)
                plane, split = Plane(origin, first, second), scene.split(data, options.samples)
                for chunk in iter(end.recv, None):
                    a, b = map(torch.from_numpy, chunk)
                    found = joined(evaluate_plane(scene.task, plane, a, b, split))
                    end.send([np.ascontiguousarray(part.numpy()) for part in found])
    except (EOFError, ConnectionError):
        return
