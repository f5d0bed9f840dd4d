"""FedAdam, FedYogi and FedAdagrad against the paper's box in plain Python, and against torch where it has them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from composed import composed
from hydra.utils import instantiate

from fedsparse.core.subspace import Subspace
from fedsparse.federation.server.aggregation import Change
from fedsparse.federation.server.server import Server
from fedsparse.job.keys import target_of
from fedsparse.optim.fedopt import AveragedMomentum, FedAdagrad, FedAdam, FedYogi

KINDS = [FedAdam, FedYogi, FedAdagrad]
NAMES = ["fedadam", "fedyogi", "fedadagrad"]
# mean changes of three rounds: growing, shrinking, turning, none at all, and so small that Yogi's v falls
CHANGES = [[1.0, 2.0, -0.5, 0.0, 1e-4], [3.0, -0.25, 0.5, 0.0, 2e-4], [-2.0, 0.125, 0.25, 0.0, -1e-4]]
START = [0.5, -1.0, 2.0, 3.0, 0.0]


def sign(value):
    return (value > 0) - (value < 0)


# the three lines of algorithm 2 that differ, as the paper writes them
RULES = {
    FedAdagrad: lambda v, d, b2: v + d * d,
    FedYogi: lambda v, d, b2: v - (1 - b2) * d * d * sign(v - d * d),
    FedAdam: lambda v, d, b2: b2 * v + (1 - b2) * d * d,
}


def paper(kind, x, changes, lr, betas, tau):
    """Algorithm 2 of Reddi et al. 2021 for one coordinate: x after each round."""
    m, v, path = 0.0, tau**2, []
    for d in changes:
        m = betas[0] * m + (1 - betas[0]) * d
        v = RULES[kind](v, d, betas[1])
        x = x + lr * m / (math.sqrt(v) + tau)
        path.append(x)
    return path


def corrected(kind, x, changes, lr, betas, tau, v, second):
    """The same with Adam's bias correction: of m always, of v if it is an average."""
    m, path = 0.0, []
    for t, d in enumerate(changes, start=1):
        m = betas[0] * m + (1 - betas[0]) * d
        v = RULES[kind](v, d, betas[1])
        root = math.sqrt(v / (1 - betas[1] ** t) if second else v)
        x = x + lr * (m / (1 - betas[0] ** t)) / (root + tau)
        path.append(x)
    return path


def walk(optimizer, param, changes=CHANGES):
    """Feed the negative changes as gradients; the parameter after each round, (rounds, coordinates)."""
    path = []
    for change in changes:
        param.grad = -torch.tensor(change, dtype=param.dtype)
        optimizer.step()
        path.append(param.tolist())
    return path


def start(dtype=torch.float64):
    return torch.tensor(START, dtype=dtype)


def columns(oracle, kind, *rest):
    """Coordinate by coordinate, then transposed to rounds."""
    series = zip(START, zip(*CHANGES, strict=True), strict=True)
    return [list(row) for row in zip(*(oracle(kind, x, changes, *rest) for x, changes in series), strict=True)]


def close(path, expected):
    for row, wanted in zip(path, expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.0, 0.5)])
@pytest.mark.parametrize("tau", [1e-3, 0.5])
def test_it_is_the_papers_box(kind, betas, tau):
    x = start()
    close(walk(kind([x], lr=0.1, betas=betas, tau=tau), x), columns(paper, kind, 0.1, betas, tau))


