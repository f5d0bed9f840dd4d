"""The ServerApp: a whole run on the server, whose messages Flower carries."""

from __future__ import annotations

import logging
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedsparse.deploy.internals import Answers
from fedsparse.deploy.link import GridLink

server = ServerApp()


def main(grid: Grid, context: Context) -> None:
    """Run the configuration that was submitted; see ``fedsparse.deploy.serve.serve``."""
    from fedsparse.deploy.serve import serve

    logging.getLogger("httpx").setLevel(logging.WARNING)  # or each question for answers is a line of run.log
    asked = context.run_config
    serve(GridLink(grid, Answers(grid)), str(asked["config"]), Path(str(asked["folder"])), bool(asked["resume"]))


server.main()(main)
