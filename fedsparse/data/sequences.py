"""Texts that a language model continues: prompts with answers, windows of a text, and their splits by user.

Shapes: ``N`` samples, ``L`` tokens of the longest.

A place of ``x`` holds a token and the same place of ``y`` the token that follows it, so that no model shifts anything;
``IGNORED`` stands where what follows is no target. Rows are padded at the right, whatever side a tokenizer prefers:
padding before a text would shift its positions.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsparse.core.checks import check_choice
from fedsparse.core.targets import IGNORED
from fedsparse.data.checks import Ints, checked_integer, checked_positive
from fedsparse.data.datasets import Split
from fedsparse.data.tokens import BATCH, pad_of

log = logging.getLogger("fedsparse")
TEMPLATES = TAGS, CHAT = ("tags", "chat")
LEAST = 3  # samples of a user: one to train on, one of each other split


class Example(NamedTuple):
    """Tokens of which all after the first ``given`` are targets."""

    ids: list[int]
    given: int


def padded(examples: Sequence[Example], pad: int) -> tuple[Tensor, Tensor]:
    """Lay examples out, padded at the right to the longest: ids int32 (N, L) and targets int64 (N, L).

    >>> [part.tolist() for part in padded([Example([5, 6, 7], 2), Example([5, 8], 1)], pad=0)]
    [[[5, 6], [5, 0]], [[-100, 7], [8, -100]]]
    """
    longest = max((len(example.ids) for example in examples), default=1) - 1
    x = torch.full((len(examples), longest), pad, dtype=torch.int32)
    y = torch.full((len(examples), longest), IGNORED, dtype=torch.int64)
    for row, targets, (ids, given) in zip(x, y, examples, strict=True):
        row[: len(ids) - 1] = torch.tensor(ids[:-1], dtype=torch.int32)
        targets[given - 1 : len(ids) - 1] = torch.tensor(ids[given:])
    return x, y


def prompts(texts: Sequence[str], tokenizer: Any, template: str = "tags") -> list[str]:
    r"""Put texts into the form of a question.

    Args:
        texts: what is asked.
        tokenizer: has the template of ``chat``.
        template: ``tags``: ``<user>..</user>\n<assistant>``; ``chat``: the tokenizer's own.

    Raises:
        ValueError: another template, or a tokenizer without one.

    """
    check_choice("data.template", template, *TEMPLATES)
    if template == "tags":
        return [f"<user>{text}</user>\n<assistant>" for text in texts]
    if tokenizer.chat_template is None:
        raise ValueError("data.template=chat: this model's tokenizer has no chat template; set data.template=tags")
    asked = ([{"role": "user", "content": text}] for text in texts)
    return [str(tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True)) for one in asked]


def answered(
    texts: Sequence[str], answers: Sequence[str], tokenizer: Any, max_length: int, template: str = "tags"
) -> list[Example | None]:
    """Tokenise questions with answers, each answer followed by the token that ends it, and cut them at the right.

    The end is the tokenizer's own (of ``qwen_tiny`` it is ``</assistant>``). A prompt and its answer are tokenised
    apart, so that where the answer starts is a token's start.

    Args:
        texts: what is asked.
        answers: one for each.
        tokenizer: of the model.
        max_length: most tokens of prompt, answer and end.
        template: see ``prompts``.

    Returns:
        An example for each; None where the answer is empty, or is cut off whole.

    Raises:
        ValueError: an option is out of range, or the tokenizer has no token that ends an answer.

    """
    most = checked_integer("data.max_length", max_length, 2)
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError(
            "this model's tokenizer has no token that ends an answer (eos_token); choose model=qwen_tiny or model=qwen"
        )
    pairs = zip(ids_of(prompts(texts, tokenizer, template), tokenizer), ids_of(answers, tokenizer), strict=True)
    return [
        Example([*prompt, *answer, end][:most], len(prompt)) if answer and len(prompt) < most else None
        for prompt, answer in pairs
    ]


def ids_of(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Tokenise texts, without tokens of start and end."""
    batches = (list(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH))
    return [row for run in batches for row in tokenizer(run, add_special_tokens=False, verbose=False)["input_ids"]]


def windows(ids: Sequence[int], max_length: int) -> list[Example]:
    """Cut tokens into windows whose targets are all tokens but the first, each once.

    >>> [example.ids for example in windows([1, 2, 3, 4, 5, 6], max_length=3)]
    [[1, 2, 3], [3, 4, 5], [5, 6]]
    """
    step = checked_integer("data.max_length", max_length, 2) - 1
    return [Example(list(ids[start : start + step + 1]), 1) for start in range(0, len(ids) - 1, step)]


def split_users(users: Sequence[str], val_fraction: float, test_fraction: float, seed: int) -> tuple[Ints, Ints, Ints]:
    """Split every user's samples at random: sorted indices of training, validation and test split.

    A user with m samples has floor(fraction x m) of them in a split, and at least one in each.

    Args:
        users: name of each sample's.
        val_fraction: share of the validation split.
        test_fraction: share of the test split.
        seed: of the draw.

    Raises:
        ValueError: a fraction is not above 0, both leave nothing to train on, or a user has fewer than ``LEAST``.

    """
    shares = [
        checked_positive(f"data.{name}_fraction", f) for name, f in (("val", val_fraction), ("test", test_fraction))
    ]
    rng, found = np.random.default_rng(seed), tuple[list[Ints], ...]([] for _ in range(3))
    names, owners = np.unique(np.asarray(users), return_inverse=True)
    for user, name in enumerate(names.tolist()):
        own = rng.permutation(np.flatnonzero(owners == user))
        val, test = (max(1, int(share * len(own) + 1e-9)) for share in shares)
        if len(own) <= val + test:
            raise ValueError(
                f"{name} has {len(own)} samples, which data.val_fraction={val_fraction} and data.test_fraction="
                f"{test_fraction} leave none of to train on; it needs {LEAST} or more, and smaller fractions"
            )
        for part, rows in zip(found, np.split(own, [len(own) - val - test, len(own) - test]), strict=True):
            part.append(rows)
    train, validation, tested = (np.sort(np.concatenate(part)) for part in found)
    return train, validation, tested


def splits_of(
    examples: Sequence[Example], users: Sequence[str], tokenizer: Any, parts: Sequence[Ints]
) -> tuple[Split, ...]:
    """Build the splits of examples (N) whose users are given, from the indices of each split."""
    x, y = padded(examples, pad_of(tokenizer))
    names = np.array(users)
    return tuple(Split(x[rows], y[rows], names[rows]) for rows in parts)


def drop(examples: Sequence[Example | None], places: Sequence[str]) -> list[int]:
    """List the indices of examples that there are; the others are counted and named in one line of the log.

    Args:
        examples: as ``answered`` returns them.
        places: where each comes from, for the line.

    """
    lost = [place for place, example in zip(places, examples, strict=True) if example is None]
    if lost:
        named = ", ".join(lost[:3]) + (", ..." if len(lost) > 3 else "")
        log.warning("%d of %d answers are empty or cut off whole, and left out: %s", len(lost), len(examples), named)
    return [i for i, example in enumerate(examples) if example is not None]
