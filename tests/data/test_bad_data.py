"""Data that cannot be trained on gets one line that says what is wrong and what would be right."""

from __future__ import annotations

import re
import sys
import types

import numpy as np
import pytest
import torch
from image_files import write_folder
from test_bad_input import refused, write_arrays
from torch.utils.data import TensorDataset

from fedsparse import run
from fedsparse.data.datasets import Dataset, Split
from fedsparse.job import execute

LABELS = torch.arange(60) % 10


def split(y=LABELS, shape=(1, 8, 8), dtype=torch.float32):
    return Split(torch.ones(60, *shape, dtype=dtype), y)


def dataset(classes=10, **options):
    return Dataset(*(split(**options) for _ in range(3)), classes=classes, name="mine")


OWN = {
    "two_torch_datasets": (
        lambda: (TensorDataset(torch.zeros(60, 1, 8, 8), LABELS),) * 2,
        r"data\._target_=own_data\.made returns a tuple; it has to return .*Dataset\(train, val, .* or torch's data",
    ),
    "a_torch_dataset_without_labels": (
        lambda: TensorDataset(LABELS),
        r"sample 0 of the train set cannot be read as a pair \(x, y\) \(not enough values to unpack",
    ),
    "nothing": (lambda: None, "returns a NoneType; it has to return"),
    "splits_of_torch": (
        lambda: Dataset(*(TensorDataset(LABELS),) * 3, classes=10, name="mine"),
        "the train split of mine is a TensorDataset; it needs to be fedsparse.data.datasets.Split",
    ),
    "one_class": (lambda: dataset(1, y=LABELS * 0), "mine has 1 class; it needs 2 to 1000000"),
    "no_class": (lambda: dataset(0, y=LABELS * 0 - 1), "labels -1; with 0 classes"),
    "far_labels": (lambda: dataset(2**43, y=LABELS << 39), "8796093022208 classes; .* labels numbered from 0 on"),
    "float_labels": (lambda: dataset(y=LABELS.float()), r"y is torch.float32 \(60,\); .* labels, int64 \(N,\)"),
    "short_labels": (lambda: dataset(y=LABELS.int()), r"y is torch.int32 \(60,\)"),
    "one_hot_labels": (lambda: dataset(y=torch.eye(10)[LABELS].long()), r"y is torch.int64 \(60, 10\)"),
    "numpy": (lambda: dataset(y=LABELS.numpy()), r"y is int64 \(60,\); it needs to be a tensor of labels"),
    "listed_images": (
        lambda: Dataset(*(Split([1] * 60, LABELS),) * 3, 10, "mine"),
        "x is list; it needs to be a tensor",
    ),
    "flat_images": (lambda: dataset(shape=(64,)), r"x is torch.float32 \(60, 64\); it needs images \(N, C, H, W\)"),
    "whole_numbers": (
        lambda: dataset(dtype=torch.int64),
        r"x is torch.int64 .*images \(N, C, H, W\) of uint8 or floats",
    ),
    "no_pixels": (lambda: dataset(shape=(1, 0, 8)), r"x is torch.float32 \(60, 1, 0, 8\); it needs images"),
    "doubles": (lambda: dataset(dtype=torch.float64), "the data is torch.float64 and the model torch.float32"),
    "large_images": (
        lambda: dataset(shape=(1, 32, 32)),
        r"the model vit_digits does not take data of 1 x 32 x 32 \(Input height \(32\) doesn't match model \(8\)",
    ),
    "oblong_images": (lambda: dataset(shape=(1, 8, 4)), "vit_digits does not take data of 1 x 8 x 4"),
    "coloured_images": (lambda: dataset(shape=(3, 8, 8)), "vit_digits does not take data of 3 x 8 x 8"),
}


@pytest.fixture
def early(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(execute, "prepare", lambda *_: pytest.fail("it was prepared"))


@pytest.mark.parametrize("name", OWN)
def test_own_data_functions(early, monkeypatch, name):
    make, says = OWN[name]
    monkeypatch.setitem(sys.modules, "own_data", types.ModuleType("own_data"))
    sys.modules["own_data"].made = make
    line = refused("data._target_=own_data.made model=vit_digits")
    assert re.search(says, line), line


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("data=imagefolder", "data.root=null is no folder; set data.root to a folder with a folder of images a class"),
        ("data=imagefolder data.root=5", "data.root=5 is no folder"),
        ("data=arrays", "data.root=null is no folder; set data.root to a folder with train.npz"),
        ("data=femnist", "data.root=null has no folder train; run ./preprocess.sh"),
        ("data=shakespeare", "data.root=null has no folder train; run ./preprocess.sh"),
        ("data=cifar10 data.root=null", "data.root is null; give the folder that holds or gets the files"),
        ("data=mnist data.root=7", "data.root is 7; give the folder"),
    ],
)
def test_roots(early, options, says):
    assert says in refused(options)


def test_a_folder_of_images(early, tmp_path):
    write_folder(tmp_path / "two", {"a": 20, "b": 20})
    write_folder(tmp_path / "one", {"a": 20})
    assert "one has 1 class; it needs 2" in refused(f"data=imagefolder data.root={tmp_path}/one data.size=8")
    line = refused(f"data=imagefolder data.root={tmp_path}/two data.size=32 model=vit_digits")
    assert "vit_digits does not take data of 3 x 32 x 32" in line
    assert "choose data.size, other data or another model: model=conv takes any, model=timm resizes them" in line


@pytest.mark.parametrize(
    ("y", "says"),
    [
        (lambda y: y + 2**50, r"train.npz: y goes up to 1125899906842633; .* numbers of the classes, from 0 on"),
        (lambda y: y.astype(np.uint64) + np.uint64(2**63), "y goes up to 9223372036854775817"),
        (lambda y: y / 1.0, "y is float64"),
        (lambda y: y > 3, "y is bool"),
        (lambda y: y * 3, None),  # numbers without a sample are classes that nobody has
    ],
)
def test_labels_of_arrays(tmp_path, monkeypatch, y, says):
    monkeypatch.chdir(tmp_path)
    options = write_arrays(tmp_path / "data", y=y)
    if says is not None:
        assert re.search(says, refused(" ".join(options)))
    else:
        fast = ["model=mlp", "logger=csv", "federation.rounds=1", "calibration.head_steps=1", "pictures=false"]
        assert run([*fast, *options])["rounds"] == 1
