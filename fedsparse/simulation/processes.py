"""The processes of a run: on one machine the leading one starts and stops the others, else torchrun or SLURM does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import distributed

from fedsparse.core import parallel
from fedsparse.simulation import strategy
from fedsparse.simulation.devices import accelerator

MEETING = "FEDSPARSE_MEETING"  # file where the processes of one machine meet
LOOPBACK = ("lo", "lo0")  # names of the interface on Linux and on macOS
GRACE = 20.0  # seconds after which a following process is killed

Followers = list["subprocess.Popen[bytes]"]


def size_of(options: Mapping[str, Any]) -> int:
    """Count the processes that ``trainer.devices`` and ``trainer.num_nodes`` ask for.

    Raises:
        ValueError: torchrun or SLURM started another number, or several machines are set without them.

    """
    asked = _asked(options)
    found = strategy.environment()
    nodes = options.get("num_nodes", 1)  # a stored run of an earlier version lacks the key
    if found is None and nodes > 1:
        raise ValueError(f"trainer.num_nodes={nodes} needs torchrun or srun, which start the processes")
    if found is not None and found.world_size() != asked:
        raise ValueError(
            f"{found.world_size()} processes were started, but trainer.devices={options['devices']} x "
            f"trainer.num_nodes={nodes} are {asked}; make them equal"
        )
    return asked


def _asked(given: Mapping[str, Any]) -> int:
    """Count the processes that Lightning's options mean, by a Trainer.

    Raises:
        ValueError: Lightning refuses them.

    """
    options = {key: given.get(key, 1) for key in ("accelerator", "devices", "num_nodes")}
    try:
        silent: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
        return lightning.Trainer(**options | {"accelerator": accelerator(options["accelerator"])}, **silent).world_size
    except (TypeError, MisconfigurationException) as error:
        said = ", ".join(f"trainer.{key}={value}" for key, value in options.items())
        raise ValueError(f"{said} cannot be had here ({error})") from error


@contextmanager
def team(size: int) -> Iterator[None]:
    """Start the following processes, join them, and end them after the ``with`` block.

    Args:
        size: number of processes. With 1, or if the process group exists already, nothing is done.

    Raises:
        ValueError: a following process failed.

    """
    if size == 1 or parallel.joined():
        yield
        return
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder, parallel.variables(_variables(0, size) | _on_this_machine()):
        meeting = Path(folder) / "meeting"
        followers = [_start(rank, size, meeting) for rank in range(1, size)]
        try:
            torch.set_num_threads(_threads(size))
            meet(meeting, followers)
            yield
            parallel.share(None)
            _wait(followers)
        except RuntimeError as error:
            raise _explained(error, followers) from error
        finally:
            torch.set_num_threads(threads)
            _stop(followers)


def meet(meeting: Path, followers: Sequence[subprocess.Popen[bytes]] = ()) -> None:
    """Wait until all processes have started, and join the process group.

    Args:
        meeting: file by which they meet.
        followers: processes that this one has started.

    Raises:
        RuntimeError: a follower ended before.

    """
    found = strategy.environment()
    assert found is not None
    size, store = found.world_size(), torch.distributed.FileStore(str(meeting), found.world_size())  # type: ignore[attr-defined]
    store.set(f"here{found.global_rank()}", "yes")
    while not store.check([f"here{rank}" for rank in range(size)]):
        if any(follower.poll() is not None for follower in followers):
            raise RuntimeError("a process ended before the run began")
        time.sleep(0.02)
    strategy.join(found, store)


def join() -> bool:
    """Join the process group if this process was started as one of several: whether it was."""
    found = strategy.environment()
    if found is not None and not parallel.joined():
        meeting = os.environ.get(MEETING)
        strategy.join(found) if meeting is None else meet(Path(meeting))
    return found is not None


def serve(follow: Callable[[], None]) -> None:
    """Run a following process. If the leading one has failed, which prints the error itself, exit with status 1."""
    try:
        follow()
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and "onnection" not in str(error):
            raise
        sys.exit(1)
    finally:
        leave()


def leave() -> None:
    """Leave the process group, if there is one."""
    if parallel.joined():
        distributed.destroy_process_group()


def _variables(rank: int, size: int) -> dict[str, str]:
    """Environment variables of a process, as torchrun sets them."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "GROUP_RANK": "0"}


def _on_this_machine() -> dict[str, str]:
    """Environment variables that bind gloo and NCCL to the loopback interface, as the processes exchange pickles.

    By default both listen on the network, gloo if the host's name resolves to it.
    """
    found = [name for _, name in socket.if_nameindex() if name in LOOPBACK] if hasattr(socket, "if_nameindex") else []
    return {key: found[0] for key in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if found}


def _threads(size: int) -> int:
    """Number of threads of each of several processes on this machine."""
    given = os.environ.get("OMP_NUM_THREADS")
    return int(given) if given else max(1, (os.cpu_count() or 1) // size)


def _start(rank: int, size: int, meeting: Path) -> subprocess.Popen[bytes]:
    """Start a following process, in a new session, so that Ctrl-C reaches the leading one only."""
    variables = (
        _variables(rank, size) | _on_this_machine() | {MEETING: str(meeting), "OMP_NUM_THREADS": str(_threads(size))}
    )
    command = [sys.executable, "-m", "fedsparse.train"]
    return subprocess.Popen(command, env=os.environ | variables, stdin=subprocess.DEVNULL, start_new_session=True)


def _wait(followers: Followers) -> None:
    for follower in followers:
        follower.wait(GRACE)


def _explained(error: RuntimeError, followers: Followers) -> Exception:
    """Turn a lost connection into an error that names the process that failed, if one did."""
    time.sleep(0.2)  # a process that has just failed may not have ended yet
    failed = [rank for rank, follower in enumerate(followers, 1) if follower.poll() not in (None, 0)]
    if not failed:
        return error
    return ValueError(f"process {failed[0]} of the run failed; if it said why, its line is above")


def _stop(followers: Followers) -> None:
    """Kill the followers, which have no results to save, and leave the process group."""
    for follower in followers:
        follower.kill()
        follower.wait()
    leave()
