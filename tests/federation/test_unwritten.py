"""What an exchange computes without a message is what the message would bring, bit for bit, and its bytes.

The oracle is the real writer and reader, and for the lengths of positions also the plain loops of ``plain_wire``.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from plain_wire import cheapest
from pretend import DEVICE, pretended
from torch import nn

from fedsparse.core.space import ParamSpace
from fedsparse.core.subspace import where_true
from fedsparse.federation.exchange.exchange import Exchange, Filter, Full
from fedsparse.federation.exchange.filters import RESIDUAL, ErrorFeedback, Quantize, SignFlip
from fedsparse.federation.exchange.sparsifiers import Layers, Pattern, RandomK, Threshold, TopK
from fedsparse.federation.exchange.update import Payload, Update
from fedsparse.federation.exchange.wire.message import split_size
from fedsparse.federation.exchange.wire.positions import positions_size
from fedsparse.federation.exchange.wire.values import as_read
from fedsparse.masks.topk import best, top_fraction

ORIGINAL = TopK("largest_final", 0.3, compat="original")
RULES = {
    "all": None,
    "topk": TopK(fraction=0.1),
    "topk of one": TopK(fraction=1e-9),
    "topk of most": TopK("smallest_final", 0.9),
    "topk of all": TopK(fraction=1.0),
    "topk of each tensor": TopK(fraction=0.2, scope="tensor"),
    "randomk": RandomK(0.3),
    "threshold": Threshold(0.5),
    "nothing": Threshold(1e9),
    "everything": Threshold(0.0),
    "layers": Layers(percentage=0.5),
    "layers by threshold": Layers(threshold=0.01, percentage=None),
    "pattern": Pattern("a"),
    "original": ORIGINAL,
}
FILTERS = {  # made for each exchange, as they keep things
    "none": {},
    "attack": {"attack": partial(SignFlip, 1, 3.0)},
    "half": {"precision": partial(Quantize, "float16")},
    "bfloat": {"precision": partial(Quantize, "bfloat16")},
    "steps": {"precision": partial(Quantize, "int8")},
    "carried": {"feedback": ErrorFeedback},
    "carried, half": {"feedback": partial(ErrorFeedback, 0.9), "precision": partial(Quantize, "float16")},
    "carried, steps": {"feedback": ErrorFeedback, "precision": partial(Quantize, "int8")},
}
MASKS = ("flat", "local", "own", "own and local", "full")
SIZES = (1, 2, 7, 255, 256, 257, 900)
K = 3


class Tensors(nn.Module):
    """Two tensors, of a third and the rest of so many numbers."""

    def __init__(self, size):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.zeros(part)) for part in (size // 3, size - size // 3))


def case(rule, filters, payload, mask, size, dtype, extra, seed, device="cpu"):
    """An exchange and what it is given, of values of every magnitude, zeros of both signs and ties."""
    g = torch.Generator().manual_seed(seed)
    space = ParamSpace.of(Tensors(size))
    owned = torch.rand(K, size, generator=g) < 0.6
    trained = owned.any(0) if "own" in mask else torch.rand(size, generator=g) < 0.8
    local = torch.rand(size, generator=g) < 0.2 if "local" in mask else torch.zeros(size, dtype=torch.bool)
    made = {name: make() for name, make in FILTERS[filters].items()}
    options = {"rule": RULES[rule], "payload": payload, "filters": made, "space": space}
    options |= {"compat": "original"} if rule == "original" and payload == "value" else {}
    if "own" in mask:
        there = owned.to(device)
        options["masks"] = lambda clients: torch.stack([there[client] for client in clients])
    n = int(trained.sum())
    values = torch.randn(K, n, generator=g) * 10.0 ** torch.randint(-9, 6, (K, n), generator=g)
    rows = torch.where(torch.rand(K, n, generator=g) < 0.1, -0.0, values.where(values.abs() > 1e-6, 0.5)).to(dtype)
    start = torch.randn(K, n, generator=g).to(dtype)
    update = Update(
        (0, 1, 2),
        rows.to(device),
        torch.randn(K, extra, generator=g).to(device),
        (1.0, 2.0, 3.0),
        (0.1, -0.2, 3.0),
        start=start.to(device) if seed % 3 else None,
        values=(start + rows).to(device) if seed % 3 == 1 else None,
        variates=rows.flip(0).to(device) if seed % 2 else None,
        steps=(1.0, 2.0, 3.0) if seed % 5 else (),
        round=seed,
    )
    return (Full if mask == "full" else Exchange)(trained.to(device), local.to(device), **options), update


def bits(tensor):
    """The bits of a tensor, in which 0.0 and -0.0 differ."""
    plain = torch.empty(0) if tensor is None else tensor.to("cpu").contiguous()
    return plain.view(torch.uint8).tolist() if plain.numel() else list(plain.shape)


def content(update):
    """All that a server takes in of an update."""
    tensors = {name: bits(getattr(update, name)) for name in ("rows", "buffers", "variates", "sent")}
    plain = {name: getattr(update, name) for name in ("weight", "loss", "refused")}
    return tensors | plain | {"steps": update.steps or (0.0,) * K}


def read_from_bytes(travels, payload):
    """The update as the real reader decodes the real messages, knowing nothing else of it."""
    written = tuple(travels.messages(payload))
    assert payload.sizes == tuple(split_size(message) for message in written)
    assert [size.total for size in payload.sizes] == [len(message) for message in written]
    sent = payload.update
    nothing = None if sent.variates is None else torch.full_like(sent.variates, torch.nan)
    unseen = replace(sent, rows=torch.full_like(sent.rows, torch.nan), variates=nothing, steps=(), loss=(0.0,) * K)
    return travels.decode(Payload(unseen, payload.sizes, written))


CASES = {
    "rule": st.sampled_from(list(RULES)),
    "filters": st.sampled_from(list(FILTERS)),
    "payload": st.sampled_from(["change", "value"]),
    "mask": st.sampled_from(MASKS),
    "size": st.sampled_from(SIZES),
    "dtype": st.sampled_from([torch.float32, torch.float64]),
    "extra": st.sampled_from([0, 3]),
    "seed": st.integers(0, 1000),
}


def check(device, rule, filters, payload, mask, size, dtype, extra, seed):
    rule = "all" if mask == "full" else rule
    payload, filters = ("value", filters.removeprefix("carried, ")) if rule == "original" else (payload, filters)
    filters = "none" if rule == "original" and filters == "carried" else filters
    case_of = (rule, filters, payload, mask, size, dtype, extra, seed)
    travels, update = case(*case_of, device=device)
    found = travels.encode(update)
    assert not found.written
    assert content(travels.decode(found)) == content(read_from_bytes(travels, found))
    return found, travels.decode(found), case_of


@settings(derandomize=True, deadline=None, max_examples=300)
@given(**CASES)
def test_what_arrives_is_what_the_message_would_bring(**options):
    check("cpu", **options)


@pytest.mark.slow
@settings(derandomize=True, deadline=None, max_examples=150)
@given(**CASES)
def test_a_device_chooses_rounds_and_counts_as_the_cpu_does(**options):
    with pretended():
        there, arrived, case_of = check(DEVICE, **options)
    travels, update = case(*case_of)
    here = travels.encode(update)
    assert there.sizes == here.sizes
    assert content(arrived) == content(travels.decode(here))
    for name, (clients, rows) in here.kept.items():
        assert there.kept[name][0] == clients
        assert bits(there.kept[name][1]) == bits(rows)


# --- bytes of positions, against plain loops


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.integers(1, 3000), st.sampled_from([0.0, 0.001, 0.02, 0.1, 0.2, 0.9, 1.0]), st.integers(0, 10**6))
@example(8, 0.0, 0)
def test_positions_take_the_bytes_of_plain_loops(n, density, seed):
    check_positions(torch.rand(n, generator=torch.Generator().manual_seed(seed)) < density)


HUGE = [(1 << bits) + more for bits in (7, 14, 21) for more in (-1, 0, 1)]


@pytest.mark.parametrize("gap", HUGE)
@pytest.mark.parametrize("first", [True, False])
def test_gaps_at_the_edges_of_their_widths(gap, first):
    """A gap before the first position, or between two, and one more place behind them or not."""
    for behind in (0, 1, 40):
        marks = torch.zeros(gap + 1 + (not first) + behind, dtype=torch.bool)
        marks[gap + (not first)] = True
        marks[0] = not first
        check_positions(marks)


def check_positions(marks):
    wanted = len(cheapest(marks.nonzero().flatten().tolist(), len(marks))[1])
    assert int(positions_size(marks)) == wanted
    with pretended() as counts:
        there = positions_size(marks.to(DEVICE))
        assert dict(counts.waits) == {"elsewhere": 1}  # the copy of the marks
        assert int(there) == wanted


def test_nothing_has_no_positions():
    check_positions(torch.zeros(0, dtype=torch.bool))


# --- choices


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.lists(st.sampled_from([-2.0, -0.0, 0.0, 0.5, 3.0, float("inf")]), min_size=1, max_size=30), st.data())
def test_a_device_marks_the_best_without_a_wait(scores, data):
    """Against a sort by hand: the best first, ties by their place."""
    k, largest = data.draw(st.integers(0, len(scores))), data.draw(st.booleans())
    order = sorted(range(len(scores)), key=lambda i: (-scores[i] if largest else scores[i], i))
    with pretended() as counts:
        there = torch.tensor(scores).to(DEVICE)
        counts.clear()
        marks = best(there, k, largest=largest)
        assert not counts.waits
        assert marks.nonzero().flatten().tolist() == sorted(order[:k])
        assert where_true(marks, k).tolist() == sorted(order[:k])


# --- values, against numpy


@pytest.mark.parametrize("count", [1, 255, 256, 700])
def test_8_bit_steps_are_those_of_numpy(count):
    """Blocks of 256: the largest magnitude over 127 is a step, of which a value is a whole number, half to even."""
    values = torch.randn(count, generator=torch.Generator().manual_seed(count)) * 3.0
    values[::7] = 0.0
    wanted = []
    for block in np.split(values.numpy(), range(256, count, 256)):
        scale = np.abs(block).max() / np.float32(127)
        wanted.append(np.rint(block / scale if scale else block).astype(np.int8) * scale)
    read, fits = as_read(values, None, torch.int8)
    assert bool(fits)
    assert read.numpy().tobytes() == np.concatenate(wanted).astype(np.float32).tobytes()


def test_buffers_travel_in_the_dtype_of_the_rows():
    travels, update = case("topk", "none", "change", "flat", 7, torch.float32, 0, 1)
    update = replace(update, buffers=torch.full((K, 2), 0.1, dtype=torch.float64))
    found = travels.encode(update)
    assert content(travels.decode(found)) == content(read_from_bytes(travels, found))
    assert travels.decode(found).buffers.tolist() == [[float(np.float32(0.1))] * 2] * K


# --- what clients know and keep


def test_own_masks_are_counted_anew_when_they_change():
    masks = {"now": torch.eye(4, dtype=torch.bool)[:2]}
    nothing, every = torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
    travels = Exchange(every, nothing, lambda clients: masks["now"][list(clients)])
    update = Update((0, 1), torch.ones(2, 4), torch.zeros(2, 0), (1.0, 1.0), (0.0, 0.0))
    assert [size.values for size in travels.encode(update).sizes] == [4, 4]
    masks["now"] = torch.tensor([[True] * 3 + [False], [True] * 4])
    travels.follow(every)
    assert [size.values for size in travels.encode(update).sizes] == [12, 16]


class Reversed(Filter):
    """Sends the opposite of what it is given."""

    def __call__(self, update, send, exchange):
        return send(replace(update, rows=-update.rows))


def test_a_residual_that_another_filter_makes_infinite_is_not_kept():
    """Wanted and arrived are finite, their difference is twice as large and is not."""
    nothing, every = torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
    filters = {"feedback": ErrorFeedback(), "other": Reversed()}
    travels = Exchange(every, nothing, rule=TopK(fraction=0.5), filters=filters)
    rows = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 3e38]])
    payload = travels.encode(Update((5, 6), rows, rows[:, :0], (1.0, 1.0), (0.0, 0.0)))
    assert not travels.decode(payload).refused
    assert payload.kept[RESIDUAL][0] == (5,)
    assert payload.kept[RESIDUAL][1].tolist() == [[1.0, 2.0, 6.0, 8.0]]


# --- what no message can hold


BEYOND = 1e300  # of float32
NOT_SENT = {"filters": "steps", "payload": "change", "mask": "flat", "size": 900, "extra": 0, "seed": 1}


@pytest.mark.parametrize("device", ["cpu", DEVICE])
def test_numbers_beyond_float32_are_refused_in_8_bits_if_they_are_sent(device):
    with pretended():
        travels, update = case(rule="topk", dtype=torch.float64, device=device, **NOT_SENT)
        update.rows[1, 5] = BEYOND
        with pytest.raises(ValueError, match="8-bit values cannot hold NaN, infinities or numbers beyond float32"):
            travels.encode(update)
        travels = Exchange(
            travels.sendable.subspace.mask,
            torch.zeros(900, dtype=torch.bool),
            rule=TopK("smallest_change", 0.1),
            filters={"precision": Quantize("int8")},
        )
        assert not travels.decode(travels.encode(update)).refused


@pytest.mark.parametrize("device", ["cpu", DEVICE])
@pytest.mark.parametrize("filters", ["attack", "half", "steps", "carried, steps"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_who_is_not_finite_is_refused_and_the_others_arrive(device, filters, number):
    with pretended():
        travels, update = case("topk", filters, "change", "flat", 900, torch.float32, 0, 1, device=device)
        update.rows[1, 7] = number
        found = travels.encode(update)
        arrived = travels.decode(found)
        assert set(arrived.refused) == {1}
        assert content(arrived) == content(read_from_bytes(travels, found)) | {"refused": arrived.refused}
        assert all(kept[0] == (0, 2) for kept in found.kept.values())


def test_a_rule_sees_numbers_alone():
    """A user's rule may refuse NaN, which a filter made: it is refused before anything is chosen."""

    class Strict:
        shared = False

        def mark(self, theta, start, layout, sender):
            return top_fraction((theta - start).abs(), 0.5)

    travels, update = case("topk", "attack", "change", "flat", 900, torch.float32, 0, 1)
    travels = Exchange(
        travels.sendable.subspace.mask,
        torch.zeros(900, dtype=torch.bool),
        rule=Strict(),
        filters={"attack": SignFlip(1, float("1e45"))},  # infinite in float32, and NaN times a change of 0
    )
    assert set(travels.decode(travels.encode(update)).refused) == {0}


