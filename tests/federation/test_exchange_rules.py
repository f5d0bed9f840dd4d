"""Which coordinates each rule sends, worked out by hand on small vectors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedsparse.federation.exchange import Exchange, select
from fedsparse.federation.exchange.filters import SignFlip
from fedsparse.federation.exchange.fractions import check_fraction, fraction_of
from fedsparse.federation.exchange.scores import SCORES, at_least, kept
from fedsparse.federation.exchange.sparsifiers import Layers, Layout, Pattern, RandomK, Sender, Threshold, TopK
from fedsparse.federation.exchange.update import Update
from fedsparse.federation.exchange.wire.message import read

# theta:      3  -1   0    2   -4    0.5
# anchor:     1  -1   2   -2   -4.5  0
# change:     2   0  -2    4    0.5  0.5
# increase:   2   0  -2    0   -0.5  0.5    of magnitudes
THETA = torch.tensor([3.0, -1.0, 0.0, 2.0, -4.0, 0.5])
ANCHOR = torch.tensor([1.0, -1.0, 2.0, -2.0, -4.5, 0.0])
BY_HAND = {  # one, two, three of six, best first; of equal ones the lowest index
    "largest_final": [4, 0, 3],
    "smallest_final": [2, 5, 1],
    "largest_change": [3, 0, 2],
    "smallest_change": [1, 4, 5],
    "largest_increase": [0, 5, 1],  # 1 and 3 both grow by 0
    "smallest_increase": [2, 4, 1],
}
LAYOUT = Layout(("a.weight", "a.bias", "head.weight"), torch.tensor([0, 0, 0, 1, 2, 2]))
ONE = Sender(client=1, round=2)


def places(marks):
    return marks.nonzero().squeeze(-1).tolist()


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("rule", list(SCORES))
def test_six_rules_by_hand(rule, k):
    assert set(SCORES) == set(BY_HAND)
    assert places(select(rule, THETA, ANCHOR, k / 6)) == sorted(BY_HAND[rule][:k])
    assert places(TopK(rule, k / 6).mark(THETA, ANCHOR, LAYOUT, ONE)) == sorted(BY_HAND[rule][:k])


def test_each_row_chooses_its_own():
    rows = torch.stack([THETA, ANCHOR]), torch.stack([ANCHOR, ANCHOR])
    marks = select("largest_change", *rows, 0.5)
    assert [places(row) for row in marks] == [[0, 2, 3], [0, 1, 2]]  # the second did not change: ties


@pytest.mark.parametrize(("fraction", "n", "k"), [(0.1, 30, 3), (0.1, 4, 1), (0.25, 10, 3), (0.24, 10, 2), (1.0, 7, 7)])
def test_so_many_are_kept(fraction, n, k):
    """floor(fraction * n + 0.5), at least one."""
    assert kept(fraction, n) == k
    assert int(select("largest_change", torch.arange(float(n)), torch.zeros(n), fraction).sum()) == k


@pytest.mark.parametrize("rule", list(SCORES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exactly_k_against_sorting(rule, dtype):
    """Small whole numbers, so that nearly all tie."""
    g = torch.Generator().manual_seed(0)
    theta, anchor = torch.randint(-2, 3, (2, 200), generator=g).to(dtype)
    hand = {
        "final": [abs(t) for t in theta.tolist()],
        "change": [abs(t - a) for t, a in zip(theta.tolist(), anchor.tolist(), strict=True)],
        "increase": [abs(t) - abs(a) for t, a in zip(theta.tolist(), anchor.tolist(), strict=True)],
    }[rule.split("_")[1]]
    sign = -1 if rule.startswith("largest") else 1
    best = sorted(range(200), key=lambda i: (sign * hand[i], i))
    for k in (1, 17, 100, 199, 200):
        assert places(select(rule, theta, anchor, k / 200)) == sorted(best[:k])


def test_an_unknown_rule_and_fractions_out_of_range_are_refused_in_one_line():
    with pytest.raises(
        ValueError, match=r"exchange.by is 'biggest'; it must be largest_final, .* or smallest_increase"
    ) as error:
        select("biggest", THETA, ANCHOR, 0.5)
    assert "\n" not in str(error.value)
    for fraction in (0, -0.1, 1.01, math.nan):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            select("largest_change", THETA, ANCHOR, fraction)
    with pytest.raises(ValueError, match="exchange.scope is 'layer'; it must be global or tensor"):
        TopK(scope="layer")
    with pytest.raises(ValueError, match="exchange.compat is 'flower'; it must be null or original"):
        TopK(compat="flower")


@pytest.mark.parametrize(
    "wrong",
    [0, 1.5, True, None, "0.1", [], [0.1, 2.0], {}, {1: 0.5}, {0: 0.5, 3: 0.0}, {0: 0.5, -1: 0.1}, {0: 0.5, "3": 0.1}],
    ids=str,
)
def test_fractions_that_cannot_be_meant_are_refused(wrong):
    for make in (TopK, RandomK):
        with pytest.raises(ValueError, match="exchange.fraction") as error:
            make(fraction=wrong)
        assert "\n" not in str(error.value)


def test_a_fraction_of_each_client_and_from_a_round_on():
    each, later = [0.5, 1 / 6], {0: 0.5, 2: 1 / 6, 10: 1.0}
    assert [fraction_of(each, 7, client) for client in (0, 1)] == each
    assert [fraction_of(later, r, 0) for r in (0, 1, 2, 9, 10, 99)] == [0.5, 0.5, 1 / 6, 1 / 6, 1.0, 1.0]
    for fraction, sender in ((each, ONE), (later, ONE)):
        assert places(TopK("largest_change", fraction).mark(THETA, ANCHOR, LAYOUT, sender)) == [3]
        assert int(RandomK(fraction).mark(THETA, ANCHOR, LAYOUT, sender).sum()) == 1
    assert places(TopK("largest_change", each).mark(THETA, ANCHOR, LAYOUT, Sender(0, 0))) == [0, 2, 3]
    check_fraction(each, clients=2)
    with pytest.raises(ValueError, match="exchange.fraction lists 2 clients; there are 3"):
        check_fraction(each, clients=3)


def test_of_each_tensor_its_share():
    # changes 2, 0, -2 | 4 | 0.5, 0.5: half of 3 rounds to 2, of 1 is 1, of 2 is 1
    assert places(TopK("largest_change", 0.5, scope="tensor").mark(THETA, ANCHOR, LAYOUT, ONE)) == [0, 2, 3, 4]
    assert places(TopK("largest_change", 0.1, scope="tensor").mark(THETA, ANCHOR, LAYOUT, ONE)) == [0, 3, 4]


def test_a_client_that_may_not_send_anything_of_a_tensor_sends_the_share_of_the_others():
    index = torch.tensor([0, 2, 5])  # nothing of a.bias
    marks = TopK("largest_change", 0.1, scope="tensor").mark(THETA[index], ANCHOR[index], LAYOUT.at(index), ONE)
    assert places(marks) == [0, 2]


RULES = [TopK(), TopK(scope="tensor"), TopK(compat="original"), RandomK(), Threshold(), Layers()]


@pytest.mark.parametrize("rule", RULES, ids=range(len(RULES)))
def test_nothing_of_nothing(rule):
    assert not len(rule.mark(torch.zeros(0), torch.zeros(0), Layout(("a",), torch.zeros(0, dtype=torch.long)), ONE))


def test_as_the_original_does_all_ties_and_no_zeros():
    # magnitudes 3 1 0 2 4 0.5; ceil(0.4 * 6) = 3 -> 4, 0, 3
    assert places(TopK("largest_final", 0.4, compat="original").mark(THETA, ANCHOR, LAYOUT, ONE)) == [0, 3, 4]
    # ceil(0.3 * 6) = 2 of the changes 2 0 2 4 .5 .5: 3, and both that tie for the second; 2 is now 0 and is not sent
    assert places(at_least((THETA - ANCHOR).abs(), 0.3)) == [0, 2, 3]
    assert places(TopK("largest_change", 0.3, compat="original").mark(THETA, ANCHOR, LAYOUT, ONE)) == [0, 3]
    assert places(TopK("smallest_final", 0.1, compat="original").mark(THETA, ANCHOR, LAYOUT, ONE)) == []
    assert len(places(at_least(torch.arange(30.0), 0.1))) == 3  # not the ceil of 3.0000000000000004


def test_threshold_by_hand():
    def sent(by, threshold):
        return places(Threshold(threshold, by).mark(THETA, ANCHOR, LAYOUT, ONE))

    assert sent("largest_change", 2.0) == [0, 2, 3]  # at least
    assert sent("largest_change", 4.5) == []
    assert sent("smallest_change", 0.5) == [1, 4, 5]  # at most
    assert sent("largest_final", 3.0) == [0, 4]
    assert sent("smallest_final", 0.5) == [2, 5]
    assert sent("largest_increase", 0.0) == [0, 1, 3, 5]
    assert sent("smallest_increase", -0.5) == [2, 4]  # grew by -0.5 or less
    for wrong in (math.inf, math.nan, None, "0.1", True):
        with pytest.raises(ValueError, match="exchange.threshold"):
            Threshold(wrong)


# drift: a.weight sqrt(4 + 0 + 4) = 2.828 of 3, a.bias 4 of 1, head sqrt(0.25 + 0.25) = 0.707 of 2
@pytest.mark.parametrize(
    ("options", "sent"),
    [
        ({"percentage": 0.3}, [3]),  # ceil(0.9) = 1; drift per coordinate 0.943, 4, 0.354
        ({"percentage": 0.5}, [0, 1, 2, 3]),  # ceil(1.5) = 2
        ({"percentage": 0.5, "more": False}, [0, 1, 2, 4, 5]),
        ({"percentage": 1 / 3, "more": False, "normalise": False}, [4, 5]),
        ({"percentage": 1.0}, [0, 1, 2, 3, 4, 5]),
        ({"threshold": 0.5}, [0, 1, 2, 3]),
        ({"threshold": 0.5, "more": False}, [4, 5]),
        ({"threshold": 1.0}, [3]),
        ({"threshold": 1.0, "normalise": False}, [0, 1, 2, 3]),
        ({"threshold": 4.0, "normalise": False}, []),  # above, not at
        ({"threshold": 4.0, "normalise": False, "more": False}, [0, 1, 2, 3, 4, 5]),
    ],
    ids=str,
)
def test_whole_tensors_by_their_drift(options, sent):
    rule = Layers(**{"percentage": None, "threshold": None, **options})
    assert places(rule.mark(THETA, ANCHOR, LAYOUT, ONE)) == sent


def test_tensors_that_drift_alike_go_by_their_order_and_empty_ones_do_not_count():
    layout = Layout(("a", "empty", "b", "c"), torch.tensor([0, 2, 3]))
    change = torch.tensor([1.0, 1.0, 1.0])
    assert places(Layers(percentage=0.5).mark(change, torch.zeros(3), layout, ONE)) == [0, 1]  # ceil(0.5 * 3)


@pytest.mark.parametrize(
    "wrong", [{"threshold": 0.1}, {"percentage": None}, {"percentage": 0.0}, {"percentage": 1.1}], ids=str
)
def test_layers_wants_one_of_two(wrong):
    with pytest.raises(ValueError, match="exchange.percentage"):
        Layers(**wrong)
    with pytest.raises(ValueError, match="exchange.threshold is -1"):
        Layers(threshold=-1, percentage=None)


def test_patterns_name_tensors():
    assert places(Pattern(["head.*"]).mark(THETA, ANCHOR, LAYOUT, ONE)) == [4, 5]
    assert places(Pattern("*.bias").mark(THETA, ANCHOR, LAYOUT, ONE)) == [3]
    assert places(Pattern(["a.weight", "head.*"]).mark(THETA, ANCHOR, LAYOUT, ONE)) == [0, 1, 2, 4, 5]
    with pytest.raises(ValueError, match=r"matches no tensor that trains and travels: a.weight, a.bias, head.weight"):
        Pattern(["heda.*"]).check(LAYOUT.names)
    assert places(Pattern(["heda.*"]).mark(THETA, ANCHOR, LAYOUT, ONE)) == []  # a mask may leave a client none of them


def test_random_coordinates_depend_on_seed_round_and_client_alone():
    n, zeros = 500, torch.zeros(500)
    layout = Layout(("row",), torch.zeros(n, dtype=torch.long))

    def sent(values=zeros, seed=0, client=1, round=2):
        return RandomK(0.1, seed).mark(values, zeros, layout, Sender(client, round))

    assert int(sent().sum()) == 50
    assert torch.equal(sent(), sent(torch.randn(n)))
    others = [sent(seed=1), sent(client=2), sent(round=3)]
    assert all(not torch.equal(sent(), other) for other in others)
    assert [rule.shared for rule in (RandomK(), Pattern("a"), TopK(), Threshold(), Layers())] == [True] * 2 + [
        False
    ] * 3


def test_random_coordinates_are_all_as_likely():
    n, rounds = 20, 400
    layout = Layout(("row",), torch.zeros(n, dtype=torch.long))
    rule = RandomK(0.25)
    marks = [rule.mark(torch.zeros(n), torch.zeros(n), layout, Sender(c, r)) for r in range(rounds) for c in range(5)]
    often = torch.stack(marks).double().mean(0)
    assert float((often - 0.25).abs().max()) < 5 * math.sqrt(0.25 * 0.75 / (5 * rounds))


# --- what is ranked and sent is what the client holds, not its start plus its change, rounded once more


def trained(seed, n=60):
    """Float32 values that end near zero, far from where they began: start plus change is another value then."""
    g = torch.Generator().manual_seed(seed)
    start = torch.randint(-9, 10, (3, n), generator=g).float() / 10
    values = torch.randn(3, n, generator=g) / 1e3
    values[:, ::4] *= 1e3
    numbers = {"weight": (1.0,) * 3, "loss": (0.0,) * 3, "start": start, "values": values}
    return start, values, Update((0, 1, 2), values - start, torch.zeros(3, 0), **numbers)


def travelling(rule, n=60, **options):
    return Exchange(torch.ones(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool), rule=rule, **options)


@pytest.mark.parametrize("seed", range(30))
def test_compat_sends_what_fl4health_would_of_float32(seed):
    """Its exchanger keeps what scores at least the k-th largest |theta - start|, ties included, and sends theta."""
    start, values, update = trained(seed)
    assert not torch.equal(start + update.rows, values)
    travels = travelling(TopK(fraction=0.3, compat="original"), payload="value", compat="original")
    payload = travels.encode(update)
    for k, message in enumerate(travels.messages(payload)):
        said = read(message, 60)
        drift = (values[k] - start[k]).abs()
        least = drift.topk(math.ceil(0.3 * 60)).values[-1]
        wanted = (drift >= least) & (values[k] != 0)
        assert torch.equal(said.sent, wanted)
        assert torch.equal(said.values, torch.where(wanted, values[k], 0.0))


SCORE_OF = {
    "largest_final": lambda now, start: abs(now),
    "smallest_final": lambda now, start: -abs(now),
    "largest_change": lambda now, start: abs(now - start),
    "smallest_change": lambda now, start: -abs(now - start),
    "largest_increase": lambda now, start: abs(now) - abs(start),
    "smallest_increase": lambda now, start: abs(start) - abs(now),
}


@pytest.mark.parametrize("by", list(SCORE_OF))
@pytest.mark.parametrize("payload", ["change", "value"])
def test_every_score_is_of_the_clients_own_values(by, payload):
    for seed in range(20):
        start, values, update = trained(seed)
        found = travelling(TopK(by, 0.3), payload=payload)
        found = found.decode(found.encode(update))
        for k in range(3):
            scores = [np.float32(SCORE_OF[by](a, b)) for a, b in zip(values[k].numpy(), start[k].numpy(), strict=True)]
            first = sorted(range(60), key=lambda i, s=scores: (-s[i], i))[:18]
            assert sorted(first) == found.sent[k].nonzero().flatten().tolist()
        assert torch.equal(found.rows, torch.where(found.sent, update.rows, 0.0))


def test_values_that_are_sent_arrive_to_the_bit_as_the_change_that_they_are():
    for seed in range(20):
        _, _, update = trained(seed)
        travels = travelling(None, payload="value")
        assert torch.equal(travels.decode(travels.encode(update)).rows, update.rows)


def test_a_filter_that_changes_the_change_changes_what_is_ranked_and_sent():
    start, _, update = trained(0)
    flip = SignFlip(3, 2.0)
    for payload in ("change", "value"):
        travels = travelling(TopK("largest_final", 0.3), payload=payload, filters={"attack": flip})
        found = travels.decode(travels.encode(update))
        theta = start - 2.0 * update.rows
        for k in range(3):
            assert torch.equal(found.sent[k], select("largest_final", theta[k], start[k], 0.3))
        wanted = -2.0 * update.rows if payload == "change" else theta - start
        assert torch.equal(found.rows, torch.where(found.sent, wanted, 0.0))
