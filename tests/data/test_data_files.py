"""Files that someone else made: pipes, small files that unpack to large ones, and names that a terminal would obey."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
import zipfile

import numpy as np
import pytest
from image_files import CHANGED, idx, write_cifar10, write_mnist
from PIL import Image

from fedsparse.data import leaf, pixels, text
from fedsparse.data.datasets import arrays
from fedsparse.data.files import MOST_BYTES, printable, reason_of
from fedsparse.data.folder import imagefolder
from fedsparse.data.samples import Mapped
from fedsparse.job.command import one_line

pytestmark = pytest.mark.filterwarnings(CHANGED)
NASTY = "a\x1b[31m\nb\u202ec"  # red from here on, a line of its own, and the rest from right to left
SHOWN = "a\\x1b[31m\\nb\\u202ec"


def refused(call, says):
    with pytest.raises(ValueError, match=says) as error:
        call()
    assert str(error.value).isprintable(), str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------- no regular files


def as_pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


def write_npz(folder):
    for part in ("train", "val", "test"):
        np.savez(folder / f"{part}.npz", x=np.zeros((4, 1, 2, 2), np.uint8), y=np.arange(4))


def test_a_pipe_in_place_of_any_file_is_refused_and_not_waited_for(tmp_path):
    cifar, mnist = write_cifar10(tmp_path), write_mnist(tmp_path)
    as_pipe(cifar / "data_batch_3")
    refused(lambda: pixels.cifar10(tmp_path), "data_batch_3 is no regular file")
    as_pipe(mnist / "t10k-images-idx3-ubyte.gz")
    refused(lambda: pixels.mnist(tmp_path), "t10k-images-idx3-ubyte.gz is no regular file")
    write_npz(tmp_path)
    as_pipe(tmp_path / "val.npz")
    refused(lambda: arrays(tmp_path), "val.npz .*no regular file")
    for part in ("train", "val", "test"):
        (tmp_path / f"{part}.npz").unlink()
        np.save(tmp_path / f"{part}_x.npy", np.zeros((4, 1, 2, 2), np.uint8))
        np.save(tmp_path / f"{part}_y.npy", np.arange(4))
    as_pipe(tmp_path / "train_x.npy")
    refused(lambda: arrays(tmp_path), "train_x.npy .*no regular file")
    refused(lambda: arrays(tmp_path, stream=True), "train_x.npy .*no regular file")
    refused(lambda: Mapped(tmp_path / "train_x.npy"), "train_x.npy .*no regular file")


def test_a_pipe_among_texts_and_users(tmp_path):
    (tmp_path / "train").mkdir()
    as_pipe(tmp_path / "train" / "a.json")
    refused(lambda: leaf.femnist(tmp_path), "a.json .*no regular file")
    as_pipe(tmp_path / "train.csv")
    refused(lambda: text.ag_news("bert_tiny", root=tmp_path), "train.csv .*no regular file")
    (tmp_path / "train.csv").unlink()
    as_pipe(tmp_path / "dataset_dict.json")  # as save_to_disk calls one of its files
    refused(
        lambda: text.ag_news("bert_tiny", root=tmp_path), "a.json is no regular file|dataset_dict.json is no regular"
    )


def write_classes(root, names="ab", count=20):
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(np.full((4, 4), i, np.uint8)).save(root / name / f"{i:02}.png")
    return root


@pytest.mark.parametrize("stream", [False, True])
def test_a_pipe_a_device_or_a_folder_in_a_class_folder(tmp_path, stream):
    root = write_classes(tmp_path / "mine")

    def load():
        dataset = imagefolder(root, 4, stream=stream)
        return [split.held for split in (dataset.train, dataset.val, dataset.test)]

    load()
    as_pipe(root / "a" / "03.png")
    refused(load, "a/03.png is no regular file; put the file itself there")
    (root / "a" / "03.png").unlink()
    (root / "a" / "03.png").symlink_to("/dev/zero")
    refused(load, "a/03.png is no regular file")
    (root / "a" / "03.png").unlink()
    (root / "a" / "03.png").mkdir()  # a folder of that name is a folder, and empty
    load()


# ------------------------------------------------------------------------------------- small files that are large ones


def test_of_a_packed_file_only_what_it_promises_is_unpacked(tmp_path):
    folder = write_mnist(tmp_path)
    path = folder / "train-images-idx3-ubyte.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(idx(np.zeros((100, 28, 28))))
        for _ in range(200):
            file.write(bytes(10**6))
    assert path.stat().st_size < 10**6
    tracemalloc.start()
    refused(lambda: pixels.mnist(tmp_path), "holds more bytes than it promises")
    assert tracemalloc.get_traced_memory()[1] < 5 * 10**6
    tracemalloc.stop()


@pytest.mark.parametrize("shape", [(2**30, 28, 28), (2**31 - 1,) * 3, (1, 2**14, 2**14 + 1), (-1, 28, 28), (0, -5, 28)])
def test_a_packed_file_that_promises_too_much_is_refused(tmp_path, shape):
    folder = write_mnist(tmp_path)
    content = bytes([0, 0, 8, 3]) + np.array(shape, ">i4").tobytes() + bytes(3 * 784)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(content))
    tracemalloc.start()
    refused(lambda: pixels.mnist(tmp_path), f"it promises {shape[0]} x {shape[1]} x {shape[2]} bytes")
    assert tracemalloc.get_traced_memory()[1] < 2**21 < MOST_BYTES
    tracemalloc.stop()


def test_an_archive_of_arrays_that_promises_more_than_there_is_is_refused(tmp_path):
    write_npz(tmp_path)
    head = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little")
    for shape in ((10**13,), (10**6, 3, 99, 99)):
        told = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
        with zipfile.ZipFile(tmp_path / "train.npz", "w") as file:
            file.writestr("x.npy", head + told)
            file.writestr("y.npy", head + told)
        refused(lambda: arrays(tmp_path), "train.npz cannot be read as an npz file")
    nested = (b"{'descr': " + b"(" * 9000).ljust(9999) + b"\n"
    with zipfile.ZipFile(tmp_path / "train.npz", "w") as file:
        file.writestr("x.npy", b"\x93NUMPY\x01\x00" + len(nested).to_bytes(2, "little") + nested)
    refused(lambda: arrays(tmp_path), "train.npz cannot be read as an npz file")


def leaf_file(users, x=None, y=None):
    data = {user: {"x": [[0.5] * 784] if x is None else x, "y": [1] if y is None else y} for user in users}
    return json.dumps({"users": users, "num_samples": [1] * len(users), "user_data": data})


def test_leaf_files_of_a_long_name_or_a_large_number_are_refused(tmp_path):
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "a.json").write_text(leaf_file(["bob"]))
    for content, says in (
        (leaf_file(["a" * 201]), "users are not 1 different names of at most 200 characters"),
        (leaf_file(["bob"], x=[[10**400] * 784]), "bob: x is not lists of 784 numbers"),
        (leaf_file(["bob"], y=[[1]]), "bob: y is not whole numbers"),
        ("[" * 100_000, "cannot be read as JSON"),
    ):
        (tmp_path / "train" / "a.json").write_text(content)
        refused(lambda: leaf.femnist(tmp_path), says)


# -------------------------------------------------------------------------------------------------- names and terminals


def test_names_of_images_and_classes_are_shown_as_text(tmp_path, caplog):
    root = write_classes(tmp_path / "mine", ("a", NASTY))
    caplog.set_level("INFO", "fedsparse")
    imagefolder(root, 4)
    assert SHOWN in caplog.text.replace("\\\\", "\\")
    assert "\x1b" not in caplog.text
    (root / NASTY / f"{NASTY}.png").write_bytes(b"no image")
    assert refused(lambda: imagefolder(root, 4), "cannot be read as an image").count(SHOWN) >= 2
    (root / NASTY / f"{NASTY}.png").unlink()
    (root / "train").mkdir()
    (root / "a").rename(root / "train" / "a")
    assert SHOWN in refused(lambda: imagefolder(root, 4), "with images beside train")
    (root / "test").mkdir()
    (root / NASTY).rename(root / "test" / NASTY)
    assert SHOWN in refused(lambda: imagefolder(root, 4), "test has the class")
    (root / "train" / NASTY).mkdir()
    assert SHOWN in refused(lambda: imagefolder(root, 4), "has no image in it")


def test_names_of_users_and_of_what_a_pickle_loads_are_shown_as_text(tmp_path):
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        (tmp_path / part / f"{NASTY}.json").write_text(leaf_file([NASTY], y=[99]))
    assert refused(lambda: leaf.femnist(tmp_path), "y is not whole numbers").count(SHOWN) == 2
    (tmp_path / "f").write_bytes(b"cos\n\x1b[31m\xe2\x80\xaesystem\n.")
    assert "os.\\x1b[31m\\u202esystem" in refused(lambda: pixels.read_batch(tmp_path / "f"), "wants to load")


@pytest.mark.parametrize("error", [ValueError(NASTY), OSError(2, "no", NASTY), KeyError(NASTY), RuntimeError(NASTY)])
def test_every_error_line_is_shown_as_text(error):
    assert one_line(error).isprintable()
    assert reason_of(error).isprintable()


def test_printable_keeps_what_people_write():
    for name in ("Gr\u00fc\u00dfe", "\u732b", "caf\u00e9 9", "a/b c.png", "\u0391-\U0001f408"):
        assert printable(name) == name
    assert printable("\x9b31m\x07\r\u2028\u2066\udcff") == "\\x9b31m\\x07\\r\\u2028\\u2066\\udcff"
