"""Curvature against explicit Hessians in float64, scipy and finite differences; the traps of torch are pinned."""

from __future__ import annotations

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from sklearn.datasets import load_digits
from torch import nn
from torch.autograd.functional import hessian, jvp
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from fedsparse.core.space import ParamSpace
from fedsparse.data.datasets import Split
from fedsparse.landscape import MeanLoss, Task, frobenius, hutchpp, hvp, lanczos, sketch
from fedsparse.models.vision import vit_digits

DIAGONAL = torch.tensor([4.0, 3.0, 1.0], dtype=torch.float64)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def losses(forward, x, y):
    return cross_entropy(forward(x), y, reduction="none")


def quadratic(row):
    return 0.5 * (DIAGONAL * row**2).sum()


def by_diagonal(vectors):
    return vectors * DIAGONAL


def samples(count, features, seed=0, dtype=torch.float64):
    g = gen(seed)
    x = torch.randn(count, features, generator=g, dtype=dtype)
    return Split(x, (x[:, :3].argmax(1) + 3 * (x[:, 3] > 0.5)) % 10)


@pytest.fixture(scope="module")
def trained():
    """An MLP of 610 parameters, trained a little on digits: net, split, row, and the Hessian of a plain loss."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)).double()
    pixels, labels = load_digits(return_X_y=True)
    split = Split(torch.from_numpy(pixels[:300] / 6 - 0.8), torch.from_numpy(labels[:300]).long())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9)
    for _ in range(20):
        optimizer.zero_grad()
        cross_entropy(net(split.x), split.y).backward()
        optimizer.step()
    row = torch.cat([p.detach().flatten() for p in net.parameters()])
    assert len(row) == 610

    def loss(row):
        w1, b1, w2, b2 = row.split([512, 8, 80, 10])
        hidden = torch.tanh(split.x @ w1.view(8, 64).T + b1)
        return cross_entropy(hidden @ w2.view(10, 8).T + b2, split.y)

    return net, split, row, hessian(loss, row)


def largest(matrix, k):
    values = np.linalg.eigvalsh(matrix.numpy())
    return torch.from_numpy(values[np.argsort(-np.abs(values))[:k]].copy())


def test_a_quadratic_has_the_eigenvalues_trace_and_norms_of_its_diagonal():
    row, vectors = torch.randn(3, generator=gen(), dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(hvp(quadratic, row, vectors), torch.diag(DIAGONAL))
    values, bounds = lanczos(lambda v: hvp(quadratic, row, v.unsqueeze(0))[0], 3, 2, 40, gen())
    assert values.tolist() == pytest.approx([4.0, 3.0], abs=1e-12)
    assert bounds.max() < 1e-10
    assert frobenius(values) == pytest.approx(5.0)
    assert frobenius(lanczos(by_diagonal, 3, 3, 3, gen())[0]) == pytest.approx(math.sqrt(26))
    assert hutchpp(by_diagonal, 3, 30, gen()) == pytest.approx((8.0, 0.0))
    assert sketch(by_diagonal, 3, 9, gen()) == pytest.approx((8.0, 0.0, math.sqrt(26), 0.0))


def test_a_linear_loss_has_no_curvature_and_no_vectors_give_no_products():
    row = torch.ones(3)
    assert not hvp(lambda r: 2 * r.sum(), row, torch.eye(3)).any()
    assert hvp(lambda r: r[0] * 2, row, torch.eye(3)).shape == (3, 3)
    assert not hvp(lambda r: r[0] ** 2 + r[1], row, torch.eye(3)[1:]).any()
    assert hvp(lambda r: (r**2).sum(), row, torch.zeros(0, 3)).shape == (0, 3)
    other = torch.ones(3, requires_grad=True)  # another tensor that the gradient depends on
    assert not hvp(lambda r: (other * r).sum(), row, torch.eye(3)).any()
    assert not hvp(lambda r: (other**2).sum(), row, torch.eye(3)).any()


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize(("batch", "largest_batch"), [(64, 60), (7, 7), (1000, 300)])  # of 300 samples, even batches
def test_products_over_batches_are_the_explicit_hessians(trained, batch, largest_batch, retain):
    net, split, row, explicit = trained
    sizes = []

    def noted(x):
        sizes.append(len(x))
        return x

    task = Task(net, ParamSpace.of(net), losses, inputs=noted)
    vectors = torch.randn(4, 610, generator=gen(), dtype=torch.float64)
    products = MeanLoss(task, split, batch=batch).hessian(row, retain)
    for _ in range(2):
        torch.testing.assert_close(products(vectors), vectors @ explicit, rtol=1e-10, atol=1e-13)
    assert max(sizes) == largest_batch


@pytest.mark.parametrize("names", ["2.*", "*.bias", None])
def test_inside_and_outside_a_mask(trained, names):
    net, split, row, explicit = trained
    space = ParamSpace.of(net)
    mask = torch.rand(610, generator=gen(2)) < 0.3 if names is None else space.where(names)
    for marks in (mask, ~mask):
        loss = MeanLoss(Task(net, space, losses), split, marks)
        vectors = torch.randn(3, int(marks.sum()), generator=gen(), dtype=torch.float64)
        expected = vectors @ explicit[marks][:, marks]
        torch.testing.assert_close(loss.hessian(row)(vectors), expected, rtol=1e-10, atol=1e-13)
        gradient = loss.gradient(row)
        step = torch.zeros_like(row).masked_scatter(marks, vectors[0])
        slope = (loss(row + 1e-5 * step) - loss(row - 1e-5 * step)) / 2e-5
        assert float(gradient @ step) == pytest.approx(slope, rel=1e-6, abs=1e-9)
        assert not gradient[~marks].any()


def test_the_mean_loss_and_its_gradient_are_plain_autograds(trained):
    net, split, row, _ = trained
    net = copy.deepcopy(net)
    expected = cross_entropy(net(split.x), split.y)
    expected.backward()
    loss = MeanLoss(Task(net, ParamSpace.of(net), losses), split)
    assert loss(row) == pytest.approx(float(expected.detach()), rel=1e-12)
    torch.testing.assert_close(loss.gradient(row), torch.cat([p.grad.flatten() for p in net.parameters()]))
    other = 0.5 * row  # not where the network stands
    ParamSpace.of(net).write(net, other)
    assert loss(other) == pytest.approx(float(cross_entropy(net(split.x), split.y).detach()), rel=1e-12)


def test_lanczos_finds_the_explicit_hessians_eigenvalues_as_scipy_does(trained):
    explicit = trained[3]
    values, bounds = lanczos(lambda v: explicit @ v, 610, 5, 40, gen())
    torch.testing.assert_close(values, largest(explicit, 5), rtol=0, atol=1e-10)
    assert bounds.max() < 1e-8
    operator = LinearOperator((610, 610), matvec=lambda v: explicit.numpy() @ v, dtype=np.float64)
    scipys = eigsh(operator, k=5, which="LM", return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(values.numpy()), np.sort(scipys), atol=1e-10)


def test_twenty_eigenvalues_need_sixty_products_and_the_bounds_of_forty_say_so(trained):
    explicit = trained[3]
    expected, found = largest(explicit, 20), {s: lanczos(lambda v: explicit @ v, 610, 20, s, gen()) for s in (40, 60)}
    torch.testing.assert_close(found[60][0], expected, rtol=1e-10, atol=0)
    assert found[60][1].max() < 1e-7
    assert (found[40][0] / expected - 1).abs().max() > 0.005
    assert found[40][1].max() > 0.001 * float(expected[0])


@pytest.mark.parametrize("steps", [6, 12, 40])
def test_every_value_is_within_its_bound_of_an_eigenvalue(trained, steps):
    explicit = trained[3]
    every = torch.linalg.eigvalsh(explicit)
    products = []
    values, bounds = lanczos(lambda v: products.append(v) or explicit @ v, 610, 6, steps, gen(1))
    assert len(products) == steps + 6
    nearest = (values.unsqueeze(1) - every).abs().min(1).values
    assert (nearest <= bounds + 1e-12).all()
    assert values.abs().tolist() == sorted(values.abs().tolist(), reverse=True)
    if steps == 6:
        assert bounds.max() > 0.01 * float(values[0])  # too few steps: and the bound says so


def test_a_bound_holds_the_rounding_of_products():
    """A recurrence's own bound goes to 1e-16 in an operator that is wrong by 1e-3."""
    matrix = torch.diag(torch.linspace(10, 1, 30, dtype=torch.float64))
    noise = 1e-3 * torch.randn(30, 30, generator=gen(4), dtype=torch.float64)
    values, bounds = lanczos(lambda v: (matrix + noise) @ v, 30, 3, 30, gen())
    assert (bounds > 1e-3).all()
    assert ((values - torch.tensor([10.0, 9.7, 9.4])).abs() < 0.3).all()
    exact, tight = lanczos(lambda v: matrix @ v, 30, 3, 30, gen())
    assert tight.max() < 1e-12
    assert exact[0] == pytest.approx(10)