@pytest.mark.parametrize(("rule", "filters"), [("topk", "none"), ("topk", "half"), ("all", "half")])
def test_a_loss_that_is_not_finite_is_refused(rule, filters):
    travels, update = case(rule, filters, "change", "flat", 7, torch.float32, 0, 1)
    found = travels.decode(travels.encode(replace(update, loss=(0.1, float("nan"), 0.2))))
    assert set(found.refused) == {1}


def test_a_value_beyond_the_dtype_is_refused():
    """Start and change are finite, their sum, which is sent, is not."""
    travels, update = case("topk", "none", "value", "flat", 7, torch.float32, 0, 1)
    update.rows[2, 3] = update.start[2, 3] = 3e38
    found = travels.encode(replace(update, values=None))
    assert set(travels.decode(found).refused) == {2}
    assert content(travels.decode(found)) == content(read_from_bytes(travels, found))


@pytest.mark.parametrize(("weight", "steps"), [(-1.0, 1.0), (1.0, float("inf"))])
def test_a_header_that_cannot_be_written_is_refused(weight, steps):
    travels, update = case("topk", "none", "change", "flat", 7, torch.float32, 0, 1)
    with pytest.raises(ValueError, match=r"^(weight|steps) is "):
        travels.encode(replace(update, weight=(1.0, weight, 1.0), steps=(1.0, steps, 1.0)))


