"""Pickles of numpy arrays, dicts, lists, strings and numbers, and of nothing else: CIFAR's files are such.

A pickle is a program: to load one is to call whatever functions it names. Here a file gets to name a fixed few.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np


def latin1(text: str, encoding: str) -> bytes:
    """Stand in for ``codecs.encode``, by which Python 3 stores bytes in old protocols; only as that uses it."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes bytes as {encoding}, not as latin1")
    return text.encode("latin1")


# What numpy itself names to rebuild an array and a number; numpy 2 calls numpy.core by another name.
ARRAY, NUMBER = np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0]
ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): latin1,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): ARRAY for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): NUMBER for core in ("core", "_core")},
}


class ArrayUnpickler(pickle.Unpickler):
    """Rebuilds arrays and numbers of numpy; whatever else a pickle names is refused before it is even imported."""

    def find_class(self, module: str, name: str) -> Any:
        """Look a name up among those admitted."""
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(f"it wants to load {module}.{name}, which is no array, dict, list or number")
        return ADMITTED[module, name]


def read_pickle(path: Path) -> Any:
    """Read a pickle of arrays, dicts, lists, strings and numbers; strings of Python 2 are taken as latin-1.

    Raises:
        ValueError: the file cannot be read, is damaged, or names anything else; says in one line what.

    """
    try:
        with path.open("rb") as file:
            return ArrayUnpickler(file, encoding="latin1").load()
    except Exception as error:  # a damaged pickle may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} cannot be read as a pickle of plain arrays: {reason}") from error
