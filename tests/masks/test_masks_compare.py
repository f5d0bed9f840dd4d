"""Overlaps of many masks against Python sets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedsparse.masks import Mask, overlaps

SHAPES = {"a.weight": (7, 5), "a.bias": (7,), "scalar": (), "none": (0,)}


def random_mask(seed, density):
    rng = np.random.default_rng([seed])
    return Mask({name: torch.from_numpy(np.asarray(rng.random(shape) < density)) for name, shape in SHAPES.items()})


def as_set(mask):
    return {(name, i) for name, tensor in mask.tensors.items() for i, on in enumerate(tensor.flatten().tolist()) if on}


@pytest.mark.parametrize("chunk", [4, 1 << 18])
def test_overlaps_equal_those_of_sets(chunk):
    masks = [random_mask(i, density) for i, density in enumerate((0.3, 0.5, 0.5, 1.0, 0.0, 0.0))]
    masks.append(Mask(dict(reversed(masks[0].tensors.items()))))
    sets = [as_set(mask) for mask in masks]
    expected = [[len(s & t) / len(s | t) if s | t else 1.0 for t in sets] for s in sets]
    found = overlaps(masks, chunk)
    assert found.dtype == torch.float64
    assert found.tolist() == expected
    assert [[m.overlap(other) for other in masks] for m in masks] == expected


def test_few_masks_and_masks_of_other_models():
    assert overlaps([]).shape == (0, 0)
    assert overlaps([random_mask(0, 0.5)]).tolist() == [[1.0]]
    with pytest.raises(ValueError, match="different models: missing b"):
        overlaps([random_mask(0, 0.5), Mask({**random_mask(1, 0.5).tensors, "b": torch.tensor([True])})])
