"""Which lines of the core each test runs, by coverage.py: in the test's process, in its forks and in what it starts."""

from __future__ import annotations

import atexit
import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path

FOLDER = "MUTATION_RECORD"  # where processes that a test starts leave their lines; names the core's files, too
SITE = """import os

if "MUTATION_RECORD" in os.environ:
    import sys

    sys.path.append({!r})
    from mutation.record import start_in_process

    start_in_process()
"""  # sitecustomize.py of the copy
EXIT = os._exit


class Recorder:
    """Lines by context; a context is a test, or ``shared`` while files are collected and fixtures made.

    Args:
        root: the project's root.
        core: paths from there.
        spool: a folder for the lines of other processes.
        context: before the first test.

    """

    def __init__(self, root: Path, core: Sequence[str], spool: Path, context: str = "shared") -> None:
        import coverage

        os.environ["COVERAGE_CORE"] = "ctrace"
        self.root, self.core, self.spool, self.pid = root, list(core), spool, os.getpid()
        os.environ[FOLDER] = json.dumps([str(root), self.core, str(spool)])
        self.coverage = coverage.Coverage(
            data_file=None, config_file=False, include=[str(root / path) for path in core]
        )
        self.coverage.set_option("run:disable_warnings", ["no-data-collected", "module-not-imported"])
        self.coverage.start()
        self.switch(context)
        os._exit = self._leave

    def switch(self, context: str) -> None:
        """Charge the lines from now on to another context."""
        self.coverage.switch_context(context)

    def stop(self) -> dict[str, dict[str, list[int]]]:
        """Stop, and say the lines of each context by file, those of other processes with them."""
        os._exit = EXIT
        lines = self._lines()
        for path in self.spool.glob("*.json"):
            for context, files in json.loads(path.read_text(encoding="utf-8")).items():
                for file, numbers in files.items():
                    mine = lines.setdefault(context, {}).setdefault(file, [])
                    mine.extend(sorted(set(numbers) - set(mine)))
            path.unlink()
        return lines

    def _lines(self) -> dict[str, dict[str, list[int]]]:
        self.coverage.stop()
        data, found = self.coverage.get_data(), {}
        for path in data.measured_files():
            file = Path(path).relative_to(self.root).as_posix()
            for line, contexts in data.contexts_by_lineno(path).items():
                for context in contexts:
                    found.setdefault(context, {}).setdefault(file, []).append(line)
        return found

    def _leave(self, code: int) -> None:
        """Leave a forked process, but not before its lines are kept."""
        if os.getpid() != self.pid:
            self.keep()
        EXIT(code)

    def keep(self) -> None:
        """Write this process's lines where the recorder of the tests finds them."""
        path = self.spool / f"{uuid.uuid4().hex}.json"
        path.with_suffix(".part").write_text(json.dumps(self._lines()), encoding="utf-8")
        path.with_suffix(".part").rename(path)


def start_in_process() -> None:
    """Record a process that a test started, by ``sitecustomize``."""
    if FOLDER in os.environ and "PYTEST_CURRENT_TEST" in os.environ:
        root, core, spool = json.loads(os.environ[FOLDER])
        test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" (")[0]
        atexit.register(Recorder(Path(root), core, Path(spool), test).keep)