@pytest.mark.parametrize(
    "diagonal",
    [[2.0] * 6, [5.0, 5.0, 5.0, 1.0, 1.0, 0.0], [0.0] * 6, [-7.0, 3.0, 0.0, 0.0, 0.0, 0.0]],
    ids=["identity", "multiple", "zero", "indefinite"],
)
def test_a_krylov_space_that_ends_early_is_gone_on_from(diagonal):
    diagonal = torch.tensor(diagonal, dtype=torch.float64)
    values, bounds = lanczos(lambda v: diagonal * v, 6, 4, 6, gen())
    expected = diagonal[diagonal.abs().argsort(descending=True)[:4]]
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-12)
    assert bounds.max() < 1e-12


def test_products_in_float32_give_the_values_to_float32(trained):
    net, split, row, explicit = trained
    net, split = copy.deepcopy(net).float(), Split(split.x.float(), split.y)
    products = MeanLoss(Task(net, ParamSpace.of(net), losses), split).hessian(row.float())
    values, bounds = lanczos(lambda v: products(v.unsqueeze(0))[0], 610, 5, 40, gen())
    torch.testing.assert_close(values, largest(explicit, 5), rtol=1e-5, atol=0)
    assert 1e-9 < bounds.max() < 1e-5


def test_what_lanczos_refuses():
    for k, steps, line in (
        (4, 10, "curvature.k is 4; it must be a whole number from 1 to 3"),
        (0, 10, "curvature.k is 0; it must be a whole number from 1 to 3"),
        (3, 2, "curvature.steps is 2; it must be a whole number of 3 or more"),
    ):
        with pytest.raises(ValueError, match=line):
            lanczos(by_diagonal, 3, k, steps, gen())
    with pytest.raises(ValueError, match="not finite: the model has diverged"):
        lanczos(lambda v: v * torch.tensor([1.0, math.nan, 1.0]), 3, 1, 2, gen())
    with pytest.raises(ValueError, match="curvature.products is 5; it must be a whole number of 6 or more"):
        hutchpp(by_diagonal, 3, 5, gen())


