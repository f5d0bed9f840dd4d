"""Payloads: what is sent, and that the counted bytes are those of real messages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedsparse.federation.exchange.exchange import Exchange, Full
from fedsparse.federation.exchange.update import Update
from fedsparse.federation.exchange.wire.message import HEADER, PayloadError

P, K = 40, 3
TRAINED = torch.arange(P) % 4 == 0
LOCAL = torch.arange(P) >= 36
RULES = {"full": Full, "masked": Exchange}


def an_update(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(K, int(TRAINED.sum()), generator=g).to(dtype)
    return Update((4, 9, 2), rows, torch.randn(K, 2, generator=g).to(dtype), (1.0, 2.5, 3.0), (0.1, 0.2, 0.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(RULES))
def test_counted_bytes_are_those_of_the_messages_and_nothing_is_lost(name, dtype):
    exchange = RULES[name](trained=TRAINED, local=LOCAL)
    update = an_update(dtype)
    payload = exchange.encode(update)
    messages = exchange.messages(payload)
    assert [len(m) for m in messages] == [size.total for size in payload.sizes]
    back = exchange.decode(replace(payload, written=tuple(messages)))
    direct = exchange.decode(payload)
    assert torch.equal(back.rows, direct.rows)
    assert torch.equal(back.buffers, update.buffers)
    assert (back.weight, back.loss, back.clients) == (update.weight, update.loss, update.clients)


@pytest.mark.parametrize(("name", "sent"), [("full", ~LOCAL), ("masked", TRAINED & ~LOCAL)])
def test_exactly_these_coordinates_arrive(name, sent):
    exchange = RULES[name](trained=TRAINED, local=LOCAL)
    update = an_update()
    arrived = exchange.decode(exchange.encode(update)).rows
    assert torch.equal(arrived, torch.where(~LOCAL[TRAINED], update.rows, 0.0))
    assert exchange.encode(update).sizes[0].total == HEADER.size + 4 * (int(sent.sum()) + 2)


def test_a_masked_payload_is_a_fifth_of_a_dense_one():
    trained = torch.arange(1000) < 200
    none = torch.zeros(1000, dtype=torch.bool)
    update = Update((0,), torch.randn(1, 200), torch.zeros(1, 0), (1.0,), (0.0,))
    lengths = [rule(trained=trained, local=none).encode(update).sizes[0].total for rule in (Exchange, Full)]
    assert lengths[0] == HEADER.size + 800
    assert lengths[1] == HEADER.size + 4000


@pytest.mark.parametrize("damage", [lambda m: m[:10], lambda m: m[:-1], lambda m: b"XXXX" + m[4:], lambda m: m + b"\0"])
def test_a_damaged_message_is_refused(damage):
    exchange = Full(trained=TRAINED, local=LOCAL)
    payload = exchange.encode(an_update())
    messages = exchange.messages(payload)
    with pytest.raises(PayloadError):
        exchange.decode(replace(payload, written=(damage(messages[0]), *messages[1:])))
