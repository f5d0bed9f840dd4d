"""min_density: no tensor below its share, the total exactly k, and no better choice of that kind."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from fedsparse.core.space import ParamSpace
from fedsparse.masks import Sparsity, select

SPACE = ParamSpace(["a.weight", "b.weight", "b.bias", "head"], [torch.Size(s) for s in ([2, 3], [3, 1], [3], [2])])
OF = np.repeat([0, 1, 2, 3], SPACE.sizes)


def best(scores, k, floors):
    """Try every choice of k of the twelve counted coordinates: the largest sum among those that hold the floors."""
    choices = itertools.combinations(range(12), k)
    allowed = [c for c in choices if all(sum(OF[i] == t for i in c) >= f for t, f in enumerate(floors))]
    return max(math.fsum(scores[i] for i in c) for c in allowed)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize(("k", "least"), [(4, 0.1), (7, 0.34), (7, 0.5), (9, 0.6), (12, 0.9)])
@pytest.mark.parametrize("seed", range(4))
def test_the_best_of_all_choices_that_leave_every_tensor_its_share(seed, k, least, largest):
    scores = np.random.default_rng([seed, k]).permutation(14).astype(float)
    scores[:6] += 20 * (seed % 2)  # one tensor would take everything
    given = torch.from_numpy(scores if largest else -scores)
    if math.ceil(least * 6) + 2 * math.ceil(least * 3) > k:
        pytest.skip("asks for more than k")
    found = select(given, SPACE, Sparsity(1 - k / 12, min_density=least, always_train="head"), largest=largest).numpy()
    floors = [math.ceil(least * size) for size in (6, 3, 3)]
    assert found[12:].all()
    assert found[:12].sum() == k
    assert all(found[t == OF].sum() >= f for t, f in enumerate(floors))
    assert scores[:12][found[:12]].sum() == best(scores, k, floors)


def test_by_hand_who_gives_and_who_gets():
    """k = 5 of 12: alone the five largest, all in a.weight; b.weight and b.bias get their best, 9 and 5 give way."""
    scores = torch.tensor([9.0, 12, 11, 10, 5, 13, 0, 2, 1, 3, 0, 0, 8, 8])
    sparsity = Sparsity(7 / 12, always_train="head")
    assert select(scores, SPACE, sparsity, largest=True)[:12].nonzero().flatten().tolist() == [0, 1, 2, 3, 5]
    kept = select(scores, SPACE, Sparsity(7 / 12, min_density=0.1, always_train="head"), largest=True)
    assert kept[:12].nonzero().flatten().tolist() == [1, 2, 5, 7, 9]


def test_a_tensor_that_pays_is_not_itself_left_short():
    """b.weight's two best are kept without the guard; b.bias needs one, and a.weight, not b.weight, pays."""
    scores = torch.tensor([6.0, 7, 8, 0, 0, 0, 5, 5.5, 1, 2, 0, 0, 9, 9])
    kept = select(scores, SPACE, Sparsity(7 / 12, min_density=0.3, always_train="head"), largest=True)
    # floors 2, 1, 1; without them 0, 1, 2, 6, 7. b.bias gets index 9, and the lowest kept, 5 at index 6, goes
    assert kept[:12].nonzero().flatten().tolist() == [0, 1, 2, 7, 9]


def test_a_share_is_taken_as_typed():
    """ceil(0.1 * 30) is 3, and 1 - 0.9 is no less than 0.1, although binary numbers say otherwise."""
    space = ParamSpace(["v", "w"], [torch.Size([30]), torch.Size([30])])
    kept = select(torch.arange(60.0), space, Sparsity(0.9, min_density=0.1), largest=True)
    assert (int(kept[:30].sum()), int(kept[30:].sum())) == (3, 3)


def test_every_layer_keeps_a_unit():
    space = ParamSpace(["a.weight", "a.bias", "b.weight"], [torch.Size(s) for s in ([4, 2], [4], [3, 2])])
    scores = torch.tensor([9.0, 9, 8, 8, 7, 7, 6, 6, 9, 8, 7, 6, 1, 1, 3, 3, 2, 2])
    alone = select(scores, space, Sparsity(0.5, unit="output"), largest=True)
    assert alone.nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 8, 9, 10]  # three units of three, k = 9
    kept = select(scores, space, Sparsity(0.5, unit="output", min_density=0.01), largest=True)
    # b's best unit has 2 coordinates; of the other 7, two units of a fit
    assert kept.nonzero().flatten().tolist() == [0, 1, 2, 3, 8, 9, 14, 15]
    least = select(-scores, space, Sparsity(0.5, unit="output", min_density=0.01), largest=False)
    assert torch.equal(least, kept)


def test_units_that_tie_at_the_line_warn_only_if_they_competed():
    space = ParamSpace(["a", "b"], [torch.Size([3, 2]), torch.Size([2, 2])])
    scores = torch.tensor([5.0, 5, 4, 4, 3, 3, 0, 0, 0, 0])  # b's units tie, and its first is kept for b
    kept = select(scores, space, Sparsity(0.4, unit="output", min_density=0.1), largest=True)
    assert kept.nonzero().flatten().tolist() == [0, 1, 2, 3, 6, 7]


@pytest.mark.parametrize("unit", ["coordinate", "output"])
def test_shares_that_do_not_fit_together_are_refused_in_one_line(unit):
    space = ParamSpace([f"{i}.bias" for i in range(10)], [torch.Size([4])] * 10)
    sparsity = Sparsity(0.8, unit=unit, min_density=0.2)
    with pytest.raises(ValueError, match=r"^sparsity\.min_density=0\.2 keeps 10 coordinates, .* only 8 ") as caught:
        select(torch.arange(40.0), space, sparsity, largest=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"min_density": 0.3}, "is more than the density 1 - 0.8"),
        ({"min_density": -0.1}, r"it must be a finite number of 0 or more and below 1"),
        ({"min_density": "some"}, r"it must be a finite number of 0 or more and below 1"),
        ({"min_density": 0.1, "scope": "tensor"}, r"needs sparsity\.scope=global"),
        ({"min_density": 0.1, "scope": "shira", "rank": 1}, r"needs sparsity\.scope=global"),
    ],
)
def test_a_share_that_cannot_be_meant_is_refused(options, says):
    with pytest.raises(ValueError, match=rf"^sparsity\.min_density.*{says}"):
        Sparsity(0.8, **options)


def test_where_the_rest_is_zero_no_tensor_dies():
    """Two of eight are kept, both of them of the strong tensor; pruned, the weak one has its best one instead."""
    space = ParamSpace(["weak", "strong"], [torch.Size([4]), torch.Size([4])])
    scores = torch.tensor([0.1, 0.4, 0.3, 0.2, 9.0, 7.0, 8.0, 6.0])
    kept = [
        select(scores, space, Sparsity(0.75, mode=mode), largest=True).nonzero().flatten().tolist()
        for mode in ("freeze", "prune")
    ]
    assert kept == [[4, 6], [1, 4]]