def hutchinson(matrix, products, seed):
    signs = torch.randint(2, (products, len(matrix)), generator=gen(seed)).double() * 2 - 1
    return float((signs @ matrix * signs).sum(1).mean())


def test_hutchpp_is_nearer_the_trace_than_hutchinson_and_its_error_is_honest(trained):
    explicit = trained[3]
    trace, norm = float(explicit.trace()), float(explicit.norm())
    found = [sketch(lambda v: v @ explicit, 610, 60, gen(seed)) for seed in range(200)]
    assert hutchpp(lambda v: v @ explicit, 610, 60, gen(3)) == (found[3].trace, found[3].trace_error)
    plus = np.array([f.trace for f in found]) / trace - 1
    plain = np.array([hutchinson(explicit, 60, seed) for seed in range(200)]) / trace - 1
    assert np.sqrt((plus**2).mean()) < 0.5 * np.sqrt((plain**2).mean())
    assert abs(plus.mean()) < 4 * plus.std() / math.sqrt(200)
    stated = np.sqrt(np.mean([f.trace_error**2 for f in found])) / trace
    assert stated == pytest.approx(np.sqrt((plus**2).mean()), rel=0.25)
    norms = np.array([f.frobenius for f in found])
    assert norms.mean() == pytest.approx(norm, rel=0.01)
    stated = np.sqrt(np.mean([f.frobenius_error**2 for f in found]))
    assert stated == pytest.approx(norms.std(), rel=0.4)


def test_a_sketch_makes_no_more_products_than_it_may(trained):
    counted = []
    for products in (6, 30, 31, 32):
        counted.clear()
        sketch(lambda v: counted.append(len(v)) or v @ trained[3], 610, products, gen())
        assert sum(counted) == products


def layernorm_loss():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 10)).double()
    space, split = ParamSpace.of(net), samples(20, 4)

    def loss(row):
        return cross_entropy(functional_call(net, space.unflatten(row), (split.x,)), split.y)

    return loss, space.read(net)


