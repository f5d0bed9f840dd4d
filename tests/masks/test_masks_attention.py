"""Heads as units of a mask, against plain loops."""

from __future__ import annotations

import pytest
import torch

from fedsparse.core.space import ParamSpace
from fedsparse.masks import Sparsity
from fedsparse.masks.attention import mean_by_head, whole_heads
from fedsparse.masks.select import select_heads
from fedsparse.models.attention import attentions
from fedsparse.models.vision import vit_digits


@pytest.fixture
def net():
    return vit_digits()


def drawn(space):
    return torch.rand(space.size, generator=torch.Generator().manual_seed(3))


def rows_of(head):
    """Rows of a head in the 192 rows of qkv: 4 heads of 16, queries first."""
    return [64 * part + 16 * head + i for part in range(3) for i in range(16)]


def test_layers_are_found(net):
    found = attentions(net)
    assert [a.name for a in found] == [f"blocks.{i}.attn" for i in range(4)]
    assert [r for _, rows in found[0].rows(2) for r in range(192)[rows]] == rows_of(2)


def test_scores_of_a_head_are_its_mean(net):
    space = ParamSpace.of(net)
    scores = drawn(space)
    pooled, given = (space.unflatten(row) for row in (mean_by_head(scores, space, attentions(net)), scores))
    for name, part in pooled.items():
        if ".qkv." not in name:
            assert torch.equal(part, given[name].double())
    for block in range(4):
        weight, bias = (f"blocks.{block}.attn.qkv.{leaf}" for leaf in ("weight", "bias"))
        for head in range(4):
            mean = torch.cat([given[weight][rows_of(head)].flatten(), given[bias][rows_of(head)]]).double().mean()
            torch.testing.assert_close(pooled[weight][rows_of(head)], mean.expand(48, 64))
            torch.testing.assert_close(pooled[bias][rows_of(head)], mean.expand(48))


def test_a_choice_by_units_then_takes_whole_heads(net):
    space, found = ParamSpace.of(net), attentions(net)
    sparsity = Sparsity(0.5, unit="output", always_train="head.*")
    mask = select_heads(drawn(space), space, sparsity, found, largest=True)
    counted = sum(t.numel() for n, t in space.unflatten(mask).items() if not n.startswith("head."))
    kept = int(mask.sum()) - 650
    assert counted / 2 - 48 * 65 - 257 < kept <= counted / 2 + 0.5  # at most one head, and one unit, fewer
    pooled, parts = space.unflatten(mean_by_head(drawn(space), space, found)), space.unflatten(mask)
    means = {}
    for block in range(4):
        weight, bias = (parts[f"blocks.{block}.attn.qkv.{leaf}"] for leaf in ("weight", "bias"))
        for head in range(4):
            rows = rows_of(head)
            assert weight[rows].all() or not weight[rows].any()
            assert bool((bias[rows] == weight[rows[0], 0]).all())
            means[block, head] = (float(pooled[f"blocks.{block}.attn.qkv.bias"][rows[0]]), bool(weight[rows].all()))
    taken = sorted(means.values(), reverse=True)
    assert [trains for _, trains in taken] == sorted((trains for _, trains in taken), reverse=True)  # best first
    assert {trains for _, trains in taken} == {True, False}


def test_tensors_outside_the_space_do_not_count(net):
    space = ParamSpace.of(net, lambda name: name.endswith("qkv.bias"))
    mask = torch.ones(space.size, dtype=torch.bool)
    mask[5] = False  # a query of head 0 in block 0
    whole = space.unflatten(whole_heads(mask, space, attentions(net)))
    assert (~whole["blocks.0.attn.qkv.bias"]).nonzero().flatten().tolist() == rows_of(0)
    assert all(whole[f"blocks.{i}.attn.qkv.bias"].all() for i in (1, 2, 3))


def test_what_always_trains_is_no_part_of_a_head(net):
    space, found = ParamSpace.of(net), attentions(net)
    sparsity = Sparsity(0.9, unit="output", always_train=["head.*", "*.qkv.bias"])
    parts = space.unflatten(select_heads(drawn(space), space, sparsity, found, largest=True))
    for i in range(4):
        assert parts[f"blocks.{i}.attn.qkv.bias"].all()
        weight = parts[f"blocks.{i}.attn.qkv.weight"]
        assert all(weight[rows_of(head)].all() or not weight[rows_of(head)].any() for head in range(4))
