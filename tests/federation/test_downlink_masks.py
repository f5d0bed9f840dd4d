"""What the server sends when the mask changes: by hand, and against a plain record of when each coordinate changed."""

from __future__ import annotations

import random

import pytest
import torch

from fedsparse.core.subspace import Carry, Subspace
from fedsparse.federation.exchange.downlink import Downlink
from fedsparse.federation.exchange.wire.message import HEADER, Size, encode

P, H = 30, HEADER.size


def length(marks):
    """Length of the message with these coordinates of as many as there are, written."""
    return len(encode(torch.zeros(len(marks)), torch.tensor(marks)))


def marks_of(places, total=P):
    return [place in places for place in range(total)]


def close(downlink, round, training, places):
    """Close a round in which these coordinates of all moved."""
    before = torch.zeros(len(training))
    after = torch.tensor([float(place in places) for place in training])
    downlink.close(round, before, after)


def follow(downlink, before, after, round, zeros=False):
    """Let others train after a round."""
    masks = [Subspace(torch.tensor(marks_of(training))) for training in (before, after)]
    downlink.move(Carry(*masks, round + 1, zeros))


def size(downlink, client, training):
    return downlink.size(client, torch.zeros(len(training)), 0)


def test_what_stopped_is_still_sent_by_hand():
    """Coordinates 0 to 9 train, then 5 to 14, then 10 to 19: 3 stops first, 7 after it."""
    downlink, first, second, third = Downlink(), range(10), range(5, 15), range(10, 20)
    downlink.holds[1] = 0
    close(downlink, 0, first, {3, 7})
    downlink.holds[2] = 1
    follow(downlink, first, second, 0)
    # 7 has a place among what trains, 3 a second list: four bytes a value, one byte a gap, one header
    assert size(downlink, 1, second) == Size(H, 2, 8)
    assert size(downlink, 2, second) == Size(H, 0, 0)
    close(downlink, 1, second, {12})
    follow(downlink, second, third, 1)
    assert size(downlink, 1, third) == Size(H, 1 + 2, 4 + 8)  # 12; 3 and 7
    assert size(downlink, 2, third) == Size(H, 1, 4)  # 12 alone
    follow(downlink, third, first, 1)  # back: 3 and 7 train again, 12 stopped
    assert size(downlink, 1, first) == Size(H, 2 + 1, 8 + 4)
    assert size(downlink, 2, first) == Size(H, 1, 4)


def test_who_holds_the_first_model_alone_is_sent_what_trains_and_what_moved_before_it_stopped():
    """It calibrated, say, and takes part for the first time: what never moved is as it was there."""
    downlink, first, second = Downlink(), range(10), range(5, 15)
    close(downlink, 0, first, {3, 7})
    follow(downlink, first, second, 0)
    assert size(downlink, 1, second) == Size(H, 1, 4 * 10 + 4)  # all that trains, without positions; 3 as a list
    close(downlink, 1, second, {12})
    assert size(downlink, 1, second) == Size(H, 1, 4 * 10 + 4)


def test_what_was_pruned_is_sent_when_it_trains_again_by_hand():
    """It is zero: whoever holds the model from before must be told; while it is pruned the mask says so."""
    downlink, first, second = Downlink(), range(10), range(5, 15)
    for client in (1, 2):
        downlink.holds[client] = 0
    close(downlink, 0, first, {7})
    follow(downlink, first, second, 0, zeros=True)  # 0 to 4 become zero after round 0
    assert size(downlink, 1, second) == Size(H, 1, 4)  # 7
    downlink.holds[2] = 1
    close(downlink, 1, second, {})
    follow(downlink, second, first, 1, zeros=True)  # they train again; 10 to 14 become zero
    assert size(downlink, 1, first) == Size(H, 2, 4 * 6)  # 0 to 4, and 7: a bitmap of ten is shorter than six gaps
    assert size(downlink, 2, first) == Size(H, 0, 0)  # it was there when they had become zero


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_any_history_of_masks_equals_a_plain_record(seed, zeros):
    draw = random.Random(seed)
    downlink, training, last, holds = Downlink(), sorted(draw.sample(range(P), 20)), [-1] * P, {}
    for client in range(4):
        downlink.holds[client] = 0
        holds[client] = 0
    for round in range(12):
        if round and draw.random() < 0.5:
            others = sorted(draw.sample(range(P), draw.choice([6, 15, 20])))
            if zeros:
                for place in set(training) - set(others):
                    last[place] = round - 1
            follow(downlink, training, others, round - 1, zeros=zeros)
            training = others
        if draw.random() < 0.3:
            again = Downlink()
            again.load_state_dict(downlink.state_dict())
            downlink = again
        for client, since in holds.items():
            here = length([last[place] >= since for place in training])
            late = [last[place] >= since and place not in training for place in range(P)]
            more = length(late) - H if any(late) and not zeros else 0
            assert size(downlink, client, training).total == min(here, H + 4 * len(training)) + more
        moved = draw.sample(training, draw.choice([0, 1, 3, len(training) - 1, len(training)]))
        close(downlink, round, training, moved)
        for place in moved:
            last[place] = round
        for client in draw.sample(sorted(holds), 1):
            downlink.holds[client] = round
            holds[client] = round


def test_a_state_that_says_nothing_of_zeros_sends_what_stopped():
    """So do checkpoints from before masks could make zeros."""
    downlink, first, second = Downlink(), range(10), range(5, 15)
    downlink.holds[1] = 0
    close(downlink, 0, first, {3})
    follow(downlink, first, second, 0)
    state = downlink.state_dict()
    del state["zeros"]
    again = Downlink()
    again.load_state_dict(state)
    assert size(again, 1, second) == size(downlink, 1, second) == Size(H, 1, 4)
