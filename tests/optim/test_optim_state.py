"""Momentum that is given, viewed and loaded, against numbers worked out by hand and torch's SGD."""

from __future__ import annotations

import copy

import pytest
import torch

from fedsparse.optim import sgdm
from fedsparse.optim.sgdm import SparseSGDM, sgdm_update

LARGE = sgdm._WORTH + 5  # one sweep, and a rest that does not fill a register


def test_without_momentum_a_buffer_is_neither_read_nor_written():
    for size in (7, LARGE):
        param, grad, buffer = torch.full((size,), 2.0), torch.full((size,), 4.0), torch.full((size,), 3.0)
        sgdm_update(param, grad, buffer, lr=0.25)
        assert (set(param.tolist()), set(grad.tolist()), set(buffer.tolist())) == ({1.0}, {4.0}, {3.0})


def test_a_momentum_of_1_adds_up_by_hand():
    """Buffer 3 + 4 = 7, step 0.25 * 7; then 7 + 4 = 11. The function leaves the range of momentum to the optimizer."""
    for size in (7, LARGE):
        param, grad, buffer = torch.zeros(size), torch.full((size,), 4.0), torch.full((size,), 3.0)
        for _ in range(2):
            sgdm_update(param, grad, buffer, lr=0.25, momentum=1.0)
        assert (set(param.tolist()), set(buffer.tolist())) == ({-(7 + 11) / 4}, {11.0})


def clients(values, **options):
    param = torch.nn.Parameter(torch.tensor(values))
    return param, SparseSGDM([param], lr=1.0, momentum=0.5, dampening=0.75, **options)


def step(param, optimizer, grad):
    param.grad = torch.tensor(grad)
    optimizer.step()


@pytest.mark.parametrize("again", [False, True])
def test_views_before_a_first_step_are_zeros_and_leave_it_a_first_step(again):
    """A first step has no dampening: it goes by the whole gradient. The next takes half of it and 0.25 of its own."""
    param, optimizer = clients([[0.0, 0.0], [0.0, 0.0]])
    if again:
        step(param, optimizer, [[9.0, 9.0], [9.0, 9.0]])
        param.data.zero_()
        optimizer.reset()
    assert [[view.tolist() for view in views] for views in optimizer.rows(2)] == [[[0.0, 0.0]], [[0.0, 0.0]]]
    step(param, optimizer, [[1.0, 2.0], [3.0, 4.0]])
    assert param.tolist() == [[-1.0, -2.0], [-3.0, -4.0]]
    assert [views[0].tolist() for views in optimizer.rows(2)] == [[1.0, 2.0], [3.0, 4.0]]
    step(param, optimizer, [[4.0, 4.0], [4.0, 4.0]])
    assert param.tolist() == [[-2.5, -4.0], [-5.5, -7.0]]  # 0.5 * 1 + 0.25 * 4 = 1.5, ...


def test_momentum_of_torch_is_viewed_as_it_was_loaded():
    """Torch's state knows nothing of a reset: what it holds goes on."""
    theirs = torch.nn.Parameter(torch.zeros(2, 2))
    torchs = torch.optim.SGD([theirs], lr=1.0, momentum=0.5, dampening=0.75)
    step(theirs, torchs, [[1.0, 2.0], [3.0, 4.0]])
    param, optimizer = clients([[0.0, 0.0], [0.0, 0.0]])
    optimizer.load_state_dict(copy.deepcopy(torchs.state_dict()))
    assert [views[0].tolist() for views in optimizer.rows(2)] == [[1.0, 2.0], [3.0, 4.0]]
    step(param, optimizer, [[4.0, 4.0], [4.0, 4.0]])
    step(theirs, torchs, [[4.0, 4.0], [4.0, 4.0]])
    assert param.tolist() == [[-1.5, -2.0], [-2.5, -3.0]]
    assert (theirs - param).unique().tolist() == [-4.0, -3.0, -2.0, -1.0]  # the step that only torch's took
