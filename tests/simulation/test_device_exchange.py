"""What a client costs a GPU's host whose update does not travel whole, counted on the pretended device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pretend import DEVICE, pretended
from small import Small, small_data, small_net, uneven_parts
from test_device_counts import counted
from test_own_masks import own_rows

from fedsparse.bench.gpu.cases import masked, small, topk
from fedsparse.federation.exchange.exchange import Exchange
from fedsparse.federation.exchange.filters import ErrorFeedback, Quantize
from fedsparse.federation.exchange.sparsifiers import RandomK, TopK
from fedsparse.federation.exchange.update import Update
from fedsparse.masks.bitmaps import pack

TRAINING = {"transfer.py:read": 1}


def steps(trained, space):
    """Send all that trains in 8 bits."""
    return Exchange(trained, space.local, filters={"precision": Quantize("int8")})


def carried_steps(trained, space):
    """Send the largest tenth in 8 bits, and carry the rest over."""
    filters = {"feedback": ErrorFeedback(), "precision": Quantize("int8")}
    return Exchange(trained, space.local, rule=TopK(fraction=0.1), filters=filters)


def drawn(trained, space):
    """Send a tenth that both sides draw."""
    return Exchange(trained, space.local, rule=RandomK(0.1))


LAUNCHES = {"topk": (topk, 53), "topk in 8 bits": (carried_steps, 79), "8 bits": (steps, 35), "drawn": (drawn, 20)}


@pytest.mark.parametrize("cohort", [1, 2])
@pytest.mark.parametrize("name", LAUNCHES)
def test_a_cohort_costs_two_waits_where_something_is_chosen_or_rounded(name, cohort):
    """One of training, one of the exchange; and so many launches a client more than where all of it travels."""
    case, (exchange, launches) = replace(small("mlp", 6, 2), density=0.5, cohort=cohort), LAUNCHES[name]
    found, whole = (counted(replace(case, exchange=make)) for make in (exchange, masked))
    assert found
    for (waits, launched), (_, plain) in zip(found, whole, strict=True):
        assert waits == TRAINING | {"exchange.py:_chosen": 1}
        assert sum(launched.values()) - sum(plain.values()) <= launches * cohort


def test_own_masks_are_counted_once_a_client():
    with pretended() as counts:
        given = Small(small_net(torch.float32), small_data(dtype=torch.float32), uneven_parts())
        owned = own_rows(len(given.parts), given.space.size)
        given.module.set_mask(owned.any(0), torch.stack([pack(row) for row in owned]).to(DEVICE))
        exchange = Exchange(owned.any(0).to(DEVICE), given.space.local, given.module.own_masks)
        rows, found = torch.zeros(2, int(owned.any(0).sum()), device=DEVICE), []
        update = Update((0, 1), rows, rows[:, :0], (1.0, 1.0), (0.0, 0.0))
        for _ in range(3):
            counts.clear()
            exchange.encode(update)
            found.append(dict(counts.waits))
    assert found == [{"exchange.py:_counts": 1}, {}, {}]
