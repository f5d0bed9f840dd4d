"""Instructions with responses, as departments' clients hold them: a folder a department, a file of JSON lines a client.

Shapes: ``N`` records.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from fedsparse.data.checks import checked_integer
from fedsparse.data.datasets import Dataset
from fedsparse.data.files import checked_file, checked_root, printable, reason_of
from fedsparse.data.sequences import answered, drop, split_users, splits_of
from fedsparse.data.tokens import fingerprint, load_tokenizer

ENDING = "_personal_clients"  # of a department's folder
WANTED = f"a folder of folders <department>{ENDING}, with a file of JSON lines for each client"


class Record(NamedTuple):
    """A question with its answer, who holds it, and where it stands."""

    text: str
    response: str
    department: str
    user: str
    place: str


def instructions(
    tokenizer: str | None,
    root: str | Path | None = None,
    checkpoint: str | None = None,
    text: str = "text",
    response: str = "response",
    template: str = "tags",
    max_records: int = 128,
    max_length: int = 256,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    split_seed: int = 0,
) -> Dataset:
    r"""Load ``root/<department>_personal_clients/*.jsonl``: every file is a client, every folder a department.

    A line is an object with a question and its answer; the prompt is ``<user>..</user>\n<assistant>``, or that of the
    tokenizer's chat template. Targets are the answer and the token that ends it. ``users`` are ``<department>/<file>``.

    Args:
        tokenizer: name of the model's tokenizer, as in ``load_tokenizer``.
        root: the folder.
        checkpoint: a folder whose tokenizer is used instead.
        text: key of the question.
        response: key of the answer.
        template: ``tags`` or ``chat``.
        max_records: the first so many lines of a file are read.
        max_length: most tokens of a question with its answer; what is longer is cut, and left out without its answer.
        val_fraction: share of each client's records for validation.
        test_fraction: share for testing, likewise.
        split_seed: seed of the splits, independent of the seed of a run.

    Raises:
        ValueError: tokenizer or files cannot be loaded, a line is no such object, or a client has too few records.

    """
    loaded_tokenizer = load_tokenizer(checkpoint or tokenizer)
    checked_integer("data.max_records", max_records, 1)
    records = read_records(checked_root(root, WANTED), text, response, max_records)
    pairs = [record.text for record in records], [record.response for record in records]
    examples = answered(*pairs, loaded_tokenizer, max_length, template)
    kept = drop(examples, [record.place for record in records])
    users = [records[i].user for i in kept]
    parts = split_users(users, val_fraction, test_fraction, split_seed)
    train, val, test = splits_of([e for e in examples if e is not None], users, loaded_tokenizer, parts)
    of_users = {records[i].user: records[i].department for i in kept}
    names = tuple(sorted(set(of_users.values())))
    return Dataset(
        train,
        val,
        test,
        len(loaded_tokenizer),
        str(root),
        fingerprint=fingerprint([f"{records[i].user} {records[i].text} {records[i].response}" for i in kept]),
        departments=tuple(names.index(of_users[user]) for user in sorted(of_users)),
        department_names=names,
        template=template,
    )


def read_records(root: Path, text: str, response: str, most: int) -> list[Record]:
    """Read the first lines of all clients' files, by department and file.

    Raises:
        ValueError: there is no file, or a line is broken; names file and line.

    """
    folders = [path for path in sorted(root.glob(f"*{ENDING}")) if path.is_dir()]
    clients = [(folder, path) for folder in folders for path in sorted(folder.glob("*.jsonl"))]
    if not clients:
        raise ValueError(f"data.root={root} holds no client; set data.root to {WANTED}")
    return [
        Record(question, answer, department, f"{department}/{path.stem}", place)
        for folder, path in clients
        for department in [folder.name.removesuffix(ENDING)]
        for place, question, answer in islice(_lines(path, text, response), most)
    ]


def _lines(path: Path, text: str, response: str) -> Iterator[tuple[str, str, str]]:
    """Read the lines of a file that are not blank: where each stands, question and answer."""
    try:
        with checked_file(path).open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    place = f"{printable(path)}, line {number}"
                    yield place, *_pair(line, text, response, place)
    except UnicodeDecodeError as error:
        raise ValueError(f"{printable(path)} is not UTF-8 ({reason_of(error)})") from error


def _pair(line: str, text: str, response: str, place: str) -> tuple[str, str]:
    """Read question and answer of a line."""
    try:
        held = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{place} is no JSON ({reason_of(error)}); each line needs an object of its own") from error
    for key in (text, response):
        if not isinstance(held, dict) or not isinstance(held.get(key), str):
            raise ValueError(f"{place} has no text under {key}; set data.text and data.response to the keys of yours")
    return held[text].strip(), held[response].strip()