def test_messages_are_read_where_there_are_any():
    """What is said in bytes counts, whatever the simulation computed."""
    travels, update = case("topk", "none", "change", "flat", 900, torch.float32, 0, 1)
    payload = travels.encode(update)
    zero = travels.messages(travels.encode(replace(update, rows=torch.zeros_like(update.rows), values=None)))
    assert payload.arrived.rows.any()
    assert not travels.decode(replace(payload, written=tuple(zero))).rows.any()


# --- what the host waits for


def kept_waits(filters, rule="topk", mask="flat", payload="change", rounds=3):
    """Waits by place of each of some rounds of encode, decode and keep; the exchange has seen these clients once."""
    with pretended() as counts:
        travels, update = case(rule, filters, payload, mask, 900, torch.float32, 3, 1, device=DEVICE)
        found = []
        for _ in range(1 + rounds):
            counts.clear()
            payload = travels.encode(update)
            travels.decode(payload, update.weight)
            for name, kept in payload.kept.items():
                travels.stores[name].write(*kept)
            found.append((Counter(counts.waits), sum(counts.launches.values())))
        assert all(row.device == DEVICE for store in travels.stores.values() for row in store.rows.values())
    return found[1:]


ONE = {"exchange.py:_chosen": 1}
WAITS = {
    "topk, carried": (("carried",), ONE),
    "topk, carried, steps": (("carried, steps",), ONE),
    "steps": (("steps", "all"), ONE),
    "halves of full": (("half", "all", "full"), ONE),
    "values": (("none", "all", "flat", "value"), ONE),
    "topk of each tensor": (("carried", "topk of each tensor"), ONE),
    "randomk": (("carried", "randomk"), ONE),
    "layers": (("none", "layers", "local"), ONE),
    "pattern": (("none", "pattern"), ONE),
    "all": (("none", "all"), {}),
    "all, carried": (("carried", "all"), {"update.py:finite_rows": 1}),
    "own masks": (("none", "all", "own"), {}),
    "own masks, topk, carried": (("carried", "topk", "own and local"), ONE),
}


@pytest.mark.parametrize("name", WAITS)
def test_the_host_waits_once_a_cohort_at_the_most(name):
    options, wanted = WAITS[name]
    for waits, _ in kept_waits(*options):
        assert waits == wanted


def test_a_residual_stays_on_its_device_and_goes_on_there():
    with pretended():
        travels, update = case("topk", "carried", "change", "flat", 900, torch.float32, 0, 1, device=DEVICE)
        payload = travels.encode(update)
        assert payload.kept[RESIDUAL][1].device == DEVICE
