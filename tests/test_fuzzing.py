"""The fuzzing harness itself notices what it is for."""

from __future__ import annotations

import os
import signal

import pytest
from fuzzing import attempts, hammer


def test_ends_are_counted():
    def attempt(index):
        if index % 3 == 0:
            raise ValueError("no")
        return "read"

    assert hammer(attempt, 10) == {"refused": 4, "read": 6}


@pytest.mark.parametrize(
    ("attempt", "said"),
    [
        (lambda index: os.kill(os.getpid(), signal.SIGUSR1) or "", "attempt 0: SIGUSR1"),
        (lambda index: {}[index], "KeyError"),
        (lambda index: bytearray(2**30) and "", "MemoryError"),
        (lambda index: (_ for _ in ()).throw(ValueError("two\nlines")), "not one line"),
        (lambda index: (_ for _ in ()).throw(ValueError("")), "without a word"),
    ],
)
def test_what_must_not_happen_fails(attempt, said):
    with pytest.raises(pytest.fail.Exception, match=said):
        hammer(attempt, 1)


def test_a_hang_fails():
    with pytest.raises(pytest.fail.Exception, match="still at work"):
        hammer(lambda index: signal.pause() or "", 1, seconds=0.2)


def test_a_tenth_unless_all_are_asked_for(monkeypatch):
    monkeypatch.delenv("FEDSPARSE_FUZZ", raising=False)
    assert attempts(20_000) == 2_000
    monkeypatch.setenv("FEDSPARSE_FUZZ", "full")
    assert attempts(20_000) == 20_000
