"""Every client its own mask, against a plain loop that averages coordinate by coordinate over those who hold it."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from plain import replay
from safetensors.torch import load_file
from small import Small, small_data, small_net, uneven_parts
from torch.nn import functional as F

from fedsparse.federation.exchange.exchange import Exchange
from fedsparse.federation.exchange.update import Update
from fedsparse.federation.exchange.wire.message import HEADER
from fedsparse.masks.bitmaps import pack, unpack


def own_rows(clients, size, keep=40, seed=3):
    """A random mask of ``keep`` coordinates for each client; the last tenth of the row belongs to nobody."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.zeros(clients, size, dtype=torch.bool)
    for row in rows:
        row[torch.randperm(int(size * 0.9), generator=g)[:keep]] = True
    return rows


def plain_rounds(small, rows, rounds, lr):
    """FedAvg written down for own masks: each coordinate is averaged over the clients whose mask holds it."""
    net, x, y = copy.deepcopy(small.net), small.dataset.train.x, small.dataset.train.y
    dealt, sampled = replay(small.plan, rounds), [small.plan.sample(r) for r in range(rounds)]
    for clients, ids in zip(dealt, sampled, strict=True):
        start = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
        sums, weights = torch.zeros_like(start), torch.zeros_like(start)
        for (batches, weight), client in zip(clients, ids, strict=True):
            local = copy.deepcopy(net)
            for batch in batches:
                grads = torch.autograd.grad(F.cross_entropy(local(x[batch]), y[batch]), list(local.parameters()))
                flat = torch.cat([g.flatten() for g in grads])
                row = torch.nn.utils.parameters_to_vector(local.parameters()).detach()
                torch.nn.utils.vector_to_parameters(torch.where(rows[client], row - lr * flat, row), local.parameters())
            change = torch.nn.utils.parameters_to_vector(local.parameters()).detach() - start
            sums += weight * torch.where(rows[client], change, 0.0)
            weights += weight * rows[client]
        new = torch.where(weights > 0, start + sums / weights.clamp(min=1e-300), start)
        torch.nn.utils.vector_to_parameters(new, net.parameters())
    return torch.nn.utils.parameters_to_vector(net.parameters()).detach()


@pytest.mark.parametrize("cohort", [1, 3])
def test_each_coordinate_is_averaged_over_those_who_hold_it(tmp_path, cohort):
    small = Small(small_net(), small_data(), uneven_parts(), cohort=cohort, momentum=0.0)
    rows = own_rows(len(small.parts), small.space.size)
    expected = plain_rounds(small, rows, 3, small.lr)
    union = rows.any(0)
    small.module.set_mask(union, torch.stack([pack(row) for row in rows]))
    small.given["exchange"] = Exchange(union, small.space.local, small.module.own_masks)
    start = small.row
    got = small.fit(3, tmp_path).row
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
    assert torch.equal(got[~union], start[~union])
    assert not torch.equal(got[union], start[union])


def test_bytes_are_those_of_each_clients_own_mask_by_hand(tmp_path):
    small = Small(small_net(), small_data(), uneven_parts(), momentum=0.0)
    rows = own_rows(len(small.parts), small.space.size)
    union = rows.any(0)
    small.module.set_mask(union, torch.stack([pack(row) for row in rows]))
    small.given["exchange"] = Exchange(union, small.space.local, small.module.own_masks)
    small.fit(2, tmp_path)
    assert small.federation.ledger.bytes_up == 2 * small.count * (HEADER.size + 8 * 40)
    again = set(small.plan.sample(0)) & set(small.plan.sample(1))  # the others got the model, of no bytes here
    moved = rows[list(small.plan.sample(0))].any(0)[union]
    whole, positions = 8 * len(moved), min(math.ceil(len(moved) / 8), int(moved.sum()))
    assert 0 < int(moved.sum()) < len(moved)
    one = HEADER.size + min(whole, 8 * int(moved.sum()) + positions)
    assert small.federation.ledger.bytes_down == len(again) * one > 0


