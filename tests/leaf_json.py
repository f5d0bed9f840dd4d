"""Files as LEAF's preprocessing writes them."""

from __future__ import annotations

import json

import numpy as np

LETTERS = "\n !\"&'(),-.0123456789:;>?ABCDEFGHIJKLMNOPQRSTUVWXYZ[]abcdefghijklmnopqrstuvwxyz}"  # LEAF's own line
PLAY = "To be, or not to be: that is the question; whether 'tis nobler in the mind to suffer the slings and arrows "
NAME = "all_data_0_niid_05_keep_0_{part}_9.json"


def write(folder, part, users, number=0):
    """Write one file of a part: ``users`` gives x and y by name."""
    content = {
        "users": list(users),
        "num_samples": [len(y) for _, y in users.values()],
        "user_data": {user: {"x": x, "y": y} for user, (x, y) in users.items()},
    }
    path = folder / part / NAME.format(part=part).replace("_0_niid", f"_{number}_niid")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def images(count, seed):
    """White paper with a dark stroke, bytes divided by 255; the class is where the stroke lies."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 62, count)
    pixels = rng.integers(230, 256, (count, 784))
    for row, label in zip(pixels, labels.tolist(), strict=True):
        row[label * 12 : label * 12 + 30] = 10
    return (pixels / 255).tolist(), labels.tolist()


def texts(count, seed):
    """Windows of 80 characters, and what comes next."""
    play, start = PLAY * 40, seed * 17
    return [play[i : i + 80] for i in range(start, start + count)], [play[i + 80] for i in range(start, start + count)]


def write_both(folder, make, train=12, test=4):
    """Write bob and eve, in both parts, ann, who only trains, carl, who only tests, and dora, who has nothing."""
    write(folder, "train", {"bob": make(train, 0), "ann": make(train + 1, 1)})
    write(folder, "train", {"eve": make(train, 2), "dora": ([], [])}, number=1)
    write(folder, "test", {"eve": make(test, 3), "carl": make(test, 4), "bob": make(test, 5), "dora": ([], [])})
    return folder
