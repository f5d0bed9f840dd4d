"""FEMNIST and Shakespeare from the JSON files of LEAF (Caldas et al. 2018), with their users.

LEAF's ``preprocess.sh`` writes folders ``train`` and ``test`` of files that each hold ``users``, ``num_samples`` and
``user_data``: for each user ``x`` and ``y``. A user who only tests is in ``test/acc`` but no client; one who only
trains has an empty test part.

Shapes: ``N`` samples, ``L`` = 80 characters.
"""

from __future__ import annotations

import hashlib
import math
import string
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedsparse.core.checks import check_number, finite
from fedsparse.data import dealing
from fedsparse.data.datasets import Dataset, Split
from fedsparse.data.leaf_files import Decode, User, read_part

# LEAF's ALL_LETTERS (models/utils/language_utils.py): a character's id is its index here
LETTERS = "\n !\"&'(),-." + string.digits + ":;>?" + string.ascii_uppercase + "[]" + string.ascii_lowercase + "}"
LENGTH = 80
FEMNIST_CLASSES = 62  # ten digits, then capitals, then small letters
_USERS, _VAL = 112, 113  # the next stream keys after that of ``fedsparse.data.own_tests``


def femnist(root: str | Path | None, val_fraction: float = 0.1, users: float = 1.0, split_seed: int = 0) -> Dataset:
    """Load FEMNIST: handwritten digits and letters of 62 classes by their writers, pixels of 1 x 28 x 28.

    LEAF's numbers in [0, 1], white as 1, are bytes divided by 255, and are converted back. They are not normalised.

    Args:
        root: folder of LEAF's ``train`` and ``test``.
        val_fraction: share of the training samples for validation; every user keeps one for training.
        users: share of the users who take part, in both parts.
        split_seed: seed of both draws, independent of the seed of a run.

    Raises:
        ValueError: a file is missing or damaged, or a share is out of range; one line with the remedy.

    """
    return _load("femnist", root, pixels, FEMNIST_CLASSES, val_fraction, users, split_seed)


def shakespeare(
    root: str | Path | None,
    val_fraction: float = 0.1,
    users: float = 1.0,
    split_seed: int = 0,
    unknown: str | None = None,
) -> Dataset:
    """Load Shakespeare: 80 characters of a role in a play, labelled by the next of LEAF's 80 characters.

    Args:
        root: folder of LEAF's ``train`` and ``test``.
        val_fraction: share of the training samples for validation; every user keeps one for training.
        users: share of the users, which are roles, who take part, in both parts.
        split_seed: seed of both draws, independent of the seed of a run.
        unknown: the character that replaces all that are not among the 80; None: they are refused.

    Raises:
        ValueError: a file is missing or damaged, a character is unknown, or a share is out of range.

    """
    if unknown is not None and not (isinstance(unknown, str) and len(unknown) == 1 and unknown in LETTERS):
        raise ValueError(f"data.unknown is {unknown!r}; give one of LEAF's 80 characters, or null")
    decode = partial(characters, unknown=unknown)
    return _load("shakespeare", root, decode, len(LETTERS), val_fraction, users, split_seed, len(LETTERS))


def pixels(x: Any, y: Any, where: str) -> User:
    """Decode images: lists of 784 numbers in [0, 1], labels -> uint8 (N, 1, 28, 28), int64 (N,).

    Raises:
        ValueError: x or y has another form; ``where`` names the user in the message.

    """
    try:
        images, labels = np.array(x, dtype=np.float64), np.array(y)
    except (ValueError, TypeError, OverflowError):
        images, labels = np.zeros(0), np.zeros(0)
    if images.shape != (len(x), 784) or not ((images >= 0) & (images <= 1)).all():
        raise ValueError(f"{where}: x is not lists of 784 numbers from 0 to 1, as LEAF writes them")
    if (
        labels.shape != (len(x),)
        or labels.dtype.kind not in "iu"
        or not 0 <= labels.min() <= labels.max() < FEMNIST_CLASSES
    ):
        raise ValueError(f"{where}: y is not whole numbers from 0 to {FEMNIST_CLASSES - 1}")
    return np.rint(images * 255).astype(np.uint8).reshape(-1, 1, 28, 28), labels.astype(np.int64)


