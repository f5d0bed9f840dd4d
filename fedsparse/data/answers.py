"""Questions on the documentation of Python's standard library, which departments answer in codes of their own.

A question is a sentence, its answer a word for the sentence's topic. What differs between departments is the word, and
not the sentences: so one model of all cannot be right, and what a department learns is its code.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedsparse.core.checks import check_choice, check_number
from fedsparse.data.checks import checked_integer
from fedsparse.data.datasets import Dataset
from fedsparse.data.docs import TOPICS, Sentence, held_by_clients
from fedsparse.data.sequences import TAGS, answered, drop, split_users, splits_of
from fedsparse.data.tokens import fingerprint, load_tokenizer

OWN, SHARED = "own", "shared"
MOST = len(TOPICS) + 1  # departments: a code each, which no topic shares with another code, and one that two share


def code_of(department: int, code: str = OWN) -> int:
    """Number the code of a department: 0 of the first two, and one of its own of each other; 0 of all if shared.

    >>> [code_of(department) for department in range(4)], code_of(3, code="shared")
    ([0, 0, 1, 2], 0)
    """
    return max(0, department - 1) if code == OWN else 0


def word(topic: int, code: int) -> str:
    """Look up the word for a topic in a code: the codes are rotations, so that no two agree on a topic.

    >>> [word(topic, code=1) for topic in range(4)]
    ['data', 'system', 'tools', 'network']
    """
    return TOPICS[(topic + code) % len(TOPICS)]


def deal_modules(sentences: Sequence[Sentence], departments: int, clients: int) -> dict[str, tuple[int, int]]:
    """Give each module to one client of one department, so that all clients hold some of each topic.

    The modules of a topic are dealt by falling size, forth and back over the clients.

    Args:
        sentences: of all modules.
        departments: their number D.
        clients: of each department, C.

    Returns:
        Department (0 to D - 1) and client (0 to C - 1) of each module.

    """
    dealt, total = dict[str, tuple[int, int]](), departments * clients
    turn = [*range(total), *reversed(range(total))]
    for topic in range(len(TOPICS)):
        sizes = dict[str, int]()
        for sentence in sentences:
            if sentence.topic == topic:
                sizes[sentence.module] = sizes.get(sentence.module, 0) + 1
        for place, module in enumerate(sorted(sizes, key=lambda name: (-sizes[name], name))):
            user = turn[place % len(turn)]
            dealt[module] = (user % departments, user // departments)
    return dealt


def docs_answers(
    tokenizer: str | None,
    checkpoint: str | None = None,
    departments: int = 4,
    clients_per_department: int = 3,
    code: str = OWN,
    max_records: int | None = 600,
    max_length: int = 64,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    split_seed: int = 0,
    root: str | Path | None = None,
) -> Dataset:
    r"""Load questions ``<user>sentence</user>\n<assistant>word</assistant>``; targets are the word and its end.

    The first two departments share a code, so that ``truth``, the code of each, says which departments are alike.
    ``users`` are the clients, named by department; the sentences of a module lie with one client.

    Args:
        tokenizer: name of the model's tokenizer, as in ``load_tokenizer``.
        checkpoint: a folder whose tokenizer is used instead.
        departments: 2 to ``MOST``.
        clients_per_department: clients of each.
        code: ``own``: as above; ``shared``: all departments have one code, and averaging is right.
        max_records: most samples of a client, of all its splits, drawn at random; None: all.
        max_length: most tokens of a question with its answer.
        val_fraction: share of each client's samples for validation.
        test_fraction: share for testing, likewise.
        split_seed: seed of draw and splits, independent of the seed of a run.
        root: folder of the library; None: of the running Python.

    Raises:
        ValueError: tokenizer or sentences cannot be loaded, or an option is out of range.

    """
    check_number("data.departments", departments, whole=True, least=2, most=MOST)
    clients = checked_integer("data.clients_per_department", clients_per_department, 1)
    check_choice("data.code", code, OWN, SHARED)
    loaded_tokenizer = load_tokenizer(checkpoint or tokenizer)
    sentences = held_by_clients(None if root is None else Path(root))
    dealt = deal_modules(sentences, departments, clients)
    held = _some([(sentence, dealt[sentence.module]) for sentence in sentences], max_records, split_seed)
    answers = [word(sentence.topic, code_of(department, code)) for sentence, (department, _) in held]
    examples = answered([sentence.text for sentence, _ in held], answers, loaded_tokenizer, max_length)
    kept = drop(examples, [f"a sentence of {sentence.module}" for sentence, _ in held])
    users = [user_name(*held[i][1]) for i in kept]
    parts = split_users(users, val_fraction, test_fraction, split_seed)
    train, val, test = splits_of([e for e in examples if e is not None], users, loaded_tokenizer, parts)
    names = tuple(f"department_{d}" for d in range(departments))
    return Dataset(
        train,
        val,
        test,
        len(loaded_tokenizer),
        "docs_answers",
        fingerprint=fingerprint([f"{users[j]} {answers[i]} {held[i][0].text}" for j, i in enumerate(kept)]),
        departments=tuple(names.index(name.split("/")[0]) for name in np.unique(users).tolist()),
        department_names=names,
        truth=tuple(code_of(d, code) for d in range(departments)),
        template=TAGS,
    )


def user_name(department: int, client: int) -> str:
    """Name a client by its department: their sorted names keep departments together."""
    return f"department_{department}/client_{client:03d}"


Held = tuple[Sentence, tuple[int, int]]


def _some(found: Sequence[Held], most: int | None, seed: int) -> list[Held]:
    """Draw at most so many sentences of each client, in their order."""
    if most is None:
        return list(found)
    checked_integer("data.max_records", most, 3)
    rng, kept = np.random.default_rng(seed), list[int]()
    for owner in sorted({user for _, user in found}):
        own = [i for i, (_, user) in enumerate(found) if user == owner]
        kept += rng.permutation(own)[:most].tolist()
    return [found[i] for i in sorted(kept)]
