"""Torch's data sets as splits, held against the pairs that they give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import IterableDataset, StackDataset, Subset, TensorDataset

from fedsparse.data import Split, from_torch
from fedsparse.data.torch_sets import sets_of
from fedsparse.job.assemble import load_dataset

DRAW = torch.Generator().manual_seed(0)
X, Y = torch.randn(100, 1, 4, 4, generator=DRAW), torch.arange(100) % 4
WHOLE = TensorDataset(X, Y)


class Listed(torch.utils.data.Dataset):
    def __init__(self, pairs):
        self.pairs = pairs

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        return self.pairs[index]


class Flipped(Listed):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return (x.flip(-1) if torch.rand(()) < 0.5 else x), y


class Endless(IterableDataset):
    def __iter__(self):
        yield from zip(X, Y, strict=True)


def sets(train=WHOLE):
    return train, TensorDataset(X[:8], Y[:8]), TensorDataset(X[8:20], Y[8:20])


def one_set():
    return WHOLE


def three_sets():
    return sets()


def named_sets():
    train, _, test = sets()
    return {"test": test, "train": train}


def loaded(function):
    return load_dataset(OmegaConf.create({"_target_": f"{__name__}.{function.__name__}"}))


def rows(split):
    """Every sample with its label, sorted: a set of samples, whatever their order."""
    return sorted([*image.flatten().tolist(), label] for image, label in zip(split.x, split.y.tolist(), strict=True))


def test_three_sets_are_the_three_splits():
    data = loaded(three_sets)
    pairs = ((X, Y), (X[:8], Y[:8]), (X[8:20], Y[8:20]))
    for split, (x, y) in zip((data.train, data.val, data.test), pairs, strict=True):
        assert torch.equal(split.x, x)
        assert torch.equal(split.y, y)
    assert (data.classes, data.name, data.train.y.dtype) == (4, "TensorDataset", torch.int64)


def test_what_is_missing_is_held_out_with_the_same_class_mix():
    data = loaded(one_set)
    assert [len(split.y) for split in (data.train, data.val, data.test)] == [72, 8, 20]  # 20 of 100, then 8 of 80
    assert [torch.bincount(split.y).tolist() for split in (data.val, data.test)] == [[2] * 4, [5] * 4]
    assert sorted(rows(data.train) + rows(data.val) + rows(data.test)) == rows(Split(X, Y))


def test_of_a_mapping_only_what_is_not_named_is_held_out():
    data = loaded(named_sets)
    assert torch.equal(data.test.x, X[8:20])
    assert [len(data.train.y), len(data.val.y)] == [90, 10]


def test_fractions_and_the_seed_of_the_split_are_arguments():
    first, again, other = (from_torch(WHOLE, val_fraction=0.2, test_fraction=0.5, split_seed=s) for s in (0, 0, 1))
    assert [len(split.y) for split in (first.train, first.val, first.test)] == [40, 10, 50]
    assert torch.equal(first.test.x, again.test.x)
    assert rows(first.test) != rows(other.test)


def test_a_picture_is_pixels_grey_or_in_colour():
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    clear = Image.fromarray(np.zeros((4, 4, 4), dtype=np.uint8))  # transparent black lies on white
    colour = Listed([(Image.fromarray(pixels), 0), (clear, 1)])
    data = from_torch(colour, colour, colour)
    assert torch.equal(data.train.x[0], torch.from_numpy(pixels).permute(2, 0, 1))
    assert data.train.x[1].unique().tolist() == [255]
    grey = Listed([(Image.fromarray(pixels[..., 0]), np.int64(0)), (Image.fromarray(pixels[..., 1]), np.int64(1))])
    assert torch.equal(from_torch(grey, grey, grey).train.x[:, 0], torch.from_numpy(pixels[..., :2]).permute(2, 0, 1))


def test_arrays_and_tokens_are_taken_as_they_are():
    arrays = Listed([(np.full((2, 3), i, dtype=np.float32), i) for i in range(2)])  # (H, W): one channel
    assert from_torch(arrays, arrays, arrays).train.x.tolist() == [[[[0.0] * 3] * 2], [[[1.0] * 3] * 2]]
    tokens = StackDataset(torch.arange(6).view(2, 3), torch.arange(2))
    data = from_torch(tokens, tokens, tokens)
    assert data.tokens
    assert data.train.x.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_random_transforms_draw_once_and_the_same_in_a_resume():
    state = torch.random.get_rng_state()
    flipped = Flipped(list(zip(X, Y, strict=True)))
    first = from_torch(flipped).train.x
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(1)
    assert torch.equal(from_torch(flipped).train.x, first)
    assert 0 < (first != from_torch(WHOLE).train.x).flatten(1).any(1).sum() < len(first)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (Endless(), "the train set is a Endless, without a length; it needs to be map-style"),
        (Subset(WHOLE, []), "the train set is empty; it needs at least one sample"),
        (Listed([(X[0], 0), (X[1, :, :3], 1)]), r"sample 1 of the train set is torch.float32 \(1, 3, 4\) and sample 0"),
        (
            Listed([(X[0], 0), (X[1].double(), 1)]),
            r"sample 1 .* is torch.float64 \(1, 4, 4\) and sample 0 torch.float32",
        ),
        (Listed([(X[0], 0.5)]), "sample 0 of the train set has the label 0.5; it needs to be the number of a class"),
        (Listed([(X[0], [0, 1])]), r"has the label \[0, 1\]; it needs to be the number of a class"),
        (Listed([("a.png", 0)]), r"sample 0 of the train set cannot be read as a pair \(x, y\) \("),
        (Listed([(X[0], 0), (X[0], -1)]), "has labels -1; with 1 classes"),
        (Listed([(X[0], i) for i in range(3)]), "test_fraction=0.2 of 3 samples: a class has only one"),
    ],
)
def test_what_cannot_be_read_is_one_line(data, says):
    held = () if "fraction" in says else (data, data)
    with pytest.raises(ValueError, match=says) as said:
        from_torch(data, *held)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("returned", [WHOLE.tensors, {"val": WHOLE}, {"train": WHOLE, "dev": WHOLE}, {}, None, [WHOLE]])
def test_what_is_no_such_sets_is_left_to_the_line_that_says_so(returned):
    assert sets_of(returned) is None
