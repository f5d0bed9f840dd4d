"""Judges mutants: the tests that run the changed line, nearest and cheapest first, until one fails."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from mutation.mutants import Mutant
from mutation.record import FOLDER
from mutation.tree import copy_project, digest, project_files

KINDS = (".py", ".yaml", ".toml", ".safetensors")  # of files that decide what a test finds
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant.

    Attributes:
        mutant: the change.
        word: ``noticed``, ``not noticed``, ``not noticed within the cap`` or ``run by no test``.
        by: the test that noticed it.

    """

    mutant: Mutant
    word: str
    by: str = ""

    @property
    def noticed(self) -> bool:
        """Whether a test failed."""
        return self.word == "noticed"


@dataclass(frozen=True)
class Recording:
    """What one file of tests runs.

    Attributes:
        seconds: the processor's, by test.
        failed: tests that fail without a mutant.
        lines: file -> line -> tests.
        shared: file -> lines that run while the tests are collected or their fixtures made.

    """

    seconds: dict[str, float]
    failed: list[str]
    lines: dict[str, dict[str, list[str]]]
    shared: dict[str, list[int]]

    def running(self, mutant: Mutant, lines: range) -> list[str]:
        """Tests that run one of these lines of a file; what runs at import or in fixtures is run for all of them."""
        tests = {test for line in lines for test in self.lines.get(mutant.file, {}).get(str(line), ())}
        top = not mutant.function or mutant.function[0].isupper() and "." not in mutant.function
        if set(lines) & set(self.shared.get(mutant.file, ())) or top and tests:
            tests = set(self.seconds)
        return [test for test in tests if test not in self.failed]


