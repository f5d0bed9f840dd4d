"""Echoes over Flower, by the Python of an environment that has it: prints one JSON object of what was seen.

``python echo.py <folder> kept|subprocess '{"nodes": 4, "rounds": 5, "size": 1000000}'``; with the first argument
``verb`` it is ``python -m fedsparse.deploy`` with the stand-ins of ``seam``.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import seam

from fedsparse.core import signals
from fedsparse.deploy import app, fleet, joining, superlink
from fedsparse.deploy.__main__ import main as command_line
from fedsparse.deploy.processes import started, waited

OWN = ["data.root=/srv/mine", "note='a b\"c'"]


def pack(place, config, folder):
    """The app with the stand-ins before its own lines."""
    app.write(place, config, folder, False)
    for name in ("server", "client"):
        path = place / app.PACKAGE / f"{name}.py"
        path.write_text("import seam\n\nseam.install()\n" + path.read_text())


def run(folder, isolation, asked):
    """Play one run -> what was seen."""
    made = fleet.init(folder / "fleet", "127.0.0.1", joining.free_port(), asked["nodes"], 30, False)
    superlink.connect(made)
    with ExitStack() as stack:
        start = time.monotonic()
        process = stack.enter_context(started(superlink.command(made), made.flower, superlink.log_of(made)))
        superlink.wait_for(made, process)
        superlink.register(made)
        ready = time.monotonic() - start
        for client in range(asked["nodes"]):
            home = made.folder / f"node-{client}"
            typed = [sys.executable, __file__, "verb", "node", str(home), *OWN, "--isolation", isolation]
            stack.enter_context(started(typed, home, folder / f"node-{client}.log"))
        with tempfile.TemporaryDirectory() as place:
            pack(Path(place) / "app", json.dumps(asked), folder / "run")
            begun = superlink.flwr(made, "run", str(Path(place) / "app"), superlink.CONNECTION)["run-id"]
        echo = folder / "run" / "echo.json"
        waited(echo.is_file, 200)
        status = superlink.finished(made, begun)
    seen = json.loads(echo.read_text()) if echo.is_file() else {}
    return {"status": status, "ready": ready, **seen}


def main():
    with signals.command():
        print(json.dumps(run(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))))


if __name__ == "__main__":
    seam.install()
    if sys.argv[1] == "verb":
        del sys.argv[1]
        command_line()
    else:
        main()