def characters(x: Any, y: Any, where: str, unknown: str | None = None) -> User:
    """Decode texts: strings of 80 characters, next characters -> int32 (N, 80), int64 (N,), indices into ``LETTERS``.

    Raises:
        ValueError: x or y has another form, or a character is unknown; ``where`` names the user in the message.

    """
    for texts, length, name in ((x, LENGTH, "x"), (y, 1, "y")):
        if not all(isinstance(text, str) and len(text) == length for text in texts):
            raise ValueError(f"{where}: {name} is not strings of {length} characters, as LEAF writes them")
    places = letter_places("".join([*x, *y]), unknown)
    if (places < 0).any():
        strange = "".join([*x, *y])[int(np.flatnonzero(places < 0)[0])]
        raise ValueError(
            f"{where}: {strange!r} is not among LEAF's 80; set data.unknown to a character that stands for it"
        )
    split = LENGTH * len(x)
    return places[:split].astype(np.int32).reshape(-1, LENGTH), places[split:]


def letter_places(text: str, unknown: str | None = None) -> np.ndarray:
    r"""Find the index of each character in ``LETTERS``; of others -1, or the index of ``unknown``.

    >>> letter_places("\n a}~").tolist(), letter_places("~", " ").tolist()
    ([0, 1, 53, 79, -1], [1])

    """
    table = np.full(128, -1 if unknown is None else LETTERS.find(unknown), dtype=np.int64)
    table[[ord(letter) for letter in LETTERS]] = np.arange(len(LETTERS))
    codes = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")
    return table[np.minimum(codes, 127)]  # 127 is no letter


def _load(
    name: str,
    root: str | Path | None,
    decode: Decode,
    classes: int,
    val_fraction: float,
    share: float,
    seed: int,
    vocabulary: int = 0,
) -> Dataset:
    """Read both parts, choose users, and hold out validation samples of the training part."""
    users = {part: read_part(root, name, part, decode) for part in ("train", "test")}
    chosen = choose_users([*users["train"], *users["test"]], share, seed)
    labelled, test = (_stack(users[part], chosen, f"data={name} data.users={share}: the {part} part") for part in users)
    assert labelled.users is not None
    rest, held_back = hold_back(labelled.users, val_fraction, seed)
    train, val = (Split(labelled.held[rows], labelled.y[rows], labelled.users[rows]) for rows in (rest, held_back))
    digest = _fingerprint([labelled, test])
    return Dataset(train, val, test, classes, name, fingerprint=digest, vocabulary=vocabulary)


def choose_users(names: list[str], share: float, seed: int) -> set[str]:
    """Choose ceil(share x users) of the users of both parts, independent of their order.

    Raises:
        ValueError: the share is not above 0 and at most 1.

    """
    check_number("data.users", share, above=0, most=1)
    users = sorted(set(names))
    count = math.ceil(float(share) * len(users) - 1e-9)  # nudged: 0.07 * 100 is 7.000000000000001 in floats
    return {users[i] for i in dealing.stream(seed, _USERS).permutation(len(users))[:count].tolist()}


def hold_back(users: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hold out ceil(fraction x N) samples at random, but keep one of each user.

    Args:
        users: user of each sample (N,).
        fraction: share that is held out, above 0 and below 1.
        seed: of the draw.

    Returns:
        Sorted indices of the rest, and of those held out.

    Raises:
        ValueError: the fraction is out of range, or would leave a user without a sample.

    """
    order = dealing.stream(seed, _VAL).permutation(len(users))
    free = np.delete(order, np.unique(users[order], return_index=True)[1])
    size = math.ceil(float(fraction) * len(users) - 1e-9) if finite(fraction) and 0 < fraction < 1 else 0
    if not 0 < size <= len(free):
        raise ValueError(
            f"data.val_fraction is {fraction!r}; give a share above 0 and, so that each user has a sample to train on, "
            f"at most {len(free) / len(users):.3f}"
        )
    held_out = np.sort(free[:size])
    return np.setdiff1d(np.arange(len(users)), held_out), held_out


def _stack(held: Mapping[str, User], chosen: set[str], where: str) -> Split:
    """Concatenate the chosen users' samples, in the order of their names."""
    names = sorted(name for name in held if name in chosen)
    if not names:
        raise ValueError(f"{where} has no user; raise data.users")
    x, y = (np.concatenate([held[name][i] for name in names]) for i in (0, 1))
    users = np.repeat(names, [len(held[name][1]) for name in names])
    return Split(torch.from_numpy(x), torch.from_numpy(y), users)


def _fingerprint(splits: list[Split]) -> str:
    """Compute the SHA-256 of samples, labels and users."""
    digest = hashlib.sha256()
    for split in splits:
        for array in (split.held.numpy(), split.y.numpy()):
            digest.update(repr(array.shape).encode() + array.tobytes())
        digest.update("\n".join(map(str, () if split.users is None else split.users.tolist())).encode())
    return digest.hexdigest()
