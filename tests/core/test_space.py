"""Which coordinates a row has: names and shapes, and where a tensor lies in it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedsparse.core.space import ParamSpace


def space(**shapes):
    return ParamSpace(list(shapes), [torch.Size(shape) for shape in shapes.values()])


def test_spaces_are_equal_when_names_and_shapes_agree():
    one = space(a=[2, 3], b=[4])
    assert one == space(a=[2, 3], b=[4])
    assert hash(one) == hash(space(a=[2, 3], b=[4]))
    for other in (space(a=[3, 2], b=[4]), space(a=[2, 3], c=[4]), space(b=[4], a=[2, 3]), space(a=[2, 3]), "a", None):
        assert one != other


def test_a_row_is_split_by_names_in_their_order():
    parts = space(a=[2, 2], b=[], c=[3]).unflatten(torch.arange(8.0))
    assert {name: part.tolist() for name, part in parts.items()} == {
        "a": [[0.0, 1.0], [2.0, 3.0]],
        "b": 4.0,
        "c": [5.0, 6.0, 7.0],
    }
    with pytest.raises(ValueError, match="a row of this space has 8 coordinates, not 7"):
        space(a=[2, 2], b=[], c=[3]).unflatten(torch.arange(7.0))


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        (2, "its parameters: 0.weight, 0.bias, 1.weight, 1.bias$"),
        (3, "its parameters: 0.weight, 0.bias, 1.weight, 1.bias, 2.weight, 2.bias$"),
        (4, "its parameters: 0.weight, 0.bias, 1.weight, 1.bias, 2.weight, 2.bias and 2 more$"),
    ],
)
def test_a_pattern_that_matches_nothing_is_told_six_names(layers, said):
    net = nn.Sequential(*[nn.Linear(2, 2) for _ in range(layers)])
    with pytest.raises(ValueError, match=said):
        ParamSpace.of(net, trainable=lambda name: name.startswith("heads"))