def test_bitmaps_round_trip():
    rows = own_rows(5, 77, keep=20)
    assert torch.equal(unpack(torch.stack([pack(row) for row in rows]), 77), rows)


def test_what_a_message_carries_is_what_arrives():
    rows = own_rows(2, 50, keep=9)
    exchange = Exchange(rows.any(0), torch.zeros(50, dtype=torch.bool), lambda clients: rows[list(clients)])
    held = rows.any(0)
    update = Update((0, 1), torch.randn(2, int(held.sum())), torch.zeros(2, 0), (1.0, 2.0), (0.1, 0.2))
    payload = exchange.encode(update)
    lengths = [size.total for size in payload.sizes]
    assert [len(m) for m in exchange.messages(payload)] == lengths == [HEADER.size + 4 * 9] * 2
    back = exchange.decode(payload)
    assert torch.equal(back.rows, torch.where(rows[:, held], update.rows, 0.0))
    assert torch.equal(back.sent, rows[:, held])


def test_masks_of_different_sizes_travel_at_their_own_lengths():
    rows = own_rows(2, 50, keep=9)
    rows[0, 49] = True
    exchange = Exchange(rows.any(0), torch.zeros(50, dtype=torch.bool), lambda clients: rows[list(clients)])
    update = Update((0, 1), torch.randn(2, int(rows.any(0).sum())), torch.zeros(2, 0), (1.0, 2.0), (0.1, 0.2))
    assert [size.values for size in exchange.encode(update).sizes] == [4 * 10, 4 * 9]


OWN = ["mask.owner=client", "mask_rule=most_sensitive", "sparsity=s90", "federation.num_clients=6"]
TWICE = ["mask_rule=most_sensitive", "calibration.rounds=2", "federation.num_clients=6"]


def test_a_run_with_own_masks_from_the_command_line(run_in):
    summary, folder = run_in("own", *OWN)
    bitmaps = load_file(folder / "client_masks.safetensors")["bitmaps"]
    assert bitmaps.shape[0] == 6
    assert 0 < summary["mask_overlap_clients"] < 1
    assert summary["bytes_up"] < summary["bytes_down"] < summary["bytes_dense"]  # down goes what anybody moved
    assert json.loads((folder / "summary.json").read_text())["dropped_updates"] == 0


def test_own_masks_survive_a_resume(run_in):
    whole, _ = run_in("whole", *OWN, "federation.rounds=4")
    _, folder = run_in("part", *OWN, "federation.rounds=2")
    from fedsparse import run

    more = run([f"resume={folder}", "federation.rounds=4"])
    assert more["global_sha256"] == whole["global_sha256"]
    assert more["bytes_total"] == whole["bytes_total"]
    assert more["mask_overlap_clients"] == whole["mask_overlap_clients"]


def test_the_overlap_of_calibration_rounds_survives_a_resume(run_in):
    whole, _ = run_in("whole", *TWICE, "federation.rounds=2")
    _, folder = run_in("part", *TWICE, "federation.rounds=1")
    from fedsparse import run

    more = run([f"resume={folder}", "federation.rounds=2"])
    assert more["mask_overlap_rounds"] == whole["mask_overlap_rounds"]
    assert len(whole["mask_overlap_rounds"]) == 1
    assert 0 < whole["mask_overlap_rounds"][0] < 1


def test_own_masks_go_with_the_masked_exchange_alone(run_in, monkeypatch):
    monkeypatch.setattr("fedsparse.job.execute.prepare", lambda *_: pytest.fail("calibrated before it was refused"))
    with pytest.raises(ValueError, match=r"exchange=masked"):
        run_in("full", *OWN, "exchange=full")
    with pytest.raises(ValueError, match=r"mask.owner is 'everyone'"):
        run_in("odd", "mask.owner=everyone")