def by_differences(loss, row, vector, step=1e-5):
    ends = [(row + s * vector).requires_grad_() for s in (step, -step)]
    gradients = [torch.autograd.grad(loss(end), end)[0] for end in ends]
    return (gradients[0] - gradients[1]) / (2 * step)


def test_products_through_layernorm_are_right_where_grad_of_jvp_is_not():
    loss, row = layernorm_loss()
    vector = torch.randn(len(row), generator=gen(), dtype=torch.float64)
    expected = by_differences(loss, row, vector)
    (found,) = hvp(loss, row, vector.unsqueeze(0))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch.jit, which torch.func imports
        wrong = torch.func.grad(lambda r: torch.func.jvp(loss, (r,), (vector,))[1])(row)
    assert (wrong - expected).norm() > 0.01 * expected.norm()  # should this fail, torch has mended it
    _, right = jvp(lambda r: torch.autograd.grad(loss(r), r, create_graph=True)[0], row, vector, create_graph=True)
    torch.testing.assert_close(right, expected, rtol=1e-6, atol=1e-8)


def test_products_through_attention_are_right_where_fused_attention_has_none():
    net = vit_digits(10).double()
    for block in net.blocks:
        block.attn.fused_attn = True  # as timm has it, and BERT
    space, g = ParamSpace.of(net), gen(1)
    split = Split(torch.randn(6, 1, 8, 8, generator=g, dtype=torch.float64), torch.randint(10, (6,), generator=g))
    task, row = Task(net, space, losses), space.read(net)
    vector = torch.randn(space.size, generator=gen(), dtype=torch.float64)
    vector /= vector.norm()

    def loss(row):
        return cross_entropy(functional_call(task.net, space.unflatten(row), (split.x,)), split.y)

    (found,) = MeanLoss(task, split).hessian(row)(vector.unsqueeze(0))
    expected = by_differences(loss, row, vector, 1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7 * float(expected.abs().max()) + 1e-8)
    leaf = row.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="derivative for .*attention.* is not implemented"):
        torch.autograd.grad(torch.autograd.grad(loss(leaf), leaf, create_graph=True)[0] @ vector, leaf)


def test_batchnorm_is_constant_in_a_derivative_with_the_statistics_of_the_row():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 10)).double()
    space, split, training = ParamSpace.of(net), samples(20, 4), samples(60, 4, seed=5)
    task, row = Task(net, space, losses, training=training), 2 * space.read(net)
    mean_loss = MeanLoss(task, split)
    products, gradient = mean_loss.hessian(row), mean_loss.gradient(row)
    mean_loss(0.1 * row)  # which moves the statistics of the copy
    plain = copy.deepcopy(net).train()
    space.write(plain, row)
    plain[1].momentum = None
    plain[1].reset_running_stats()
    plain(training.x)
    plain.eval()

    def loss(row):
        return cross_entropy(functional_call(plain, space.unflatten(row), (split.x,)), split.y)

    explicit, leaf = hessian(loss, row), row.clone().requires_grad_()
    torch.testing.assert_close(products(torch.eye(space.size, dtype=torch.float64)), explicit)
    torch.testing.assert_close(gradient, torch.autograd.grad(loss(leaf), leaf)[0])
    assert mean_loss(row) == pytest.approx(float(loss(row).detach()), rel=1e-12)


def test_nothing_to_differentiate_is_refused(trained):
    net, split, *_ = trained
    task = Task(net, ParamSpace.of(net), losses)
    with pytest.raises(ValueError, match="no coordinate lies inside the mask"):
        MeanLoss(task, split, torch.zeros(610, dtype=torch.bool))
    with pytest.raises(ValueError, match="at least one sample"):
        MeanLoss(task, Split(split.x[:0], split.y[:0]))
    with pytest.raises(ValueError, match="batch is 0; it must be a whole number of 1 or more"):
        MeanLoss(task, split, batch=0)


def test_curvature_leaves_the_network_and_the_random_state_alone(trained):
    net, split, row, _ = trained
    net = copy.deepcopy(net).train()
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    loss = MeanLoss(Task(net, ParamSpace.of(net), losses), split)
    loss(2 * row)
    loss.gradient(2 * row)
    loss.hessian(2 * row)(torch.ones(2, 610, dtype=torch.float64))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert torch.equal(random, torch.get_rng_state())
