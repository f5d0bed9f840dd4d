"""A process that has imported what is slow to import, and runs tests in forks of itself, with one file changed.

It reads requests as lines of JSON and answers each with one; its folder is a copy of the project that is its own.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from mutation.record import SITE, Recorder

MEMORY = 8 * 2**30  # address space that a mutant may take beyond what the process begins with
SILENCE = 600.0  # seconds after which a test that uses no processor counts as hung
ARGUMENTS = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore::pytest.PytestAssertRewriteWarning"]


class Chosen:
    """Runs the tests asked for, in the order asked for; says when each starts and that one failed."""

    def __init__(self, wanted: Sequence[str] | None, limits: dict[str, float], tell: Any, stop: bool) -> None:
        self.wanted, self.limits, self.tell, self.stop = wanted, limits, tell, stop
        self.recorder: Recorder | None = None

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        if self.wanted is not None:
            order = {test: index for index, test in enumerate(self.wanted)}
            items[:] = sorted((item for item in items if item.nodeid in order), key=lambda item: order[item.nodeid])

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._failed("collection")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.tell(start=item.nodeid)
        before = sum(os.times()[:4])
        # a loop that never ends is found by the processor's time, so that a busy machine makes no difference
        signal.setitimer(signal.ITIMER_PROF, self.limits.get(item.nodeid, 600.0))
        done = yield
        signal.setitimer(signal.ITIMER_PROF, 0)
        self.tell(test=item.nodeid, seconds=sum(os.times()[:4]) - before)
        return done

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        if self.recorder is not None:
            self.recorder.switch(item.nodeid)
        try:
            return (yield)
        finally:
            if self.recorder is not None:
                self.recorder.switch("shared")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._failed(report.nodeid)

    def _failed(self, test: str) -> None:
        self.tell(failed=test)
        if self.stop:
            sys.stdout.flush()
            os._exit(1)


class Worker:
    """Serves requests in a folder.

    Args:
        folder: a copy of the project, and the current directory.
        preload: modules to import before the first fork.

    """

    def __init__(self, folder: Path, preload: Sequence[str]) -> None:
        self.folder, self.scratch = folder, Path(os.environ["TMPDIR"])
        (folder / "sitecustomize.py").write_text(SITE.format(str(Path(__file__).parents[1])), encoding="utf-8")
        for name in preload:
            importlib.import_module(name)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Run the tests of a request in a fork.

        Args:
            request: ``file`` and its ``source`` as it shall be, or None; ``tests``, lists of [file, ids or None];
                ``limits``, the processor's seconds of each; ``core``, files to record; ``select``, pytest's ``-m``.

        Returns:
            ``failed`` (a list), ``seconds`` by test, ``lines`` of a recording, and ``end``, which says how the process
            ended if not by itself; the test that ran then has failed.

        """
        self.scratch.mkdir(parents=True, exist_ok=True)
        with self._changed(request.get("file"), request.get("source")):
            reader, writer = os.pipe()
            child = os.fork()
            if child == 0:
                os.close(reader)
                self._work(request, writer)
            os.close(writer)
            answer = self._listen(child, reader)
        shutil.rmtree(self.scratch, ignore_errors=True)
        return answer

    @contextmanager
    def _changed(self, file: str | None, source: str | None) -> Iterator[None]:
        """Change a file; its time changes with it, so that no stored bytecode is taken for it."""
        if file is None or source is None:
            yield
            return
        path = self.folder / file
        before, status = path.read_bytes(), path.stat()
        path.write_text(source, encoding="utf-8")
        os.utime(path, (status.st_atime, status.st_mtime + 100))
        try:
            yield
        finally:
            path.write_bytes(before)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    def _work(self, request: dict[str, Any], writer: int) -> None:  # in the child; never returns
        try:
            os.setsid()
            os.dup2(os.open(self.folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
            os.dup2(1, 2)
            size = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY,) * 2)
            sys.dont_write_bytecode = request.get("file") is not None
            if sys.dont_write_bytecode:
                os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
            pipe = os.fdopen(writer, "w", encoding="utf-8")

            def tell(**words: Any) -> None:
                pipe.write(json.dumps(words) + "\n")
                pipe.flush()

            self._run(request, tell)
        finally:
            os._exit(0)

    def _run(self, request: dict[str, Any], tell: Any) -> None:
        core, recorder = request.get("core"), None
        if core is not None:
            recorder = Recorder(self.folder, core, self.scratch)
        for file, wanted in request["tests"]:
            chosen = Chosen(wanted, request.get("limits", {}), tell, stop=core is None)
            chosen.recorder = recorder
            chosen_by = ["-m", request["select"]] if request.get("select") else []
            code = pytest.main([*ARGUMENTS, f"--basetemp={self.scratch / 'pytest'}", *chosen_by, file], [chosen])
            if code not in (0, 1, 5) and core is None:  # pytest itself ended: on usage, on an error of its own
                tell(failed="collection")
        tell(lines=None if recorder is None else recorder.stop())

    def _listen(self, child: int, reader: int) -> dict[str, Any]:
        """Take what the child tells until it ends, or tells nothing for too long."""
        answer: dict[str, Any] = {"failed": [], "seconds": {}, "lines": None, "end": None}
        last, rest, started, status, whole = time.monotonic(), b"", "collection", None, False
        while True:
            ready = select.select([reader], [], [], 0.2 if status is None else 0.0)[0]
            if told := os.read(reader, 1 << 16) if ready else b"":
                last = time.monotonic()
                *lines, rest = (rest + told).split(b"\n")
                for words in map(json.loads, lines):
                    started = words.get("start", started)
                    answer["failed"] += [words["failed"]] if "failed" in words else []
                    answer["seconds"] |= {words["test"]: words["seconds"]} if "test" in words else {}
                    whole, answer["lines"] = "lines" in words, words.get("lines")
                continue
            if status is not None:
                break
            if time.monotonic() - last > SILENCE:
                os.kill(child, signal.SIGKILL)
            done, code = os.waitpid(child, os.WNOHANG)
            status = code if done else None
        os.close(reader)
        _end_group(child)
        if not whole and not answer["failed"]:  # a signal, a limit, an exit of its own
            signalled = os.WIFSIGNALED(status)
            answer["end"] = signal.Signals(os.WTERMSIG(status)).name if signalled else "ended early"
            answer["failed"].append(started)
        return answer


def _end_group(leader: int) -> None:
    """End what a test left running."""
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def main() -> None:
    """Serve until there are no more requests."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what an import prints is no answer
    worker = Worker(Path.cwd(), sys.argv[1:])
    for line in sys.stdin:
        answers.write(json.dumps(worker.answer(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
