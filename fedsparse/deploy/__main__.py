"""Runs on machines of their own, over Flower: ``python -m fedsparse.deploy init|server|node|submit|status <folder>``.

init makes a fleet: an authority, the server's certificate, and a folder with a key for each node. server runs the
server of a fleet, on machine A. node runs a node, on machine B, from the folder that was copied there. submit starts a
run with the options of fedsparse.train, follows it and fails if it does. status lists nodes and runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from fedsparse.job.command import on_command_line

PORT, DAYS = 9092, 730
ISOLATIONS = ("kept", "subprocess")


class Parser(argparse.ArgumentParser):
    """A parser whose refusals are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Raise the refusal.

        Raises:
            ValueError: always.

        """
        raise ValueError(f"{message}; python -m fedsparse.deploy --help lists what there is")


def parser() -> Parser:
    """Build the parser of all verbs."""
    made = Parser(prog="python -m fedsparse.deploy", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    verbs = made.add_subparsers(dest="verb", required=True, metavar="init|server|node|submit|status")
    init = _verb(verbs, "init", "make the folder of a fleet")
    init.add_argument("--host", required=True, metavar="NAME", help="name or address by which nodes reach the server")
    init.add_argument("--nodes", required=True, type=int, metavar="N", help="how many there are")
    init.add_argument("--port", type=int, default=PORT, metavar="N", help=f"of the server, for everything ({PORT})")
    init.add_argument("--days", type=int, default=DAYS, metavar="N", help=f"how long certificates are valid ({DAYS})")
    init.add_argument("--insecure", action="store_true", help="without TLS and keys, on this machine alone")
    server = _verb(verbs, "server", "run the server of a fleet")
    words = "keep nodes and runs in memory: a message takes half the time, and after a crash nodes are started again"
    server.add_argument("--memory", action="store_true", help=words)
    node = _verb(verbs, "node", "run a node", "its own overrides, such as data.root=/srv/mine")
    words = "a process that stays, or Flower's SuperNode, which starts one for each message"
    node.add_argument("--isolation", choices=ISOLATIONS, default=ISOLATIONS[0], help=words)
    node.add_argument("--port", type=int, metavar="N", help="of a SuperNode for its own processes (a free one)")
    _verb(
        verbs, "submit", "start a run and follow it", "overrides, as for fedsparse.train; resume=<run> goes on from one"
    )
    _verb(verbs, "status", "list nodes and runs")
    return made


def _verb(verbs: Any, name: str, words: str, overrides: str = "") -> Any:
    """Add a verb."""
    made = verbs.add_parser(name, help=words, description=words)
    made.add_argument("folder", type=Path, help="of the fleet" if name != "node" else "of the node")
    if overrides:
        made.add_argument("overrides", nargs="*", metavar="key=value", help=overrides)
    return made


def check_overrides(overrides: Sequence[str]) -> None:
    """Refuse arguments that are no overrides.

    Raises:
        ValueError: one has no ``=``.

    """
    for one in overrides:
        if "=" not in one:
            raise ValueError(f"{one}: give overrides as key=value")


def run(arguments: Sequence[str]) -> None:
    """Carry a command out.

    Raises:
        ValueError: one line that says what is wrong.

    """
    options = parser().parse_args(arguments)
    check_overrides(vars(options).get("overrides", ()))
    from fedsparse.deploy.verbs import VERBS

    VERBS[options.verb](options)


def main() -> None:
    """Entry point of the command line."""
    on_command_line(partial(run, sys.argv[1:]))


if __name__ == "__main__":
    main()