class Run:
    """Workers in copies of the project, and what is stored of earlier runs on the same files.

    Args:
        root: the project's root.
        settings: ``[tool.mutate]`` of its ``pyproject.toml``.
        files: the core.
        jobs: how many workers.
        cap: seconds of tests for each mutant.

    """

    def __init__(self, root: Path, settings: dict[str, Any], files: list[str], jobs: int, cap: float) -> None:
        self.root, self.settings, self.files, self.jobs, self.cap = root, settings, files, jobs, cap
        self.at = root / ".mutation"
        everything = project_files(root)
        self.project = [name for name in everything if not name.startswith(".mutation/")]
        code = [
            n for n in self.project if n.endswith((".py", ".yaml", ".toml", ".safetensors")) and "/mutation/" not in n
        ]
        self.tests = [name for name in code if Path(name).name.startswith("test_")]
        self.base = digest(root, [name for name in code if name not in self.tests])
        self.tree = digest(root, code)
        self.digests = {name: digest(root, [name]) for name in code}
        self.idle: queue.Queue[Worker] = queue.Queue()
        self.workers: list[Worker] = []
        self.unsound: set[str] = set()
        self.sound: set[str] = set()
        self.lock = threading.Lock()
        self.counter = itertools.count(1)

    def close(self) -> None:
        """End the workers."""
        for worker in self.workers:
            worker.close()

    def judge(self, chosen: Sequence[Mutant], tests: Sequence[str] = (), recorded: bool = True) -> list[Verdict]:
        """Judge every mutant.

        Args:
            chosen: the mutants.
            tests: only these files of tests; all if there are none.
            recorded: whether to run the tests that run the changed line, as recorded; else all tests of these files.

        """
        store = self.at / f"verdicts-{self.base}.jsonl"
        known = self._known(store)
        todo = [mutant for mutant in chosen if mutant.key not in known]
        if todo:
            self._start()
            files = list(tests) or [name for name in self.project if self._is_tests(name)]
            self.recordings = self._record(files) if recorded else dict.fromkeys(files)
        print(f"{len(chosen)} mutants, {len(todo)} to judge", file=sys.stderr, flush=True)

        def one(mutant: Mutant) -> Verdict:
            verdict = self._with_worker(lambda worker: self._judge(worker, mutant))
            with self.lock:
                words = f"{next(self.counter)}/{len(todo)} {verdict.word}: {mutant.key}  {verdict.by}"
                print(words.rstrip(), file=sys.stderr, flush=True)
                if verdict.noticed or not tests:  # by fewer tests nothing is known of a survivor
                    with store.open("a", encoding="utf-8") as file:
                        file.write(json.dumps([mutant.key, verdict.word, verdict.by, self._state(verdict.by)]) + "\n")
            return verdict

        with ThreadPoolExecutor(self.jobs) as pool:
            new = {verdict.mutant.key: verdict for verdict in pool.map(one, todo)}
        return [new.get(m.key) or Verdict(m, *known[m.key]) for m in chosen]

    def _known(self, store: Path) -> dict[str, tuple[str, str]]:
        """Verdicts on the same files; that a test noticed a mutant holds while its own file is the same."""
        lines = store.read_text(encoding="utf-8").splitlines() if store.is_file() else []
        return {key: (word, by) for key, word, by, state in map(json.loads, lines) if state == self._state(by)}

    def _state(self, by: str) -> str:
        """Name what a verdict depends on beside the project without its tests."""
        return self.digests.get(by.partition("::")[0], f"{self.tree}-{self.cap:g}")

    def _start(self) -> None:
        """Start the workers, each in a copy that no other run uses; the copies stay, for Python's bytecode in them."""
        self.at.mkdir(exist_ok=True)
        for number in itertools.count():
            if len(self.workers) == self.jobs:
                return
            lock = (self.at / f"copy-{number}.lock").open("w")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                continue
            folder = self.at / f"copy-{number}"
            copy_project(self.root, self.project, folder)
            worker = Worker(folder, self.settings.get("preload", []), lock)
            self.workers.append(worker)
            self.idle.put(worker)

    def _with_worker(self, work: Callable[[Worker], Any]) -> Any:
        worker = self.idle.get()
        try:
            return work(worker)
        finally:
            self.idle.put(worker)

    def _record(self, files: Sequence[str]) -> dict[str, Recording]:
        """Recordings of files of tests; those that are stored are read."""

        def one(file: str) -> tuple[str, Recording]:
            path = self.at / f"recorded-{self.base}" / f"{file.replace('/', '.')}-{self.digests[file]}.json"
            if not path.is_file():
                recording = self._with_worker(lambda worker: self._record_file(worker, file))
                path.parent.mkdir(exist_ok=True)
                path.with_suffix(".part").write_text(json.dumps(asdict(recording)), encoding="utf-8")
                path.with_suffix(".part").rename(path)
                used = sum(recording.seconds.values())
                print(f"recorded {file}: {len(recording.seconds)} tests, {used:.1f} s", file=sys.stderr, flush=True)
            return file, Recording(**json.loads(path.read_text(encoding="utf-8")))

        with ThreadPoolExecutor(self.jobs) as pool:
            recordings = dict(pool.map(one, files))
        for recording in recordings.values():
            self.unsound.update(recording.failed)
        return recordings

    def _is_tests(self, name: str) -> bool:
        """Whether pytest finds tests in a file: its name says so, or a docstring of the package has an example."""
        if name in self.tests:
            return True
        package = name.endswith(".py") and name.split("/")[0] in self.settings.get("doctests", [])
        return package and ">>> " in (self.root / name).read_text(encoding="utf-8")

    def _record_file(self, worker: Worker, file: str) -> Recording:
        select = self.settings.get("select")
        answer = worker.ask({"tests": [[file, None]], "core": self.files, "select": select})
        failed, told = sorted(set(answer["failed"])), answer["lines"]
        if told is None or "collection" in failed:
            raise RuntimeError(f"{file} cannot be recorded: {answer['end'] or 'pytest cannot collect it'}")
        lines: dict[str, dict[str, list[str]]] = {}
        for test, files in told.items():
            for name, numbers in files.items() if test in answer["seconds"] else ():
                for number in numbers:
                    lines.setdefault(name, {}).setdefault(str(number), []).append(test)
        return Recording(answer["seconds"], failed, lines, told.get("shared", {}))

    def _judge(self, worker: Worker, mutant: Mutant) -> Verdict:
        tests, seconds, whole = self._tests(mutant)
        source = mutant.apply((self.root / mutant.file).read_text(encoding="utf-8"))
        limits = {test: self.settings.get("patience", 30) + 10 * used for test, used in seconds.items()}
        while True:
            chosen = [[file, [t for t in ids if t not in self.unsound] if ids else None] for file, ids in tests]
            chosen = [pair for pair in chosen if pair[1] != []]
            if not chosen:
                return Verdict(mutant, "run by no test")
            request = {"tests": chosen, "limits": limits, "select": self.settings.get("select")}
            answer = worker.ask({**request, "file": mutant.file, "source": source})
            if not answer["failed"]:
                return Verdict(mutant, "not noticed" if whole else "not noticed within the cap")
            test = answer["failed"][0]
            if test == "collection" or self._is_sound(worker, test):
                return Verdict(mutant, "noticed", test + (f" ({answer['end']})" if answer["end"] else ""))

    def _is_sound(self, worker: Worker, test: str) -> bool:
        """Whether a test passes alone without a mutant; only then does its failure say something."""
        if test not in self.sound:
            answer = worker.ask({"tests": [[test.partition("::")[0], [test]]]})
            (self.unsound if answer["failed"] else self.sound).add(test)
        return test in self.sound

    def _tests(self, mutant: Mutant) -> tuple[list[tuple[str, list[str] | None]], dict[str, float], bool]:
        """Tests for a mutant by file, in their order; the seconds of each; whether these are all."""
        if not all(self.recordings.values()):
            return [(file, None) for file in self.recordings], {}, True
        seconds, near = {}, {}
        # what the compiler folded has no line of its own: the statement's then
        for lines in (range(mutant.line, mutant.line + 1), mutant.statement):
            for file, recording in self.recordings.items() if not seconds else ():
                is_near = self._is_near(file, mutant.file)
                for test in recording.running(mutant, lines):
                    seconds[test], near[test] = recording.seconds[test], is_near
        order = sorted(seconds, key=lambda test: (not near[test], seconds[test], test))
        used, kept = 0.0, []
        for test in order:
            used += seconds[test]
            if kept and used > self.cap:
                break
            kept.append(test)
        files: dict[str, list[str]] = {}
        for test in kept:
            files.setdefault(test.partition("::")[0], []).append(test)
        costs = {file: (not near[ids[0]], sum(seconds[t] for t in ids)) for file, ids in files.items()}
        return sorted(files.items(), key=lambda pair: costs[pair[0]]), seconds, len(kept) == len(order)

    def _is_near(self, tests: str, file: str) -> bool:
        """Whether a file of tests is about a file: it is that file, is called after it or imports from it."""
        module = file.removesuffix(".py").replace("/", ".")
        text = (self.root / tests).read_text(encoding="utf-8")
        return tests == file or Path(file).stem in Path(tests).stem.split("_") or f"{module} " in text


class Worker:
    """A worker's process, in its folder."""

    def __init__(self, folder: Path, preload: Sequence[str], lock: IO[str]) -> None:
        self.lock = lock
        self.scratch = tempfile.TemporaryDirectory(prefix="mutation-")
        path = os.pathsep.join([str(folder), str(Path(__file__).parents[1])])
        environment = {key: value for key, value in os.environ.items() if key != FOLDER}  # a test of this tool itself
        environment |= dict.fromkeys(THREADS, "1") | {
            "PYTHONPATH": path,
            "TMPDIR": str(Path(self.scratch.name) / "tmp"),
            "HYPOTHESIS_STORAGE_DIRECTORY": str(Path(self.scratch.name) / "hypothesis"),
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [sys.executable, "-m", "mutation.worker", *preload]
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and wait for the answer.

        Raises:
            RuntimeError: the worker ended.

        """
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with code {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End the process, and remove what its tests wrote."""
        self.process.communicate()
        self.scratch.cleanup()
        self.lock.close()