def test_two_rounds_of_each_by_hand():
    # lr 1, betas 1/2, tau 1, so v starts at 1; the change is 2, then 1. m: 1, then 1.
    # Adam: v = (1 + 4)/2 = 5/2, then (5/2 + 1)/2 = 7/4. Yogi: 1 + 4/2 = 3, then 3 - 1/2 = 5/2. Adagrad: 5, then 6.
    second = {FedAdam: (5 / 2, 7 / 4), FedYogi: (3.0, 5 / 2), FedAdagrad: (5.0, 6.0)}
    for kind, (first, then) in second.items():
        x = torch.zeros(1, dtype=torch.float64)
        path = walk(kind([x], lr=1.0, betas=(0.5, 0.5), tau=1.0), x, [[2.0], [1.0]])
        one = 1 / (math.sqrt(first) + 1)
        close(path, [[one], [one + 1 / (math.sqrt(then) + 1)]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("initial", [None, 0.25])
def test_bias_correction(kind, initial):
    x, betas, average = start(), (0.9, 0.99), kind is not FedAdagrad
    optimizer = kind([x], lr=0.1, betas=betas, tau=0.01, bias_correction=True, initial=initial)
    v = initial if initial is not None else 0.0 if average else 1e-4
    close(walk(optimizer, x), columns(corrected, kind, 0.1, betas, 0.01, v, average))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_corrected_fedadam_is_torchs_adam_bit_for_bit(dtype):
    ours, torchs = start(dtype), start(dtype)
    mine = FedAdam([ours], lr=0.01, betas=(0.9, 0.99), tau=1e-3, bias_correction=True)
    other = torch.optim.Adam([torchs], lr=0.01, betas=(0.9, 0.99), eps=1e-3, foreach=False)
    assert walk(mine, ours, CHANGES * 5) == walk(other, torchs, CHANGES * 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fedadagrad_without_momentum_is_torchs_adagrad_bit_for_bit(dtype):
    ours, torchs = start(dtype), start(dtype)
    mine = FedAdagrad([ours], lr=0.1, betas=(0.0, 0.0), tau=0.1)
    other = torch.optim.Adagrad([torchs], lr=0.1, initial_accumulator_value=0.1**2, eps=0.1, foreach=False)
    assert walk(mine, ours, CHANGES * 5) == walk(other, torchs, CHANGES * 5)


def test_yogi_forgets_a_large_change_more_slowly_than_adam():
    paths = {}
    for kind in (FedAdam, FedYogi):
        x = torch.zeros(1, dtype=torch.float64)
        optimizer = kind([x], lr=0.1)
        walk(optimizer, x, [[10.0], *[[0.01]] * 200])
        paths[kind] = optimizer.state[x]["exp_avg_sq"].item()
    assert paths[FedYogi] > 5 * paths[FedAdam]


@pytest.mark.parametrize("kind", KINDS)
def test_moments_have_the_parameters_shape_from_the_start(kind):
    x = torch.zeros(2, 3)
    state = kind([x], lr=0.1, tau=0.5).state[x]
    assert torch.equal(state["exp_avg"], torch.zeros(2, 3))
    assert torch.equal(state["exp_avg_sq"], torch.full((2, 3), 0.25))


def bits(node):
    if isinstance(node, torch.Tensor):
        return node.dtype, node.shape, node.numpy().tobytes()
    if isinstance(node, dict):
        return {key: bits(value) for key, value in node.items()}
    return [bits(value) for value in node] if isinstance(node, list | tuple) else node


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("correct", [False, True])
def test_a_step_without_gradients_changes_nothing(kind, correct):
    x = start()
    optimizer = kind([x], lr=0.1, bias_correction=correct)
    for rounds in (0, 2):
        walk(optimizer, x, CHANGES[:rounds])
        x.grad = None
        before, row = bits(copy.deepcopy(optimizer.state_dict())), x.clone()
        for _ in range(3):
            assert optimizer.step() is None
        assert bits(optimizer.state_dict()) == before
        assert torch.equal(x, row)


def test_a_parameter_without_gradient_does_not_age():
    late, early, alone = start(), start(), start()
    optimizer = FedAdam([{"params": [late]}, {"params": [early]}], lr=0.1, bias_correction=True)
    walk(optimizer, early)
    early.grad = None
    assert walk(optimizer, late) == walk(FedAdam([alone], lr=0.1, bias_correction=True), alone)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("correct", [False, True])
@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_state_goes_through_a_file_to_the_bit(tmp_path, kind, correct, rounds):
    x = start(torch.float32)
    optimizer = kind([x], lr=0.1, bias_correction=correct, tau=0.01)
    walk(optimizer, x, CHANGES[:rounds])
    torch.save({"row": x, "state": optimizer.state_dict()}, tmp_path / "state.pt")
    stored = torch.load(tmp_path / "state.pt", weights_only=True)
    y = stored["row"]
    other = kind([y], lr=7.0, betas=(0.1, 0.1))  # options come with the state, as in all of torch
    other.load_state_dict(stored["state"])
    assert bits(other.state_dict()) == bits(optimizer.state_dict())
    assert walk(other, y, CHANGES[rounds:]) == walk(optimizer, x, CHANGES[rounds:])


def test_groups_have_options_of_their_own():
    a, b, alone = start(), start(), start()
    optimizer = FedYogi([{"params": [a]}, {"params": [b], "lr": 0.5, "tau": 0.1}], lr=0.1)
    b.grad = -torch.tensor(CHANGES[0], dtype=b.dtype)
    walk(optimizer, a, CHANGES[:1])
    assert b.tolist() == walk(FedYogi([alone], lr=0.5, tau=0.1), alone, CHANGES[:1])[0]


def test_a_closure_is_called_with_gradients_on():
    x = torch.nn.Parameter(torch.ones(2))
    optimizer = FedAdagrad([x], lr=0.1)

    def closure():
        loss = x.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 2.0
    assert (x < 1).all()


@pytest.mark.parametrize(
    "wrong",
    [{"lr": 0}, {"lr": math.nan}, {"tau": 0.0}, {"tau": -1}, {"betas": (0.9, 1.0)}, {"betas": (-0.1, 0.9)}]
    + [{"betas": (0.9,)}, {"betas": 0.9}, {"bias_correction": "yes"}, {"initial": -1.0}, {"lr": True}],
    ids=str,
)  # fmt: skip
def test_options_outside_their_range_are_refused_in_one_line(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .*; it must be") as error:
        FedAdam([torch.zeros(1)], **{"lr": 0.1, **wrong})
    assert "\n" not in str(error.value)


def server_of(name, row, **options):
    """The server as the configuration makes it."""
    cfg = composed(f"server={name}", *(f"server.{key}={value}" for key, value in options.items()))
    make = instantiate(target_of("server", cfg.server))
    return Server(row, make, Subspace(torch.ones(row.shape[1], dtype=torch.bool)))


@pytest.mark.parametrize(("name", "kind"), list(zip(NAMES, KINDS, strict=True)))
def test_the_server_of_each_configuration_is_the_papers(name, kind):
    row = start().unsqueeze(0)
    server = server_of(name, row)
    betas = (0.0, 0.0) if kind is FedAdagrad else (0.9, 0.99)
    expected = columns(paper, kind, 0.01, betas, 1e-3)
    for change, wanted in zip(CHANGES, expected, strict=True):
        rows = torch.tensor([change], dtype=torch.float64)
        server.step(Change(rows, torch.zeros(1, 0), None, 0.0, (True,)))
        assert row[0].tolist() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_every_key_of_a_configuration_reaches_the_optimizer(name):
    options = {"lr": 0.3, "betas": [0.2, 0.4], "tau": 0.05, "bias_correction": True}
    group = server_of(name, torch.zeros(1, 2), **options).optimizer.param_groups[0]
    assert {key: group[key] for key in options} == {**options, "betas": (0.2, 0.4)}


def test_averaged_momentum_over_three_rounds_by_hand():
    # beta 0.9, changes 1, 2, -1: v = 0.1, then 0.09 + 0.2 = 0.29, then 0.261 - 0.1 = 0.161
    x = torch.zeros(1, dtype=torch.float64)
    path = walk(AveragedMomentum([x], lr=1.0), x, [[1.0], [2.0], [-1.0]])
    close(path, [[0.1], [0.39], [0.551]])
    y = torch.zeros(1, dtype=torch.float64)
    torchs = walk(torch.optim.SGD([y], lr=1.0, momentum=0.9, dampening=0.9), y, [[1.0], [2.0], [-1.0]])
    close(torchs, [[1.0], [2.1], [2.99]])  # torch does not dampen its first step: v = 1, 1.1, 0.89


@pytest.mark.parametrize("lr", [1.0, 0.5])
def test_the_server_of_averaged_momentum_is_autoflips(lr):
    row = start().unsqueeze(0)
    server, wanted, v = server_of("fedavgm_ema", row, lr=lr, beta=0.75), list(START), [0.0] * len(START)
    for change in CHANGES:
        server.step(Change(torch.tensor([change], dtype=torch.float64), torch.zeros(1, 0), None, 0.0, (True,)))
        v = [0.75 * old + 0.25 * -d for old, d in zip(v, change, strict=True)]  # G is the negative change
        wanted = [x - lr * step for x, step in zip(wanted, v, strict=True)]
        assert row[0].tolist() == pytest.approx(wanted, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_averaged_momentum_goes_through_a_file_to_the_bit(tmp_path, rounds):
    x = start(torch.float32)
    optimizer = AveragedMomentum([x], lr=0.5)
    walk(optimizer, x, CHANGES[:rounds])
    torch.save({"row": x, "state": optimizer.state_dict()}, tmp_path / "state.pt")
    stored = torch.load(tmp_path / "state.pt", weights_only=True)
    y = stored["row"]
    other = AveragedMomentum([y], lr=7.0, beta=0.1)
    other.load_state_dict(stored["state"])
    assert bits(other.state_dict()) == bits(optimizer.state_dict())
    assert walk(other, y, CHANGES[rounds:]) == walk(optimizer, x, CHANGES[rounds:])


def test_averaged_momentum_without_gradients_changes_nothing():
    x = start()
    optimizer = AveragedMomentum([x], lr=0.1)
    before = bits(copy.deepcopy(optimizer.state_dict()))
    optimizer.step()
    assert bits(optimizer.state_dict()) == before
    assert x.tolist() == START


@pytest.mark.parametrize("untouched", ["step", "hold", "freeze"])
def test_a_coordinate_that_nobody_sent_under_averaged_momentum(untouched):
    row = torch.zeros(1, 2, dtype=torch.float64)
    make = lambda params: AveragedMomentum(params, lr=1.0, beta=0.5)  # noqa: E731
    server = Server(row, make, Subspace(torch.ones(2, dtype=torch.bool)), untouched)
    for touched in ([True, True], [True, False], [True, True]):
        rows = torch.tensor([[1.0, 1.0 * touched[1]]], dtype=torch.float64)
        server.step(Change(rows, torch.zeros(1, 0), torch.tensor([touched]), 0.0, (True,)))
    # v: 0.5, 0.75, 0.875 where all is sent. Else 0.5, then 0.25 or, frozen, 0.5, then 0.625 or 0.75
    second = {"step": 0.5 + 0.25 + 0.625, "hold": 0.5 + 0.625, "freeze": 0.5 + 0.75}[untouched]
    assert row[0].tolist() == pytest.approx([0.5 + 0.75 + 0.875, second])


@pytest.mark.parametrize(
    "wrong", [{"lr": 0}, {"lr": math.inf}, {"beta": 1.0}, {"beta": -0.1}, {"beta": "0.9"}], ids=str
)
def test_averaged_momentum_refuses_in_one_line(wrong):
    with pytest.raises(ValueError, match=f"server.{next(iter(wrong))} is .*; it must be") as error:
        AveragedMomentum([torch.zeros(1)], **{"lr": 1.0, **wrong})
    assert "\n" not in str(error.value)
