"""The cubic schedule and the rounds at which a mask is chosen anew, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from omegaconf import OmegaConf

from fedsparse.masks import Gradual, Sparsity


def test_the_cubic_schedule_by_hand():
    """From 0.2 to 0.8 in three changes, two rounds apart, from round 1: 0.8 - 0.6 * (1, 8/27, 1/27, 0)."""
    gradual = Gradual(initial=0.2, begin=1, every=2, steps=3)
    expected = [0.2] * 3 + [0.8 - 0.6 * 8 / 27] * 2 + [0.8 - 0.6 / 27] * 2 + [0.8] * 4
    assert [gradual.ratio(t, 0.8) for t in range(11)] == pytest.approx(expected)
    assert [t for t in range(20) if gradual.changes(t)] == [3, 5, 7]


@pytest.mark.parametrize("initial", [0.0, 0.1, 0.3, 0.7, 0.9])
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_both_ends_are_exact_and_it_never_falls(initial, steps):
    gradual = Gradual(initial, begin=2, every=3, steps=steps)
    ratios = [gradual.ratio(t, 0.9) for t in range(3 * steps + 6)]
    assert ratios[:3] == [initial] * 3
    assert ratios[3 * steps + 2 :] == [0.9] * 4
    assert ratios == sorted(ratios)
    changed = [t for t in range(1, len(ratios)) if ratios[t] != ratios[t - 1]]
    assert changed == ([t for t in range(1, len(ratios)) if gradual.changes(t)] if initial < 0.9 else [])


def test_a_sparsity_knows_its_rounds():
    sparsity = Sparsity(0.8, always_train="head.*", schedule=Gradual(begin=1, every=2, steps=2), renew_every=4)
    assert sparsity.at(0) == replace(sparsity, ratio=0.0, schedule=None)
    assert sparsity.at(3).ratio == pytest.approx(0.7)
    assert sparsity.at(99) == replace(sparsity, schedule=None)
    assert [t for t in range(13) if sparsity.renews(t)] == [3, 4, 5, 8, 12]
    plain = Sparsity(0.8)
    assert plain.at(7) is plain
    assert not any(plain.renews(t) for t in range(9))


def test_a_schedule_is_typed_as_a_node():
    node = OmegaConf.create({"begin": 2, "steps": 4})
    assert Sparsity(0.8, schedule=node) == Sparsity(0.8, schedule=Gradual(begin=2, steps=4))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"initial": 1.0}, r"initial is 1.0; it must be a finite number of 0 or more and below 1"),
        ({"initial": True}, "initial is True; it must be a finite number"),
        ({"begin": -1}, "begin is -1; it must be a whole number of 0 or more"),
        ({"every": 0}, "every is 0; it must be a whole number of 1 or more"),
        ({"every": 1.5}, "every is 1.5; it must be a whole number"),
        ({"steps": True}, "steps is True; it must be a whole number"),
        ({"initial": 0.9}, r"initial=0.9 is more than sparsity\.ratio=0.8"),
        ({"cubic": 3}, " is .*; it must be null or a node of initial, begin, every, steps"),
    ],
)
def test_bad_schedules_are_refused_by_name(options, says):
    with pytest.raises(ValueError, match=rf"^sparsity\.schedule\.?{says}") as caught:
        Sparsity(0.8, schedule=options)
    assert "\n" not in str(caught.value)


def test_shira_and_words_have_no_schedule():
    with pytest.raises(ValueError, match=r"sparsity\.scope=shira does not read"):
        Sparsity(scope="shira", rank=2, schedule=Gradual())
    with pytest.raises(ValueError, match=r"^sparsity\.schedule is .*; it must be null or a node"):
        Sparsity(schedule="cubic")
    with pytest.raises(ValueError, match=r"^sparsity\.renew_every is 0; it must be a whole number of 1 or more"):
        Sparsity(renew_every=0)


def test_a_share_for_every_tensor_goes_with_a_schedule():
    """The ratio on its way is never above the final one, in no last bit either."""
    sparsity = Sparsity(0.9, min_density=0.1, schedule=Gradual(initial=0.9, steps=7))
    assert {sparsity.at(t).ratio for t in range(9)} == {0.9}
