"""Reads CIFAR's pickles as data: functions that a file names are recorded, and never called.

A pickle is a program: loading one calls the functions that it names, and numpy's own crash Python if called with wrong
numbers. Here a name is text and a call is a record (``Call``); ``array_of`` builds an array from such a record, of
bytes whose number agrees with type and shape.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedsparse.data.files import MOST_BYTES, checked_file, reason_of

PYTHONS: Any = pickle._Unpickler  # the Python implementation, whose memo is a dict; C's is an array
MOST_STEPS = 2_000_000  # of the program; CIFAR-100's has 0.3 million. Each creates at most one object of 200 bytes
LONGEST_KEY = 1000
WHOLE = {f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)}
# Functions by which numpy rebuilds an array and a number (numpy 2 renamed numpy.core), and Python 3 bytes in old
# protocols.
ADMITTED = {
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "encode",
    **{(f"numpy.{core}.multiarray", name): name for core in ("core", "_core") for name in ("_reconstruct", "scalar")},
}


@dataclass(frozen=True)
class Name:
    """A name in a pickle, in place of the object."""

    text: str


@dataclass(eq=False, slots=True)
class Call:
    """A call in a pickle, in place of its result."""

    name: str
    given: tuple[Any, ...]
    state: Any = None


class Memo(dict[int, Any]):
    """The objects that a pickle refers to again, by number."""

    def __setitem__(self, number: int, value: Any) -> None:
        """Store a value; numbers are at most ``MOST_STEPS``, since larger ones could be chosen to collide."""
        if number > MOST_STEPS:
            raise pickle.UnpicklingError("it numbers objects higher than there can be any")
        dict.__setitem__(self, number, value)


class Steps:
    """The admitted steps of the program, by code; at most ``MOST_STEPS`` are executed."""

    def __init__(self) -> None:
        self.left = MOST_STEPS

    def __getitem__(self, code: int) -> Callable[[PlainUnpickler], None]:
        """Look up an admitted step, and count it."""
        self.left -= 1
        if self.left < 0:
            raise pickle.UnpicklingError(f"it takes more than {MOST_STEPS} steps")
        if code not in PLAIN:
            raise pickle.UnpicklingError(f"it takes the step {code:#04x}, which plain data does not need")
        return PLAIN[code]


class PlainUnpickler(PYTHONS):
    """Reads lists, tuples, dicts, texts and numbers; names and calls are recorded."""

    def __init__(self, content: bytes) -> None:
        PYTHONS.__init__(self, io.BytesIO(content), encoding="latin1")
        self.memo, self.dispatch = Memo(), Steps()

    def find_class(self, module: str, name: str) -> Name:
        """Look up an admitted name."""
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(f"it wants to load {module}.{name}, which is no array, dict, list or number")
        return Name(ADMITTED[module, name])

    def load_reduce(self) -> None:
        """Record a call."""
        given, name = self.stack.pop(), self.stack.pop()
        if not (isinstance(name, Name) and isinstance(given, tuple)):
            raise pickle.UnpicklingError("it calls what has no name")
        self.append(Call(name.text, given))

    def load_build(self) -> None:
        """Record the state of a called object."""
        state, call = self.stack.pop(), self.stack[-1]
        if not isinstance(call, Call):
            raise pickle.UnpicklingError("it changes what is no array")
        call.state = state

    def load_setitem(self) -> None:
        """Put one pair into a dict."""
        pair = self.stack[-2:]
        del self.stack[-2:]
        self._fill(self.stack[-1], pair)

    def load_setitems(self) -> None:
        """Put pairs into a dict."""
        pairs = self.pop_mark()
        self._fill(self.stack[-1], pairs)

    def load_dict(self) -> None:
        """Build a dict from pairs."""
        pairs = self.pop_mark()
        self.append({})
        self._fill(self.stack[-1], pairs)

    def _fill(self, held: Any, pairs: list[Any]) -> None:
        """Fill a dict."""
        if not isinstance(held, dict) or len(pairs) % 2:
            raise pickle.UnpicklingError("it fills what is no dict")
        held.update(zip(map(_key_of, pairs[::2]), pairs[1::2], strict=True))


def _key_of(key: Any) -> str:
    """Read a key, which must be text: numbers could be chosen to collide, and nested tuples hash recursively."""
    text = key.given[0] if isinstance(key, Call) and key.name == "encode" and key.given else key
    text = text.decode("latin1") if isinstance(text, bytes) else text
    if not isinstance(text, str) or len(text) > LONGEST_KEY:
        raise pickle.UnpicklingError("it holds a dict whose keys are no names")
    return text


# The steps of plain data, and their methods; none that builds an object of a class.
STEPS = """PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4
    FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES
    SHORT_BINBYTES BINBYTES8 EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT
    SETITEM SETITEMS GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL REDUCE BUILD"""
CODES = [getattr(pickle, step)[0] for step in STEPS.split()]
PLAIN = {code: getattr(PlainUnpickler, PYTHONS.dispatch[code].__name__) for code in CODES}


def read_pickle(path: Path) -> Any:
    """Read a pickle of lists, tuples, dicts, texts and numbers; strings of Python 2 are taken as latin-1.

    A file of n bytes takes 4 n (Python's text of an array's bytes, and the array) and at most 400 MB of memory.

    Returns:
        The content, with keys as text, and a ``Call`` in place of each array or number of numpy, for ``array_of``.

    Raises:
        ValueError: the file cannot be read, is damaged, too large, or names another function; one line.

    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES} bytes, and no batch of CIFAR has")
        return PlainUnpickler(checked_file(path).read_bytes()).load()
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"{path} cannot be read as a pickle of plain arrays: {reason_of(error)}") from error


def array_of(held: Any) -> np.ndarray | None:
    """Build an array of whole numbers, or one number, from a recorded call; None from any other object."""
    match held:
        case Call(name="_reconstruct", state=(*_, tuple(shape), Call(name="dtype") as kind, bool(fortran), stored)):
            pass
        case Call(name="scalar", given=(Call(name="dtype") as kind, stored)):
            shape, fortran = (), False
        case _:
            return None
    dtype = _dtype_of(kind)
    if dtype is None or len(shape) > 4 or not all(type(side) is int and 0 < side <= MOST_BYTES for side in shape):
        return None
    content = _bytes_of(stored, math.prod(shape) * dtype.itemsize)
    if content is None:
        return None
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C").copy()


def number_of(held: Any) -> int:
    """Convert a whole number, Python's or numpy's; -1 for any other object."""
    array = array_of(held) if isinstance(held, Call) and held.name == "scalar" else None
    number = held if array is None else array.item()
    return number if type(number) is int else -1


def _dtype_of(kind: Call) -> np.dtype[Any] | None:
    """Convert a recorded dtype of whole numbers, such as u1, with its byte order; None for others."""
    match kind:
        case Call(given=(str(code), *_), state=(int(), "|" | "<" | ">" as order, None, None, None, *_)):
            return np.dtype(order + code) if code in WHOLE else None
    return None


def _bytes_of(stored: Any, size: int) -> bytes | None:
    """Convert bytes of this size, as Python 2 or 3 pickled them; None for any other object."""
    match stored:
        case Call(name="encode", given=(str(held), "latin1")) | (str(held) | bytes(held)) if len(held) == size:
            try:
                return held.encode("latin1") if isinstance(held, str) else held
            except UnicodeEncodeError:
                return None
    return None
