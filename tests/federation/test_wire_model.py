"""Masks and whole models as messages: read as they were written, bit by bit, and refused where damaged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fedsparse.core.space import ParamSpace
from fedsparse.federation.exchange.wire.message import (
    HEADER,
    PayloadError,
    bitmap_size,
    decode_mask,
    encode_mask,
    encode_tensors,
    known_size,
    length,
    read,
)
from fedsparse.federation.exchange.wire.model import read_model, write_model


@pytest.mark.parametrize("size", [1, 7, 8, 9, 1000])
def test_a_mask_is_one_bit_a_coordinate(size):
    mask = torch.rand(size, generator=torch.Generator().manual_seed(size)) < 0.3
    payload = encode_mask(mask)
    assert len(payload) == bitmap_size(size).total == HEADER.size + -(-size // 8)
    by_hand = [sum(1 << bit for bit, mark in enumerate(mask[at : at + 8].tolist()) if mark) for at in range(0, size, 8)]
    assert list(payload[HEADER.size :]) == by_hand
    assert torch.equal(decode_mask(payload, size), mask)


def test_no_damaged_mask_is_read():
    mask = torch.arange(50) % 3 == 0
    payload = encode_mask(mask)
    for at in range(len(payload)):
        for bit in (1, 128):
            with pytest.raises(PayloadError):
                decode_mask(payload[:at] + bytes([payload[at] ^ bit]) + payload[at + 1 :], 50)
    for other in (payload[:-1], payload + b"\0", b"", encode_tensors([torch.zeros(50)])):
        with pytest.raises(PayloadError):
            decode_mask(other, 50)
    with pytest.raises(PayloadError, match="size"):
        decode_mask(payload, 51)


class Tied(nn.Module):
    """Two names of one tensor, a float buffer, an integer buffer, and a frozen layer outside the space."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.second = nn.Linear(3, 4, bias=False)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(4, 2).requires_grad_(False)
        self.norm.running_mean.normal_()


def test_a_model_is_read_whole_and_a_tied_tensor_travels_once():
    one, two = Tied(0), Tied(1)
    space = ParamSpace.of(one)
    payload = write_model(one, space)
    floats = 12 + 4 + 4 * 4 + 8 + 2  # the shared weight once, its bias, four vectors of the norm, the frozen layer
    assert len(payload) == known_size(floats, 0, torch.float32).total
    read_model(payload, two, ParamSpace.of(two))
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    assert two.second.weight is two.first.weight
    with pytest.raises(PayloadError):
        read_model(payload, nn.Linear(3, 4), ParamSpace.of(nn.Linear(3, 4)))


def test_what_the_mask_implies_does_not_travel():
    one, two = Tied(0), Tied(1)
    space = ParamSpace.of(one)
    mask = torch.from_numpy(np.random.default_rng(0).random(space.size) < 0.4)
    space.write(one, space.read(one).masked_fill(~mask, 0.0))
    payload = write_model(one, space, mask)
    assert len(write_model(one, space)) - len(payload) == 4 * int((~mask).sum())
    read_model(payload, two, ParamSpace.of(two), mask)
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())


def test_tensors_travel_one_after_the_other():
    tensors = [torch.arange(6.0).view(2, 3), torch.tensor(7.0), torch.full((2,), 8.0)]
    payload = encode_tensors(tensors)
    assert len(payload) == length(*tensors)
    assert read(payload, 9).values.tolist() == [0, 1, 2, 3, 4, 5, 7, 8, 8]
