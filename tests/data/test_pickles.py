"""CIFAR's pickles: real ones read as they were, and what would end Python, fill memory or run code is refused."""

from __future__ import annotations

import collections
import pickle
import tracemalloc

import numpy as np
import pytest
from image_files import write_pickle

from fedsparse.data import pixels
from fedsparse.data.unpickle import MOST_STEPS, Call, array_of, read_pickle

NDARRAY = b"cnumpy\nndarray\n"
DTYPE = b"cnumpy\ndtype\n"
RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n"
EMPTY = RECONSTRUCT + b"(" + NDARRAY + b"K\x00\x85U\x01btR"  # what numpy begins an array with


def dtype(code=b"u1", state=b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"):
    """A dtype as numpy 1 pickled it."""
    return DTYPE + b"(U" + bytes([len(code)]) + code + b"K\x00K\x01tR" + state


def array(shape=b"K\x01M\x00\x0c\x86", kind=None, content=b"T\x00\x0c\x00\x00" + bytes(3072)):
    """An array of uint8 (1, 3072) as Python 2 and numpy 1 pickled it, or something like it."""
    return EMPTY + b"(K\x01" + shape + (kind or dtype()) + b"\x89" + content + b"tb"


def batch(data, labels=b"](K\x05e"):
    """A batch of CIFAR around an array."""
    return b"\x80\x02}(U\x04data" + data + b"U\x06labels" + labels + b"u."


def written(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("held", [eval, getattr, np.load, np.memmap, pickle.loads, collections.OrderedDict, slice(1)])
def test_other_names_are_refused(tmp_path, held):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(ValueError, match="it wants to load"):
            read_pickle(written(tmp_path / "f", pickle.dumps([held], protocol)))


def plain(held):
    """Make arrays and numbers of the notes of them."""
    if isinstance(held, list | tuple):
        return type(held)(map(plain, held))
    if isinstance(held, dict):
        return {key: plain(value) for key, value in held.items()}
    if isinstance(held, Call) and held.name == "encode":
        return held.given[0].encode("latin1")
    return array_of(held) if isinstance(held, Call) else held


PLAIN = {
    "array": np.arange(12, dtype=np.uint8).reshape(3, 4),
    "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "big-endian": np.arange(-3, 3, dtype=">i4"),
    "long": np.array([[2**63 - 1]]),
    "scalars": [np.int64(-3), np.uint8(200)],
    "plain": [1, 2.5, "\xe9", b"\xff\x00", None, True, (1, [2, {"a": 3}])],
}


@pytest.mark.parametrize("key", PLAIN)
@pytest.mark.parametrize("core", [b"numpy._core", b"numpy.core"])
def test_plain_data_reads_as_it_was(tmp_path, key, core):
    for protocol in range(pickle.HIGHEST_PROTOCOL):  # 5 names a function of its own for arrays
        content = pickle.dumps(PLAIN[key], protocol)
        if protocol < 4:  # those that name a module by a line, so that numpy 1's name is one replacement
            content = content.replace(b"numpy._core", core)
        held = plain(read_pickle(written(tmp_path / "f", content)))
        np.testing.assert_equal(held, PLAIN[key])
        if isinstance(held, np.ndarray):
            assert held.dtype == PLAIN[key].dtype
            assert held.flags.writeable


def test_a_pickle_of_python_2(tmp_path):
    """As Python 2.7 and numpy 1 wrote CIFAR: arrays' bytes and keys as strings without an encoding (opcode U)."""
    pixel = array(b"K\x01K\x04\x86", content=b"U\x04\x00\x7f\x80\xff")
    content = b"\x80\x02}(U\x04data" + pixel + b"U\x06labels](K\x05eU\x01n\x8a\x01\x07u."
    held = read_pickle(written(tmp_path / "f", content))
    assert array_of(held["data"]).tolist() == [[0, 127, 128, 255]]
    assert array_of(held["data"]).dtype == np.uint8
    assert held["labels"] == [5]
    assert held["n"] == 7


def test_labels_may_be_an_array_or_numbers_of_numpy(tmp_path):
    for labels in (np.array([3, 99]), [np.int64(3), np.uint8(99)], [3, 99]):
        write_pickle(tmp_path / "batch", {"data": np.ones((2, 3072), np.uint8), "labels": labels})
        assert pixels.read_batch(tmp_path / "batch").y.tolist() == [3, 99]


@pytest.mark.parametrize(
    "held",
    [
        {"data": np.zeros((3, 3072), np.uint8)},
        {"data": np.zeros((2, 3072), np.uint8), "labels": [1, 2, 3]},
        {"data": np.zeros((2, 3072), np.float32), "labels": [1, 2]},
        {"data": np.zeros((2, 3072), np.int8), "labels": [1, 2]},
        {"data": np.zeros((2, 768), np.uint8), "labels": [1, 2]},
        {"data": np.zeros((2, 3072), np.uint8), "labels": [0.5, 1.0]},
        {"data": np.zeros((2, 3072), np.uint8), "labels": [True, 1]},
        {"data": np.zeros((2, 3072), np.uint8), "labels": [1, -1]},
        {"data": np.zeros((2, 3072), np.uint8), "labels": [1, 10**12]},  # as many outputs of a head fill the memory
        {"data": np.zeros((2, 3072), np.uint8), "labels": [[1], [2]]},
        {"data": np.zeros((2, 3072), np.uint8), "labels": np.array([[1], [2]])},
        {"data": np.zeros((0, 3072), np.uint8), "labels": []},
        {"data": [np.zeros((1, 3072), np.uint8)], "labels": [1]},
        {"labels": [1]},
    ],
    ids=str,
)
def test_a_pickle_of_something_else_is_refused(tmp_path, held):
    write_pickle(tmp_path / "batch", held)
    with pytest.raises(ValueError, match="batch") as error:
        pixels.read_batch(tmp_path / "batch")
    assert "\n" not in str(error.value)


FIELD = b"(K\x03U\x01|N(U\x01at}U\x01a(" + dtype() + b"J\x00\xe1\xf5\x05tsJ\x01\xe1\xf5\x05K\x01K\x00tb"
NEVER = {
    # the 79 bytes: numpy takes eight bytes of the file for the address of an object
    "array in a list": batch(b"](" + NDARRAY + b"(K\x01\x85U\x01OU\x08AAAAAAAAtRe"),
    "array of addresses": batch(NDARRAY + b"(K\x01\x85U\x01OU\x08AAAAAAAAtR"),
    "object dtype in a state": batch(array(b"K\x01\x85", dtype(b"O8"), b"U\x08AAAAAAAA")),
    "a field at 100 MB": batch(array(b"K\x01\x85", dtype(b"V1", FIELD), b"U\x01A")),
    "no buffer": batch(NDARRAY + b"(J\xa0\x86\x01\x00\x85U\x02u1tR"),
    "state of another array": batch(NDARRAY + b"(K\x01\x85U\x02u1tR(K\x01K\x01\x85" + dtype() + b"\x89U\x01Atb"),
    "shape beyond the bytes": batch(array(b"K\x02M\x00\x0c\x86")),
    "negative shape": batch(array(b"J\xff\xff\xff\xffJ\x00\xf4\xff\xff\x86")),
    "shape of bools": batch(array(b"\x88M\x00\x0c\x86")),
    "a type that is no name": batch(array(kind=DTYPE + b"(](U\x01aU\x02i8\x86eK\x00K\x01tR")),
    "a state that is no tuple": batch(EMPTY + b"}b"),
    "characters that are no bytes": batch(array(content=b"X\x00\x18\x00\x00" + "\u0101".encode() * 3072)),
    "memo index of 2**28": b"Nr\x00\x00\x00\x10.",
    "memo index of 2**200": b"Np" + str(2**200).encode() + b"\n.",
    "nested keys": b"}" + b")" + b"\x85" * 200_000 + b"Ns.",  # whose hash is taken recursively
    "nested keys of a dict": b"()" + b"\x85" * 200_000 + b"Nd.",
    "unhashable key": b"}]Ns.",
    "keys that collide": b"}("
    + b"".join(b"\x8a\x09" + (i * (2**61 - 1)).to_bytes(9, "little") + b"N" for i in range(9))
    + b"u.",
    "a change of a name": NDARRAY + b"N}U\x04textU\x01xs\x86b.",
    "a change of a dict": b"}}U\x01aNsb.",
    "a call of a text": b"U\x01a)R.",
    "a call with a text": NDARRAY + b"U\x03abcR.",
    "a call with a dict": NDARRAY + b"}R.",
    "a persistent id": b"U\x01aQ.",
    "an extension": b"\x82\x01.",
    "an instance": b"(icollections\nOrderedDict\n.",
    "an object of a class": NDARRAY + b")\x81.",
    "a buffer elsewhere": b"\x80\x05\x97.",
    "a set": b"\x8f.",
    "bytes beyond the end": b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b"a.",
    "a frame beyond the end": b"\x80\x04\x95" + (2**62).to_bytes(8, "little") + b"N.",
    "a number beyond the end": b"\x8b\xff\xff\xff\x7f\x01.",
    "a negative length": b"T\xff\xff\xff\xff.",
    "digits": b"I" + b"9" * 100_000 + b"\n.",
    "a stop at once": b".",
    "marks": b"(" * 100_000 + b".",
}


@pytest.mark.parametrize("name", NEVER)
def test_what_no_batch_holds_is_refused_in_one_line(tmp_path, name):
    content = NEVER[name]
    tracemalloc.start()
    with pytest.raises(ValueError, match="batch") as error:
        pixels.read_batch(written(tmp_path / "batch", content))
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(error.value)
    assert taken < 100 * len(content) + 2**20


@pytest.mark.slow
def test_a_program_without_end_is_refused_before_it_fills_the_memory(tmp_path):
    with pytest.raises(ValueError, match="steps"):
        read_pickle(written(tmp_path / "f", b"]" * (MOST_STEPS + 1) + b"."))
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**28 + 1)
    with pytest.raises(ValueError, match="more than 268435456 bytes"):
        read_pickle(tmp_path / "large")


def test_what_nests_deeply_is_read_and_let_go(tmp_path):
    for nested in (
        b"]" * 100_000 + b"a" * 99_999,
        b")" + b"\x85" * 100_000,
        (NDARRAY + b")R") + b"\x85q\x00" + (NDARRAY + b"h\x00R\x85q\x00") * 10_000,
    ):
        read_pickle(written(tmp_path / "f", nested + b"."))
